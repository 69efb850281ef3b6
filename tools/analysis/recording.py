"""One pass over a text that records its memories and gates in a bounded number of bins."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ...blocks.language_model import LanguageModel
from ...blocks.observe import observe
from ...blocks.observers import Learned, Observer
from ...kernels.memory import MemoryState

QUANTITIES = ("surprise", "error", "step", "momentum", "forgetting")
"""The fields of ``MemoryRecord`` that are recorded for each token and head."""
CELLS = 240_000
"""Bins of all rows and quantities together, which the page can hold."""
MIN_BINS, MAX_BINS = 512, 4096
"""Bins of one row."""
DRIFT_POINTS = 128
"""Positions at most at which weights are measured."""
PEAKS, PEAK_DISTANCE = 12, 12
"""Most surprising tokens that are listed, and the least distance between two of them."""


class Drift(NamedTuple):
    """Weights of a memory at some positions; float64 ``[heads, positions]``, over all layers of its network."""

    positions: list[int]
    """Tokens read."""
    norm: np.ndarray
    distance: np.ndarray
    """From the initial weights, relative to the norm of these."""


class Recording(NamedTuple):
    """All that was recorded of a text. Keys are module paths."""

    bin_width: int
    """Tokens of a bin."""
    tokens: dict[str, dict[str, Bins]]
    """Memory -> quantity -> rows are heads."""
    drift: dict[str, Drift]
    stretches: dict[str, Learned]
    """The inputs of each memory during a part of the text, as those of one call."""
    gates: dict[str, Bins]
    """Gate -> rows are the mean gate, the norm of the first branch, and that of the second."""
    peaks: list[tuple[int, float]]
    """Position and mean surprise over all heads of the most surprising tokens, in order of position."""


class Bins:
    """Pools values token by token; ``mean`` and ``max`` are float32 ``[rows, bins]``, NaN where there were none."""

    def __init__(self, rows: int, time: int, width: int) -> None:
        shape = (math.ceil(time / width), rows)
        self._width, self._read = width, 0
        self._sum, self._count, self._max = np.zeros(shape), np.zeros(shape), np.full(shape, -np.inf)

    def add(self, values: Tensor) -> None:
        """The values of the next tokens, ``[time, rows]``; NaN is left out."""
        new = values.cpu().double().numpy()
        bins = (self._read + np.arange(len(new))) // self._width
        real = ~np.isnan(new)
        np.add.at(self._sum, bins, np.where(real, new, 0.0))
        np.add.at(self._count, bins, real)
        np.maximum.at(self._max, bins, np.where(real, new, -np.inf))
        self._read += len(new)

    @property
    def mean(self) -> np.ndarray:
        with np.errstate(invalid="ignore"):
            return (self._sum / np.where(self._count, self._count, np.nan)).T.astype(np.float32)

    @property
    def max(self) -> np.ndarray:
        return np.where(self._count > 0, self._max, np.nan).T.astype(np.float32)


def bin_width(time: int, rows: int) -> int:
    """Tokens of a bin, so that all bins of ``rows`` rows of ``time`` tokens are about ``CELLS`` at most."""
    most = CELLS // rows
    # bins of several tokens have a maximum beside their mean, which takes as much space
    bins = min(max(most if time <= most else most // 2, MIN_BINS), MAX_BINS)
    return math.ceil(time / bins)


def record(
    model: LanguageModel,
    tokens: Tensor,
    memories: dict[str, int],
    *,
    piece: int,
    stretch: tuple[int, int],
    advance: Callable[[], None] = lambda: None,
) -> Recording:
    """Read ``tokens`` [1, time] from the initial state, ``piece`` tokens at a time.

    ``memories``: module paths of the memories that are written, with their number of heads. ``stretch``: the tokens
    of which the memories' inputs are kept, from and to multiples of ``piece`` (or the end). ``advance`` is called after
    each piece.
    """
    time = tokens.shape[1]
    width = bin_width(time, len(QUANTITIES) * sum(memories.values()))
    bins = {name: {quantity: Bins(heads, time, width) for quantity in QUANTITIES} for name, heads in memories.items()}
    gates: dict[str, Bins] = {}
    surprises = [torch.empty(0)]
    capture = _Capture(model)
    measured_every = piece * math.ceil(time / piece / DRIFT_POINTS)
    state: Any = None
    with capture, torch.no_grad():
        for start in range(0, time, piece):
            stop = min(start + piece, time)
            capture.keeps_inputs = stretch[0] <= start < stretch[1]
            with observe(model) as observed:
                state = model(tokens[:, start:stop], state).state
            for name, memory in observed.memories.items():
                for quantity, pool in bins.get(name, {}).items():
                    pool.add(getattr(memory, quantity)[0])
            for name, gate in observed.gates.items():
                pool = gates.setdefault(name, Bins(3, time, width))
                pool.add(torch.stack([gate.gate[0], gate.first[0], gate.second[0]], dim=-1))
            if observed.memories:
                every_head = torch.cat([memory.surprise[0] for memory in observed.memories.values()], dim=-1)
                surprises.append(every_head.nanmean(-1).nan_to_num(0.0).cpu())
            if stop % measured_every == 0 or stop == time:
                capture.measure(stop)
            advance()
    stretches = {name: stretch for name, stretch in capture.stretches().items() if name in bins}
    return Recording(width, bins, capture.drift(), stretches, gates, _peaks(torch.cat(surprises)))


def _peaks(surprise: Tensor) -> list[tuple[int, float]]:
    """The largest of ``surprise`` [time] that are not close to each other."""
    chosen: list[tuple[int, float]] = []
    for position in surprise.argsort(descending=True).tolist():
        if len(chosen) == PEAKS:
            break
        if all(abs(position - other) >= PEAK_DISTANCE for other, _ in chosen):
            chosen.append((position, float(surprise[position])))
    return sorted(chosen)


class _Capture(Observer):
    """Keeps the inputs of memories for a while, and measures their weights."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.keeps_inputs = False
        self._inputs: dict[str, list[Learned]] = {}
        self._initial: dict[str, tuple[Tensor, ...]] = {}
        self._last: dict[str, MemoryState] = {}
        self._measured: dict[str, list[tuple[int, Tensor, Tensor]]] = {}

    def learned(self, memory: nn.Module, learned: Learned) -> None:
        name = self._names[memory]
        if name not in self._initial:
            self._initial[name] = learned.before.weights
            self._measure(name, 0, learned.before)
        if self.keeps_inputs:
            self._inputs.setdefault(name, []).append(learned)
        self._last[name] = learned.after or learned.before

    def measure(self, position: int) -> None:
        """Measure the weights of all memories."""
        for name, state in self._last.items():
            self._measure(name, position, state)

    def _measure(self, name: str, position: int, state: MemoryState) -> None:
        initial = self._initial[name]
        change = tuple(now - then for now, then in zip(state.weights, initial))
        self._measured.setdefault(name, []).append((position, _norm(state.weights), _norm(change) / _norm(initial)))

    def drift(self) -> dict[str, Drift]:
        found = {}
        for name, measured in self._measured.items():
            positions, norms, distances = zip(*measured)
            found[name] = Drift(list(positions), torch.stack(norms, 1).numpy(), torch.stack(distances, 1).numpy())
        return found

    def stretches(self) -> dict[str, Learned]:
        found = {}
        for name, calls in self._inputs.items():
            joined = [None if part[0] is None else torch.cat(part, dim=1) for part in zip(*(c.tokens for c in calls))]
            found[name] = calls[0]._replace(tokens=type(calls[0].tokens)(*joined))
        return found


def _norm(weights: tuple[Tensor, ...]) -> Tensor:
    """Frobenius norm over all layers, of the first row: float64 ``[heads]``."""
    squares = [weight[0].square().sum((-2, -1)).cpu().double() for weight in weights]
    return torch.stack(squares).sum(0).sqrt()
