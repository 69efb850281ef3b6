"""Keeping what must be exact out of autocast's hands."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def full_precision(device_type: str) -> AbstractContextManager[object]:
    """A region in which autocast narrows nothing; free where autocast is off."""
    if device_type != "meta" and torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


def half(x: Tensor) -> str | None:
    """``"bfloat16"`` or ``"float16"`` where products of ``x`` may be rounded to it; sums and states never are.

    That is so where ``x`` is of that dtype itself, and where autocast would make it so.
    """
    dtype = x.dtype
    if dtype == torch.float32 and not x.is_meta and torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
    return _HALF.get(dtype)


_HALF = {torch.bfloat16: "bfloat16", torch.float16: "float16"}
