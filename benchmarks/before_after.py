"""Compare the speed of this version with that of another one, in processes that take turns.

python benchmarks/before_after.py --against FOLDER [--pairs N] [--cases PATTERN ...] [--threads N] [--json FILE]

FOLDER is one that another titans_build is installed in (``pip install --no-deps --target FOLDER ...``). This version is
the one that Python imports without it. Each of ``--pairs`` pairs of processes, one of each version, is started anew, on
the same cores and with equally many threads. For each case the two run the same number of calls in turn, first the one
and then the other in every other round, so that a disturbance meets both. A pair's ratio is the shortest time of this
version over the shortest of the other: below 1 is faster. The result is the median over the pairs, with the lowest and
the highest. With one thread the time is that of the processor, which other processes on the machine take little of.
"""

from __future__ import annotations

import argparse
import fnmatch
import gc
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measure import Result, benchmark, machine_table, milliseconds, say, table

CASES = [
    "operation forward",
    "operation forward and backward",
    "operation one token",
    *(f"train {name}" for name in ("memory", "mac", "lmm")),
    *(f"read {name}" for name in ("mac", "mag", "mal", "lmm")),
    *(f"generate {name} {rows}" for name in ("mac", "mag", "lmm") for rows in ("one row", "four rows")),
]
SAMPLE = 0.005  # seconds that one sample takes at least: short ones are seldom disturbed
RATIO = {"ratio": "this over the other", "lowest": "lowest pair", "highest": "highest pair"}


def operation(time: int, backward: bool) -> Callable[[], Any]:
    """``titans_memory`` of depth 2 with 4 heads of width 32, in chunks of 16."""
    from titans_build.kernels.memory import MemoryState, titans_memory

    heads, width, hidden = 4, 32, 128
    draw = torch.Generator().manual_seed(0)
    qkv = torch.nn.functional.normalize(torch.randn(3, 1, time, heads, width, generator=draw), dim=-1)  # no overflow
    q, k, v = qkv.requires_grad_(backward)
    theta, eta, alpha = 0.1 * torch.rand(3, 1, time, heads, generator=draw).requires_grad_(backward)
    weights = tuple(
        torch.randn(1, heads, *shape, generator=draw) * shape[1] ** -0.5 for shape in ((hidden, width), (width, hidden))
    )
    state = MemoryState.fresh(weights)

    def call() -> torch.Tensor:
        with torch.set_grad_enabled(backward):
            y, _ = titans_memory(q, k, v, theta, eta, alpha, state, chunk=16)
            if backward:
                torch.autograd.grad(y.sum(), (q, k, v, theta, eta, alpha))
        return y

    return call


def case(name: str, quick: bool) -> Callable[[], Any]:
    """The function that a case calls. It uses public names only, which every version has."""
    import titans_build as tb

    kind, which, *rows = name.split(" ", 2)
    dim, time, long, new = (32, 32, 64, 4) if quick else (128, 512, 4096, 64)
    if kind == "operation":
        return operation(1 if "token" in name else time, "backward" in name)
    draw = torch.Generator().manual_seed(0)
    if which == "memory":
        block, x = tb.build_block({"type": "memory", "heads": 4}, dim=dim), torch.randn(1, time, dim, generator=draw)
        return lambda: block(x)[0].sum().backward()
    model = tb.build(tb.load_recipe(which, overrides={"dim": dim}), seed=0)
    tokens = torch.randint(256, (4 if rows == ["four rows"] else 1, long), generator=draw)
    if kind == "train":
        return lambda: model(tokens[:, :time], targets=tokens[:, 1 : time + 1]).loss.backward()
    if kind == "generate":
        return lambda: model.generate(tokens[:, :16], max_new_tokens=new)

    @torch.no_grad()
    def read() -> None:
        state = None
        for piece in tokens.split(time, dim=1):
            state = model(piece, state).state

    return read


