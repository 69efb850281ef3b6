"""Writing only what is surprising enough: a token below the threshold neither writes nor forgets.

Which tokens those are depends on the weights at the start of their chunk, and so on what was written before: chunks are
taken in order, each measured before it is written. The comparison is not differentiated, so where gradients are wanted
that walk only says which gates are zero, and the operation runs on these as it always does.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..dispatch import needs_grad as tracks
from ..padding import Layout, align
from .read import read_memory
from .state import MemoryState
from .surprise import Surprise, surprise_at
from .tokens import Options, Path, Tokens


class Step(NamedTuple):
    """One chunk of a walk, or a part of one."""

    surprise: Surprise
    held: Tensor
    """``[batch, time, heads]`` bool: the token is below the threshold."""
    y: Tensor | None
    """Outputs; ``None`` for the last chunk where nobody asks for what comes of it."""
    state: MemoryState
    """Afterwards; or before, where there is no ``y``."""


class Walk:
    """A sequence laid out so that no row begins a chunk inside of a span of ``spans``."""

    def __init__(
        self, tokens: Tokens, state: MemoryState, norm: Tensor | None, mask: Tensor | None, options: Options, path: Path
    ) -> None:
        self.tokens, self.real, self.state, self.norm, self.path = tokens, mask, state, norm, path
        self.options, self.threshold = options._replace(threshold=None), options.threshold
        self.layout: Layout | None = None
        time, chunk = tokens.k.shape[1], options.chunk
        self.phases = [position % chunk for position in state.position.tolist()]
        if mask is not None and bool(mask.all()):
            self.real = mask = None
        counts = [time] * len(self.phases) if mask is None else mask.sum(1).tolist()
        if all(phase + count <= chunk for phase, count in zip(self.phases, counts)):
            edges = [0, time]
        elif mask is None and len(set(self.phases)) == 1:
            edges = [0, *range(-self.phases[0] % chunk, time, chunk), time]
        else:
            if mask is None:
                mask = torch.ones(len(counts), time, dtype=torch.bool, device=tokens.k.device)
            self.layout = align(mask, torch.tensor(self.phases, device=mask.device), multiple=chunk)
            self.tokens, self.real = tokens.map(self.layout.spread), self.layout.filled
            edges = list(range(0, self.real.shape[1] + 1, chunk))
        self.spans = [slice(start, stop) for start, stop in itertools.pairwise(edges) if start < stop]

    def steps(self, ends: bool = True) -> Iterator[Step]:
        """Span by span. Without ``ends``, what comes of the last one is left out."""
        state = self.state
        for span in self.spans:
            part = self.tokens.at(span)
            # inside their chunk, rows find their anchor in the state; from then on chunks begin with their spans
            anchor = state.weights if span.start else self._anchor()
            found = surprise_at(part.k, part.v, anchor, self.options.activation, self.norm)
            # what is not a number is not held back: the paths agree on what it spoils
            held = found.norm < (self.threshold or 0.0)
            y = None
            if ends or span is not self.spans[-1]:
                y, state = self.advance(span, held, state, bool(self._idle(span, held).all()))
            yield Step(found, held, y, state)

    def advance(self, span: slice, held: Tensor, state: MemoryState, idle: bool) -> tuple[Tensor, MemoryState]:
        """The operation on a span, or on several; ``idle``: all of its tokens are held back."""
        part, real = self.tokens.at(span), self._real(span)
        if not idle or _carries_on(part, state):
            if self.threshold is not None:
                zero = lambda gate: None if gate is None else gate.masked_fill(held, 0.0)  # noqa: E731
                part = part._replace(theta=part.theta.masked_fill(held, 0.0), alpha=zero(part.alpha))
            return self.path(part, state, self.norm, real, self.options)
        y = read_memory(part.q, state.weights, self.options.activation, self.norm)
        count = torch.full_like(state.position, y.shape[1]) if real is None else real.sum(1)
        phase = state.position % self.options.chunk
        began = (count > 0) & ((phase == 0) | (phase + count >= self.options.chunk))
        return y if real is None else torch.where(real[..., None, None], y, 0.0), state._replace(
            anchor=_pick(began, state.weights, state.anchor), position=state.position + count
        )

    def runs(self, held: list[Tensor]) -> Iterator[tuple[slice, Tensor, bool]]:
        """Spans beside each other that are all idle, or all not, as one: where, who is held back there, which."""
        idle = [bool(self._idle(span, x).all()) for span, x in zip(self.spans, held)]
        for quiet, group in itertools.groupby(zip(self.spans, held, idle), key=lambda each: each[2]):
            spans, parts, _ = zip(*group)
            yield slice(spans[0].start, spans[-1].stop), torch.cat(parts, 1), quiet

    def collect(self, x: list[Tensor]) -> Tensor:
        """The spans' results in the order the tokens came in."""
        joined = x[0] if len(x) == 1 else torch.cat(x, 1)
        return joined if self.layout is None else self.layout.collect(joined)

    def _real(self, span: slice) -> Tensor | None:
        return None if self.real is None else self.real[:, span]

    def _idle(self, span: slice, held: Tensor) -> Tensor:
        real = self._real(span)
        return held if real is None else held | ~real.unsqueeze(-1)

    def _anchor(self) -> tuple[Tensor, ...]:
        within = torch.tensor([phase > 0 for phase in self.phases], device=self.state.position.device)
        return _pick(within, self.state.anchor, self.state.weights)


def selective_memory(
    tokens: Tokens, state: MemoryState, norm: Tensor | None, mask: Tensor | None, options: Options, path: Path
) -> tuple[Tensor, MemoryState]:
    """``path`` with a threshold. A chunk in which no token writes, and no momentum carries on, costs no products."""
    if tokens.q.shape[1] == 0:
        return torch.zeros_like(tokens.v), state
    walk = Walk(tokens, state, norm, mask, options, path)
    outputs: list[Tensor] = []
    if not tracks(*tokens, norm, *state.weights, *state.momentum, *state.anchor):
        for step in walk.steps():
            state = step.state
            assert step.y is not None
            outputs.append(step.y)
        return walk.collect(outputs), state
    with torch.no_grad():
        held = [step.held for step in walk.steps(ends=False)]
    for span, who, idle in walk.runs(held):
        y, state = walk.advance(span, who, state, idle)
        outputs.append(y)
    return walk.collect(outputs), state


def _carries_on(tokens: Tokens, state: MemoryState) -> bool:
    """Whether past surprise moves the weights though nothing is written, or a gradient asks whether it would."""
    if tokens.eta is None:
        return False
    return tracks(*state.momentum) or any(bool(x.any()) for x in state.momentum)


def _pick(rows: Tensor, new: tuple[Tensor, ...], old: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """``new`` in the given rows, without a copy where all agree."""
    if bool(rows.all()):
        return new
    if not bool(rows.any()):
        return old
    return tuple(torch.where(rows.view(-1, 1, 1, 1), a, b) for a, b in zip(new, old))
