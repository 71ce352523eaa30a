"""Check a folder with a model or with LoRA adapters, write its card, and upload both to the Hugging Face Hub."""

import argparse
import re
import sys
from pathlib import Path
from typing import Any

from ..loading import refuse

LICENCE = "apache-2.0"
HELP = "write a model's card and upload the model to the Hub"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "folder", type=Path, metavar="DIR", help="folder, as save_pretrained, `train` or `convert` wrote it"
    )
    parser.add_argument(
        "--repo", required=True, metavar="OWNER/NAME", help="repository on the Hub; it is made if there is none"
    )
    steps = parser.add_mutually_exclusive_group()
    steps.add_argument(
        "--dry-run", action="store_true", help="check everything and list the files; upload and write nothing"
    )
    steps.add_argument("--card-only", action="store_true", help="write DIR/README.md anew and stop")
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    card = parser.add_argument_group("the card", "README.md, written where DIR has none, and by --card-only")
    card.add_argument("--license", metavar="ID", help=f"default: {LICENCE}")
    card.add_argument(
        "--base-model", action="append", metavar="HUB_ID", help="what it was made of; may be given more than once"
    )
    card.add_argument("--training", type=Path, metavar="JSON", help="file with an object, whose entries become a table")
    card.add_argument(
        "--evaluation", type=Path, metavar="JSON", help='{"results": [{"dataset": ..., "metric": ..., "value": ...}]}'
    )


def run(args: argparse.Namespace) -> None:
    folder = args.folder
    if not any((folder / name).is_file() for name in ("config.json", "adapter_config.json")):
        raise ValueError(
            f"{folder}: there is neither config.json nor adapter_config.json; name a folder that save_pretrained, "
            "`train` or `convert` wrote"
        )
    if not re.fullmatch(r"\w[\w.-]*/[\w.-]+", args.repo):
        raise ValueError(f"--repo {args.repo}: a repository of the Hub looks like owner/name")
    if args.card_only:
        refuse(args, {"private": False}, "--card-only makes no repository; leave one of them out")

    import shutil

    from ..files import write_text
    from ..weights.adapters import has_card, is_adapter, render_adapter_card
    from ..weights.model_card import read_report, render_card
    from ..weights.sharing import check_folder, files_to_share, upload

    written, card = has_card(folder) and not args.card_only, folder / "README.md"
    if written:
        of_card = dict.fromkeys(("license", "base_model", "training", "evaluation"))
        refuse(args, of_card, f"{card} is written already and stays as it is; --card-only writes it anew")
        text = card.read_text(encoding="utf-8")
    else:
        options: dict[str, Any] = {
            "licence": args.license or LICENCE, "base_models": args.base_model, "training": read_report(args.training),
        }  # fmt: skip
        if is_adapter(folder):
            refuse(args, {"evaluation": None}, "a card of adapters has no table of results; leave the option out")
            rendered = render_adapter_card(folder, args.repo, **options)
        else:
            rendered = render_card(folder, args.repo, **options, evaluation=read_report(args.evaluation))
        text = f"{str(rendered).rstrip()}\n"
    if args.card_only:
        write_text(card, text)
        print(f"wrote {card}", file=sys.stderr)
        return
    files = files_to_share(folder)
    answer = check_folder(folder, text)
    sizes = {"README.md": len(text.encode()), **{name: file.stat().st_size for name, file in files.items()}}
    for name, size in sorted(sizes.items()):
        print(f"{size:>14,}  {name}")
    print(f"{sum(sizes.values()):>14,}  bytes in all", file=sys.stderr)
    if left_out := sorted({path.name for path in folder.iterdir()} - set(sizes)):
        print(f"not uploaded: {', '.join(left_out)}", file=sys.stderr)
    print(f"loads, and says of a black frame: {answer!r}", file=sys.stderr)
    if args.dry_run:
        parts = [*["the card"] * (not written), *["the code"] * any(file.parent != folder for file in files.values())]
        lacks = f" after writing {' and '.join(parts)} into {folder}" if parts else ""
        print(
            f"a dry run: nothing was uploaded and nothing written. Without --dry-run these {len(sizes)} files go to "
            f"{args.repo}{', made private if it is new' if args.private else ''}{lacks}",
            file=sys.stderr,
        )
        return
    if not written:
        write_text(card, text)
    for name, file in files.items():
        if file.parent != folder:
            shutil.copy(file, folder / name)
    print(upload(folder, args.repo, sizes, args.private))
