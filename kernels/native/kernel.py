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


_ORDINARY = frozenset({Tensor, torch.nn.Parameter})


def plain(*tensors: Tensor | None) -> bool:
    """Whether a kernel may be given the addresses of these: ordinary tensors on the CPU, watched by nobody.

    Who traces, transforms or differentiates forward has to see operators; numbers written behind the back are lost.
    """
    if torch.compiler.is_compiling():
        return True  # traced without a look at this: the kernels refuse for that reason alone
    for x in tensors:
        if x is not None and (
            type(x) not in _ORDINARY or not x.is_cpu or x.layout is not torch.strided or x.is_neg()
        ):
            return False
    return (
        torch._C._get_tracing_state() is None
        and not torch._C._len_torch_dispatch_stack()
        and torch.autograd.forward_ad._current_level < 0
        and torch._C._functorch.maybe_current_level() is None
    )


def tracks(*tensors: Tensor | None) -> bool:
    """Whether autograd has to know of an operation on these."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
