"""Documents packed in rows: where each begins and ends, and tensors that have one row for each document.

A packed row ``[a a a | b b | c c c c]`` becomes rows ``[a a a .]``, ``[b b . .]``, ``[c c c c]``. Documents of similar
length share a tensor, so that little is padded.
"""

from __future__ import annotations

import bisect
import copy
import functools
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .dispatch import integers, on_host, placed
from .padding import Layout

NO_DOCUMENT = torch.iinfo(torch.int64).min
"""The id of no document: the row has had no token."""
GROUP_COST = 128
"""Cost of one more group, in tokens of padding."""
MAX_LENGTHS = 64
"""Maximum number of different lengths that are considered. Longer documents are rounded up."""


class Group(NamedTuple):
    """Documents that are processed together, one in each row."""

    documents: list[int]
    source: Tensor
    """``[documents, longest]`` int64: the index of each token in ``[batch * time]``."""
    layout: Layout | None
    """The places of the tokens in the rows, which are at their beginning; ``None`` if there is no padding."""
    continues: bool
    """Whether the documents go on from the state of their row. Otherwise they begin."""
    first: int | None = None
    """The index of the first token, if those of all documents follow each other in ``[batch * time]``."""


class Step(NamedTuple):
    """Segments that are processed together, one of each document, one after the other in a packed row."""

    start: int
    """The place of the first token in ``Segments.source``."""
    stop: int
    documents: Documents
    """The segments as documents: those after the first go on. The states of the documents that have further segments
    are returned, and then those of the last document of each row."""
    apart: Documents
    """The same, where segments after the first begin. The states of the last document of each row are returned."""
    further: int
    """The number of documents that have further segments."""
    rows: list[int]
    """For each last document of a row, the row of the state after the call."""
    position: list[int]
    """The positions of these."""


class Segments(NamedTuple):
    """The segments of all documents, in the order in which they are processed: the first of each, the second, ..."""

    source: Tensor
    """``[tokens]`` int64: the index of each token in ``[batch * time]``."""
    target: Tensor
    """``[batch * time]`` int64: the place of each token in ``source``; 0 if it is masked."""
    steps: list[Step]


