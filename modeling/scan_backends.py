"""Which implementation runs the scan and the convolution: chosen here and nowhere else, once, and said in one line.

The scan: plain torch (`mamba2`, `ssd`) or the Triton kernels of mamba_ssm (`ssd_kernels`), which take the gated norm
along. Beside these kernels the convolution runs on causal_conv1d where that is usable, else in plain torch.
"""

import os
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import torch
from transformers.utils import logging

from .ssd_kernels import conv_kernel, scan_kernels

logger = logging.get_logger(__name__)

SCAN_BACKENDS = ("auto", "torch", "mamba_ssm")
VARIABLE = "VIDEO_MA2MBA_BACKEND"  # decides where the configuration says "auto"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LARGEST_NORM_BYTES = 65536  # of one row of one group, which the norm's kernel holds at once


class Backends(NamedTuple):
    """What a mixer runs. `conv`: the package causal_conv1d, or None for torch. `reasons`: for each refused, why."""

    scan: str
    conv: Callable | None
    reasons: dict[str, str]

    def __str__(self):
        conv = "torch" if self.conv is None else "causal_conv1d"
        refused = "; ".join(f"{name} not used: {reason}" for name, reason in self.reasons.items())
        return f"scan on {self.scan}, convolution on {conv}" + (f" ({refused})" if refused else "")


def choose_backends(asked, device, dtype, shape, conv_kernel_size, activation):
    """The backends for tensors of this kind.

    Args:
        asked: "auto", "torch" or "mamba_ssm": `config.scan_backend`. "auto" listens to VIDEO_MA2MBA_BACKEND, then takes
            the kernels wherever they are usable.
        dtype: of what in_proj gives. shape: `CoreShape`.

    Raises:
        ValueError: an unknown name, or a backend that was asked for by name and cannot run here; says why.
    """
    if asked == "auto":
        asked = os.environ.get(VARIABLE) or "auto"
    return _choose(asked, torch.device(device).type, dtype, shape, conv_kernel_size, activation)


@lru_cache
def _choose(asked, device_type, dtype, shape, conv_kernel_size, activation):
    if asked not in SCAN_BACKENDS:
        raise ValueError(f"scan backend {asked!r} is none of {', '.join(SCAN_BACKENDS)}; look at {VARIABLE}")
    reasons, conv = {}, None
    refusal = why_not_mamba_ssm(device_type, dtype, shape, activation) if asked != "torch" else None
    if refusal is not None:
        if asked == "mamba_ssm":
            raise ValueError(f"scan backend 'mamba_ssm' was asked for and cannot run here: {refusal}")
        reasons["mamba_ssm"] = refusal
    scan = "torch" if asked == "torch" or refusal else "mamba_ssm"
    if scan == "mamba_ssm":
        refusal = why_not_causal_conv1d(device_type, dtype, shape, conv_kernel_size)
        if refusal is None:
            conv = conv_kernel()
        else:
            reasons["causal_conv1d"] = refusal
    chosen = Backends(scan, conv, reasons)
    # on a GPU that goes without its kernels, speed is lost: that is worth more than a note
    say = logger.warning if device_type == "cuda" and asked == "auto" and scan == "torch" else logger.info
    if not torch.compiler.is_compiling():  # a graph takes no messages
        say(f"Mamba-2: {chosen}")
    return chosen


def norm_on_kernels(asked, device, dtype, hidden_size):
    """Whether the norm before a mixer runs on the kernels, in one launch; arguments as of `choose_backends`."""
    if asked == "auto":
        asked = os.environ.get(VARIABLE) or "auto"
    return asked != "torch" and _norm_fits(device.type, dtype, hidden_size)


@lru_cache
def _norm_fits(device_type, dtype, hidden_size):
    fits = hidden_size * dtype.itemsize <= LARGEST_NORM_BYTES
    return fits and _why_not_device(device_type, dtype) is None and _why_not_import(scan_kernels) is None


def why_not_mamba_ssm(device_type, dtype, shape, activation="silu"):
    """Why the kernels of mamba_ssm cannot run a mixer of this kind; None if they can."""
    if (reason := _why_not_device(device_type, dtype)) is not None:
        return reason
    if activation not in ("silu", "swish"):
        return f"the activation is {activation!r}, and the kernels' gate is silu"
    group_bytes = shape.inner // shape.n_groups * dtype.itemsize
    if group_bytes > LARGEST_NORM_BYTES:
        return f"a group of {group_bytes} bytes is more than the {LARGEST_NORM_BYTES} the gated norm's kernel holds"
    return _why_not_import(scan_kernels)


def why_not_causal_conv1d(device_type, dtype, shape, conv_kernel_size):
    """Why the CUDA convolution of causal_conv1d cannot run a mixer of this kind; None if it can."""
    if (reason := _why_not_device(device_type, dtype)) is not None:
        return reason
    if conv_kernel_size not in (2, 3, 4):
        return f"the convolution is {conv_kernel_size} tokens wide, and its kernel knows 2, 3 and 4"
    for name in ("inner", "conv_dim", "projection"):
        if getattr(shape, name) % 8:
            return f"{name} = {getattr(shape, name)} is not a multiple of 8, as its kernel needs"
    return _why_not_import(conv_kernel)


def _why_not_device(device_type, dtype):
    # Triton's interpreter runs kernels on the CPU: slow, for tests
    if device_type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"the tensors are on the device {device_type!r}, not on a CUDA device"
    if dtype not in DTYPES:
        return f"the dtype is {dtype}, and the kernels know float32, bfloat16 and float16"
    return None


def _why_not_import(load):
    try:
        load()
    except Exception as error:  # a broken build may raise anything; the text says what
        return f"{type(error).__name__}: {error}"
    return None
