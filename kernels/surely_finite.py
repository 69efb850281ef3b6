"""Whether tensors are finite: what is asked of every call, in as little as one reading of the memory takes."""

from __future__ import annotations

import torch
from torch import Tensor


def surely_finite(*tensors: Tensor) -> bool:
    """False where one of them holds NaN or infinity, and perhaps where their numbers are too large to be added up."""
    return bool(torch.stack([_probe(x.detach()) for x in tensors]).sum().isfinite())


def _probe(x: Tensor) -> Tensor:
    if x.is_contiguous() and x.dtype in (torch.float32, torch.float64):
        flat = x.view(-1)
        return torch.dot(flat, flat)  # three times as fast as a sum
    return x.sum(dtype=torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else x.dtype)
