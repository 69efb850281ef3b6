"""The state tree: what a model carries from one token to the next, and the few operations on it.

A state is an immutable tree: named tuples (and tuples) whose leaves are tensors, or ``None`` where a block
keeps nothing. Two invariants make every operation here generic, so that no block writes its own:

* every tensor has the batch row as dimension 0;
* nothing a caller passes in is ever modified.

A snapshot is therefore the reference itself, and a fork is using it twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

State: TypeAlias = Any
"""A named tuple or tuple of states, a tensor with the batch row first, or ``None``."""


def map_state(function: Callable[..., Tensor], state: State, *others: State) -> State:
    """Apply ``function`` to corresponding tensors of one or more states of equal structure.

    Raises ``TypeError`` when the structures differ or a leaf is neither tensor nor ``None``.
    """
    if isinstance(state, Tensor):
        for other in others:
            if not isinstance(other, Tensor):
                raise TypeError(f"states differ in structure: a tensor here, {type(other).__name__} there")
        return function(state, *others)
    if any(type(other) is not type(state) for other in others):
        raise TypeError("states differ in structure: " + ", ".join(type(node).__name__ for node in (state, *others)))
    if state is None:
        return None
    if not isinstance(state, tuple):
        raise TypeError(f"a state is a tree of named tuples, tensors and None, not {type(state).__name__}")
    if any(len(other) != len(state) for other in others):
        raise TypeError(f"states differ in structure: {type(state).__name__} of different lengths")
    children = [map_state(function, *nodes) for nodes in zip(state, *others)]
    return type(state)(*children) if hasattr(state, "_fields") else tuple(children)


def named_tensors(state: State, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield ``(dotted path, tensor)`` for every tensor, in a fixed order: ``layers.0.memory.weights.1``."""
    if isinstance(state, Tensor):
        yield path, state
    elif isinstance(state, tuple):
        names: Sequence[Any] = getattr(state, "_fields", range(len(state)))
        for name, child in zip(names, state):
            yield from named_tensors(child, f"{path}.{name}" if path else str(name))
    elif state is not None:
        raise TypeError(f"a state is a tree of named tuples, tensors and None, not {type(state).__name__} at {path}")


def batch_size(state: State) -> int | None:
    """Rows in the state; ``None`` when it holds no tensor. Raises ``ValueError`` when tensors disagree."""
    rows: int | None = None
    first = ""
    for path, tensor in named_tensors(state):
        if rows is None:
            rows, first = tensor.shape[0], path
        elif tensor.shape[0] != rows:
            raise ValueError(f"state rows disagree: {first} has {rows}, {path} has {tensor.shape[0]}")
    return rows


def detach(state: State) -> State:
    """The same values without their history: the only thing that cuts gradients between two calls."""
    return map_state(lambda tensor: tensor.detach(), state)


def to(state: State, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> State:
    """Move to ``device``; cast floating-point tensors to ``dtype``. Integer tensors keep their type."""
    return map_state(
        lambda tensor: tensor.to(device=device, dtype=dtype if tensor.is_floating_point() else None), state
    )


def select(state: State, rows: Tensor | Sequence[int] | slice) -> State:
    """The given rows, in the given order, repeats allowed: beam search and batch reordering."""
    if isinstance(rows, slice):
        return map_state(lambda tensor: tensor[rows], state)

    def pick(tensor: Tensor) -> Tensor:
        index = torch.as_tensor(rows, device=tensor.device)
        return tensor[index] if index.dtype == torch.bool else tensor.index_select(0, index.long())

    return map_state(pick, state)


def concatenate(states: Sequence[State]) -> State:
    """One state holding the rows of all the given states, in order."""
    if not states:
        raise ValueError("concatenate: expected at least one state, got none")

    def join(*tensors: Tensor) -> Tensor:
        if len({tensor.shape[1:] for tensor in tensors}) > 1:
            shapes = ", ".join(str(list(tensor.shape)) for tensor in tensors)
            raise ValueError(f"concatenate: rows of different shapes: {shapes} (states that grow must be equally long)")
        return torch.cat(tensors, dim=0)

    return map_state(join, *states)


def where(rows: Tensor, state: State, other: State) -> State:
    """Row by row: ``state`` where ``rows`` (bool ``[batch]``) is true, ``other`` elsewhere."""
    return map_state(lambda here, there: torch.where(rows.view(-1, *[1] * (here.dim() - 1)), here, there), state, other)


def reset(state: State, rows: Tensor | Sequence[int], fresh: State) -> State:
    """Start the given rows anew: their values come from ``fresh``, ``init_state`` of the same batch size."""
    size = batch_size(state)
    if size is None:
        return state
    chosen = torch.as_tensor(rows)
    if chosen.dtype != torch.bool:
        chosen = torch.zeros(size, dtype=torch.bool).index_fill_(0, chosen.long().cpu(), True)
    return map_state(
        lambda old, new: torch.where(chosen.to(old.device).view(-1, *[1] * (old.dim() - 1)), new, old), state, fresh
    )


def nbytes(state: State) -> int:
    """Bytes of all tensors, each counted in full (a broadcast view counts as if it were written out)."""
    return sum(tensor.numel() * tensor.element_size() for _, tensor in named_tensors(state))