def work(quick: bool, threads: int) -> None:
    """Answer each line ``[case, calls]`` on standard input with the seconds that a call takes."""
    import titans_build as tb

    torch.set_num_threads(threads)
    clock = time.process_time if threads == 1 else time.perf_counter
    print(json.dumps(tb.__file__), flush=True)
    ready: dict[str, Callable[[], Any]] = {}
    for line in sys.stdin:
        name, calls = json.loads(line)
        if name not in ready:
            ready = {name: case(name, quick)}  # frees the case before
            ready[name]()
            gc.collect()
            gc.freeze()  # later collections ignore the objects that exist now
        began = clock()
        for _ in range(calls):
            ready[name]()
        print(json.dumps((clock() - began) / calls), flush=True)


class Worker:
    """A process that imports one version: from ``folder``, or as this process would."""

    def __init__(self, folder: Path | None, given: argparse.Namespace) -> None:
        paths = [str(Path(__file__).parent), *([str(folder)] if folder else []), os.environ.get("PYTHONPATH", "")]
        settings = {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": str(given.threads)}
        command = [sys.executable, "-c", f"import before_after; before_after.work({given.quick}, {given.threads})"]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self.process = subprocess.Popen(command, env={**os.environ, **settings}, text=True, **pipes)
        self.file = self.answer()

    def answer(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"before_after.py: error: a worker ended with status {self.process.wait()}")
        return json.loads(line)

    def seconds(self, name: str, calls: int) -> float:
        print(json.dumps([name, calls]), file=self.process.stdin, flush=True)
        return self.answer()


def measure_pair(given: argparse.Namespace, cases: list[str]) -> dict[str, tuple[float, float]]:
    """Seconds of a call in each case: of this version and of the other, each the shortest of all rounds."""
    before = Worker(given.against, given)
    if given.against.absolute() not in Path(before.file).parents:
        sys.exit(f"before_after.py: error: {given.against}: no titans_build in it; {before.file} would be measured")
    pair = (now := Worker(None, given), before)
    found = {}
    for name in cases:
        say(name)
        calls = max(1, math.ceil(SAMPLE / max(worker.seconds(name, 1) for worker in pair)))
        samples: dict[Worker, list[float]] = {now: [], before: []}
        began = time.perf_counter()
        while len(samples[now]) < 5 or time.perf_counter() - began < given.seconds * (not given.quick):
            for worker in pair[:: -1 if len(samples[now]) % 2 else 1]:
                samples[worker].append(worker.seconds(name, calls))
        found[name] = min(samples[now]), min(samples[before])
    for worker in pair:
        worker.process.communicate()
    return found


def tables(results: Result) -> dict[str, str]:
    rows = [
        (name, *(milliseconds(row[key]) for key in ("now", "before")), *(f"{row[key]:.3f}" for key in RATIO))
        for name, row in results["cases"].items()
    ]
    head = ("case", "this version, ms", "the other, ms", *RATIO.values())
    return {"before and after": table(head, rows), "machine": machine_table(results, [])}


def matching(pattern: str) -> list[str]:
    if not (found := fnmatch.filter(CASES, pattern)):
        raise argparse.ArgumentTypeError(f"{pattern!r}: expected some of {', '.join(CASES)}")
    return found


def add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--against", type=Path, required=True, metavar="FOLDER", help="where the other version is installed")
    add("--pairs", type=int, choices=range(1, 100), default=5, metavar="N", help="pairs of processes (default: 5)")
    add("--cases", type=matching, nargs="+", default=[CASES], metavar="PATTERN", help="with wildcards (default: all)")
    add("--threads", type=int, choices=range(1, 100), default=1, metavar="N", help="of each process (default: 1)")
    add("--seconds", type=float, default=4.0, help="for a case in a pair, both versions together (default: 4)")


def measure(given: argparse.Namespace, results: Result) -> Result:
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: given.threads])
    cases = list(dict.fromkeys(itertools.chain(*given.cases)))
    pairs = [measure_pair(given, cases) for _ in range(given.pairs)]
    found = {}
    for name in cases:
        ratios = sorted(now / before for now, before in (pair[name] for pair in pairs))
        now, before = (min(pair[name][which] for pair in pairs) for which in (0, 1))
        spread = {"ratio": statistics.median(ratios), "lowest": ratios[0], "highest": ratios[-1]}
        found[name] = {"now": now, "before": before, **spread}
    return {"cases": found}


if __name__ == "__main__":
    benchmark("before_after", __doc__, "about 7 minutes", measure, tables, add_options=add_options)
