"""Which implementations of the scan and of the convolution run on this machine, and why the others do not."""

import argparse
import importlib.metadata
from typing import Any

import torch

from ..loading import choose_device
from ..modeling.configuration_video_ma2mba import PRESETS, VideoMa2mbaConfig
from ..modeling.mamba2 import Mamba2Mixer
from ..modeling.scan_backends import why_not_causal_conv1d, why_not_mamba_ssm
from ..modeling.ssd_kernels import tokens_per_call
from .machine import describe

PACKAGES = ("mamba-ssm", "causal-conv1d", "triton")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", choices=PRESETS, default="3.1b", help="whose shapes are asked about")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="bfloat16")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda if there is one")


def run(args: argparse.Namespace) -> dict[str, Any]:
    device = choose_device(args.device or "auto").type
    dtype = getattr(torch, args.dtype)
    with torch.device("meta"):
        mixer = Mamba2Mixer(VideoMa2mbaConfig.from_preset(args.model).text_config)
    asked = device, dtype, mixer.shape
    refusals = {
        "scan": {"torch": None, "mamba_ssm": why_not_mamba_ssm(*asked, mixer.hidden_act)},
        "convolution": {"torch": None, "causal_conv1d": why_not_causal_conv1d(*asked, mixer.conv_kernel)},
    }
    return {
        "benchmark": "backends",
        "model": args.model,
        "dtype": args.dtype,
        "usable": {
            part: {name: reason or "yes" for name, reason in backends.items()} for part, backends in refusals.items()
        },
        "chosen": str(mixer.backends(device, dtype)),
        "tokens_per_call": tokens_per_call(1, mixer.shape),
        "packages": {name: _version(name) for name in PACKAGES},
        "machine": describe(device),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
