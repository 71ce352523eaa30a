"""Serve a model over HTTP: videos are watched once and remembered, questions of all users are answered together.

--engine vllm hands the model to vLLM's own server instead.

It speaks as OpenAI's API does: POST /v1/chat/completions, with parts of the types text, image_url, video_url and
memory; POST and GET /v1/memories; /v1/models, /health and /metrics.
"""

import argparse
import importlib.util
import os
import shlex
import sys
import tempfile
from pathlib import Path
from typing import Any

from ..loading import find_model, natural, output_folder, port_number, positive, refuse
from . import watching
from .parser import parse_bytes

HELP = "serve a model over HTTP"
LOOPBACK = ("127.0.0.1", "::1", "localhost")
# options that vLLM's server has no place for, and their defaults
OWN: dict[str, Any] = {
    "memories": None, "api_key_file": None, "adapter": None, "device": "auto", "allow_urls": False,
    "allow_private_urls": False, "max_upload": 2 * 10**9, "max_duration": 86400.0, "slots": 32, "max_waiting": 256,
    "timeout": 300.0,
}  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="folder or Hub id")
    parser.add_argument("--engine", choices=("memory", "vllm"), default="memory", help="default: memory, this server")
    parser.add_argument(
        "--engine-options",
        default="",
        metavar="TEXT",
        help="for vLLM's server: --engine-options='--max-model-len 100000'",
    )
    watching.add_loading_arguments(parser)
    parser.add_argument(
        "--memories", type=output_folder, metavar="DIR", help="where memories are kept (default: until it ends)"
    )
    parser.add_argument("--host", default="127.0.0.1", help="default: 127.0.0.1, this machine alone")
    parser.add_argument("--port", type=port_number, default=8000, help="default: 8000; 0 takes a free one")
    parser.add_argument("--api-key-file", type=Path, metavar="FILE", help="a key a line; clients must send one")
    parser.add_argument(
        "--allow-media", type=Path, nargs="+", action="extend", default=[], metavar="DIR",
        help="folders whose files clients may name",
    )  # fmt: skip
    parser.add_argument("--allow-urls", action="store_true", help="fetch http and https URLs of the public internet")
    parser.add_argument("--allow-private-urls", action="store_true", help="fetch those of private addresses too")
    parser.add_argument(
        "--max-upload", type=parse_bytes, default="2gb", metavar="SIZE", help="of a file (default: 2gb)"
    )
    parser.add_argument(
        "--max-duration", type=positive, default=86400.0, metavar="SECONDS", help="of a video (default: 86400, a day)"
    )
    parser.add_argument("--slots", type=natural, default=32, metavar="N", help="answers written at once (default: 32)")
    parser.add_argument(
        "--max-waiting", type=natural, default=256, metavar="N", help="answers that may wait (default: 256)"
    )
    parser.add_argument(
        "--timeout", type=positive, default=300.0, metavar="SECONDS", help="of a request (default: 300)"
    )


def read_keys(path: Path | None, host: str) -> tuple[str, ...]:
    """The keys of a file; there must be some where other machines can reach the server."""
    if path is None:
        if host not in LOOPBACK:
            raise ValueError(f"--host {host}: other machines can reach it, so name an --api-key-file")
        return ()
    keys = tuple(line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip())
    if not keys or not all(key.isascii() and " " not in key for key in keys):
        raise ValueError(f"--api-key-file {path}: it must hold a key a line, of ASCII characters without blanks")
    return keys


def vllm_command(args: argparse.Namespace) -> list[str]:
    """What starts vLLM's own server.

    Raises:
        ValueError: there are options that vLLM's server has no place for.
    """
    refuse(args, OWN, "for the memory server alone; vLLM's server has its own: --engine-options")
    if len(args.allow_media) > 1:
        raise ValueError("--allow-media: vLLM's server takes one folder")
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", find_model(args.model)]
    command += ["--served-model-name", Path(args.model).name, "--host", args.host, "--port", str(args.port)]
    command += ["--enable-prefix-caching", "--dtype", args.dtype]
    if args.allow_media:
        command += ["--allowed-local-media-path", str(args.allow_media[0].resolve())]
    try:
        return command + shlex.split(args.engine_options)
    except ValueError as error:
        raise ValueError(f"--engine-options: not as a shell would read it, {error}") from None


def run(args: argparse.Namespace) -> None:
    if args.engine == "vllm":
        command = vllm_command(args)
        if importlib.util.find_spec("vllm") is None:
            raise ValueError("--engine vllm needs vLLM, in an environment of its own: pip install 'video-ma2mba[vllm]'")
        sys.stdout.flush()
        os.execv(command[0], command)
    refuse(args, {"engine_options": ""}, "they are for --engine vllm")
    if absent := [folder for folder in args.allow_media if not folder.is_dir()]:
        raise ValueError(f"--allow-media {absent[0]}: there is no such folder")
    keys = read_keys(args.api_key_file, args.host)

    from ..serving.app import Settings, build_app, listening_socket, serve
    from ..serving.media import MediaRules

    listening_socket(args.host, args.port).close()  # a port that is taken is said before the model is loaded
    model, processor = watching.load_model_and_processor(args)
    rules = MediaRules(
        tuple(folder.resolve() for folder in args.allow_media), args.allow_urls or args.allow_private_urls,
        args.allow_private_urls, args.max_upload, args.max_duration,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as until_it_ends:
        settings = Settings(
            name=Path(args.model).name, memories=args.memories or Path(until_it_ends), rules=rules, keys=keys,
            num_slots=args.slots, max_waiting=args.max_waiting, timeout_s=args.timeout,
        )  # fmt: skip
        app = build_app(model, processor, settings)
        serve(app, args.host, args.port, lambda url: print(url, flush=True))
