"""Calling a C kernel: one packed structure takes half a microsecond, twenty arguments take two."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable
from typing import Any

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
        self._functions: dict[torch.dtype, Callable[[Any], int]] = {}

    def __call__(self, dtype: torch.dtype, *values: float) -> None:
        function = self._functions.get(dtype) or self._find(dtype)
        if function(self._pack(*values)):
            raise MemoryError(f"{self.name}: no memory left for its work buffers")

    def prepared(
        self, dtype: torch.dtype, first: int, count: int, *values: float | Tensor | None
    ) -> Callable[..., None]:
        """The call with a structure that is filled once: each time, ``count`` values from the ``first`` on are new.

        A tensor among the values stands for its address, and what it holds stays alive. One call at a time.
        """
        held = [x.detach() for x in values if isinstance(x, Tensor)]
        numbers = [address(x) if x is None or isinstance(x, Tensor) else x for x in values]
        structure = ctypes.create_string_buffer(self._pack(*numbers))
        function = self._functions.get(dtype) or self._find(dtype)
        put, at = struct.Struct(f"{count}q").pack_into, 8 * first

        def call(*new: int, held: Any = held) -> None:
            put(structure, at, *new)
            if function(structure):
                raise MemoryError(f"{self.name}: no memory left for its work buffers")

        return call

    def _find(self, dtype: torch.dtype) -> Callable[[Any], int]:
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
        return True  # what a compiler traces with is no tensor to look at; what its operators are given is ordinary
    for x in tensors:
        if x is not None and (type(x) not in _ORDINARY or not x.is_cpu or x.layout is not torch.strided or x.is_neg()):
            return False
    return (
        torch._C._get_tracing_state() is None
        and not torch._C._len_torch_dispatch_stack()
        and torch.autograd.forward_ad._current_level < 0
        and torch._C._functorch.maybe_current_level() is None
        # where new tensors go to another device of themselves, results would not be where the kernel writes
        and (not torch._C._len_torch_function_stack() or torch.get_default_device().type == "cpu")
    )


WORTH_A_THREAD = 2**17
"""Bytes read by a kernel for a few tokens for which another thread is woken up: some ten microseconds."""


def threads_worth(size: int) -> int:
    """How many threads are worth waking up to read ``size`` bytes."""
    return min(torch.get_num_threads(), 1 + size // WORTH_A_THREAD)


def tracks(*tensors: Tensor | None) -> bool:
    """Whether autograd has to know of an operation on these."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def prepares(*weights: Tensor | None) -> bool:
    """Whether a kernel's call can be prepared with these: dense, ordinary, and nothing else is to happen to them."""
    return (
        not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and all(w is None or w.is_contiguous() for w in weights)
        and plain(*weights)
    )
