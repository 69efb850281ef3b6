"""Whether tensors are finite: what is asked of every call, in as little as one reading of the memory takes."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def surely_finite(*tensors: Tensor) -> bool:
    """False where one of them holds NaN or infinity, and perhaps where their numbers are too large to be added up."""
    # numbers of Python are added up in a fraction of the time that tensors of one number are
    return math.isfinite(sum(_sum(x.detach()).item() for x in tensors))


def _sum(x: Tensor) -> Tensor:
    return x.sum(dtype=torch.float32) if x.dtype in _NARROW else x.sum()


_NARROW = (torch.float16, torch.bfloat16)
