"""Autocast by device type, also for devices that have none: the meta device, on which memory is counted."""

from contextlib import nullcontext

import torch


def autocast_dtype(device_type):
    """The dtype autocast uses at this point, None where it is off."""
    available = torch.amp.is_autocast_available(device_type)
    return torch.get_autocast_dtype(device_type) if available and torch.is_autocast_enabled(device_type) else None


def autocast_to(device_type, dtype, cache_enabled=None):
    """A context in which autocast uses `dtype`, or is off where that is None.

    `cache_enabled`: whether casts of weights are remembered; None leaves that as it is.
    """
    if not torch.amp.is_autocast_available(device_type):
        return nullcontext()
    return torch.autocast(device_type, dtype=dtype, enabled=dtype is not None, cache_enabled=cache_enabled)
