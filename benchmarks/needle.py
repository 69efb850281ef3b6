"""The needle in 2M tokens: a memory trained for minutes on short haystacks, then tested on longer ones.

python benchmarks/needle.py [--quick] [--tasks TASK ...] [--json FILE]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import measure
import torch
import yaml

import titans_build as tb

HERE = Path(__file__).parent
JOBS = 2
"""Haystacks that are read at a time, each with one thread."""
WANTED = 0.94
"""The goal for the accuracy in the longest haystack."""
QUICK: dict[str, Any] = {
    "stages": {
        task: [{"length": length, "batch": 4, "steps": 2} for length in (32, 64)] for task in ("needle", "needle_kv")
    },
    "lengths": [64, 256],
    "rows": 2,
    "piece": 64,
}


def train(task: dict[str, Any], settings: measure.Result, runs: Path) -> measure.Result:
    """One run for each length, which starts from the weights of the run before."""
    stages, before = [], None
    recipe = tb.load_recipe(HERE / "recipes" / "needle.yaml", settings["changes"].get(task["task"]))
    for number, stage in enumerate(settings["stages"][task["task"]]):
        out = runs / f"stage-{number}-of-{stage['length']}"
        done = tb.train(recipe, task, {**settings["train"], **stage}, out, weights=before)
        speeds = [event["tokens_per_second"] for event in done.history if event["event"] == "step"]
        took = stage["steps"] * stage["batch"] * stage["length"] / statistics.median(speeds)
        seen = [event for event in done.history if event["event"] == "valid"]
        last = {key: seen[-1][key] for key in ("loss", "accuracy")} if seen else None
        stages.append({**stage, "seconds": took, "valid": last})
        before = out / "model"
        measure.say(f"{runs.name}: {stages[-1]}")
    model = tb.load(before)
    return {
        "model": str(before),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "state_bytes": tb.state.nbytes(model.init_state(1)),
        "stages": stages,
    }


@torch.no_grad()
def read(case: measure.Result, quick: bool) -> measure.Result:
    """Read all rows piece by piece and count the right answers, which are in the last piece."""
    model = tb.load(case["model"]).eval()
    length, rows, piece = case["length"], case["rows"], case["piece"]
    source = tb.open_source({**case["task"], "length": length}, rows=rows, split="test", vocab=model.vocab)
    # allocate everything that is allocated once before measuring memory
    model(next(iter(source.stream(1, min(piece, length)))).tokens)
    before, state, right, asked, seconds = measure.resident(), None, 0, 0, []
    for batch in source.stream(0, piece):
        started = time.perf_counter()
        out = model(batch.tokens, state)
        seconds.append(time.perf_counter() - started)
        state = out.state
        right += int((out.logits.argmax(-1) == batch.targets).sum())
        asked += int((batch.targets >= 0).sum())
    tenth = max(1, len(seconds) // 10)
    return {
        "length": length,
        "rows": rows,
        "accuracy": right / asked,
        "asked": asked,
        "seconds": sum(seconds),
        "tokens_per_second": length * rows / sum(seconds),
        "first_tenth": statistics.median(seconds[:tenth]),
        "last_tenth": statistics.median(seconds[-tenth:]),
        "before": before,
        "peak": max(measure.resident("VmHWM"), before),
    }


# -- the tables --------------------------------------------------------------------------------------------------------


def tables(results: measure.Result) -> dict[str, str]:
    found, rows, training, goals = results["tasks"], [], [], []
    for name, of in found.items():
        steps = sum(stage["steps"] for stage in of["trained"]["stages"])
        tokens = sum(stage["steps"] * stage["batch"] * stage["length"] for stage in of["trained"]["stages"])
        longest = max(stage["length"] for stage in of["trained"]["stages"])
        seconds = sum(stage["seconds"] for stage in of["trained"]["stages"])
        parameters, state = of["trained"]["parameters"], of["trained"]["state_bytes"]
        training.append(
            (name, f"{parameters:,}", f"{state:,}", f"{steps:,}", f"{tokens / 1e6:.1f}M", longest, f"{seconds:,.0f} s")
        )
        for row in of["read"]:
            accuracy, speed = f"{row['accuracy']:.3f}", f"{row['tokens_per_second']:,.0f}"
            rows.append((name, f"{row['length']:,}", row["asked"], accuracy, speed, measure.megabytes(row["peak"])))
        short, long = of["read"][0], of["read"][-1]
        what = f"{name}: found in {long['length']:,} tokens"
        goals.append(measure.goal(what, f"{WANTED:.0%}", [long["accuracy"]], lambda v: v >= WANTED, "{:.3f}"))
        what = f"{name}: peak memory there over that of {short['length']:,} tokens"
        goals.append(measure.goal(what, "at most 1.1", [long["peak"] / short["peak"]], lambda v: v <= 1.1))
        what = f"{name}: time of a piece in the last tenth over the first"
        goals.append(measure.goal(what, "at most 1.1", [long["last_tenth"] / long["first_tenth"]], lambda v: v <= 1.1))
    trained = ("task", "parameters", "state, bytes", "steps", "tokens", "longest haystack", "training")
    return {
        "goals": measure.table(measure.GOALS, goals),
        "training": measure.table(trained, training),
        "reading": measure.table(("task", "haystack, tokens", "needles", "found", "tokens/s", "peak MB"), rows),
        "machine": measure.machine_table(results),
    }


def measured(arguments: argparse.Namespace, results: measure.Result) -> measure.Result:
    settings = yaml.safe_load((HERE / "settings" / "needle.yaml").read_text(encoding="utf-8"))
    settings |= QUICK if arguments.quick else {}
    tasks = {name: settings["tasks"][name] for name in arguments.tasks or settings["tasks"]}
    found: measure.Result = {}

    def find(case: measure.Result) -> measure.Result:
        # without a fixed threshold glibc keeps freed memory, and the peak depends on the layout of its heap
        one = {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "131072"}
        row = measure.alone(__file__, case, arguments.quick, **one)
        measure.say(f"{case['task']['task']}: {row}")
        return row

    with tempfile.TemporaryDirectory() as temporary:
        for name, task in tasks.items():
            found[name] = {"data": task, "trained": train(task, settings, Path(temporary) / name), "read": []}
        cases = [
            {"rows": settings["rows"], "piece": settings["piece"], "model": found[name]["trained"]["model"],
             "task": task, "length": length}
            for length in settings["lengths"]
            for name, task in tasks.items()
        ]  # fmt: skip
        executor = ThreadPoolExecutor(JOBS)
        try:
            for case, row in zip(cases, executor.map(find, cases)):
                found[case["task"]["task"]]["read"].append(row)
        finally:  # also on Ctrl-C: do not start the others
            executor.shutdown(cancel_futures=True)
    for of in found.values():
        of["trained"]["model"] = Path(of["trained"]["model"]).parent.name
    return {"tasks": found}


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tasks", nargs="+", metavar="TASK", help="needle, needle_kv (default: both)")


if __name__ == "__main__":
    measure.benchmark("needle", __doc__, "15 minutes", measured, tables, alone=read, add_options=add_options)
