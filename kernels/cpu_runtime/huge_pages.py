"""Fresh memory for large results."""

from __future__ import annotations

import torch
from torch import Tensor

from .library import library

LARGE = 4 * 2**20
"""Bytes from which on large pages are asked for."""


def fresh(shape: torch.Size | tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """``torch.empty`` on the CPU in float32 or float64; large ones in large pages, which are ready sooner."""
    x = torch.empty(shape, dtype=dtype, device="cpu")
    size = x.numel() * x.element_size()
    if size >= LARGE:
        library(dtype).large_pages(x.data_ptr(), size)
    return x
