"""The torch path on a CPU: as it is here beside an older commit, compiled, and beside the C kernels.

python benchmarks/torch_path.py [--quick] [--before COMMIT] [--json FILE]

Each tree has a process of its own with every case ready, and they are asked in turn. Seconds are of the processor, not
of the clock, and one thread does it all: what else the machine does counts for little.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import measure
import torch
from torch import Tensor

BEFORE = "3a39973"
"""The last commit before the kernels for GPUs and the compiler's operators."""
SLOWER = 1.03
"""A ratio up to which nothing has become slower: medians of sixteen agree to a percent or two."""
PYTORCH = "torch,attention=sdpa"


class Case(NamedTuple):
    what: str
    backward: bool
    way: str
    """``"torch"``, ``"compiled"``: that through ``torch.compile``, or ``"native"``: the C kernels."""


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
FULL = Sizes(4, 2048, 64, 64, SHAPE, 512, 16, (*MEMORIES, *MODELS))
QUICK = Sizes(1, 24, 8, 8, {}, 0, 1, ("memory, one layer",))
WAYS = ("torch", "compiled", "native")
TREES = ("before", "now", "again")
"""Again is before once more, in another process: what its time differs from that of before is noise."""


def cases(sizes: Sizes, ways: tuple[str, ...]) -> list[Case]:
    return [Case(what, backward, way) for what in sizes.whats for backward in (False, True) for way in ways]


# -- the process of a tree ---------------------------------------------------------------------------------------------


def make(case: Case, sizes: Sizes) -> Callable[[], Any]:
    """Inputs and parameters of a case; the result runs it once. Imports the package of this process's tree."""
    torch.manual_seed(0)
    if case.what in MEMORIES:
        backend = "native" if case.way == "native" else "torch"
        depth, expansion = MEMORIES[case.what]
        shapes = measure.layer_shapes(sizes.width, expansion, depth)
        forward, leaves = measure.memory_operation(1, sizes.length, sizes.heads, shapes, sizes.chunk, backend)
    else:
        forward, leaves = model(case, sizes)
    return measure.passes(torch.compile(forward) if case.way == "compiled" else forward, leaves, case.backward)


def model(case: Case, sizes: Sizes) -> tuple[Callable[[], Tensor], list[Tensor]]:
    import titans_build as tb

    module = tb.build(tb.load_recipe(case.what, overrides=sizes.model))
    text = torch.randint(sizes.model["vocab"], (1, sizes.text + 1))

    def forward() -> Tensor:
        loss: Tensor = module(text[:, :-1], targets=text[:, 1:]).loss
        return loss

    return forward, list(module.parameters())


def serve(sizes: Sizes) -> None:
    """Answer each case on standard input with the seconds that one run of it takes, after one that is not counted."""
    torch.set_num_threads(1)
    ready: dict[Case, Callable[[], Any]] = {}
    answers, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        case = Case(*json.loads(line))
        answer: Any
        try:
            os.environ["TITANS_BUILD_BACKEND"] = "auto" if case.way == "native" else PYTORCH
            if case not in ready:
                ready[case] = make(case, sizes)
                ready[case]()
            gc.collect()
            ready[case]()  # the other process has had the caches since the last time
            start = time.process_time()
            ready[case]()
            answer = time.process_time() - start
        except Exception as error:
            answer = f"{type(error).__name__}: {error}".splitlines()[0]
        print(json.dumps(answer), file=answers, flush=True)


# -- the two trees -----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def older(commit: str) -> Iterator[Path]:
    """The tree of ``commit``, for as long as it is needed."""
    with tempfile.TemporaryDirectory() as place:
        file, tree = Path(place) / "tree.zip", Path(place) / "tree"
        _git("archive", "--output", str(file), commit)
        shutil.unpack_archive(file, tree)
        yield tree


def _git(*words: str) -> str:
    done = subprocess.run(["git", *words], cwd=measure.ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"git {' '.join(words)}: {done.stderr.strip()}")
    return done.stdout.strip()


def lay_out(tree: Path, place: Path) -> None:
    """The package of a tree as links in ``place``, from where it can be imported without installing it."""
    inside = place / "titans_build"
    inside.mkdir()
    names = ["blocks", "kernels", "recipes", "registry", "tools", "__init__.py", "py.typed"]
    public = tree / "tools" / "titans_build"  # of an older commit, whose root was no package
    for part in [*(public.iterdir() if public.is_dir() else ()), *(tree / name for name in names)]:
        if part.exists() and not (inside / part.name).exists():
            (inside / part.name).symlink_to(part)


