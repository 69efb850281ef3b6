"""Calling a C kernel: one packed structure takes half a microsecond, twenty arguments take two."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable

import torch
from torch import Tensor

from .library import library


class Kernel:
    """The C function ``name``, which takes a structure of ``whole`` int64 or pointers and then ``real`` doubles.

    Called with a dtype and the structure's values. Raises ``MemoryError`` where the function returns other than 0.
    """

    def __init__(self, name: str, whole: int, real: int) -> None:
        self.name = name
        self._pack = struct.Struct(f"{whole}q{real}d").pack
        self._functions: dict[torch.dtype, Callable[[bytes], int]] = {}

    def __call__(self, dtype: torch.dtype, *values: float) -> None:
        function = self._functions.get(dtype) or self._find(dtype)
        if function(self._pack(*values)):
            raise MemoryError(f"{self.name}: no memory left for its work buffers")

    def _find(self, dtype: torch.dtype) -> Callable[[bytes], int]:
        # a function pointer of its own: what others set on the library's shared one is not changed
        function = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_char_p)((self.name, library(dtype)))
        self._functions[dtype] = function
        return function


def address(x: Tensor | None) -> int:
    """Where the tensor's numbers begin; 0, C's null pointer, for ``None``."""
    return 0 if x is None else x.data_ptr()


def tracks(*tensors: Tensor | None) -> bool:
    """Whether autograd has to know of an operation on these."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