class Documents:
    """The documents of a batch ``[batch, time]`` of packed rows.

    Args:
        ids: ``[batch, time]`` int64: the document of each token. Does not decrease along a row.
        mask: ``[batch, time]`` bool: tokens where it is false belong to no document.
        before: ``[batch]`` int64: the document that the state before the call belongs to. A row's first document goes
            on from the state if it has this id, or if the id is ``NO_DOCUMENT``. By default, it goes on.
        ended: the documents before the call have ended, although the first id may be equal.
        empty: a document without tokens follows the last one. Its id is the last of the batch.

    Raises ``TypeError`` or ``ValueError`` for ids of a wrong type, dtype, shape or order.
    """

    rows: int
    """The number of rows of the state before the call."""
    row: list[int]
    """The row of each document, in the order of the tokens."""
    length: list[int]
    """The number of tokens of each document, at least 1."""
    continues: list[bool]
    """Whether the document goes on from the state of its row."""
    last: list[int | None]
    """For each row of the state after the call, its document: the last of the row. ``None`` if it has no tokens."""
    after: Tensor
    """``[batch]`` int64: the document that the state after the call belongs to."""
    fresh: Any = None
    """The state of one row from which documents begin, if it is not that of ``init_state``."""

    def __init__(
        self,
        ids: Tensor,
        mask: Tensor | None = None,
        before: Tensor | None = None,
        *,
        ended: bool = False,
        empty: int | None = None,
    ) -> None:
        self.rows, time = ids.shape
        self.shape = self.rows, time
        self.device, self.empty = ids.device, empty is not None
        self._cache: dict[Any, Any] = {}
        host = on_host(ids)
        flat = torch.arange(host.numel()) if mask is None else on_host(mask).flatten().nonzero().flatten()
        self._tokens, found = flat, host.flatten()[flat]
        row = flat // max(time, 1)
        same_row = row[1:] == row[:-1]
        wrong = (same_row & (found[1:] < found[:-1])).nonzero()
        if len(wrong):
            at = int(flat[1:][wrong[0]])
            old, new = int(found[wrong[0]]), int(found[wrong[0] + 1])
            raise ValueError(
                f"documents: id {new} at row {at // time}, token {at % time} follows {old}: expected ids "
                "that do not decrease along a row"
            )
        # the first token of all, and each that differs from the one before in row or document
        begins = F.pad(~same_row | (found[1:] != found[:-1]), (1, 0), value=True)[: len(flat)].nonzero().flatten()
        self._starts: list[int] = begins.tolist()
        self.row = row[begins].tolist()
        self.length = torch.diff(begins, append=torch.tensor([len(flat)])).tolist()
        self.last = [None] * self.rows
        first: dict[int, int] = {}
        for i, b in enumerate(self.row):
            first.setdefault(b, i)
            self.last[b] = i
        known = [NO_DOCUMENT] * self.rows if before is None else integers(before)
        names = found[begins].tolist()
        self.continues = [
            first[b] == i and not ended and known[b] in (NO_DOCUMENT, names[i]) for i, b in enumerate(self.row)
        ]
        after = [known[b] if i is None else names[i] for b, i in enumerate(self.last)]
        self.after = placed(torch.tensor(after if empty is None else [empty] * self.rows), self.device)
        self.ended = ended

    @classmethod
    def packed(
        cls,
        length: list[int],
        row: list[int],
        continues: list[bool],
        last: Sequence[int | None],
        rows: int,
        device: torch.device,
    ) -> Documents:
        """Documents of any ``length`` in one packed row ``[1, tokens]``, with a row of the state for each."""
        self = cls.__new__(cls)
        self.rows, self.shape, self.device, self.empty = rows, (1, sum(length)), device, False
        self.length, self.row, self.continues, self.last = length, row, continues, list(last)
        self._tokens, self._starts, self._cache = torch.arange(sum(length)), _starts(length), {}
        return self

    def repeated(self, times: int) -> Documents:
        """The documents where there are ``times`` tokens in place of each token of a packed row."""
        length = [count * times for count in self.length]
        packed = Documents.packed(length, self.row, self.continues, self.last, self.rows, self.device)
        return packed.starting(self.fresh)

    @functools.cached_property
    def apart(self) -> bool:
        """Whether no row has more than one document, and the states of all rows are returned."""
        return len(set(self.row)) == len(self.row) and len(self.last) == self.shape[0] == self.rows

    def starting(self, fresh: Any) -> Documents:
        """The same documents, which begin from the state ``fresh`` of one row."""
        documents = copy.copy(self)
        documents.fresh = fresh
        return documents

    def parts(self, count: int) -> list[Documents]:
        """The documents for each of ``count`` blocks, whose states make up the state of a block."""
        return [self] * count if self.fresh is None else [self.starting(fresh) for fresh in self.fresh]

    def groups(self, last_together: bool = False, begin: bool = False) -> list[Group]:
        """Divide the documents into groups of similar length.

        Those that go on and those that begin are in different groups. ``last_together``: the last documents of the rows
        are in one group each, in the order of the rows. ``begin``: all documents begin.
        """
        key = last_together, begin
        if key not in self._cache:
            kinds: dict[tuple[bool, bool], list[int]] = {}
            for i, continues in enumerate(self.continues):
                kind = continues and not begin, last_together and self.last[self.row[i]] == i
                kinds.setdefault(kind, []).append(i)
            self._cache[key] = [
                self._group(members, continues)
                for (continues, together), all_ in kinds.items()
                for members in ([all_] if together else group_by_length([(self.length[i], i) for i in all_]))
            ]
        groups: list[Group] = self._cache[key]
        return groups

    def groups_to_read(self) -> list[Group]:
        """Those of ``groups`` that go on, after one row of all documents that begin."""
        if "read" not in self._cache:
            begin = torch.tensor(self.continues).logical_not().repeat_interleave(torch.tensor(self.length))
            source = placed(self._tokens[begin].unsqueeze(0), self.device)
            shared = [Group([], source, None, False)] if source.numel() else []
            self._cache["read"] = [*shared, *(group for group in self.groups() if group.continues)]
        groups: list[Group] = self._cache["read"]
        return groups

    def segments(self, segment: int, position: list[int], begin: bool) -> Segments:
        """Divide the documents into segments.

        Args:
            segment: tokens of a segment.
            position: of each document, the number of tokens before those of this call.
            begin: all documents begin.
        """
        key = segment, *position, begin
        if key not in self._cache:
            self._cache[key] = self._segments(segment, position, begin)
        segments: Segments = self._cache[key]
        return segments

    def _segments(self, segment: int, position: list[int], begin: bool) -> Segments:
        after = {i: b for b, i in enumerate(self.last)}
        here, done = list(range(len(self.row))), [0] * len(self.row)
        steps, places, start = list[Step](), list[Tensor](), 0
        while here:
            length = [min(self.length[i] - done[i], segment - (position[i] + done[i]) % segment) for i in here]
            for i, count in zip(here, length):
                first = self._starts[i] + done[i]
                places.append(torch.arange(first, first + count))
                done[i] += count
            further = [place for place, i in enumerate(here) if done[i] < self.length[i]]
            last = [place for place, i in enumerate(here) if done[i] == self.length[i] and i in after]
            row, rows = list(range(len(here))), len(here)
            goes_on, apart = [True] * rows, [False] * rows
            if not steps:
                row, rows = self.row, self.rows
                goes_on = apart = [each and not begin for each in self.continues]
            steps.append(
                Step(
                    start,
                    start := start + sum(length),
                    Documents.packed(length, row, goes_on, [*further, *last], rows, self.device),
                    Documents.packed(length, row, apart, last, rows, self.device),
                    len(further),
                    [after[here[place]] for place in last],
                    [position[here[place]] + done[here[place]] for place in last],
                )
            )
            here = [here[place] for place in further]
        source = placed(self._tokens[torch.cat(places)], self.device)
        target = self._flat(torch.int64)
        target[source] = torch.arange(len(source), device=self.device)
        return Segments(source, target, steps)

    def _group(self, members: list[int], continues: bool) -> Group:
        length = torch.tensor([self.length[i] for i in members])
        start = torch.tensor([self._starts[i] for i in members])
        time = torch.arange(int(length.max()))
        # padding repeats the last token of the document
        source = self._tokens[start[:, None] + torch.minimum(time, length[:, None] - 1)]
        layout = None
        if not bool((length == len(time)).all()):
            filled = placed(time < length[:, None], self.device)
            layout = Layout(None, filled, placed(time, self.device) * filled, filled, placed(length, self.device))
        first, last = int(source[0, 0]), int(source[-1, -1])
        in_order = layout is None and bool((start.diff() == len(time)).all()) and last - first + 1 == source.numel()
        return Group(members, placed(source, self.device), layout, continues, first if in_order else None)

    def unpack(self, x: Tensor, group: Group) -> Tensor:
        """``[batch, time, ...]`` -> ``[documents, longest, ...]``. Padding repeats the last token."""
        x, first = x.flatten(0, 1), group.first
        if first is not None:
            return x[first : first + group.source.numel()].unflatten(0, group.source.shape)
        return x.index_select(0, group.source.flatten()).unflatten(0, group.source.shape)

    def pack(self, outputs: list[Tensor], groups: list[Group]) -> Tensor:
        """The outputs ``[documents, longest, ...]`` of each group -> ``[batch, time, ...]``, zero at masked tokens."""
        if len(groups) == 1 and groups[0].first == 0 and groups[0].source.numel() == self.shape[0] * self.shape[1]:
            return outputs[0].flatten(0, 1).unflatten(0, self.shape)
        flat = torch.cat([y.flatten(0, 1) for y in outputs])
        key = id(groups)
        if key not in self._cache:
            target = torch.zeros(self.shape[0] * self.shape[1], dtype=torch.int64)
            offset = 0
            for group in groups:
                source = on_host(group.source)
                place = torch.arange(offset, offset + source.numel()).view_as(source)
                offset += source.numel()
                if group.layout is not None:
                    filled = on_host(group.layout.filled)
                    source, place = source[filled], place[filled]
                target[source.flatten()] = place.flatten()
            self._cache[key] = target = placed(target, self.device)
        return self._placed(flat, self._cache[key])

    def spread(self, x: Tensor, segments: Segments) -> Tensor:
        """``[batch, time, ...]`` -> ``[1, tokens, ...]`` in the order of the segments, without masked tokens."""
        return x.flatten(0, 1).index_select(0, segments.source).unsqueeze(0)

    def collect(self, y: Tensor, segments: Segments) -> Tensor:
        """The outputs ``[1, tokens, ...]`` of segments -> ``[batch, time, ...]``, zero at masked tokens."""
        return self._placed(y[0], segments.target)

    def _placed(self, flat: Tensor, target: Tensor) -> Tensor:
        y = flat.index_select(0, target).unflatten(0, self.shape)
        if len(self._tokens) == self.shape[0] * self.shape[1]:
            return y
        return y.masked_fill(~self._valid.view(*self.shape, *[1] * (y.dim() - 2)), 0.0)

    @functools.cached_property
    def _valid(self) -> Tensor:
        valid = self._flat(torch.bool)
        valid[placed(self._tokens, self.device)] = True
        return valid

    def _flat(self, dtype: torch.dtype) -> Tensor:
        return torch.zeros(self.shape[0] * self.shape[1], dtype=dtype, device=self.device)

    def next_tokens(self, tokens: Tensor, ignored: int) -> Tensor:
        """The token after each of ``tokens`` [batch, time] in its document, ``ignored`` at its last and if masked."""
        flat = placed(self._tokens, self.device)
        following = tokens.flatten()[flat].roll(-1, 0)
        ends = torch.tensor([*self._starts, len(flat)][1:], dtype=torch.int64) - 1  # empty if there are no tokens
        following[placed(ends, self.device)] = ignored
        targets = torch.full_like(tokens, ignored).flatten()
        targets[flat] = following
        return targets.view_as(tokens)