@contextlib.contextmanager
def process(tree: Path, quick: bool) -> Iterator[Callable[[Case], Any]]:
    """Asks the process of a tree for one run of a case."""
    with tempfile.TemporaryDirectory() as place:
        lay_out(tree, Path(place))
        # a process finds the package there before it looks for one that is installed
        variables = {**os.environ, "PYTHONPATH": place, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, str(Path(__file__).resolve()), "--serve", *["--quick"] * quick]
        child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=variables)
        assert child.stdin is not None and child.stdout is not None
        words, answers = child.stdin, child.stdout

        def ask(case: Case) -> Any:
            words.write(json.dumps(case) + "\n")
            words.flush()
            line = answers.readline()
            if not line:
                sys.exit(f"{tree}: the process ended at {case}")
            return json.loads(line)

        try:
            yield ask
        finally:
            words.close()
            child.wait()


def compared(
    sizes: Sizes, commit: str, quick: bool, skipped: dict[str, str]
) -> tuple[list[measure.Result], list[measure.Result]]:
    """Both trees side by side, and the ways of this one."""
    beside: dict[Case, list[list[float]]] = {case: [] for case in cases(sizes, ("torch",))}
    ways: dict[Case, list[float]] = {case: [] for case in cases(sizes, WAYS)}
    with older(commit) as tree, contextlib.ExitStack() as stack:
        before, now, again = (stack.enter_context(process(each, quick)) for each in (tree, measure.ROOT, tree))
        # a process that has compiled is slower at everything, its heap being many times as large
        other = stack.enter_context(process(measure.ROOT, quick))
        for count in range(sizes.rounds):
            measure.say(f"round {count + 1} of {sizes.rounds}")
            for case in beside:
                found: dict[int, Any] = {}
                for turn in range(len(TREES)):  # each is the first in turn
                    which = (count + turn) % len(TREES)
                    found[which] = (before, now, again)[which](case)
                taken = [found[which] for which in range(len(TREES))]
                if _all_ran(case, taken, skipped):
                    beside[case].append(taken)
            for case in ways if count % 4 == 0 else ():
                if str(case) not in skipped:
                    alone = [other(case)]
                    if _all_ran(case, alone, skipped):
                        ways[case] += alone
    pairs = [
        {
            **case._asdict(),
            **{tree: statistics.median(side) for tree, side in zip(TREES, zip(*taken))},
            "ratio": statistics.median(now / before for before, now, _ in taken),
            "noise": statistics.median(again / before for before, _, again in taken),
        }
        for case, taken in beside.items()
        if taken
    ]
    return pairs, [{**case._asdict(), "seconds": statistics.median(taken)} for case, taken in ways.items() if taken]


def _all_ran(case: Case, found: list[Any], skipped: dict[str, str]) -> bool:
    for each in found:
        if isinstance(each, str):
            skipped[str(case)] = each
    return not any(isinstance(each, str) for each in found)


# -- the tables --------------------------------------------------------------------------------------------------------


def tables(results: measure.Result) -> dict[str, str]:
    seconds = {Case(row["what"], row["backward"], row["way"]): row["seconds"] for row in results["ways"]}
    rows = []
    for case in dict.fromkeys(case._replace(way="torch") for case in seconds):
        took = [seconds.get(case._replace(way=way)) for way in WAYS]
        gains = [None if took[0] is None or each is None else f"{took[0] / each:.2f}" for each in took[1:]]
        cells = [None if each is None else measure.milliseconds(each) for each in took]
        rows.append([case.what, _pass(case.backward), *cells, *gains])
    what = "the torch path: its time over that before, the median of pairs"
    ratios = [row["ratio"] for row in results["pairs"]]
    return {
        "goals": measure.table(
            measure.GOALS, [measure.goal(what, f"at most {SLOWER}", ratios, lambda x: x <= SLOWER, "{:.3f}")]
        ),
        "machine": measure.machine_table(results, []),
        "before and now": measure.table(
            ["processor ms", "pass", "before", "now", "now / before", "before again / before"],
            [
                [
                    row["what"],
                    _pass(row["backward"]),
                    measure.milliseconds(row["before"]),
                    measure.milliseconds(row["now"]),
                    f"{row['ratio']:.3f}",
                    f"{row['noise']:.3f}",
                ]
                for row in results["pairs"]
            ],
        ),
        "ways": measure.table(
            ["processor ms", "pass", "torch", "compiled", "C kernels", "faster compiled", "faster in C"],
            rows,
        ),
    }


def _pass(backward: bool) -> str:
    return "both" if backward else "forward"


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--before", default=BEFORE, metavar="COMMIT", help=f"compare with (default: {BEFORE})")


def measured(arguments: argparse.Namespace, results: measure.Result) -> measure.Result:
    results["environment"]["threads"] = 1
    commit = _git("rev-parse", "--short", arguments.before)
    sizes = QUICK if arguments.quick else FULL
    pairs, ways = compared(sizes, commit, arguments.quick, results["skipped"])
    return {"before": commit, "pairs": pairs, "ways": ways}


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:  # the process of a tree
        serve(QUICK if "--quick" in sys.argv else FULL)
    else:
        measure.benchmark("torch_path", __doc__, "half an hour", measured, tables, add_options=add_options)
