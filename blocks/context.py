"""``context``: memory as context (MAC). Read, attend, write, gate, segment by segment (paper 4.2)."""

from __future__ import annotations

import math
from typing import Annotated, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

from ..kernels.padding import Layout, align
from ..registry import Needs, Spec, create, register
from .block import Block, Decoder, as_memory, as_rows, check_input, check_state
from .decoding import decoder, reader
from .gate import Form, Gating
from .state import State, reset, select, where
from .walking import walk
from .watching import moved, unwatched, watches


class ContextState(NamedTuple):
    """What a context block carries from token to token."""

    memory: State
    """The memory after the last token written."""
    snapshot: State
    """The memory as it stood at the start of the current segment: what is read from."""
    attend: State
    """What attention has seen: the persistent tokens, and this segment so far."""
    position: Tensor
    """``[batch]`` int64: tokens read."""


class Piece(NamedTuple):
    """A stretch of time in which no row crosses a segment boundary."""

    start: int
    stop: int
    begins: list[bool] | Tensor
    """Per row: the row begins a segment here, other than its first. Bool ``[batch]`` where a compiler traces."""
    whole: bool
    """Every row runs through exactly one full segment."""
    real: Tensor | None
    """``[batch, stop - start]`` bool: where rows have tokens; ``None`` where all do."""


