"""The goals for the kernels on a GPU, compared with the measurements, and the growth of time with length."""

from __future__ import annotations

import functools
import math
import operator
import re
import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from .timing import Measurement


class Goal(NamedTuple):
    """A goal, and the range of what was measured for it."""

    what: str
    wanted: str
    reached: str
    met: bool | None
    """``None`` where nothing was measured."""

    @property
    def cells(self) -> tuple[str, str, str, str]:
        """A row of a table."""
        return self.what, self.wanted, self.reached, {None: "", True: "yes", False: "no"}[self.met]


class Trend(NamedTuple):
    """How the time and memory of one case grow with length."""

    what: str
    backend: str
    shape: str
    direction: str
    lengths: tuple[int, ...]
    exponent: float
    """``p`` of the best fit ``time = c * length ** p``."""
    bytes: tuple[float, ...]
    """Peak memory per token, at each length; empty where the device does not report it."""


Key = tuple[str, str, str, str]


def trends(rows: Sequence[Measurement]) -> list[Trend]:
    """The trend of every case that was measured at two or more lengths."""
    found: dict[Key, dict[int, Measurement]] = {}
    for row in rows:
        length, shape = _length(row)
        if length and not row.failed:
            found.setdefault((row.what, row.backend, shape, row.direction), {})[length] = row
    made = []
    for key, by in found.items():
        lengths = sorted(by)
        power = exponent(lengths, [by[n].seconds for n in lengths])
        if power is not None:
            peaks = tuple(by[n].peak / by[n].tokens for n in lengths if by[n].peak)
            made.append(Trend(*key, tuple(lengths), power, peaks))
    return made


def _length(row: Measurement) -> tuple[int, str]:
    """The length in a measurement's shape, 0 if it has none, and the shape without it."""
    place = re.match(r"(\d+) x (\d+)", row.shape)
    if place is None or row.what == "memory step" or not row.tokens:
        return 0, row.shape
    return int(place[2]), row.shape[: place.start(2)] + "time" + row.shape[place.end(2) :]


def exponent(lengths: Sequence[int], seconds: Sequence[float]) -> float | None:
    """``p`` of the best fit ``seconds = c * length ** p``; ``None`` for a single length."""
    if len(lengths) < 2:
        return None
    return statistics.linear_regression([math.log(n) for n in lengths], [math.log(s) for s in seconds]).slope


def goals(rows: Sequence[Measurement]) -> list[Goal]:
    """Every goal."""
    found = {(row.what, row.backend, row.shape, row.direction): row for row in rows if not row.failed}
    made = []
    for expansion in (2, 4):
        shape = f"d 64, expansion {expansion}"
        shares = [
            row.share
            for (what, backend, where, direction), row in found.items()
            if (what, backend, direction) == ("memory", "triton", "both") and shape in where
        ]
        what = f"memory, d 64, expansion {expansion}, both passes: share of the measured matrix rate"
        made.append(goal_of(what, "40%", shares, lambda x: x >= 0.4, "{:.0%}"))
    ratios = _over(found, ("memory block", "titans-pytorch"), ("memory block", "auto"))
    made.append(goal_of("memory block: times faster than titans-pytorch's", "50", ratios, lambda x: x >= 50, "{:.1f}"))
    ratios = _over(found, ("memory", "triton"), ("memory", "fla gated delta rule"))
    what = "memory of one layer: its time over the gated delta rule's, of as large a state"
    made.append(goal_of(what, "at most 1", ratios, lambda x: x <= 1, "{:.2f}"))
    for most, least, wanted in ((100_000, 32_000, 1.5), (math.inf, 100_000, 3.2)):
        pairs = [
            (found.get(("model transformer", "SDPA", row.shape, "both")), row)
            for row in found.values()
            if row[:2] == ("model mag", "auto") and least <= row.tokens < most
        ]
        ratios = [one.seconds / row.seconds for one, row in pairs if one]
        where = "past 100,000 tokens" if least == 100_000 else "at 32,768 tokens"
        what = f"MAG {where}: times faster than a FlashAttention transformer of its size"
        made.append(goal_of(what, f"{wanted}", ratios, functools.partial(operator.le, wanted), "{:.2f}"))
    ours = [t for t in trends(rows) if (t.what, t.backend) in (("memory", "triton"), ("model mag", "auto"))]
    exponents = [t.exponent for t in ours]
    made.append(goal_of("memory, MAG: exponent of time against length", "at most 1.05", exponents, lambda x: x <= 1.05))
    growth = [t.bytes[-1] / t.bytes[0] for t in ours if len(t.bytes) > 1]
    what = "memory, MAG: peak memory of a token at the longest text over the shortest"
    made.append(goal_of(what, "at most 1.05", growth, lambda x: x <= 1.05))
    steps = [row for row in found.values() if row[:2] == ("memory step", "triton_step")]
    # half of the bytes moved are read; a state that changes has to be written as well, so 2 is the least possible
    for what, parts in (("reading its state once", 2), ("moving its state in and out once", 1)):
        ratios = [parts / row.share for row in steps]
        made.append(
            goal_of(f"step of a token: its time over that of {what}", "at most 1.5", ratios, lambda x: x <= 1.5)
        )
    return made


def _over(found: dict[Key, Measurement], one: tuple[str, str], other: tuple[str, str]) -> list[float]:
    """The time of ``one`` over that of ``other``, for each shape and direction that both have."""
    pairs = [(row, found.get((*other, *key[2:]))) for key, row in found.items() if key[:2] == one]
    return [row.seconds / beside.seconds for row, beside in pairs if beside]


def goal_of(
    what: str, wanted: str, values: Iterable[float], met: Callable[[float], bool], form: str = "{:.2f}"
) -> Goal:
    """The range of what was measured, and whether all of it meets the goal."""
    found = sorted(values)
    if not found:
        return Goal(what, wanted, "not measured", None)
    ends = dict.fromkeys(form.format(value) for value in (found[0], found[-1]))
    return Goal(what, wanted, " to ".join(ends), all(met(value) for value in found))
