"""One pass over a text with everything that can be seen of its memories and gates, in a bounded number of bins."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ...blocks.language_model import LanguageModel
from ...blocks.observing import Observed, observe
from ...blocks.watching import Learned, Watch
from ...kernels.memory import MemoryState, Options, Tokens
from .pooling import Pool, bin_width

QUANTITIES = ("surprise", "error", "step", "momentum", "forgetting")
"""Of a memory, at each token and head: the fields of ``MemoryRecord`` that are shown."""
DRIFT_POINTS = 128
"""Positions at most at which weights are measured."""
PEAKS, APART = 12, 12
"""Most surprising tokens that are named, and tokens that lie between two of them at least."""


class Drift(NamedTuple):
    """Weights at some positions; float64 ``[heads, positions]``, over all layers of the memory's network."""

    positions: list[int]
    """Tokens read."""
    norm: np.ndarray
    distance: np.ndarray
    """From the weights at the start, as a share of the norm of these."""


class Stretch(NamedTuple):
    """What a memory was given during a part of the text, of one row, and its state before."""

    tokens: Tokens
    before: MemoryState
    norm: Tensor | None
    options: Options


class Seen(NamedTuple):
    """What was seen of a text; names are module paths."""

    width: int
    """Tokens of a bin."""
    tokens: dict[str, dict[str, Pool]]
    """Memory -> quantity -> rows are heads."""
    drift: dict[str, Drift]
    stretches: dict[str, Stretch]
    gates: dict[str, Pool]
    """Gate -> rows are the mean gate, the norm of the first branch, and that of the second."""
    peaks: list[tuple[int, float]]
    """Position and surprise, over the heads' mean, of the most surprising tokens, in order of position."""


def see(
    model: LanguageModel,
    tokens: Tensor,
    memories: dict[str, int],
    *,
    piece: int,
    stretch: tuple[int, int],
    advance: Callable[[], None] = lambda: None,
) -> Seen:
    """Read ``tokens`` [1, time] from a fresh state, ``piece`` at a time.

    ``memories``: those that are written, and how many heads each has. ``stretch``: from which token to which the
    inputs of memories are kept: multiples of ``piece``, or the end.
    """
    time = tokens.shape[1]
    width = bin_width(time, len(QUANTITIES) * sum(memories.values()))
    pools = {name: {quantity: Pool(heads, time, width) for quantity in QUANTITIES} for name, heads in memories.items()}
    gates: dict[str, Pool] = {}
    peaks, capture = _Peaks(), _Capture(model)
    every = piece * math.ceil(time / piece / DRIFT_POINTS)
    state: Any = None
    with capture, torch.no_grad():
        for start in range(0, time, piece):
            stop = min(start + piece, time)
            capture.keeps = stretch[0] <= start < stretch[1]
            with observe(model) as seen:
                state = model(tokens[:, start:stop], state).state
            for name, record in seen.memories.items():
                for quantity, pool in pools[name].items():
                    pool.add(getattr(record, quantity)[0])
            for name, gate in seen.gates.items():
                pool = gates.setdefault(name, Pool(3, time, width))
                pool.add(torch.stack([gate.gate[0], gate.first[0], gate.second[0]], dim=-1))
            peaks.add(start, seen)
            if stop % every == 0 or stop == time:
                capture.measure(stop)
            advance()
    return Seen(width, pools, capture.drift(), capture.stretches(), gates, peaks.found())


class _Capture(Watch):
    """Keeps what memories are given for a while, and how their weights move."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.keeps = False
        self._kept: dict[str, list[Learned]] = {}
        self._first: dict[str, tuple[Tensor, ...]] = {}
        self._last: dict[str, MemoryState] = {}
        self._measured: dict[str, list[tuple[int, Tensor, Tensor]]] = {}

    def learned(self, memory: nn.Module, learned: Learned) -> None:
        name = self._names[memory]
        if name not in self._first:
            self._first[name] = learned.before.weights
            self._measure(name, 0, learned.before)
        if self.keeps:
            self._kept.setdefault(name, []).append(learned)
        self._last[name] = learned.after or learned.before

    def measure(self, position: int) -> None:
        """Look at the weights of all memories."""
        for name, state in self._last.items():
            self._measure(name, position, state)

    def _measure(self, name: str, position: int, state: MemoryState) -> None:
        first = self._first[name]
        norm, start = _norm(state.weights), _norm(first)
        far = _norm(tuple(now - then for now, then in zip(state.weights, first)))
        self._measured.setdefault(name, []).append((position, norm, far / start))

    def drift(self) -> dict[str, Drift]:
        found = {}
        for name, measured in self._measured.items():
            positions, norms, distances = zip(*measured)
            found[name] = Drift(list(positions), torch.stack(norms, 1).numpy(), torch.stack(distances, 1).numpy())
        return found

    def stretches(self) -> dict[str, Stretch]:
        found = {}
        for name, calls in self._kept.items():
            joined = [None if part[0] is None else torch.cat(part, dim=1) for part in zip(*(c.tokens for c in calls))]
            tokens: Any = joined  # in the order of the fields
            found[name] = Stretch(Tokens(*tokens), calls[0].before, calls[0].norm, calls[0].options)
        return found


def _norm(weights: tuple[Tensor, ...]) -> Tensor:
    """Frobenius, of all layers together, of the first row: float64 ``[heads]``."""
    squares = [weight[0].square().sum((-2, -1)).cpu().double() for weight in weights]
    return torch.stack(squares).sum(0).sqrt()


class _Peaks:
    """The most surprising tokens so far."""

    def __init__(self) -> None:
        self._best: list[tuple[float, int]] = []

    def add(self, start: int, seen: Observed) -> None:
        records = list(seen.memories.values())
        if not records:
            return
        surprise = torch.cat([record.surprise[0] for record in records], dim=-1).nanmean(-1)
        values, places = surprise.nan_to_num(0.0).topk(min(len(surprise), PEAKS * APART))
        self._best += [(value, start + place) for value, place in zip(values.tolist(), places.tolist())]
        self._best = heapq.nlargest(PEAKS * APART, self._best)

    def found(self) -> list[tuple[int, float]]:
        chosen: list[tuple[int, float]] = []
        for value, place in self._best:
            if len(chosen) < PEAKS and all(abs(place - other) >= APART for other, _ in chosen):
                chosen.append((place, value))
        return sorted(chosen)
