"""A learner on rows: the fused operation where it computes the rule, stretches between resets, and documents."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...dispatch import advanced, integers, known, on_host, placed, shows_values, sum_is_finite
from ...documents import Documents
from ..operation import has_fast_backend, run_memory
from ..state import Tokens
from . import objectives
from .chunks import project_queries
from .rule import Rule
from .state import LearnerState, Writes
from .walk import begin, complete, run, take_window

Run = Callable[..., tuple[Tensor, LearnerState]]
"""``run(writes, state, mask, ends)``: the outputs, and the state of the rows ``ends``, or of all, after the writes."""


def by_place(gamma: Tensor | None) -> bool:
    """Whether weights of a window are those of its places."""
    return gamma is not None and gamma.dim() == 4


def fits(rule: Rule, norm: Tensor | None) -> bool:
    """Whether the operation ``titans_memory`` has this norm: its residual is the input after the features."""
    return norm is None or rule.features is None or rule.features.width(norm.shape[-1]) == norm.shape[-1]


def run_row(
    rule: Rule, writes: Writes, state: LearnerState, mask: Tensor | None, ends: list[int] | None = None, *,
    norm: Tensor | None, keep: int | None, half: str | None, backend: str,
) -> tuple[Tensor, LearnerState]:  # fmt: skip
    """A stretch without a reset inside it. ``ends``: as of ``titans_memory``."""
    options = rule.options(keep, half)
    if (rule.objective.learned and writes.parameter is None) or by_place(writes.gamma):
        options = None  # the general path says what is missing
    pick = lambda x: x if ends is None else x[ends]  # noqa: E731
    if options is not None and backend != "general" and fits(rule, norm):
        state = complete(rule, state, writes)
        tokens, shift, later = _tokens(rule, writes, state, norm, mask)
        before = state.plain()
        # where the general path solves for many chunks at once, products for each are slower
        rare = backend == "auto" and options.rare(tokens)
        slower = ("torch", "triton_batched", *(("triton",) if rare else ())) if rule.solves else ()
        if not rare or has_fast_backend(tokens, before, norm, mask, options, slower):
            y, after = run_memory(tokens, before, norm, mask, options._replace(ends=ends), backend)
            if shift is not None:
                y = y + (shift if mask is None else shift.masked_fill(~mask[..., None, None], 0.0))
            # otherwise, the general path finds the token from which on there is NaN or infinity; where a GPU would be
            # waited for, the operation does
            waits = not y.is_cpu and backend == "auto"
            if options.confines or waits or not shows_values(y) or sum_is_finite(y, *after.weights):
                return y, later.rows(pick)._replace(**after._asdict())
    gain = None if norm is None else norm.unsqueeze(1)
    y, state = run(rule, writes, complete(rule, state, writes), gain, mask)
    return y, state.rows(pick)


def _tokens(
    rule: Rule, writes: Writes, state: LearnerState, norm: Tensor | None, mask: Tensor | None
) -> tuple[Tokens, Tensor | None, LearnerState]:
    """What ``titans_memory`` is given for ``writes``; what is added to its outputs; and the state with what it does not
    know as it is after them.

    The residual of its norm is the network's input. Where features make this, values and outputs move by as much.
    """
    q, k, v, theta, eta, alpha, gamma, delta = writes
    if rule.query is not None:
        q, projection = _projected(q, k, state.projection, mask)
        state = state._replace(projection=projection)
    if rule.window > 1:
        across = writes.map(lambda x: x.transpose(1, 2))
        recent, held, every, state = take_window(rule, across, state, mask)
        k, v = every.k.transpose(1, 2), every.v.transpose(1, 2)
        delta = None if every.parameter is None else every.parameter.transpose(1, 2)
        there = torch.arange(1 - rule.window, 0, device=held.device) >= -held.unsqueeze(1)
        assert recent.gamma is not None
        before = torch.where(there.unsqueeze(1), recent.gamma, 0.0).transpose(1, 2)
        gamma = torch.cat([before, torch.ones_like(theta) if gamma is None else gamma], 1)
    elif gamma is not None:
        theta, gamma = theta * gamma, None
    query, key, shift = rule.features_of(q), rule.features_of(k), None
    if rule.features is not None and norm is not None:
        shift = q - query
        if type(rule.objective) is not objectives.DotProduct:  # which is not of the difference to the value
            v = v + (key - k)
    return Tokens(query, key, v, theta, eta, alpha, delta, gamma), shift, state


def _projected(q: Tensor, k: Tensor, projection: Any, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """``project_queries`` of ``[batch, time, heads, d_in]``. Values at masked tokens are arbitrary."""
    if mask is not None:
        q, k = (x.masked_fill(~mask[..., None, None], 0.0) for x in (q, k))
    q, projection = project_queries(q.transpose(1, 2), k.transpose(1, 2), projection, mask)
    return q.transpose(1, 2), projection


def run_stretches(
    run: Run, rule: Rule, writes: Writes, state: LearnerState, mask: Tensor | None, ends: list[int] | None = None
) -> tuple[Tensor, LearnerState]:
    """``run`` of the stretches between resets, which are rows side by side."""
    rows, time = writes.theta.shape[:2]
    if rule.reset is None or rows * time == 0:
        return run(writes, state, mask, ends)
    state, every = complete(rule, state, writes), rule.reset * rule.keys
    before, counts = state.position, [time] * rows if mask is None else on_host(mask).sum(1).tolist()
    places = integers(before)
    due = [count > 0 and place > 0 and place % every == 0 for place, count in zip(places, counts)]
    position, due_rows = before % every, placed(torch.tensor(due), before.device)
    if not before.is_cpu:
        known(position, [place % every for place in places])
    state = state._replace(position=position)
    pick = lambda x: x if ends is None else x[ends]  # noqa: E731
    if all(place % every + count <= every for place, count in zip(places, counts)):
        y, after = run(writes, begin(state, due_rows) if any(due) else state, mask, ends)
    else:
        seen = torch.arange(time) if mask is None else on_host(mask).cumsum(1) - 1
        ids = (torch.tensor([place % every for place in places]).unsqueeze(1) + seen).div(every, rounding_mode="floor")
        ids, ids_before = (placed(x, before.device) for x in (ids, -torch.tensor(due).long()))
        y, after = _apart(run, rule, writes, state, ids, mask, ids_before)
        after = after.rows(pick)
    return y, after._replace(position=pick(advanced(before, placed(torch.tensor(counts), before.device))))


def run_documents(
    run: Run, rule: Rule, writes: Writes, state: LearnerState, mask: Tensor | None, ids: Tensor
) -> tuple[Tensor, LearnerState]:
    """``run`` of every document as a row."""
    if not isinstance(ids, Tensor) or ids.dtype != torch.int64 or ids.shape != writes.theta.shape[:2]:
        got = f"{ids.dtype} {list(ids.shape)}" if isinstance(ids, Tensor) else type(ids).__name__
        raise ValueError(f"documents: expected int64 [batch, time], got {got}")
    if not state.initial:
        if bool((state.position > 0).any()):
            raise ValueError("documents: the state does not hold the initial weights, from which documents begin: "
                             "expected one made with documents or reset, or one at position 0")  # fmt: skip
        state = state._replace(initial=state.weights)
    return _apart(run, rule, writes, complete(rule, state, writes), ids, mask)


def _apart(
    run: Run, rule: Rule, writes: Writes, state: LearnerState, ids: Tensor, mask: Tensor | None,
    ids_before: Tensor | None = None,
) -> tuple[Tensor, LearnerState]:  # fmt: skip
    """``run`` of every document as a row, and the state after the last of each row. ``ids_before``: of the state."""
    documents = Documents(ids, mask, ids_before)
    groups, outputs, ends, order = documents.groups(begin=True), [], [], []
    for group in groups:
        rows = [documents.row[i] for i in group.documents]
        goes_on = [documents.continues[i] for i in group.documents]
        unpacked = writes.map(lambda x, group=group: documents.unpack(x, group))  # type: ignore[misc]
        if any(goes_on):
            anew = begin(state, True)._replace(position=torch.zeros_like(state.position))
            index = [row if on else documents.rows + row for row, on in zip(rows, goes_on)]
            before = _joined([state, anew]).rows(lambda x, index=index: x[index])  # type: ignore[misc]
        else:
            picked = placed(torch.tensor(rows), ids.device)
            weights = tuple(w.index_select(0, picked) for w in state.initial)
            momentum = tuple(torch.zeros_like(w[:1]).expand_as(w) for w in weights[: len(state.momentum)])
            position = state.position.new_zeros(len(rows))
            if not position.is_cpu:
                known(position, [0] * len(rows))
            before = complete(rule, LearnerState(weights, momentum, weights, position, weights), unpacked)
        final = [place for place, i in enumerate(group.documents) if documents.last[documents.row[i]] == i]
        y, after = run(unpacked, before, None if group.layout is None else group.layout.filled, final)
        outputs.append(y)
        ends.append(after)
        order += [rows[place] for place in final]
    unread = [row for row, i in enumerate(documents.last) if i is None]
    ends.append(state.rows(lambda x: x[unread]))
    order += unread
    if not outputs:
        return torch.zeros_like(writes.v), state
    index = sorted(range(len(order)), key=order.__getitem__)
    return documents.pack(outputs, groups), _joined(ends).rows(lambda x: x[index])


def _joined(states: list[LearnerState]) -> LearnerState:
    """The rows of all states."""
    parts: list[Any] = []
    for part in zip(*states):
        if part[0] is None:
            parts.append(None)
        else:
            parts.append(torch.cat(part) if isinstance(part[0], Tensor) else tuple(map(torch.cat, zip(*part))))
    return LearnerState(*parts)
