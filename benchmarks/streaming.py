"""Stability, memory and speed of every packaged recipe over 100,000 tokens, read in pieces.

python benchmarks/streaming.py [--quick] [--json FILE]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import measure
import torch
from torch import Tensor

import titans_build as tb

RECIPES = (
    "lmm",
    "mac",
    "mag",
    "mal",
    "transformer",
    "windows-and-mac",
    "two-memories",
    "memory-as-ffn",
    "deltas-and-mac",
    "llama-and-memory",
)


class Sizes(NamedTuple):
    tokens: int
    piece: int
    """Tokens in one call, not a multiple of a chunk or segment."""
    rounds: int
    """How often the first and the last tenth are read again."""


FULL = Sizes(100_000, 1_000, 4)
QUICK = Sizes(400, 20, 1)


class Clock(NamedTuple):
    wall: float
    cpu: float

    @classmethod
    def now(cls) -> Clock:
        return cls(time.perf_counter(), time.process_time())

    def since(self, start: Clock) -> Clock:
        return Clock(self.wall - start.wall, self.cpu - start.cpu)


def walk(model: Any, pieces: tuple[Tensor, ...], state: Any) -> Iterator[tuple[Clock, Any, bool]]:
    """Read piece after piece. Yields the time, the state, and whether logits and state are finite."""
    for piece in pieces:
        start = Clock.now()
        with torch.no_grad():
            out = model(piece, state)
        took = Clock.now().since(start)
        state = out.state
        leaves = [leaf for _, leaf in tb.state.named_tensors(state)]
        yield took, state, all(bool(leaf.isfinite().all()) for leaf in (out.logits, *leaves))


def stream(name: str, sizes: Sizes, quick: bool) -> measure.Result:
    # for a test of this program one layer of each kind is enough
    overrides = {"stack.0.repeat": 1, "dim": 32} if quick else None
    model = tb.build(tb.load_recipe(name, overrides=overrides))
    text = torch.randint(model.vocab, (1, sizes.tokens), generator=torch.Generator().manual_seed(0))
    pieces = text.split(sizes.piece, dim=1)
    tenth = len(pieces) // 10
    fresh = tb.state.nbytes(model.init_state(1))

    for _ in walk(model, pieces[:2], None):  # to warm up
        pass
    clocks, sizes_seen, residents, finite, before_last = [], set(), [], True, None
    for count, (took, state, fine) in enumerate(walk(model, pieces, None), start=1):
        clocks.append(took)
        sizes_seen.add(tb.state.nbytes(state))
        finite &= fine
        if count == len(pieces) - tenth:
            before_last = state
        if count in (tenth, len(pieces)):
            residents.append(measure.resident())

    # other load on the machine affects both pieces of a pair, which are read one after the other
    pairs = [
        (first, last)
        for _ in range(sizes.rounds)
        for (first, *_), (last, *_) in zip(walk(model, pieces[:tenth], None), walk(model, pieces[-tenth:], before_last))
    ]
    return {
        "recipe": name,
        "parameters": sum(p.numel() for p in model.parameters()),
        "finite": finite,
        "fresh_bytes": fresh,
        "state_bytes": sorted(sizes_seen),
        "resident_growth": residents[-1] - residents[0],
        "piece_wall": [round(clock.wall, 6) for clock in clocks],
        "piece_cpu": [round(clock.cpu, 6) for clock in clocks],
        "pairs_wall": [[round(a.wall, 6), round(b.wall, 6)] for a, b in pairs],
        "pairs_cpu": [[round(a.cpu, 6), round(b.cpu, 6)] for a, b in pairs],
    }


# -- the tables --------------------------------------------------------------------------------------------------------


def tables(results: measure.Result) -> dict[str, str]:
    piece = results["shape"]["piece"]
    rows = []
    for row in results["recipes"]:
        constant = row["state_bytes"] == [row["fresh_bytes"]]
        rows.append(
            [
                row["recipe"],
                "yes" if row["finite"] else "NO",
                f"{row['fresh_bytes'] / 1e6:.2f}" if constant else f"grows to {row['state_bytes'][-1] / 1e6:.2f}",
                f"{row['resident_growth'] / 1e6:.0f}",
                f"{statistics.median(row['piece_wall']) / piece * 1e6:.1f}",
                f"{statistics.median(row['piece_cpu']) / piece * 1e6:.1f}",
                f"{last_to_first(row['pairs_wall']):.3f}",
                f"{last_to_first(row['pairs_cpu']):.3f}",
                f"{tenths(row['piece_wall']):.3f}",
            ]
        )
    head = ["recipe", "finite", "state MB", "process grew by MB", "ms per 1,000 tokens", "CPU ms per 1,000 tokens"]
    head += ["last tenth / first, in turn", "the same, CPU time", "in one pass"]
    found = results["recipes"]
    fixed = [float(row["state_bytes"] == [row["fresh_bytes"]]) for row in found]
    finite = [float(row["finite"]) for row in found]
    ratios = [last_to_first(row["pairs_cpu"]) for row in found]
    goals = [
        measure.goal("recipes that stay finite", f"{len(found)}", [sum(finite)], lambda x: x == len(found), "{:.0f}"),
        measure.goal("recipes of constant state", f"{len(found)}", [sum(fixed)], lambda x: x == len(found), "{:.0f}"),
        measure.goal(
            "last tenth over first, CPU time", "within 5% of 1", ratios, lambda x: abs(x - 1) <= 0.05, "{:.3f}"
        ),
    ]
    return {
        "goals": measure.table(measure.GOALS, goals),
        "machine": measure.machine_table(results, []),
        "streaming": measure.table(head, rows),
    }


def last_to_first(pairs: list[list[float]]) -> float:
    """The median over pairs of the time of a piece of the last tenth over that of a piece of the first."""
    return statistics.median(last / first for first, last in pairs)


def tenths(pieces: list[float]) -> float:
    """Total time of the last tenth over that of the first, in one pass over all pieces."""
    tenth = len(pieces) // 10
    return sum(pieces[-tenth:]) / sum(pieces[:tenth])


def measured(arguments: argparse.Namespace, results: measure.Result) -> measure.Result:
    sizes = QUICK if arguments.quick else FULL
    found = []
    for name in RECIPES:
        began = time.perf_counter()
        found.append(stream(name, sizes, arguments.quick))
        measure.say(f"{name}: {sizes.tokens:,} tokens, and the tenths again, {time.perf_counter() - began:.0f} s")
    return {"shape": sizes._asdict(), "recipes": found}


if __name__ == "__main__":
    measure.benchmark("streaming", __doc__, "5 minutes", measured, tables)
