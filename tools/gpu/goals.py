"""The goals for the kernels on a GPU, compared with the rows of a run, and the growth of time with length."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from operator import itemgetter, le
from typing import Any, NamedTuple


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


def exponent(lengths: Sequence[int], seconds: Sequence[float]) -> float | None:
    """``p`` of the best fit ``seconds = c * length ** p``; ``None`` for a single length."""
    if len(lengths) < 2:
        return None
    return statistics.linear_regression([math.log(n) for n in lengths], [math.log(s) for s in seconds]).slope


def shares(rows: Sequence[dict[str, Any]]) -> None:
    """Add to each row its ``share`` of the measured matrix rate, or of the measured bandwidth."""
    rates = {row.get("dtype", row["what"]): row["rate"] for row in rows if row.get("rate")}
    for row in rows:
        for part, rate in (("flops", rates.get("bfloat16")), ("moved", rates.get("copy"))):
            if row.get(part) and row.get("seconds") and rate and not row.get("rate"):
                row["share"] = row[part] / row["seconds"] / rate


def goals(rows: Sequence[dict[str, Any]]) -> list[Goal]:
    """Every goal, of rows with shares."""
    timed = [row for row in rows if row.get("seconds")]

    def of(**facts: Any) -> list[dict[str, Any]]:
        return [row for row in timed if all(row.get(name) == value for name, value in facts.items())]

    made = []
    deep = dict(what="memory", direction="both", d=128, layers=2, tiles=None, schedule="auto")
    for chunk, wanted in ((64, 0.25), (512, 0.4)):
        found = [row["share"] for row in of(**deep, chunk=chunk) if "share" in row]
        what = f"memory, heads of 128, chunk {chunk}, both passes: share of the measured matrix rate"
        made.append(goal_of(what, f"{wanted:.0%}", found, partial(le, wanted), "{:.0%}"))
    flat = [row for row in of(what="memory", direction="both", layers=1) if row["schedule"] in ("auto", "fused")]
    size = itemgetter("length", "rows", "d")
    beside = {size(row): row["seconds"] for row in of(what="gated delta rule", direction="both")}
    ratios = [row["seconds"] / beside[size(row)] for row in flat if size(row) in beside]
    what = "memory of one layer: its time over the gated delta rule's, of as large a state"
    made.append(goal_of(what, "at most 1", ratios, lambda x: x <= 1))
    for length, least in ((32768, 1.0), (131072, 1.5)):
        ours, theirs = (of(what="training step", model=f"{name}-170m", length=length, compiled=False, graphs=False)
                        for name in ("mag", "transformer"))  # fmt: skip
        ratios = [theirs[0]["seconds"] / ours[0]["seconds"]] if ours and theirs else []
        what = f"MAG at {length:,} tokens: times faster than a FlashAttention transformer of its size"
        made.append(goal_of(what, f"{least:g}", ratios, partial(le, least)))
    copy = [row["rate"] for row in of(what="copy")]
    steps = [row["seconds"] * copy[0] / row["state"] for row in of(what="memory step") if copy]
    what = "step of a token: its time over that of reading its state once"
    made.append(goal_of(what, "at most 1.5", steps, lambda x: x <= 1.5))
    return made


def goal_of(
    what: str, wanted: str, values: Iterable[float], met: Callable[[float], bool], form: str = "{:.2f}"
) -> Goal:
    """The range of what was measured, and whether all of it meets the goal."""
    found = sorted(values)
    if not found:
        return Goal(what, wanted, "not measured", None)
    ends = dict.fromkeys(form.format(value) for value in (found[0], found[-1]))
    return Goal(what, wanted, " to ".join(ends), all(met(value) for value in found))
