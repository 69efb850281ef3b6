"""Calling a C kernel: one way of passing arguments, threads, fresh memory, and the dtype of products."""

from __future__ import annotations

import ctypes
import functools
import struct
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import library

BYTES_PER_THREAD = 2**17
"""Bytes that a kernel for a few tokens reads per thread: fewer are read before another thread wakes up."""
HUGE_PAGE_BYTES = 4 * 2**20
"""Bytes from which on memory in huge pages is ready sooner."""


class Kernel:
    """The C function ``name``, which takes a pointer to a structure of int64s and pointers, and then doubles.

    Every C kernel is called this way: packing one structure takes half a microsecond, passing twenty arguments two.

    Args:
        name: of the function. It returns 0, 1 if there is no memory for its work buffers, or 2 if a buffer that it was
            given is too small.
        integers: how many int64s and pointers the structure has.
        doubles: how many doubles follow them.

    Called with a dtype, which picks the library, and the structure's values in order. Raises ``MemoryError`` for
    1 and ``RuntimeError`` for 2.
    """

    def __init__(self, name: str, integers: int, doubles: int = 0) -> None:
        self.name = name
        self._pack = struct.Struct(f"{integers}q{doubles}d").pack
        self._functions: dict[torch.dtype, Callable[[Any], int]] = {}

    def __call__(self, dtype: torch.dtype, *values: float) -> None:
        function = self._functions.get(dtype) or self._find(dtype)
        if code := function(self._pack(*values)):
            raise self._error(code)

    def prepare(
        self, dtype: torch.dtype, first: int, count: int, *values: float | Tensor | None
    ) -> Callable[..., None]:
        """A function of the ``count`` integers from the ``first`` on; the other values stay as they are given here.

        A tensor among the values stands for its address and is kept alive. One call at a time.
        """
        kept = [x.detach() for x in values if isinstance(x, Tensor)]
        numbers = [address(x) if x is None or isinstance(x, Tensor) else x for x in values]
        structure = ctypes.create_string_buffer(self._pack(*numbers))
        function = self._functions.get(dtype) or self._find(dtype)
        pack_into, offset = struct.Struct(f"{count}q").pack_into, 8 * first

        def call(*new: int, kept: Any = kept) -> None:
            pack_into(structure, offset, *new)
            if code := function(structure):
                raise self._error(code)

        return call

    def _error(self, code: int) -> Exception:
        if code == 1:
            return MemoryError(f"{self.name}: no memory left for its work buffers")
        return RuntimeError(f"{self.name}: a buffer that it was given is too small")

    def _find(self, dtype: torch.dtype) -> Callable[[Any], int]:
        # a function pointer of its own: attributes that others set on the library's shared one do not change it
        function = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_char_p)((self.name, library.library(dtype)))
        self._functions[dtype] = function
        return function


def address(x: Tensor | None) -> int:
    """The address of the first element; 0, C's null pointer, for ``None``."""
    return 0 if x is None else x.data_ptr()


def threads_for(size: int) -> int:
    """How many threads are worth waking up to read ``size`` bytes."""
    return min(torch.get_num_threads(), 1 + size // BYTES_PER_THREAD)


def empty_huge_pages(shape: torch.Size | tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """``torch.empty`` on the CPU in float32 or float64; large tensors in huge pages."""
    x = torch.empty(shape, dtype=dtype, device="cpu")
    size = x.numel() * x.element_size()
    if size >= HUGE_PAGE_BYTES:
        _advise_huge_pages(dtype)(x.data_ptr(), size)
    return x


@functools.cache
def _advise_huge_pages(dtype: torch.dtype) -> Callable[[int, int], None]:
    arguments = ctypes.c_void_p, ctypes.c_int64
    return ctypes.CFUNCTYPE(None, *arguments)(("advise_huge_pages", library.library(dtype)))


# -- operands of matrix products ---------------------------------------------------------------------------------------


def product_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype to which the C kernels round the operands of matrix products of ``dtype`` tensors.

    ``torch.set_float32_matmul_precision("medium")`` allows bfloat16 inside float32 products. The kernels for many
    tokens then round operands to it where the CPU multiplies bfloat16, at twice the speed; sums stay float32, and
    backward rounds as its forward did. Autocast changes nothing: it is off around these kernels.
    """
    return torch.bfloat16 if dtype == torch.float32 and refuse_bfloat16() is None else dtype


def refuse_bfloat16() -> str | None:
    """Why float32 products do not take bfloat16 operands, or ``None``."""
    # this setting can always be read; torch.get_float32_matmul_precision raises where settings disagree
    if torch.backends.mkldnn.matmul.fp32_precision != "bf16":  # type: ignore[attr-defined]
        return "is for bfloat16 operands: torch.set_float32_matmul_precision('medium') allows them"
    return lacks_bfloat16()


@functools.cache
def lacks_bfloat16() -> str | None:
    """Why this machine's kernels cannot multiply bfloat16, or ``None``."""
    try:
        able = library.library(torch.float32).multiplies_bfloat16()
    except library.NotBuilt as error:
        return str(error)
    return None if able else "needs a CPU that multiplies bfloat16 (AVX512_BF16)"