def _starts(length: list[int]) -> list[int]:
    return [0, *itertools.accumulate(length)][:-1]


def group_by_length(items: list[tuple[int, int]]) -> list[list[int]]:
    """Divide ``(length, item)`` into groups of least cost: padding, and ``GROUP_COST`` for each group."""
    items = sorted(items)
    longest = items[-1][0]
    quantum = 1 if len({length for length, _ in items}) <= MAX_LENGTHS else -(-longest // MAX_LENGTHS)
    sizes = sorted({-(-length // quantum) * quantum for length, _ in items})
    counts = [bisect.bisect_right(items, (size, 2**62)) for size in sizes]
    best: list[tuple[float, int]] = [(0.0, 0)]
    for i, size in enumerate(sizes):
        best.append(
            min((best[j][0] + GROUP_COST + size * (counts[i] - (counts[j - 1] if j else 0)), j) for j in range(i + 1))
        )
    groups, i = [], len(sizes)
    while i:
        j = best[i][1]
        groups.append([item for _, item in items[counts[j - 1] if j else 0 : counts[i - 1]]])
        i = j
    return groups


def packed_ids(cu_seqlens: Any, rows: int, time: int) -> tuple[Tensor, bool, int | None]:
    """The ids ``[1, time]`` of documents with the boundaries ``cu_seqlens`` [documents + 1], from 0 on.

    Also returns whether the first document is empty, and the id of the last one if it is empty. Raises ``TypeError`` or
    ``ValueError`` for boundaries that do not fit one row of ``time`` tokens.
    """
    if isinstance(cu_seqlens, list | tuple) and all(type(end) is int for end in cu_seqlens):
        cu_seqlens = torch.tensor(cu_seqlens)
    if not isinstance(cu_seqlens, Tensor) or cu_seqlens.dtype not in (torch.int32, torch.int64):
        got = cu_seqlens.dtype if isinstance(cu_seqlens, Tensor) else type(cu_seqlens).__name__
        raise TypeError(f"cu_seqlens: expected an int32 or int64 tensor [documents + 1], got {got}")
    if rows != 1:
        raise ValueError(f"cu_seqlens: expected one packed row, got {rows} rows (documents= takes ids [batch, time])")
    if cu_seqlens.dim() != 1 or len(cu_seqlens) < 2:
        raise ValueError(f"cu_seqlens {list(cu_seqlens.shape)}: expected [documents + 1] with at least one document")
    ends = cu_seqlens.cpu().long()
    lengths = ends.diff()
    if int(ends[0]) != 0 or int(ends[-1]) != time or bool((lengths < 0).any()):
        raise ValueError(
            f"cu_seqlens: expected boundaries from 0 to the number of tokens, {time}, that do not decrease, got "
            f"{ends.tolist() if len(ends) < 12 else [*ends[:5].tolist(), '...', *ends[-5:].tolist()]}"
        )
    ids = torch.arange(len(lengths)).repeat_interleave(lengths)[None].to(cu_seqlens.device)
    return ids, int(lengths[0]) == 0, len(lengths) - 1 if int(lengths[-1]) == 0 else None
