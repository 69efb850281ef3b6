"""Decode plans: one token of each row at a time, with everything looked up once that does not change between tokens.

A plan is registered for a class of blocks, outside the class. It replaces calling the block only where that would run
the class's own ``forward`` and nothing else: an instance of exactly that class, without hooks, not compiled, with no
method replaced. Any other block is called as usual.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor, nn

from ..kernels.linear import is_unmodified, module_tables
from . import decode_graph
from .block import Block, Memory
from .segmented import forward_every
from .state import State

Decoder: TypeAlias = Callable[[Tensor, State], tuple[Tensor, State]]
"""From tokens ``[rows, time, dim]`` and a state to outputs ``[rows, time / step, dim]`` and the next state."""
Reader: TypeAlias = Callable[[Tensor, State], Tensor]
"""From one token of each row ``[rows, 1, dim]`` and a state to what the memory returns."""
Plan: TypeAlias = Callable[..., Decoder | None]
"""``plan(block, rows, time, step)``; ``None`` where there is nothing to prepare."""

_P = TypeVar("_P")
_DECODE: dict[type, Plan] = {}
_READ: dict[type, Callable[..., Reader | None]] = {}


def decode_plan(kind: type[Block]) -> Callable[[Plan], Plan]:
    """Register ``plan(block, rows, time, step)``, which prepares :func:`decoder` for blocks of the class ``kind``.

    Raises ``ValueError`` if the class has a plan.
    """
    return functools.partial(_register, _DECODE, kind)


def read_plan(kind: type[Block]) -> Callable[[Callable[..., Reader | None]], Callable[..., Reader | None]]:
    """Register ``plan(memory, rows)``, which prepares :func:`reader` for memories of the class ``kind``.

    Raises ``ValueError`` if the class has a plan.
    """
    return functools.partial(_register, _READ, kind)


def _register(plans: dict[type, _P], kind: type, plan: _P) -> _P:
    if kind in plans:
        raise ValueError(f"{kind.__name__} already has such a plan")
    plans[kind] = plan
    return plan


def decoder(block: Block, rows: int, *, time: int = 1, step: int = 1) -> Decoder:
    """A function that reads ``time`` tokens ``[rows, time, dim]`` after a state, with outputs at every ``step``-th.

    Without gradients, and for as long as the block and its parameters do not change. The next call may write over the
    outputs; inputs and states are not modified.
    """
    plan = _DECODE.get(type(block))
    if plan is not None and is_unmodified(block, "forward", "every"):
        prepared = plan(block, rows, time, step)
        if prepared is not None:
            return prepared
    expected = (rows, time // step, block.dim)

    def call(x: Tensor, state: State) -> tuple[Tensor, State]:
        # Clone: the block may store `x` in its state, and a plan overwrites `x` at the next token.
        y, state = forward_every(block, x.clone(), state, step=step)
        if torch.is_autocast_enabled(x.device.type):
            y = y.to(x.dtype)  # as the residual connection does, which adds it to `x`
        if y.shape != expected or y.dtype is not x.dtype:
            kind = type(block).__name__
            raise ValueError(f"{kind}: output is {y.dtype} {list(y.shape)}: expected {x.dtype} {list(expected)}")
        return y.contiguous(), state

    return call


def reader(memory: Memory, rows: int) -> Reader:
    """A function that reads ``memory`` with one token ``[rows, 1, dim]`` after a state. Valid as :func:`decoder` is."""
    plan = _READ.get(type(memory))
    if plan is not None and isinstance(memory, nn.Module) and is_unmodified(memory, "read"):
        prepared = plan(memory, rows)
        if prepared is not None:
            return prepared
    return lambda x, state: memory.read(x.clone(), state).contiguous()


class ModuleSnapshot:
    """The modules, parameters and hooks of a module at one time. Decoders are valid until one of them changes."""

    def __init__(self, module: nn.Module) -> None:
        modules = list(module.modules())
        self._tables = [table for child in modules for table in module_tables(child)]
        self._filled = [table for table in self._tables if table]
        self._tables += map(vars, modules)  # where a forward of its own would be
        self._sizes = list(map(len, self._tables))
        # kept alive, so that nothing new can have the identity of something old
        self._kept = [x for table in self._filled for x in table.values()]
        self._identities = list(map(id, self._kept))
        self._tensors = [x for x in self._kept if isinstance(x, Tensor)]
        self._places = [x.data_ptr() for x in self._tensors]

    def unchanged(self) -> bool:
        """Whether nothing was replaced, added or moved since, and no module has a ``forward`` of its own since."""
        if list(map(len, self._tables)) != self._sizes:
            return False
        now = map(id, itertools.chain.from_iterable(map(dict.values, self._filled)))
        return list(now) == self._identities and [x.data_ptr() for x in self._tensors] == self._places


def model_decoder(model: Any, rows: int) -> Decoder:
    """The stack of a ``LanguageModel`` for one token ``[rows, 1, dim]`` at a time, from states of the model.

    Without gradients. The next call may write over the outputs. Changes of the model between calls are followed:
    parameters, blocks and hooks that are put in or moved. Raises what ``model.check_state`` raises for the first state,
    for one of other rows, and for one that no longer fits the model.
    """
    snapshot: ModuleSnapshot | None = None
    parts: list[Decoder] = []
    graph: decode_graph.DecodeGraph | None = None

    def step(x: Tensor, layers: State) -> tuple[Tensor, State]:
        states = []
        for part, before in zip(parts, layers):
            x, after = part(x, before)
            states.append(after)
        return parts[-1](x, None)[0], tuple(states)

    def decode(x: Tensor, state: Any) -> tuple[Tensor, Any]:
        nonlocal snapshot, parts, graph
        if snapshot is None or not snapshot.unchanged() or len(state.recipe) != rows:
            # plans read states where they are, without checks
            model.check_state(state, rows)
            snapshot = ModuleSnapshot(model)
            parts = [decoder(block, rows) for block in (*model.layers, model.norm)]
            graph = decode_graph.DecodeGraph(model, step) if decode_graph.wanted(model, x) else None
        y, layers = step(x, state.layers) if graph is None else graph(x, state.layers)
        return y, state._replace(layers=layers)

    return decode


__all__ = ["Decoder", "ModuleSnapshot", "Reader", "decode_plan", "decoder", "model_decoder", "read_plan", "reader"]
