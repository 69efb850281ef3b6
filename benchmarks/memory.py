"""The neural memory against titans-pytorch and against causal SDPA attention: time, its growth, and peak memory.

python benchmarks/memory.py [--quick] [--json FILE]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Iterator
from itertools import product
from typing import Any, NamedTuple

import measure
import torch
from baselines import Attention

import titans_build as tb
from titans_build.kernels.memory import memory_flops
from titans_build.tools.gpu.goals import exponent
from titans_build.tools.gpu.speed import layer_shapes, memory_operation, titans_pytorch_memory
from titans_build.tools.gpu.timing import passes

KINDS = {
    "op": "memory, the operation",
    "block": "memory, the block",
    "medium op": "the operation, bfloat16 operands",
    "medium block": "the block, bfloat16 operands",
    "package": "titans-pytorch",
    "attention": "SDPA attention",
}


class Sizes(NamedTuple):
    dim: int
    heads: int
    batch: int
    chunks: tuple[int, ...]
    lengths: dict[int, float]
    """Length -> seconds to spend on it."""
    long: dict[int, float]
    """Likewise, for the block and attention only."""
    small_chunks: int
    """The longest sequence for titans-pytorch at the small chunk: its time grows with the square of the length."""
    matrix: int


FULL = Sizes(256, 4, 2, (64, 16), {1024: 45, 2048: 60, 4096: 80, 8192: 130}, {32768: 150}, 2048, 2048)
QUICK = Sizes(32, 2, 1, (8, 4), {32: 0, 64: 0}, {128: 0}, 32, 128)


class Case(NamedTuple):
    kind: str
    length: int
    backward: bool
    expansion: int | None = None
    chunk: int | None = None


def cases(sizes: Sizes, lengths: Iterable[int], absent: bool) -> Iterator[Case]:
    """The cases at these lengths, in the order of the tables."""
    most, largest = max(sizes.lengths), max(sizes.chunks)
    kinds = [kind for kind in KINDS if kind != "attention" and not (absent and kind == "package")]
    for length, backward in product(lengths, (False, True)):
        for kind, expansion, chunk in product(kinds, (4, 1), sizes.chunks):
            if length > most:
                wanted = kind == "block" and chunk == largest
            elif kind == "package":
                wanted = chunk == largest or length <= sizes.small_chunks
            else:
                wanted = chunk == largest or "medium" not in kind
            if wanted:
                yield Case(kind, length, backward, expansion, chunk)
        yield Case("attention", length, backward)


# -- one case ----------------------------------------------------------------------------------------------------------


def make(case: Case, sizes: Sizes) -> Callable[[], Any]:
    """Create inputs and parameters of a case, and return a function that runs it once."""
    torch.manual_seed(0)
    if case.kind.startswith("medium "):
        return measure.medium(make(case._replace(kind=case.kind.removeprefix("medium ")), sizes))
    if case.kind == "op":
        operation = memory_operation(sizes.batch, case.length, sizes.heads, shapes(case, sizes), case.chunk or 0)
        return passes(*operation, case.backward)
    x, module = torch.randn(sizes.batch, case.length, sizes.dim), block(case, sizes)
    result = (lambda: module(x)) if case.kind == "attention" else (lambda: module(x)[0])
    return passes(result, [x, *module.parameters()], case.backward)


def block(case: Case, sizes: Sizes) -> Any:
    if case.kind == "attention":
        return Attention(sizes.dim, sizes.heads)
    if case.kind == "package":
        return titans_pytorch_memory(sizes.dim, sizes.heads, case.expansion or 0, case.chunk or 0)
    spec = {"type": "memory", "heads": sizes.heads, "depth": 2, "expansion": case.expansion, "chunk": case.chunk}
    return tb.build_block(spec, dim=sizes.dim)


def shapes(case: Case, sizes: Sizes) -> list[tuple[int, int]]:
    return layer_shapes(sizes.dim // sizes.heads, case.expansion or 0, 2)


def flops(case: Case, sizes: Sizes) -> int | None:
    """Useful FLOPs of a case; ``None`` for titans-pytorch."""
    if case.kind == "package":
        return None
    if case.kind in ("op", "medium op"):
        count = case.length * sizes.heads * memory_flops(shapes(case, sizes), case.chunk or 0)
    else:
        count = block(case, sizes).flops(case.length)
    return count * sizes.batch * (3 if case.backward else 1)


# -- the measurements --------------------------------------------------------------------------------------------------


def times(sizes: Sizes, absent: bool) -> list[measure.Result]:
    results = []
    for length, seconds in {**sizes.lengths, **sizes.long}.items():
        group = list(cases(sizes, [length], absent))
        measure.say(f"{length} tokens: {len(group)} cases, about {seconds:.0f} s")
        ready = {case: make(case, sizes) for case in group}
        # a long case needs no warm-up: its code has run at all other lengths
        warm = length not in sizes.long
        samples, rate = measure.interleave_with_rate(ready, seconds, sizes.matrix, warm=warm)
        results += [
            {**case._asdict(), "seconds": measure.summary(samples[case]), "flops": flops(case, sizes), "rate": rate}
            for case in group
        ]
    return results


def peaks(sizes: Sizes, absent: bool, quick: bool) -> list[measure.Result]:
    most, largest = max(sizes.lengths), sizes.chunks[0]
    wanted = [
        case
        for case in cases(sizes, (most, most // 2), absent)
        if "medium" not in case.kind and (case.length == most or (case.backward and case.chunk in (None, largest)))
    ][: 1 if quick else None]
    measure.say(f"peak memory: {len(wanted)} processes, about {5 * len(wanted)} s")
    return [{**case._asdict(), **measure.alone(__file__, case, quick)} for case in wanted]


# -- the tables --------------------------------------------------------------------------------------------------------


Series = dict[int, measure.Result]
"""The rows of one case by length."""


def tables(results: measure.Result) -> dict[str, str]:
    series: dict[Case, Series] = {}
    for row in results["times"]:
        case = Case(*(row[field] for field in Case._fields))
        series.setdefault(case._replace(length=0), {})[case.length] = row
    lengths = sorted({row["length"] for row in results["times"]})

    def times(backward: bool) -> str:
        head = ["ms (share of the floor)", "expansion", "chunk", *(f"{length:,}" for length in lengths)]
        rows: list[list[object]] = []
        for case, of in series.items():
            if case.backward == backward:
                power = _exponent(of, results["compared"])
                cells = [_time(of[length]) if length in of else None for length in lengths]
                ends = [f"{max(map(_spread, of.values())):.0%}", power and f"{power:.2f}"]
                rows.append([KINDS[case.kind], case.expansion, case.chunk, *cells, *ends])
        return measure.table([*head, "spread", "exponent"], rows)

    peaks = [
        [KINDS[row["kind"]], _pass(row["backward"]), f"{row['length']:,}", row["expansion"], row["chunk"]]
        + [measure.megabytes(row["peak"] - below) for below in (row["inputs"], row["imports"], 0)]
        for row in results["peaks"]
    ]
    peak_head = ["MB", "pass", "tokens", "expansion", "chunk", "above inputs", "with inputs", "whole process"]
    return {
        "goals": measure.table(measure.GOALS, goals(series, results)),
        "machine": measure.machine_table(results, [row["rate"] for row in results["times"]]),
        "forward": times(False),
        "forward and backward": times(True),
        "peak memory": measure.table(peak_head, peaks),
    }


def _median(row: measure.Result) -> float:
    return row["seconds"]["median"]


def _share(row: measure.Result) -> float:
    """Share of the floor."""
    return row["flops"] / row["rate"] / _median(row)


def _time(row: measure.Result) -> str:
    return measure.milliseconds(_median(row)) + (f" ({_share(row):.0%})" if row["flops"] else "")


def _spread(row: measure.Result) -> float:
    return (row["seconds"]["high"] - row["seconds"]["low"]) / _median(row)


def _exponent(rows: Series, most: int) -> float | None:
    lengths = sorted(length for length in rows if length <= most)
    return exponent(lengths, [_median(rows[length]) for length in lengths])


def _pass(backward: bool) -> str:
    return "both" if backward else "forward"


def goals(series: dict[Case, Series], results: measure.Result) -> Iterator[tuple[str, ...]]:
    chunk, most = max(case.chunk for case in series if case.chunk), results["compared"]

    def times_faster(kind: str, case: Case) -> list[float]:
        others = series.get(case._replace(kind="package"), {})
        return [
            _median(others[n]) / _median(row)
            for n, row in series.get(case._replace(kind=kind), {}).items()
            if n in others
        ]

    for (expansion, share), backward in product(((4, 0.7), (1, 0.6)), (False, True)):
        shares = map(_share, series[Case("op", 0, backward, expansion, chunk)].values())
        what = f"operation, expansion {expansion}, {_pass(backward)}: share of the floor"
        yield measure.goal(what, f"{share:.0%}", shares, lambda x, y=share: x >= y, "{:.0%}")
    for expansion, (backward, wanted) in product((4, 1), ((False, 5), (True, 3))):
        case, name = Case("block", 0, backward, expansion, chunk), f"expansion {expansion}, {_pass(backward)}"
        for kind, what in (
            ("block", f"block, {name}: times faster than titans-pytorch"),
            ("medium block", f"block with bfloat16 operands, {name}: times faster"),
        ):
            yield measure.goal(what, f"{wanted}", times_faster(kind, case), lambda x, y=wanted: x >= y)
        longest = max(series[case])
        ratio = _median(series[case][longest]) / _median(series[Case("attention", 0, backward)][longest])
        what = f"block, {name}: share of SDPA's time at {longest:,} tokens"
        yield measure.goal(what, "under 0.50", [ratio], lambda x: x < 0.5)
    powers = [_exponent(rows, most) for case, rows in series.items() if case.kind in ("op", "block")]
    what = "operation and block: exponent of time against length"
    yield measure.goal(what, "at most 1.05", [x for x in powers if x], lambda x: x <= 1.05)
    for kind, name in (("op", "operation"), ("block", "block")):
        rows = [row for row in results["peaks"] if row["kind"] == kind and row["length"] == most]
        peaks = [(row["peak"] - row["imports"]) / 1e6 for row in rows]
        what = f"{name}: peak MB at {most:,} tokens, inputs and outputs included"
        yield measure.goal(what, "under 600", peaks, lambda x: x < 600, "{:.0f}")


def measured(arguments: argparse.Namespace, results: measure.Result) -> measure.Result:
    sizes = QUICK if arguments.quick else FULL
    results["skipped"] = measure.missing()
    absent = bool(results["skipped"])
    return {
        "shape": {"dim": sizes.dim, "heads": sizes.heads, "batch": sizes.batch, "depth": 2},
        "compared": max(sizes.lengths),
        "times": times(sizes, absent),
        "peaks": peaks(sizes, absent, arguments.quick),
    }


def alone(case: list[Any], quick: bool) -> measure.Result:
    if case[0] == "package":
        measure.missing()  # imports it
    return measure.peak_memory(lambda: make(Case(*case), QUICK if quick else FULL))


if __name__ == "__main__":
    measure.benchmark("memory", __doc__, "12 minutes", measured, tables, alone=alone)
