"""States: what a model carries from one token to the next, and operations on them.

A state is an immutable tree of named tuples and tuples. Its leaves are tensors, or ``None`` for a block without state.
The operations work for the states of all blocks, because two rules hold for every state:

* dimension 0 of every tensor is the batch;
* tensors of a state are never modified in place.

A snapshot of a state is therefore a reference to it, and several continuations may start from one state.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from ..kernels.dispatch import copied, integers, known
from ..kernels.documents import NO_DOCUMENT, packed_ids
from .observers import suppressed

State: TypeAlias = Any
"""A named tuple or tuple of states, a tensor ``[batch, ...]``, or ``None``."""


class DocumentState(NamedTuple):
    """The state of a block after packed documents, and which document it belongs to."""

    state: State
    """The state of the block after the last document of each row."""
    document: Tensor
    """``[batch]`` int64: the id of that document. A call goes on with it if the first id of the row is the same."""


def map_state(function: Callable[..., Tensor], state: State, *others: State) -> State:
    """Apply ``function`` to the corresponding tensors of one or more states of equal structure.

    Raises ``TypeError`` if the structures differ or a leaf is neither a tensor nor ``None``. The message has its path.
    """
    return _map(function, (), state, *others)


def _map(function: Callable[..., Tensor], path: tuple[object, ...], *nodes: State) -> State:
    state = nodes[0]
    if isinstance(state, Tensor):
        for other in nodes[1:]:
            if not isinstance(other, Tensor):
                raise TypeError(f"states differ in structure{_at(path)}: a tensor here, {type(other).__name__} there")
        return function(*nodes)
    if any(type(other) is not type(state) for other in nodes[1:]):
        kinds = ", ".join(type(node).__name__ for node in nodes)
        raise TypeError(f"states differ in structure{_at(path)}: {kinds}")
    if state is None:
        return None
    if not isinstance(state, tuple):
        raise TypeError(f"{_NO_STATE}, not {type(state).__name__}{_at(path)}")
    if any(len(other) != len(state) for other in nodes[1:]):
        raise TypeError(f"states differ in structure{_at(path)}: {type(state).__name__} of different lengths")
    names = getattr(state, "_fields", range(len(state)))
    children = [_map(function, (*path, name), *below) for name, below in zip(names, zip(*nodes))]
    return type(state)(*children) if hasattr(state, "_fields") else tuple(children)


_NO_STATE = "a state is a tree of named tuples, tensors and None"


def _at(path: tuple[object, ...]) -> str:
    return f" at {'.'.join(map(str, path))}" if path else ""


def named_tensors(state: State, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield ``(path, tensor)`` for every tensor in a fixed order. A path is dotted: ``layers.0.memory.weights.1``."""
    if isinstance(state, Tensor):
        yield path, state
    elif isinstance(state, tuple):
        names: Sequence[Any] = getattr(state, "_fields", range(len(state)))
        for name, child in zip(names, state):
            yield from named_tensors(child, f"{path}.{name}" if path else str(name))
    elif state is not None:
        raise TypeError(f"{_NO_STATE}, not {type(state).__name__}" + (f" at {path}" if path else ""))


def batch_size(state: State) -> int | None:
    """Return the number of rows of a state, or ``None`` if it has no tensors.

    Raises ``ValueError`` if a tensor has no dimensions or the tensors have different numbers of rows.
    """
    rows: int | None = None
    first = ""
    for path, tensor in named_tensors(state):
        if tensor.dim() == 0:
            raise ValueError(f"state {path or 'tensor'} is a scalar: expected a tensor with the batch as dimension 0")
        if rows is None:
            rows, first = tensor.shape[0], path
        elif tensor.shape[0] != rows:
            raise ValueError(f"state has different numbers of rows: {first} has {rows}, {path} has {tensor.shape[0]}")
    return rows


def detach(state: State) -> State:
    """Return the state detached from the graph. Without it, gradients flow from each call into the calls before."""
    return map_state(lambda x: x.detach() if x.is_floating_point() else x, state)


def trainable(state: State) -> State:
    """Return the state with copies of the tensors of inference mode, which autograd does not accept."""
    if not any(tensor.is_inference() for _, tensor in named_tensors(state)):
        return state
    return map_state(lambda x: copied(x.clone(), x) if x.is_inference() else x, state)


def to(state: State, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> State:
    """Move a state to ``device`` and cast its floating-point tensors to ``dtype``. Other tensors keep their dtype.

    Raises ``TypeError`` if ``dtype`` is not a floating-point dtype.
    """
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"dtype: expected a floating-point torch.dtype or None, got {dtype!r}")
    return map_state(
        lambda tensor: tensor.to(device=device, dtype=dtype if tensor.is_floating_point() else None), state
    )


