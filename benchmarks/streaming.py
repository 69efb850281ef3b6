"""Stability, memory and speed of every packaged recipe over 100,000 tokens, read in pieces.

python benchmarks/streaming.py [--quick] [--json FILE]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import measure
import torch
from torch import Tensor

import titans_build as tb

RECIPES = ("lmm", "mac", "mag", "mal", "transformer", "windows-and-mac", "two-memories", "memory-as-ffn",
           "deltas-and-mac", "llama-and-memory", "tnt", "continuum", "hope")  # fmt: skip


class Sizes(NamedTuple):
    tokens: int
    piece: int
    """Tokens in one call, not a multiple of a chunk or segment."""
    rounds: int
    """How often the first and the last tenth are read again."""


FULL = Sizes(100_000, 1_000, 4)
QUICK = Sizes(400, 20, 1)


Times = tuple[float, float]
"""Seconds on the clock and of the processor."""


@torch.no_grad()
def walk(model: Any, pieces: Sequence[Tensor], state: Any) -> Iterator[tuple[Times, Any, bool]]:
    """Read piece after piece. Yields the time, the state, and whether logits and state are finite."""
    for piece in pieces:
        wall, cpu = time.perf_counter(), time.process_time()
        out = model(piece, state)
        took = time.perf_counter() - wall, time.process_time() - cpu
        state = out.state
        leaves = [leaf for _, leaf in tb.state.named_tensors(state)]
        yield took, state, all(bool(leaf.isfinite().all()) for leaf in (out.logits, *leaves))


def stream(name: str, sizes: Sizes, quick: bool) -> measure.Result:
    # for a test of this program one layer of each kind is enough
    model = tb.build(tb.load_recipe(name, {"stack.0.repeat": 1, "dim": 32} if quick else None))
    text = torch.randint(model.vocab, (1, sizes.tokens), generator=torch.Generator().manual_seed(0))
    pieces = text.split(sizes.piece, dim=1)
    tenth = len(pieces) // 10
    for _ in walk(model, pieces[:2], None):  # to warm up
        pass
    times, bytes_seen, residents, finite, before_last = [], set(), [], True, None
    for count, (took, state, fine) in enumerate(walk(model, pieces, None), start=1):
        times.append(took)
        bytes_seen.add(tb.state.nbytes(state))
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
    row = {
        "recipe": name,
        "parameters": sum(p.numel() for p in model.parameters()),
        "finite": finite,
        "fresh_bytes": tb.state.nbytes(model.init_state(1)),
        "state_bytes": sorted(bytes_seen),
        "resident_growth": residents[-1] - residents[0],
    }
    for index, clock in enumerate(("wall", "cpu")):
        row[f"piece_{clock}"] = [round(took[index], 6) for took in times]
        row[f"pairs_{clock}"] = [[round(took[index], 6) for took in pair] for pair in pairs]
    return row


# -- the tables --------------------------------------------------------------------------------------------------------


def tables(results: measure.Result) -> dict[str, str]:
    piece, found, rows = results["shape"]["piece"], results["recipes"], []
    fixed = [row["state_bytes"] == [row["fresh_bytes"]] for row in found]
    ratios = [last_to_first(row["pairs_cpu"]) for row in found]
    for row, constant, ratio in zip(found, fixed, ratios):
        tenth = len(row["piece_wall"]) // 10
        rows.append(
            [
                row["recipe"],
                "yes" if row["finite"] else "NO",
                f"{row['fresh_bytes'] / 1e6:.2f}" if constant else f"grows to {row['state_bytes'][-1] / 1e6:.2f}",
                f"{row['resident_growth'] / 1e6:.0f}",
                *(f"{statistics.median(row[f'piece_{clock}']) / piece * 1e6:.1f}" for clock in ("wall", "cpu")),
                f"{last_to_first(row['pairs_wall']):.3f}",
                f"{ratio:.3f}",
                f"{sum(row['piece_wall'][-tenth:]) / sum(row['piece_wall'][:tenth]):.3f}",
            ]
        )
    head = ["recipe", "finite", "state MB", "process grew by MB", "ms per 1,000 tokens", "CPU ms per 1,000 tokens"]
    head += ["last tenth / first, in turn", "the same, CPU time", "in one pass"]
    every = lambda count: count == len(found)  # noqa: E731
    near = lambda ratio: abs(ratio - 1) <= 0.05  # noqa: E731
    goals = [
        measure.goal("recipes that stay finite", f"{len(found)}", [sum(r["finite"] for r in found)], every, "{:.0f}"),
        measure.goal("recipes of constant state", f"{len(found)}", [sum(fixed)], every, "{:.0f}"),
        measure.goal("last tenth over first, CPU time", "within 5% of 1", ratios, near, "{:.3f}"),
    ]
    return {
        "goals": measure.table(measure.GOALS, goals),
        "machine": measure.machine_table(results),
        "streaming": measure.table(head, rows),
    }


def last_to_first(pairs: list[list[float]]) -> float:
    """The median over pairs of the time of a piece of the last tenth over that of a piece of the first."""
    return statistics.median(last / first for first, last in pairs)


def measured(arguments: argparse.Namespace, results: measure.Result) -> measure.Result:
    sizes, found = QUICK if arguments.quick else FULL, []
    for name in RECIPES:
        measure.say(f"{name}: {sizes.tokens:,} tokens, and the tenths again")
        found.append(stream(name, sizes, arguments.quick))
    return {"shape": sizes._asdict(), "recipes": found}


if __name__ == "__main__":
    measure.benchmark("streaming", __doc__, "5 minutes", measured, tables)
