"""The two ways between device and host, so that it can be seen where the host waits.

A kernel launch does not wait for the device; reading a number from it does. What the host must know of a batch (where
frames stand, what is padding, what is supervised) is fetched in one go by `on_host`, at most once a forward pass and
not at all where the caller's tensors lie on the CPU. What the host has counted goes back by `to_device`, beside the
work.
"""

import torch


def on_host(*tensors):
    """The tensors, or None, on the CPU. Waits for the device, once for all of them."""
    if not any(tensor is not None and tensor.is_cuda for tensor in tensors):
        return [None if tensor is None else tensor.cpu() for tensor in tensors]
    copies = [None if tensor is None else tensor.to("cpu", non_blocking=True) for tensor in tensors]  # pinned, by torch
    for device in {tensor.device for tensor in tensors if tensor is not None}:
        wait_for(device)
    return copies


def wait_for(device):
    """Wait until copies from a device that were asked for without waiting are there."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


def to_device(tensor, device):
    """A tensor of the CPU, on the device; the host does not wait for the copy."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
