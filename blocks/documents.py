"""Documents packed in rows: each is processed as a row of its own, from a fresh state."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ..kernels.dispatch import copied, expect_values, placed
from ..kernels.documents import Documents, Group, packed_ids
from ..kernels.padding import align
from .observers import active, observers_of
from .state import State, concatenate, map_state, select, where


def expect_documents(
    block: nn.Module,
    documents: Tensor | None,
    cu_seqlens: Tensor | None,
    x: Tensor,
    mask: Tensor | None,
    before: Tensor | None,
) -> Documents:
    """Return the documents of the inputs ``x`` [batch, time, ...] of ``block``: see ``Documents``.

    ``documents``: ids ``[batch, time]``. ``cu_seqlens``: boundaries ``[documents + 1]`` in one row, of which the first
    document goes on from a given state unless it is empty.
    """
    rows, time = x.shape[:2]
    if active and any(True for module in block.modules() for _ in observers_of(module)):
        raise ValueError("packed documents cannot be observed: give each document as a row")
    if x.is_meta:
        raise ValueError("documents: the inputs are on the meta device, where boundaries have no values")
    if cu_seqlens is not None:
        if documents is not None:
            raise ValueError("give either documents [batch, time] or cu_seqlens [documents + 1], and not both")
        if isinstance(cu_seqlens, Tensor):
            expect_values("cu_seqlens", cu_seqlens)
        ids, ended, empty = packed_ids(cu_seqlens, rows, time)
        return Documents(placed(ids.cpu(), x.device), mask, None, ended=ended, empty=empty)
    if not isinstance(documents, Tensor) or documents.dtype != torch.int64:
        got = documents.dtype if isinstance(documents, Tensor) else type(documents).__name__
        raise TypeError(f"documents: expected an int64 tensor [batch, time], got {got}")
    if documents.shape != (rows, time):
        raise ValueError(f"documents {list(documents.shape)}: expected [batch, time] = {[rows, time]}")
    if documents.device != x.device and not documents.is_cpu:
        raise ValueError(f"documents are on {documents.device}: expected {x.device}, as the inputs are")
    expect_values("documents", documents)
    # ids that are on a CPU need not be waited for
    return Documents(documents if documents.device == x.device else placed(documents, x.device), mask, before)


def run_documents(
    run: Callable[..., tuple[Tensor, State]],
    documents: Documents,
    inputs: Sequence[Tensor],
    state: State,
    mask: Tensor | None,
    init_state: Callable[[int], State],
    *,
    grows: bool = False,
    aligned: bool = False,
    join: Callable[[Sequence[State]], State] = concatenate,
) -> tuple[Tensor, State]:
    """Return the outputs ``[batch, time, ...]`` of packed documents, and the state after the last of each row.

    Args:
        run: ``run(*rows, state, mask)`` processes rows with one document each, whose padding is at the end. ``state``
            is ``None`` for documents that begin.
        documents: the documents of the batch.
        inputs: tensors ``[batch, time, ...]``.
        state: the state before the call; ``None``: a fresh one.
        mask: that of the batch.
        init_state: returns a fresh state.
        grows: whether the states of rows differ in shape.
        aligned: call ``run(*rows, state, layout, ends)`` with the valid tokens of each row at its beginning, and any
            values at padding. ``ends``: the rows whose states are returned; ``None``: all.
        join: concatenates states.
    """

    def fresh(rows: int) -> State:
        if documents.fresh is None:
            return init_state(rows)
        return map_state(lambda x: copied(x.expand(rows, *x.shape[1:]), x, rows), documents.fresh)

    def begin(rows: int) -> State:
        return None if documents.fresh is None else fresh(rows)

    last = documents.last
    goes_on = [state is not None and (i is None or documents.continues[i]) for i in last]
    # one document in each row: the rows need not be divided, unless states that grow would have to be joined
    if documents.apart and (all(goes_on) or not any(goes_on) or not grows):
        before = state
        if not all(goes_on):
            kept = placed(torch.tensor(goes_on), documents.device)
            before = where(kept, state, fresh(documents.rows)) if any(goes_on) else begin(documents.rows)
        layout = align(mask) if aligned and mask is not None else None
        if layout is not None:
            y, after = run(*map(layout.spread, inputs), before, layout, None)
            y = layout.collect(y)
        else:
            y, after = run(*inputs, before, None, None) if aligned else run(*inputs, before, mask)
    else:
        # the states of rows that grow can be concatenated if the rows are in one group
        groups = documents.groups(grows and join is concatenate, begin=state is None)
        rows_after = {i: b for b, i in enumerate(last)}
        outputs, ends, order = [], [], []
        for group in groups:
            before = states_before(documents, group, state) if group.continues else begin(len(group.documents))
            final = [place for place, i in enumerate(group.documents) if i in rows_after]
            some, layout = len(final) < len(group.documents), group.layout
            rows = [documents.unpack(x, group) for x in inputs]
            if aligned:
                y, end = run(*rows, before, layout, final if some else None)
            else:
                rows = rows if layout is None else [layout.spread(x) for x in rows]  # zero at padding
                y, end = run(*rows, before, None if layout is None else layout.filled)
            outputs.append(y)
            if final:
                ends.append(select(end, final) if some and not aligned else end)
                order += [rows_after[group.documents[place]] for place in final]
        unread = [b for b, i in enumerate(last) if i is None]
        if unread:
            ends.append(fresh(len(unread)) if state is None else select(state, unread))
            order += unread
        y = documents.pack(outputs, groups)
        after = in_order(ends, order, join) if order else None
    return y, fresh(documents.rows) if documents.empty else after


def read_documents(
    read: Callable[[Sequence[Tensor], State], Tensor],
    documents: Documents,
    inputs: Sequence[Tensor],
    state: State,
    fresh: State,
) -> Tensor:
    """Return ``read(rows, state)`` of packed documents, which does not write.

    ``state``: that of each row. ``fresh``: the state of one row from which documents begin. They share a row.
    """
    if not any(documents.continues):
        return read(inputs, fresh)
    groups, outputs = documents.groups_to_read(), []
    for group in groups:
        rows = [documents.unpack(x, group) for x in inputs]
        outputs.append(read(rows, states_before(documents, group, state) if group.continues else fresh))
    return documents.pack(outputs, groups)


def states_before(documents: Documents, group: Group, state: State) -> State:
    """Return the states from which the documents of a group go on."""
    rows = [documents.row[i] for i in group.documents]
    return state if rows == list(range(documents.rows)) else select(state, rows)


def in_order(states: list[State], order: list[int], join: Callable[[Sequence[State]], State] = concatenate) -> State:
    """Return the rows of ``states`` as one state, where ``order`` is the row of each."""
    if len(states) == 1 and order == sorted(order):
        return states[0]
    try:
        joined = join(states)
    except ValueError as error:
        raise ValueError(
            "documents: some rows go on from the state and others begin a document, and the states of this block, "
            f"which grow, cannot be in one batch: give these rows in separate calls ({error})"
        ) from None
    return select(joined, sorted(range(len(order)), key=order.__getitem__))