@register("context")
class Context(Block):
    """Memory as context: attention sees what the memory recalls, and the memory learns what attention makes of it.

    For each segment of tokens ``x_1..x_C`` (equations 21-25, causal at every token):

    1. read    ``h_j = M(x_j)`` from the memory as it stood at the start of the segment;
    2. attend  ``y_j`` from the persistent tokens, ``h_1..h_j`` and ``x_1..x_j``;
    3. write   ``y_j`` into the memory, token by token;
    4. gate    ``o_j = gate(y_j, M_j(y_j))``, read after ``y_j`` is written and before any later one is.

    ``attend`` is given the stream ``h_1, x_1, h_2, x_2, ...`` and asked at the x's, so its being causal is the whole
    mask, and any causal block can stand there. It starts anew, with the persistent tokens, at every segment.

    ``write: inputs`` writes ``x_j`` in place of ``y_j``: the memory no longer waits for attention, and all segments
    attend at once. That is not the paper's architecture.
    """

    def __init__(
        self,
        dim: int,
        *,
        segment: Annotated[int, Field(ge=1, le=2**20, description="tokens per segment")] = 128,
        persistent: Annotated[int, Field(ge=0, le=2**16, description="learned tokens that attention always sees")] = 16,
        memory: Annotated[Spec, Needs("read", "write"), Field(description="what is read and written")] = "memory",
        attend: Annotated[Spec, Field(description="any causal block; starts anew at every segment")] = "attention",
        write: Annotated[
            Literal["attended", "inputs"],
            Field(description="what is written: attention's outputs (the paper's), or inputs (segments in parallel)"),
        ] = "attended",
        form: Annotated[
            Form, Field(description="norm(y) times sigmoid or silu of norm(m), or plus norm(m)")
        ] = "sigmoid",
    ) -> None:
        super().__init__(dim)
        self.segment = segment
        self.write = write
        self.memory = create(memory, dim=dim)
        self.attend = create(attend, dim=dim)
        self.attend.bound(2 * segment)
        self.persistent = nn.Parameter(torch.empty(persistent, dim)) if persistent else None
        self.gate = Gating(dim, form)
        self.period = math.lcm(segment, self.memory.period)
        self.grows = self.memory.grows or self.attend.grows

    def init_state(self, batch_size: int) -> ContextState:
        memory = self.memory.init_state(batch_size)
        position = torch.zeros(batch_size, dtype=torch.int64, device=self.gate.gain_a.device)
        return ContextState(memory, memory, self._fresh_attend(batch_size), position)

    def forward(
        self, x: Tensor, state: ContextState | None = None, *, mask: Tensor | None = None
    ) -> tuple[Tensor, ContextState]:
        check_input(self, x, mask, like=self.gate.gain_a)
        rows, time, _ = x.shape
        fresh = state is None
        if state is None:
            state = self.init_state(rows)
        check_state(self, state, ContextState, rows)
        run = self._run if self.write == "attended" else self._run_inputs
        if torch.compiler.is_compiling() and not (fresh and mask is None):
            layout, pieces = self._unknown_pieces(x, mask, state.position)
            y, state = run(layout.spread(x), state, pieces)
            return layout.collect(y), state._replace(position=state.position + layout.length)
        positions = [0] * rows if fresh else state.position.tolist()
        if mask is None:
            y, state = run(x, state, self._pieces(positions, [time] * rows, None))
            return y, state._replace(position=state.position + time)
        layout = align(mask)
        pieces = self._pieces(positions, layout.length.tolist(), layout.filled)
        with moved(self, layout):
            y, state = run(layout.spread(x), state, pieces)
        return layout.collect(y), state._replace(position=state.position + layout.length)

    def decoder(self, rows: int, *, time: int = 1, step: int = 1) -> Decoder | None:
        if time != 1 or self.write != "attended":
            return None
        recall, learn = reader(as_memory(self.memory), rows), decoder(self.memory, rows)
        attending, gate, segment = decoder(self.attend, rows, time=2, step=2), self.gate.prepared(rows, 1), self.segment

        def decode(x: Tensor, state: ContextState) -> tuple[Tensor, ContextState]:
            memory, snapshot, attend, position = state
            begins = [place > 0 and place % segment == 0 for place in position.tolist()]
            if any(begins):
                snapshot = _restart(begins, snapshot, memory)
                attend = _restart(begins, attend, self._fresh_attend(rows))
            with unwatched():
                y, attend = attending(torch.cat((recall(x, snapshot), x), dim=1), attend)
            m, memory = learn(y, memory)
            self._tell(y, m)
            return gate(y, m), ContextState(memory, snapshot, attend, position + 1)

        return decode

    def _run(self, x: Tensor, state: ContextState, pieces: list[Piece]) -> tuple[Tensor, ContextState]:
        memory, snapshot, attend, position = state
        ask, answer, learn, finish = walk(self.memory, len(pieces))
        fresh: State = None
        attended, answers = [], []
        for piece, tokens, *asked in zip(pieces, *_cut(pieces, x, *ask(x))):
            if _any(piece.begins):
                fresh = fresh if fresh is not None else self._fresh_attend(x.shape[0])
                snapshot = _restart(piece.begins, snapshot, memory)
                attend = _restart(piece.begins, attend, fresh)
            h = answer(asked, snapshot)  # 1. read
            y, attend = self._attend(h, tokens, attend, piece.real)  # 2. attend
            m, memory = learn(y, memory, mask=piece.real)  # 3. write each y_j, and read it back
            attended.append(y)
            answers.append(m)
        y = _join(attended, x)
        m = finish(_join(answers, x), y)
        self._tell(y, m)
        return self.gate(y, m), ContextState(memory, snapshot, attend, position)  # 4. gate

    def _run_inputs(self, x: Tensor, state: ContextState, pieces: list[Piece]) -> tuple[Tensor, ContextState]:
        """``write: inputs``: the whole walk of the memory first, then attention."""
        memory, snapshot, attend, position = state
        ask, answer, learn, finish = walk(self.memory, len(pieces))
        recalled, written = [], []
        for piece, tokens, *asked in zip(pieces, *_cut(pieces, x, *ask(x))):
            if _any(piece.begins):
                snapshot = _restart(piece.begins, snapshot, memory)
            recalled.append(answer(asked, snapshot))
            m, memory = learn(tokens, memory, mask=piece.real)
            written.append(m)
        fresh: State = None
        attended = []
        done = 0
        while done < len(pieces):
            piece, together = pieces[done], 1
            while piece.whole and done + together < len(pieces) and pieces[done + together].whole:
                together += 1
            if together > 1:
                # full segments do not see each other: each is a row of one batch
                rows, fold = x.shape[0] * together, (x.shape[0] * together, self.segment, self.dim)
                h = torch.cat(recalled[done : done + together], dim=1)
                tokens = x[:, piece.start : piece.start + together * self.segment]
                y, ends = self._attend(h.reshape(fold), tokens.reshape(fold), self._fresh_attend(rows), None)
                y, attend = y.reshape(h.shape), select(ends, slice(together - 1, None, together))
            else:
                if _any(piece.begins):
                    fresh = fresh if fresh is not None else self._fresh_attend(x.shape[0])
                    attend = _restart(piece.begins, attend, fresh)
                y, attend = self._attend(recalled[done], x[:, piece.start : piece.stop], attend, piece.real)
            attended.append(y)
            done += together
        y, m = _join(attended, x), finish(_join(written, x), x)
        self._tell(y, m)
        return self.gate(y, m), ContextState(memory, snapshot, attend, position)

    def _attend(self, recalled: Tensor, x: Tensor, state: State, real: Tensor | None) -> tuple[Tensor, State]:
        """Attention at each ``x_j``, which sees ``h_1..h_j`` and ``x_1..x_j``. All ``[rows, time, dim]``."""
        rows, time, dim = x.shape
        stream = torch.stack([recalled, x], dim=2).view(rows, 2 * time, dim)
        mask = None if real is None else real.repeat_interleave(2, dim=1)
        with unwatched():  # it reads a stream of its own, which begins anew at every segment
            return self.attend.every(stream, state, step=2, mask=mask)

    def _tell(self, y: Tensor, m: Tensor) -> None:
        """What is gated, to whoever watches."""
        for watch in watches(self):
            watch.gated(self, self.gate.opening(m), y, m, None)

    def _fresh_attend(self, rows: int) -> State:
        """Attention that has seen the persistent tokens and nothing else."""
        if self.persistent is None:
            return self.attend.init_state(rows)
        # every row starts from the same state: it is computed once
        return as_rows(self.attend.prefix(self.persistent.unsqueeze(0))[1], rows)

    def _pieces(self, positions: list[int], lengths: list[int], filled: Tensor | None) -> list[Piece]:
        """Cut the time axis at every segment boundary of any row that still has tokens."""
        segment, slots, start = self.segment, max(lengths) if lengths else 0, 0
        pieces = []
        while start < slots:
            at = [position + start for position in positions]
            live = [start < length for length in lengths]
            stop = min(slots, start + min(segment - p % segment for p, here in zip(at, live) if here))
            # at position 0 the state is as init_state left it, which is how a segment begins
            begins = [here and p > 0 and p % segment == 0 for p, here in zip(at, live)]
            full = min(lengths) >= stop
            whole = full and stop - start == segment and not any(p % segment for p in at)
            real = None if full or filled is None else filled[:, start:stop]
            pieces.append(Piece(start, stop, begins, whole, real))
            start = stop
        return pieces

    def _unknown_pieces(self, x: Tensor, mask: Tensor | None, position: Tensor) -> tuple[Layout, list[Piece]]:
        """Pieces for rows of which nobody knows, while a compiler traces, where they stand and how long they are.

        Each row's first segment boundary is moved to one slot, and the others follow it: the pieces are then the same
        for all rows wherever they stand, with a slot or a piece too many where a row begins later.
        """
        (rows, time, _), segment = x.shape, self.segment
        first = min(time, segment)
        phase = position % segment
        offset = first - (segment - phase).clamp(max=first)
        if mask is None:
            mask = torch.ones(rows, time, dtype=torch.bool, device=x.device)
        slots = max(first + time - 1, 0)
        layout = align(mask, offset, slots=slots)
        pieces: list[Piece] = []
        start, stop = 0, first
        while start < slots:
            real = layout.filled[:, start:stop]
            # behind the first boundary a row begins where its slots do
            begins = real[:, 0] if pieces else real.any(1) & (phase == 0) & (position > 0)
            pieces.append(Piece(start, stop, begins, False, real))
            start, stop = stop, min(stop + segment, slots)
        return layout, pieces

    def reset_parameters(self) -> None:
        if self.persistent is not None:
            nn.init.normal_(self.persistent, std=0.02)
        self.gate.reset_parameters()

    def flops(self, length: int) -> int:
        # each segment's attention runs over two tokens for every one, after the persistent tokens
        segments, rest = divmod(length, self.segment)
        ahead = 0 if self.persistent is None else len(self.persistent)
        attend = segments * self.attend.every_flops(ahead + 2 * self.segment, 2)
        if rest:
            attend += self.attend.every_flops(ahead + 2 * rest, 2)
        # ``memory.flops`` is of writing each y_j and reading it back; asking for h_j is one read more
        read = getattr(self.memory, "read_flops", None)
        recall = read(length) if read is not None else 0
        return self.memory.flops(length) + recall + attend + 10 * self.dim * length


def _any(rows: list[bool] | Tensor) -> bool:
    """Whether some of the rows are true, or may be."""
    return isinstance(rows, Tensor) or any(rows)


def _restart(rows: list[bool] | Tensor, old: State, new: State) -> State:
    """``new`` in the given rows and ``old`` in the others; a plain assignment when all rows restart together."""
    if isinstance(rows, Tensor):
        return where(rows, new, old)
    return new if all(rows) else reset(old, rows, new)


def _cut(pieces: list[Piece], *tensors: Tensor) -> list[tuple[Tensor, ...]]:
    """Each tensor's stretches. Not slices of it, of which each has a gradient as long as the whole."""
    lengths = [piece.stop - piece.start for piece in pieces]
    return [x.split_with_sizes(lengths, dim=1) for x in tensors]


def _join(pieces: list[Tensor], like: Tensor) -> Tensor:
    if len(pieces) == 1:
        return pieces[0]
    return torch.cat(pieces, dim=1) if pieces else like
