"""``context``: memory as context (MAC): read, attend, write and gate, segment by segment (equations 21-25)."""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Annotated, Any, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

from ..kernels.dispatch import advanced, integers, known, on_host, placed, seen
from ..kernels.documents import Documents
from ..kernels.padding import align
from ..registry import Needs, SameWeights, Spec, create, register
from . import cuda_graph
from .block import Block, as_rows, like_of
from .documents import in_order, read_documents, run_documents
from .layers import Form, Gating
from .observers import active, moved, observers_of, suppressed
from .segmented import Piece, forward_every, independent, limit_window, pieces_of, split, split_memory, traced_pieces
from .state import State, concatenate, reset, select, where


class ContextState(NamedTuple):
    """The state of a context block."""

    memory: State
    """The memory after the last token."""
    snapshot: State
    """The memory at the start of the current segment, from which tokens of the segment are read."""
    attend: State
    """The state of ``attend`` after the persistent tokens and the tokens of the current segment."""
    position: Tensor
    """``[batch]`` int64: number of tokens processed."""


@register("context")
class Context(Block):
    """Memory as context: attention over persistent tokens, memory reads and a segment; its outputs are memorized.

    For each segment of tokens ``x_1..x_C`` (equations 21-25, causal at every token):

    1. read    ``h_j = M(x_j)``, with the memory M at the start of the segment;
    2. attend  ``y_j`` is the attention output at ``x_j``, over the persistent tokens, ``h_1..h_j`` and ``x_1..x_j``;
    3. write   ``y_j`` is written into the memory, which gives ``M_j``;
    4. gate    ``o_j = gate(y_j, M_j(y_j))``.

    ``attend`` may be any causal block. It processes ``h_1, x_1, h_2, x_2, ...`` after the persistent tokens, and starts
    from a fresh state at every segment.

    With ``write: inputs``, ``x_j`` is written in place of ``y_j``. The memory is then independent of attention, and all
    segments attend in parallel. This is not the architecture of the paper.
    """

    sharding = "pipelined"

    def __init__(
        self,
        dim: int,
        *,
        segment: Annotated[int, SameWeights(), Field(ge=1, le=2**20, description="tokens per segment")] = 128,
        persistent: Annotated[int, Field(ge=0, le=2**16, description="number of persistent tokens")] = 16,
        memory: Annotated[Spec, Needs("read", "write"), Field(description="the memory")] = "memory",
        attend: Annotated[Spec, Field(description="the attention, or any other causal block")] = "attention",
        write: Annotated[
            Literal["attended", "inputs"],
            Field(description="write the attention outputs, as in the paper, or the inputs (segments in parallel)"),
        ] = "attended",
        form: Annotated[
            Form,
            Field(
                description="sigmoid: norm(y) * sigmoid(norm(m)); silu: norm(y) * silu(norm(m)); sum: norm(y) + norm(m)"
            ),
        ] = "sigmoid",
    ) -> None:
        super().__init__(dim)
        self.segment = segment
        self.write = write
        self.memory = create(memory, dim=dim)
        self.attend = create(attend, dim=dim)
        limit_window(self.attend, 2 * segment)
        self.persistent = nn.Parameter(torch.empty(persistent, dim)) if persistent else None
        self.gate = Gating(dim, form)
        self.period = math.lcm(segment, self.memory.period)

    def init_state(self, batch_size: int) -> ContextState:
        memory = self.memory.init_state(batch_size)
        position = torch.zeros(batch_size, dtype=torch.int64, device=like_of(self).device)
        if not position.is_cpu:
            known(position, [0] * batch_size)
        return ContextState(memory, memory, self.fresh_attention(batch_size), position)

    def fresh_attention(self, rows: int) -> State:
        """Return the state of ``attend`` after the persistent tokens."""
        if self.persistent is None:
            return self.attend.init_state(rows)
        # equal for all rows, so it is computed once
        state = self.attend.prefix(self.persistent.unsqueeze(0))[1]
        return state if rows == 1 else as_rows(state, rows)

    def forward(
        self,
        x: Tensor,
        state: ContextState | None = None,
        *,
        mask: Tensor | None = None,
        documents: Documents | None = None,
    ) -> tuple[Tensor, ContextState]:
        if documents is not None:
            # caches of different lengths cannot be joined after each segment
            if self.grows or documents.apart:
                return self._run_documents_as_rows(x, state, mask, documents)
            return self._run_segments_of_documents(x, state, documents)
        rows, time, _ = x.shape
        fresh = state is None
        run = self._run if self.write == "attended" else self._run_inputs
        if x.is_cuda and fresh and mask is None and rows and not active and cuda_graph.enabled(x):

            def from_fresh(x: Tensor) -> tuple[Tensor, ContextState]:
                state = self.init_state(rows)
                y, after = run(x, state, pieces_of(self.segment, [0] * rows, [time] * rows, None))
                return y, after._replace(position=advanced(state.position, time))

            return cuda_graph.call(self, from_fresh, x)
        if state is None:
            state = self.init_state(rows)
        if rows == 0:
            return self.gate(x, x), state
        if torch.compiler.is_compiling() and not (fresh and mask is None):
            layout, pieces = traced_pieces(self.segment, x, mask, state.position)
            y, state = run(layout.spread(x), state, pieces)
            return layout.collect(y), state._replace(position=state.position + layout.length)
        positions = [0] * rows if fresh else integers(state.position)
        if mask is None:
            y, state = run(x, state, pieces_of(self.segment, positions, [time] * rows, None))
            return y, state._replace(position=advanced(state.position, time))
        layout = align(mask)
        pieces = pieces_of(self.segment, positions, integers(layout.length), layout.filled)
        with moved(self, layout):
            y, state = run(layout.spread(x), state, pieces)
        return layout.collect(y), state._replace(position=advanced(state.position, layout.length))

    def _run(self, x: Tensor, state: ContextState, pieces: list[Piece]) -> tuple[Tensor, ContextState]:
        """The architecture of the paper, piece by piece."""
        memory, snapshot, attend, position = state
        project, read, update, output = split_memory(self.memory, len(pieces))
        fresh: State = None
        # fewer launches, which a CPU has none of
        ahead = range(0) if x.is_cpu or active else independent(self.attend, pieces)
        if ahead:
            fresh = self.fresh_attention(x.shape[0]) if any(pieces[ahead[0]].begins) else attend
            tokens = x[:, pieces[ahead[0]].start : pieces[ahead[-1]].stop]
            attend_segment = self.attend.segments(tokens, len(ahead), fresh)
        attended, read_back = [], []
        for i, (piece, tokens, *projected) in enumerate(split(pieces, x, *project(x))):
            if isinstance(piece.begins, Tensor) or any(piece.begins):
                fresh = self.fresh_attention(x.shape[0]) if fresh is None else fresh
                if isinstance(piece.begins, list) and all(piece.begins):
                    snapshot, attend = memory, fresh
                else:
                    snapshot, attend = restart(piece.begins, (snapshot, attend), (memory, fresh))
            h = read(projected, snapshot)  # 1. read
            following = pieces[i + 1].begins if i + 1 < len(pieces) else [False]
            unused = isinstance(following, list) and all(following)  # all rows begin a segment
            if i in ahead:
                y = attend_segment(i - ahead[0], h)  # 2. attend
            else:
                y, attend = self._attend(h, tokens, attend, piece.valid, unused=unused)
            m, memory = update(y, memory, mask=piece.valid)  # 3. write
            attended.append(y)
            read_back.append(m)
        y = torch.cat(attended, dim=1) if pieces else x
        m = output(torch.cat(read_back, dim=1) if pieces else x, y)
        if active:
            self.report(y, m)
        return self.gate(y, m), ContextState(memory, snapshot, attend, position)  # 4. gate

    def _run_inputs(self, x: Tensor, state: ContextState, pieces: list[Piece]) -> tuple[Tensor, ContextState]:
        """``write: inputs``: first the memory over all pieces, then attention."""
        memory, snapshot, attend, position = state
        project, read, update, output = split_memory(self.memory, len(pieces))
        recalled, read_back = [], []
        for piece, tokens, *projected in split(pieces, x, *project(x)):
            if isinstance(piece.begins, Tensor) or any(piece.begins):
                snapshot = restart(piece.begins, snapshot, memory)
            recalled.append(read(projected, snapshot))
            m, memory = update(tokens, memory, mask=piece.valid)
            read_back.append(m)
        fresh: State = None
        attended = []
        done = 0
        while done < len(pieces):
            piece, together = pieces[done], 1
            while piece.whole and done + together < len(pieces) and pieces[done + together].whole:
                together += 1
            if together > 1:
                # full segments are independent of each other: each is a row of one batch
                rows, fold = x.shape[0] * together, (x.shape[0] * together, self.segment, self.dim)
                h = torch.cat(recalled[done : done + together], dim=1)
                tokens = x[:, piece.start : piece.start + together * self.segment]
                y, ends = self._attend(h.reshape(fold), tokens.reshape(fold), self.fresh_attention(rows), None)
                y, attend = y.reshape(h.shape), select(ends, slice(together - 1, None, together))
            else:
                if isinstance(piece.begins, Tensor) or any(piece.begins):
                    fresh = self.fresh_attention(x.shape[0]) if fresh is None else fresh
                    attend = restart(piece.begins, attend, fresh)
                y, attend = self._attend(recalled[done], x[:, piece.start : piece.stop], attend, piece.valid)
            attended.append(y)
            done += together
        y = torch.cat(attended, dim=1) if pieces else x
        m = output(torch.cat(read_back, dim=1) if pieces else x, x)
        if active:
            self.report(y, m)
        return self.gate(y, m), ContextState(memory, snapshot, attend, position)

    def _run_documents_as_rows(
        self, x: Tensor, state: ContextState | None, mask: Tensor | None, documents: Documents
    ) -> tuple[Tensor, ContextState]:
        def run(x: Tensor, state: ContextState | None, mask: Tensor | None) -> tuple[Tensor, ContextState]:
            return self.forward(x, state, mask=mask)

        return run_documents(run, documents, [x], state, mask, self.init_state, grows=self.grows)

    def _run_segments_of_documents(
        self, x: Tensor, state: ContextState | None, documents: Documents
    ) -> tuple[Tensor, Any]:
        """First the first segment of every document, in one packed row, then the second of those that go on, ..."""
        if documents.fresh is None:  # at position 0, which need not be read from a device
            first = began = self.init_state(1)
            begin, attention = 0, first.attend
        else:
            first, attention = documents.fresh, self.fresh_attention(1)
            begin, began = integers(first.position)[0], self._begin_segments(first)
        memory = snapshot = attend = None
        position = [begin] * len(documents.row)
        if state is not None:
            memory, snapshot, attend, at = self._begin_segments(state)
            rows = integers(at)
            position = [rows[b] if on else begin for b, on in zip(documents.row, documents.continues)]
        segments = documents.segments(self.segment, position, state is None)
        project, read, update, output = split_memory(self.memory, 2)
        x = documents.spread(x, segments)
        ends, order, attended, read_back = list[ContextState](), list[int](), list[Tensor](), list[Tensor]()
        for step, tokens, *projected in split(segments.steps, x, *project(x)):
            h = read_documents(read, step.documents, projected, snapshot, began.snapshot)
            y, after = self._attend(h, tokens, attend, None, step.apart.starting(began.attend))
            write = y if self.write == "attended" else tokens
            m, memory = update(write, memory, documents=step.documents.starting(began.memory))
            attended.append(y)
            read_back.append(m)
            if step.rows:
                snapshots = [
                    select(snapshot, [step.documents.row[i]]) if step.documents.continues[i] else began.snapshot
                    for i in step.apart.last
                ]
                reached = placed(torch.tensor(step.position), x.device)
                done = memory if not step.further else select(memory, slice(step.further, None))
                ends.append(ContextState(done, concatenate(snapshots), after, reached))
                order += step.rows
                memory = select(memory, slice(0, step.further)) if step.further else None
            snapshot, attend, began = memory, None, began._replace(attend=attention)
        y = torch.cat(attended, dim=1)
        m = output(torch.cat(read_back, dim=1), y if self.write == "attended" else x)
        unread = [b for b, i in enumerate(documents.last) if i is None]
        if unread:
            ends.append(as_rows(first, len(unread)) if state is None else select(state, unread))
            order += unread
        y = documents.collect(self.gate(y, m), segments)
        if documents.empty:
            return y, as_rows(first, documents.rows)
        return y, in_order(ends, order) if order else None

    def _begin_segments(self, state: ContextState) -> ContextState:
        """Return the state in which the rows at the end of a segment begin the next one."""
        begins = [position > 0 and position % self.segment == 0 for position in integers(state.position)]
        if not any(begins):
            return state
        attend = restart(begins, state.attend, self.fresh_attention(len(begins)))
        return state._replace(snapshot=restart(begins, state.snapshot, state.memory), attend=attend)

    def _attend(
        self, recalled: Tensor, x: Tensor, state: State, valid: Tensor | None, documents: Documents | None = None,
        unused: bool = False,
    ) -> tuple[Tensor, State]:  # fmt: skip
        """Return the output at each ``x_j``, which sees ``h_1..h_j`` and ``x_1..x_j``. All ``[rows, time, dim]``.

        ``unused``: nothing follows the state that is returned.
        """
        stream = torch.stack([recalled, x], dim=2).flatten(1, 2)
        mask = None if valid is None else valid.repeat_interleave(2, dim=1)
        if mask is not None and valid is not None and not mask.is_cpu and not torch.compiler.is_compiling():
            seen(mask, on_host(valid).repeat_interleave(2, dim=1))
        with suppressed() if active else nullcontext():  # observers see the sequence, not this stream
            return forward_every(self.attend, stream, state, step=2, mask=mask, documents=documents, unused=unused)

    def report(self, y: Tensor, m: Tensor) -> None:
        """Report the inputs of the gate to the observers."""
        for observer in observers_of(self):
            observer.gated(self, self.gate.gate_values(m), y, m, None)

    def reset_parameters(self) -> None:
        if self.persistent is not None:
            nn.init.normal_(self.persistent, std=0.02)
        self.gate.reset_parameters()


def restart(rows: list[bool] | Tensor, old: State, new: State) -> State:
    """Return ``new`` in the given rows and ``old`` in the others, without a copy if all rows restart."""
    if isinstance(rows, Tensor):
        return where(rows, new, old)
    return new if all(rows) else reset(old, rows, new)
