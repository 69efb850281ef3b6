"""Decoding: one token of each row at a time, with everything looked up once that stays the same from token to token.

A block's :meth:`~.block.Block.decoder` is its ``forward`` in other words, and stands for it only where calling the
block would run that ``forward`` and nothing else: a subclass with a ``forward`` of its own, a hook, or a compiled
block is called as ever.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .block import Block, Decoder, Memory
from .state import State


def decoder(block: Block, rows: int, *, time: int = 1, step: int = 1) -> Decoder:
    """A function that reads ``time`` tokens ``[rows, time, dim]`` after a state: what ``block.every`` does.

    Without gradients, and for as long as the block and its parameters stay what they are. The outputs may be written
    over by the next call; inputs and states are left alone.
    """
    of = own(block, "decoder", "forward", "every", "__call__")
    prepared = of(rows, time=time, step=step) if of is not None else None
    if prepared is not None:
        return prepared
    expected = (rows, time // step, block.dim)

    def call(x: Tensor, state: State) -> tuple[Tensor, State]:
        # a block may keep what it is given in its state, and what a prepared one gives out is written over
        y, state = block(x.clone(), state) if step == 1 else block.every(x.clone(), state, step=step)
        if y.shape != expected or y.dtype is not x.dtype:
            kind = type(block).__name__
            raise ValueError(f"{kind}: gave {y.dtype} {list(y.shape)}: expected {x.dtype} {list(expected)}")
        return y.contiguous(), state

    return call


def reader(memory: Memory, rows: int) -> Callable[[Tensor, State], Tensor]:
    """The same for ``memory.read`` of one token ``[rows, 1, dim]``."""
    of = own(memory, "reader", "read")
    prepared = of(rows) if of is not None else None
    if prepared is not None:
        return prepared
    return lambda x, state: memory.read(x.clone(), state).contiguous()


class Arrangement:
    """The blocks, parameters and hooks of a module as they are now: what a decoder has been prepared from."""

    def __init__(self, module: nn.Module) -> None:
        self._tables: list[dict[Any, Any]] = [
            table
            for child in module.modules()
            for table in (child._modules, child._parameters, child._forward_hooks, child._forward_pre_hooks)
        ]
        # held, so that nothing new can have the identity of something old
        self._held = [x for table in self._tables for x in table.values()]
        self._identities = list(map(id, self._held))
        self._tensors = [x for x in self._held if isinstance(x, Tensor)]
        self._places = [x.data_ptr() for x in self._tensors]

    def stands(self) -> bool:
        """Whether nothing was put in another's place, added or moved since."""
        now = map(id, itertools.chain.from_iterable(map(dict.values, self._tables)))
        return list(now) == self._identities and [x.data_ptr() for x in self._tensors] == self._places


def own(block: Any, name: str, *stands_for: str) -> Callable[..., Any] | None:
    """The method ``name``, unless calling ``stands_for`` would run something that whoever wrote it did not know of."""
    home = _home(block, name)
    if home is None or any(other in vars(block) for other in stands_for):
        return None
    if not all(issubclass(home, _home(block, other) or object) for other in stands_for) or not unobserved(block):
        return None
    method: Callable[..., Any] = getattr(block, name)
    return method


def _home(block: Any, name: str) -> type | None:
    """The class that defines a method."""
    return next((kind for kind in type(block).__mro__ if name in vars(kind)), None)


def unobserved(module: nn.Module) -> bool:
    """Whether calling the module runs its ``forward`` and nothing else: no hooks, not compiled."""
    everywhere = torch.nn.modules.module
    return not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or module._compiled_call_impl is not None
        or everywhere._global_forward_hooks
        or everywhere._global_forward_pre_hooks
        or everywhere._global_backward_hooks
        or everywhere._global_backward_pre_hooks
    )