def select(state: State, rows: Tensor | Sequence[int] | slice) -> State:
    """Select rows of a state, in the given order and with repetitions, as beam search does.

    ``rows``: integers, where negative ones count from the end, a slice, or one bool per row. Raises ``IndexError`` for
    a row out of range and ``TypeError`` for other values.
    """
    size = batch_size(state)
    if size is None:
        return state
    index = rows if isinstance(rows, slice) else _index(rows, size)

    def pick(x: Tensor) -> Tensor:
        if isinstance(index, slice):
            y, on_host = x[index], True
        else:
            y, on_host = x.index_select(0, index.to(x.device, non_blocking=True)), index.is_cpu
        if not x.is_cpu and x.dim() == 1 and not x.is_floating_point() and on_host:
            values = integers(x, wait=False)
            if values is not None:
                known(y, values[index] if isinstance(index, slice) else [values[i] for i in index.tolist()])
        return y

    return map_state(pick, state)


def concatenate(states: Sequence[State]) -> State:
    """Concatenate the rows of several states into one state.

    Raises ``TypeError`` or ``ValueError`` for states of different structures, dtypes, devices or shapes of rows.
    """
    if isinstance(states, Tensor) or hasattr(states, "_fields"):
        raise TypeError(f"concatenate: expected a list of states, got one {type(states).__name__}")
    if not states:
        raise ValueError("concatenate: expected at least one state, got none")

    def join(*tensors: Tensor) -> Tensor:
        if any(tensor.dim() == 0 for tensor in tensors) or len({tensor.shape[1:] for tensor in tensors}) > 1:
            shapes = ", ".join(str(list(tensor.shape)) for tensor in tensors)
            raise ValueError(f"concatenate: rows of different shapes: {shapes} (states that grow must be equally long)")
        _expect_alike("concatenate", *tensors)
        y = torch.cat(tensors, dim=0)
        if not y.is_cpu and y.dim() == 1 and not y.is_floating_point():
            values = [integers(tensor, wait=False) for tensor in tensors]
            if None not in values:
                known(y, list(itertools.chain(*values)))
        return y

    return map_state(join, *states)


def where(rows: Tensor, state: State, other: State) -> State:
    """Take the rows of ``state`` where ``rows`` (bool ``[batch]``) is true, and those of ``other`` elsewhere.

    Raises ``TypeError`` or ``ValueError`` for states of different structures, dtypes, devices or shapes.
    """
    sizes = batch_size(state), batch_size(other)
    if sizes[0] != sizes[1]:
        raise ValueError(f"where: states of {sizes[0]} and {sizes[1]} rows: expected equal numbers of rows")
    if sizes[0] is None:
        return state
    if not isinstance(rows, Tensor) or rows.dtype != torch.bool or rows.shape != (sizes[0],):
        got = f"{rows.dtype} {list(rows.shape)}" if isinstance(rows, Tensor) else repr(rows)
        raise TypeError(f"where: rows: expected bool [{sizes[0]}], got {got}")
    return _choose("where", rows, state, other)


def reset(state: State, rows: Tensor | Sequence[int], fresh: State) -> State:
    """Replace the given rows of ``state`` by those of ``fresh``, the result of ``init_state`` for all rows or for one.

    ``rows``: integers, where negative ones count from the end, or one bool per row. After packed documents, these rows
    belong to no document. Raises ``IndexError`` for a row out of range, and ``TypeError`` or ``ValueError`` for states
    of different structures, dtypes, devices or shapes.
    """
    if isinstance(state, DocumentState) and not isinstance(fresh, DocumentState):
        fresh = DocumentState(fresh, state.document.new_full((batch_size(fresh) or 1,), NO_DOCUMENT))
    size = batch_size(state)
    if size is None:
        return state
    given = batch_size(fresh)
    if given not in (size, 1, None):
        raise ValueError(f"reset: fresh has {given} rows: expected 1, or {size} as the state has")
    chosen = torch.zeros(size, dtype=torch.bool, device="cpu")
    chosen[_index(rows, size).cpu()] = True
    return _choose("reset", chosen, fresh, state)


