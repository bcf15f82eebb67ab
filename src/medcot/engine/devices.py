"""What a device can run: Triton's kernels, PyTorch's flash attention, 8-bit matrix products."""

from __future__ import annotations

import importlib.util
from functools import cache

import torch
from torch import Tensor


@cache
def has_triton(device: torch.device) -> bool:
    """Whether our kernels run there: Triton wants compute capability 8.0, and is not part of every build of PyTorch."""
    if device.type != "cuda" or importlib.util.find_spec("triton") is None:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


@cache
def has_flash(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether ``varlen_attn`` runs there: its flash kernel wants 16 bit and compute capability 8.0."""
    if device.type != "cuda" or dtype not in (torch.float16, torch.bfloat16):
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


@cache
def has_fp8(device: torch.device) -> bool:
    """Whether 8-bit products with a scale for each row run there: Hopper and later."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """Move a tensor without waiting for the GPU: an ordinary copy from the host would wait for all it has to do."""
    if tensor.device == device:
        return tensor
    if tensor.device.type == "cpu" and device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
