"""The PyTorch backend on a CPU: eager, compiled, and compared with the C kernels.

python benchmarks/torch_path.py [--quick] [--json FILE]

Times are processor time of one thread, which other processes on the machine affect little.
``TITANS_BUILD_BACKEND=torch,attention=sdpa python benchmarks/before_after.py`` compares the backend of two versions.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import measure
import torch
from torch import Tensor

import titans_build as tb
from titans_build.tools.gpu.speed import layer_shapes, memory_operation
from titans_build.tools.gpu.timing import passes

PYTORCH = "torch,attention=sdpa"


class Case(NamedTuple):
    what: str
    backward: bool
    way: str
    """``"torch"``, ``"compiled"`` (the same through ``torch.compile``), or ``"native"`` (the C kernels)."""


class Sizes(NamedTuple):
    heads: int
    length: int
    width: int
    chunk: int
    model: dict[str, Any]
    text: int
    rounds: int
    whats: tuple[str, ...]


MEMORIES = {"memory, expansion 4": (2, 4), "memory, expansion 1": (2, 1), "memory, one layer": (1, 1)}
MODELS = ("lmm", "mac", "mag")
SHAPE = {"dim": 128, "vocab": 256, "stack.0.repeat": 2}
FULL = Sizes(4, 2048, 64, 64, SHAPE, 512, 4, (*MEMORIES, *MODELS))
QUICK = Sizes(1, 24, 8, 8, {}, 0, 1, ("memory, one layer",))
WAYS = ("torch", "compiled", "native")


def make(case: Case, sizes: Sizes) -> Callable[[], Any]:
    """Create inputs and parameters of a case, and return a function that runs it once."""
    torch.manual_seed(0)
    if case.what in MEMORIES:
        backend = "native" if case.way == "native" else "torch"
        depth, expansion = MEMORIES[case.what]
        shapes = layer_shapes(sizes.width, expansion, depth)
        forward, leaves = memory_operation(1, sizes.length, sizes.heads, shapes, sizes.chunk, backend)
    else:
        forward, leaves = model(case, sizes)
    once = passes(torch.compile(forward) if case.way == "compiled" else forward, leaves, case.backward)

    def run() -> None:
        os.environ["TITANS_BUILD_BACKEND"] = "auto" if case.way == "native" else PYTORCH
        once()

    return run


def model(case: Case, sizes: Sizes) -> tuple[Callable[[], Tensor], list[Tensor]]:
    module = tb.build(tb.load_recipe(case.what, overrides=sizes.model))
    text = torch.randint(sizes.model["vocab"], (1, sizes.text + 1))

    def forward() -> Tensor:
        loss: Tensor = module(text[:, :-1], targets=text[:, 1:]).loss
        return loss

    return forward, list(module.parameters())


def measured(arguments: argparse.Namespace, results: measure.Result) -> measure.Result:
    sizes = QUICK if arguments.quick else FULL
    torch.set_num_threads(1)
    results["environment"]["threads"] = 1
    ready: dict[Case, Callable[[], Any]] = {}
    for case in (Case(what, both, way) for what in sizes.whats for both in (False, True) for way in WAYS):
        measure.say(*case)
        try:
            run = make(case, sizes)
            run()
        except Exception as error:  # there may be no C compiler
            results["skipped"][str(case)] = f"{type(error).__name__}: {error}".splitlines()[0]
        else:
            ready[case] = run
    samples = measure.interleave(ready, 0, least=sizes.rounds, clock=time.process_time)
    return {"ways": [{**case._asdict(), "seconds": statistics.median(samples[case])} for case in ready]}


# -- the tables --------------------------------------------------------------------------------------------------------


def tables(results: measure.Result) -> dict[str, str]:
    seconds = {Case(row["what"], row["backward"], row["way"]): row["seconds"] for row in results["ways"]}
    rows = []
    for case in dict.fromkeys(case._replace(way="torch") for case in seconds):
        took = [seconds.get(case._replace(way=way)) for way in WAYS]
        gains = [None if took[0] is None or each is None else f"{took[0] / each:.2f}" for each in took[1:]]
        cells = [None if each is None else measure.milliseconds(each) for each in took]
        rows.append([case.what, "both" if case.backward else "forward", *cells, *gains])
    head = ["processor ms", "pass", "torch", "compiled", "C kernels", "faster compiled", "faster in C"]
    return {"machine": measure.machine_table(results, []), "ways": measure.table(head, rows)}


if __name__ == "__main__":
    measure.benchmark("torch_path", __doc__, "4 minutes", measured, tables)