def rewind(
    block: Any,
    state: State,
    x: Tensor,
    count: int | Sequence[int] | Tensor,
    *,
    mask: Tensor | None = None,
    documents: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    **options: Any,
) -> State:
    """Return the state after the first ``count`` tokens of the call ``block(x, state, mask=mask)``.

    The prefix is processed again, so the block must not have changed since. Gradients are those of the prefix.

    Args:
        block: a block or a model.
        state: the state before the call, or ``None`` for a fresh one.
        x: the inputs of the call, ``[batch, time, dim]``, or tokens ``[batch, time]`` of a model.
        count: an integer, or one for each row, from 0 to ``time``. Masked tokens count.
        mask, documents, cu_seqlens: those of the call.
        options: further arguments of the call.

    Raises ``TypeError`` or ``ValueError`` for another ``count``, and what the block raises for its inputs.
    """
    counts = prefix_lengths(count, *x.shape[:2])
    shared = getattr(block, "parallel", None)
    # ranks share a multiple of their number; a mask hides the rest
    ranks = 1 if shared is None else shared.context.size
    longest = min(-(-max(counts) // ranks) * ranks, x.shape[1])
    if longest == 0:
        return block.init_state(len(counts)) if state is None else state
    for name, ids in (("mask", mask), ("documents", documents)):
        if isinstance(ids, Tensor) and ids.shape != x.shape[:2]:
            raise ValueError(f"rewind: {name} {list(ids.shape)}: expected [batch, time] = {list(x.shape[:2])}")
    if cu_seqlens is not None:
        packed_ids(cu_seqlens, *x.shape[:2])  # checks
        ends = torch.as_tensor(cu_seqlens)
        if longest < x.shape[1]:
            ends = torch.cat((ends[ends < longest], ends.new_tensor([longest])))
        options["cu_seqlens"] = ends
    x, mask = x[:, :longest], None if mask is None else mask[:, :longest]
    if min(counts) < longest:
        within = torch.arange(longest, device=x.device) < torch.tensor(counts, device=x.device).unsqueeze(1)
        mask = within if mask is None else mask & within
    if documents is not None:
        options["documents"] = documents[:, :longest]
    with suppressed():  # observers have seen these tokens
        if not hasattr(block, "embed"):
            return block(x, state, mask=mask, **options)[1]
        given = {"tokens": x} if x.dim() == 2 else {"embeddings": x}  # of a model
        return block(**given, state=state, mask=mask, **options).state


def prefix_lengths(count: Any, rows: int, time: int) -> list[int]:
    """The argument ``count`` of :func:`rewind` as one integer for each row. Raises ``TypeError`` or ``ValueError``."""
    numbers = count if isinstance(count, (list, tuple)) else [count]
    given = torch.as_tensor(count, device="cpu") if all(isinstance(number, int) for number in numbers) else count
    if not isinstance(given, Tensor) or given.dtype in (torch.bool, torch.uint8) or given.is_floating_point():
        raise TypeError(f"rewind: expected a number of tokens, or one for each row as a list or int64, got {count!r}")
    if given.shape not in ((), (rows,)):
        raise ValueError(f"rewind: numbers of tokens {list(given.shape)}: expected one, or [{rows}], one for each row")
    counts: list[int] = given.expand(rows).tolist()
    for row, length in enumerate(counts):
        if not 0 <= length <= time:
            raise ValueError(f"rewind: row {row}: {length} tokens: expected 0 to {time}, the tokens of the call")
    return counts


def nbytes(state: State) -> int:
    """Return the size of all tensors in bytes. An expanded tensor counts in full, although it shares memory."""
    return sum(tensor.numel() * tensor.element_size() for _, tensor in named_tensors(state))


def _index(rows: Any, size: int) -> Tensor:
    """Return ``rows`` of a state of ``size`` rows as an int64 vector of row numbers >= 0."""
    try:
        given = rows if isinstance(rows, Tensor) else torch.as_tensor(rows, device="cpu")
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"rows: expected row numbers or bools, got {rows!r}") from None
    if given.numel() == 0:
        given = given.long()
    if given.dtype == torch.bool:
        if given.shape != (size,):
            raise IndexError(f"rows: bools {list(given.shape)}: expected one for each of the {size} rows of the state")
        return given.nonzero().flatten()
    if given.dim() > 1 or given.is_floating_point() or given.is_complex():
        raise TypeError(f"rows: expected a list of row numbers or bools, got {given.dtype} {list(given.shape)}")
    index = given.long().reshape(-1)
    wrong = index[(index < -size) | (index >= size)]
    if wrong.numel():
        raise IndexError(f"rows: row {int(wrong[0])} is out of range for a state of {size} rows")
    return torch.where(index < 0, index + size, index)


def _choose(name: str, rows: Tensor, state: State, other: State) -> State:
    """Take rows of ``state`` where ``rows`` is true, else of ``other``. A state of one row is used for all rows."""

    def choose(here: Tensor, there: Tensor) -> Tensor:
        if here.shape[1:] != there.shape[1:]:
            raise ValueError(
                f"{name}: rows of different shapes: {list(here.shape)}, {list(there.shape)} "
                "(states that grow must be equally long)"
            )
        _expect_alike(name, here, there)
        mask = rows.to(here.device, non_blocking=rows.is_cpu).view(-1, *[1] * (here.dim() - 1))
        y, count = torch.where(mask, here, there), len(rows)
        if not y.is_cpu and y.dim() == 1 and not y.is_floating_point() and rows.is_cpu:
            values = [integers(x, wait=False) for x in (here, there)]
            if values[0] is not None and values[1] is not None:
                pairs = zip(rows.tolist(), *(x * (count // len(x)) for x in values))
                known(y, [a if mine else b for mine, a, b in pairs])
        return y

    return map_state(choose, state, other)


def _expect_alike(name: str, *tensors: Tensor) -> None:
    """Raise unless corresponding tensors have one dtype and device. They are not converted implicitly."""
    if len({tensor.dtype for tensor in tensors}) > 1:
        raise TypeError(f"{name}: states of different dtypes: {', '.join(str(tensor.dtype) for tensor in tensors)}")
    if len({tensor.device for tensor in tensors}) > 1:
        raise ValueError(f"{name}: states on different devices: {', '.join(str(tensor.device) for tensor in tensors)}")
