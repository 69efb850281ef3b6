"""The neural memory against titans-pytorch and against causal SDPA attention: time, its growth, and peak memory.

python benchmarks/memory.py [--quick] [--json FILE]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import measure
import torch
from baselines import Attention
from torch import Tensor

import titans_build as tb
from titans_build.kernels.memory import memory_flops
from titans_build.tools.gpu.goals import exponent
from titans_build.tools.gpu.speed import layer_shapes, memory_operation, titans_pytorch_memory
from titans_build.tools.gpu.timing import passes

RATE = "matrix product"
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
    lever: float
    matrix: int


FULL = Sizes(256, 4, 2, (64, 16), {1024: 45, 2048: 60, 4096: 80, 8192: 130}, {32768: 150}, 2048, 15, 2048)
QUICK = Sizes(32, 2, 1, (8, 4), {32: 0, 64: 0}, {128: 0}, 32, 0, 128)


class Case(NamedTuple):
    kind: str
    length: int
    backward: bool
    expansion: int | None = None
    chunk: int | None = None


def cases(sizes: Sizes, lengths: dict[int, float], absent: bool) -> Iterator[Case]:
    """The cases at these lengths, in the order of the tables."""
    most = max(sizes.lengths)
    for length in lengths:
        for backward in (False, True):
            for kind in [kind for kind in KINDS if kind != "attention"]:
                for expansion in (4, 1):
                    for chunk in sizes.chunks:
                        small = chunk < max(sizes.chunks)
                        if kind == "package" and (absent or (small and length > sizes.small_chunks)):
                            continue
                        if (length > most and kind != "block") or (small and (length > most or "medium" in kind)):
                            continue
                        yield Case(kind, length, backward, expansion, chunk)
            yield Case("attention", length, backward)


# -- one case ----------------------------------------------------------------------------------------------------------


def make(case: Case, sizes: Sizes) -> Callable[[], Any]:
    """Create inputs and parameters of a case, and return a function that runs it once."""
    torch.manual_seed(0)
    if case.kind.startswith("medium "):
        return measure.medium(make(case._replace(kind=case.kind.removeprefix("medium ")), sizes))
    if case.kind == "op":
        return operation(case, sizes)[0]
    module: Any
    if case.kind == "block":
        module = tb.build_block(spec(case, sizes), dim=sizes.dim)
    elif case.kind == "package":
        assert case.expansion is not None and case.chunk is not None
        module = titans_pytorch_memory(sizes.dim, sizes.heads, case.expansion, case.chunk)
    else:
        module = Attention(sizes.dim, sizes.heads)
    x = torch.randn(sizes.batch, case.length, sizes.dim)
    leaves = [x, *module.parameters()]
    first = (lambda out: out) if case.kind == "attention" else (lambda out: out[0])
    return passes(lambda: first(module(x)), leaves, case.backward)


def spec(case: Case, sizes: Sizes) -> dict[str, Any]:
    return {"type": "memory", "heads": sizes.heads, "depth": 2, "expansion": case.expansion, "chunk": case.chunk}


def operation(case: Case, sizes: Sizes, dtype: torch.dtype = torch.float32) -> tuple[Any, list[Tensor]]:
    assert case.chunk is not None
    types = {"dtype": dtype, "state_dtype": dtype}
    forward, leaves = memory_operation(sizes.batch, case.length, sizes.heads, shapes(case, sizes), case.chunk, **types)
    return passes(forward, leaves, case.backward), leaves


def shapes(case: Case, sizes: Sizes) -> list[tuple[int, int]]:
    assert case.expansion is not None
    return layer_shapes(sizes.dim // sizes.heads, case.expansion, 2)


def flops(case: Case, sizes: Sizes) -> int | None:
    """Useful FLOPs of a case; ``None`` for titans-pytorch."""
    if case.kind in ("op", "medium op"):
        assert case.chunk is not None
        count = case.length * sizes.heads * memory_flops(shapes(case, sizes), case.chunk)
    elif case.kind in ("block", "medium block"):
        count = tb.build_block(spec(case, sizes), dim=sizes.dim, device="cpu").flops(case.length)
    elif case.kind == "attention":
        count = Attention(sizes.dim, sizes.heads).flops(case.length)
    else:
        return None
    return count * sizes.batch * (3 if case.backward else 1)


# -- the measurements --------------------------------------------------------------------------------------------------


def times(sizes: Sizes, absent: bool) -> list[measure.Result]:
    results = []
    for length, seconds in {**sizes.lengths, **sizes.long}.items():
        group = list(cases(sizes, {length: seconds}, absent))
        measure.say(f"{length} tokens: {len(group)} cases, about {seconds:.0f} s")
        long = length in sizes.long
        samples = measure.interleave(
            {RATE: measure.matrix_product(sizes.matrix), **{case: make(case, sizes) for case in group}},
            seconds,
            # a long case needs no warm-up: its code has run at all other lengths
            least=3 if seconds else 1, most=30 if seconds else 1, warm=not long,
        )  # fmt: skip
        reached = measure.rate(samples[RATE], sizes.matrix)
        results += [
            {**case._asdict(), "seconds": measure.summary(samples[case]), "flops": flops(case, sizes), "rate": reached}
            for case in group
        ]
    return results


def peaks(sizes: Sizes, absent: bool, quick: bool) -> list[measure.Result]:
    most = max(sizes.lengths)
    if quick:
        wanted = [Case("op", most, True, 4, sizes.chunks[0])]
    else:
        wanted = list(cases(sizes, {most: 0}, absent))
        wanted += [
            case
            for case in cases(sizes, {most // 2: 0}, absent)
            if case.backward and case.chunk in (None, sizes.chunks[0])
        ]
    wanted = [case for case in wanted if "medium" not in case.kind]
    measure.say(f"peak memory: {len(wanted)} processes, about {5 * len(wanted)} s")
    return [{**case._asdict(), **measure.peak_memory(__file__, case, quick)} for case in wanted]


def lever(sizes: Sizes) -> list[measure.Result]:
    """The effect of bfloat16 operands: on single products, large and batched as in a chunk, and on the operation."""
    measure.say(f"bfloat16: about {sizes.lever:.0f} s")
    # an untrained memory is chaotic: a difference between two runs grows with every chunk
    length = min(sizes.lengths)
    case = Case("op", length, True, 4, sizes.chunks[0])
    width, hidden = sizes.dim // sizes.heads, 4 * sizes.dim // sizes.heads
    operands = {
        "one large product": (torch.randn(sizes.matrix, sizes.matrix), torch.randn(sizes.matrix, sizes.matrix)),
        "64 small products": (torch.randn(64, width, width), torch.randn(64, width, 2 * hidden)),
    }
    half = {name: (a.bfloat16(), b.bfloat16()) for name, (a, b) in operands.items()}

    def outcome(dtype: torch.dtype) -> tuple[Callable[[], Tensor], Callable[[], list[Tensor]]]:
        torch.manual_seed(0)
        operate, leaves = operation(case, sizes, dtype)
        found = lambda: [operate().detach(), *(x.grad.clone() for x in leaves if x.grad is not None)]  # noqa: E731
        return operate, found

    operate, found = outcome(torch.float32)
    exact = outcome(torch.float64)[1]()
    errors = {
        precision: max(float((a - b).norm() / b.norm()) for a, b in zip(run(), exact))
        for precision, run in (("float32", found), ("medium", measure.medium(found)))
    }
    what = f"the operation, {length} tokens, both passes"
    tried: dict[tuple[str, str], Callable[[], Any]] = {
        (what, "float32"): operate,
        (what, "medium"): measure.medium(operate),
    }
    for name, (a, b) in operands.items():
        product = lambda a=a, b=b: a @ b  # noqa: E731
        c, d = half[name]
        tried |= {(name, "float32"): product, (name, "medium"): measure.medium(product)}
        tried[name, "bfloat16"] = lambda c=c, d=d: c @ d
    samples = measure.interleave(tried, sizes.lever, least=3 if sizes.lever else 1, most=30 if sizes.lever else 1)
    return [
        {"what": name, "precision": precision, "seconds": measure.summary(samples[name, precision])}
        | ({"error": f"{errors[precision]:.0e}"} if name == what else {})
        for name, precision in tried
    ]


# -- the tables --------------------------------------------------------------------------------------------------------


Series = dict[int, measure.Result]
"""The rows of one case by length."""


def tables(results: measure.Result) -> dict[str, str]:
    series: dict[Case, Series] = {}
    for row in results["times"]:
        case = Case(*(row[field] for field in Case._fields))
        series.setdefault(case._replace(length=0), {})[case.length] = row
    lengths = sorted({length for rows in series.values() for length in rows})
    compared = results["compared"]

    def times(backward: bool) -> list[list[object]]:
        return [
            [KINDS[case.kind], case.expansion, case.chunk]
            + [_time(rows[length]) if length in rows else None for length in lengths]
            + [f"{max(map(_spread, rows.values())):.0%}", f"{power:.2f}" if power else None]
            for case, rows in series.items()
            if case.backward == backward
            for power in [_exponent(rows, compared)]
        ]

    ratios = []
    for kind in ("package", "attention"):
        for case, rows in series.items():
            if case.kind == "block":
                faster = _times_faster(rows, series.get(_other(case, kind), {}))
                cells = [f"{faster[length]:.2f}" if length in faster else None for length in lengths]
                if faster:
                    ratios.append([KINDS[kind], _pass(case.backward), case.expansion, case.chunk, *cells])

    heads = [f"{length:,}" for length in lengths]
    timed = ["ms (share of the floor)", "expansion", "chunk", *heads, "spread", "exponent"]
    return {
        "goals": measure.table(measure.GOALS, goals(series, results)),
        "machine": measure.machine_table(results, [row["rate"] for row in results["times"]]),
        "forward": measure.table(timed, times(False)),
        "forward and backward": measure.table(timed, times(True)),
        "times faster": measure.table(["the block is faster than", "pass", "expansion", "chunk", *heads], ratios),
        "peak memory": measure.table(
            ["MB", "pass", "tokens", "expansion", "chunk", "above inputs", "with inputs", "whole process"],
            [
                [KINDS[row["kind"]], _pass(row["backward"]), f"{row['length']:,}", row["expansion"], row["chunk"]]
                + [measure.megabytes(row["peak"] - below) for below in (row["inputs"], row["imports"], 0)]
                for row in results["peaks"]
            ],
        ),
        "bfloat16": measure.table(
            ["ms", "precision", "median", "error"],
            [
                [row["what"], row["precision"], measure.milliseconds(row["seconds"]["median"]), row.get("error")]
                for row in results["lever"]
            ],
        ),
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


def _other(case: Case, kind: str) -> Case:
    """The case of another kind that ``case`` is compared with."""
    return Case(kind, 0, case.backward) if kind == "attention" else case._replace(kind=kind)


def _times_faster(rows: Series, others: Series) -> dict[int, float]:
    return {length: _median(others[length]) / _median(row) for length, row in rows.items() if length in others}


def goals(series: dict[Case, Series], results: measure.Result) -> list[tuple[str, ...]]:
    chunk = max(case.chunk for case in series if case.chunk)
    most = results["compared"]
    made = []
    for expansion, share in ((4, 0.7), (1, 0.6)):
        for backward in (False, True):
            shares = map(_share, series[Case("op", 0, backward, expansion, chunk)].values())
            what = f"operation, expansion {expansion}, {_pass(backward)}: share of the floor"
            made.append(measure.goal(what, f"{share:.0%}", shares, lambda x, y=share: x >= y, "{:.0%}"))
    for expansion in (4, 1):
        for backward, wanted in ((False, 5), (True, 3)):
            case = Case("block", 0, backward, expansion, chunk)
            name = f"expansion {expansion}, {_pass(backward)}"
            block, package = series[case], series.get(_other(case, "package"), {})
            faster = _times_faster(block, package).values()
            what = f"block, {name}: times faster than titans-pytorch"
            made.append(measure.goal(what, f"{wanted}", faster, lambda x, y=wanted: x >= y))
            if faster := _times_faster(series.get(_other(case, "medium block"), {}), package).values():
                what = f"block with bfloat16 operands, {name}: times faster"
                made.append(measure.goal(what, f"{wanted}", faster, lambda x, y=wanted: x >= y))
            longest = max(block)
            what = f"block, {name}: share of SDPA's time at {longest:,} tokens"
            ratio = _median(block[longest]) / _median(series[_other(case, "attention")][longest])
            made.append(measure.goal(what, "under 0.50", [ratio], lambda x: x < 0.5))
    powers = [_exponent(rows, most) for case, rows in series.items() if case.kind in ("op", "block")]
    what = "operation and block: exponent of time against length"
    made.append(measure.goal(what, "at most 1.05", [x for x in powers if x], lambda x: x <= 1.05))
    for kind, name in (("op", "operation"), ("block", "block")):
        rows = [row for row in results["peaks"] if row["kind"] == kind and row["length"] == most]
        peaks = [(row["peak"] - row["imports"]) / 1e6 for row in rows]
        what = f"{name}: peak MB at {most:,} tokens, inputs and outputs included"
        made.append(measure.goal(what, "under 600", peaks, lambda x: x < 600, "{:.0f}"))
    return made


def _pass(backward: bool) -> str:
    return "both" if backward else "forward"


def measured(arguments: argparse.Namespace, results: measure.Result) -> measure.Result:
    sizes = QUICK if arguments.quick else FULL
    results["skipped"] = measure.missing()
    absent = bool(results["skipped"])
    return {
        "shape": {"dim": sizes.dim, "heads": sizes.heads, "batch": sizes.batch, "depth": 2},
        "compared": max(sizes.lengths),
        "times": times(sizes, absent),
        "peaks": peaks(sizes, absent, arguments.quick),
        "lever": lever(sizes),
    }


def peak_case(case: list[Any], quick: bool) -> Callable[[], Callable[[], Any]]:
    found = Case(*case)
    if found.kind == "package":
        measure.missing()  # imports it
    return lambda: make(found, QUICK if quick else FULL)


if __name__ == "__main__":
    measure.benchmark("memory", __doc__, "12 minutes", measured, tables, peak_case=peak_case)
