"""The needle in 2M tokens: a memory trained for minutes on short haystacks, then tested on longer ones.

python benchmarks/needle.py [--quick] [--runs FOLDER] [--json FILE]

An interrupted training is resumed; the haystacks are read again.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import measure
import torch

import titans_build as tb
from titans_build.recipes import StorageError
from titans_build.recipes.parse import read_file
from titans_build.tools.data import score
from titans_build.tools.training import as_settings
from titans_build.tools.training.trials import Trial, check_trial

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


# -- training ----------------------------------------------------------------------------------------------------------


def train(task: dict[str, Any], settings: measure.Result, runs: Path) -> measure.Result:
    """One run for each length, which starts from the weights of the run before."""
    stages, model, before = [], None, None
    recipe = tb.load_recipe(HERE / "recipes" / "needle.yaml", settings["changes"].get(task["task"]))
    for number, stage in enumerate(settings["stages"][task["task"]]):
        out = runs / f"stage-{number}-of-{stage['length']}"
        file = out / "stage.json"
        whole = as_settings({**settings["train"], **stage})
        try:
            check_trial(Trial(runs.name, recipe, task, whole, out))
        except StorageError as error:
            sys.exit(f"{error}, or remove it")
        if not file.is_file():
            done = tb.train(recipe, task, whole, out, resume=True, weights=before)
            # from the speed of single steps: the run may have been interrupted
            speeds = [event["tokens_per_second"] for event in done.history if event["event"] == "step"]
            took = stage["steps"] * stage["batch"] * stage["length"] / statistics.median(speeds)
            seen = [event for event in done.history if event["event"] == "valid"]
            last = {key: seen[-1][key] for key in ("loss", "accuracy")} if seen else None
            file.write_text(json.dumps({**stage, "seconds": took, "valid": last}), encoding="utf-8")
        stages.append(json.loads(file.read_text(encoding="utf-8")))
        before = out / "model"
        measure.say(f"{runs.name}: {stages[-1]}")
    model = tb.load(before)
    return {
        "model": str(before),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "state_bytes": tb.state.nbytes(model.init_state(1)),
        "stages": stages,
    }


# -- reading -----------------------------------------------------------------------------------------------------------


def find(case: measure.Result) -> measure.Result:
    """The result of :func:`read` in a process of its own, whose peak memory is that of this case."""
    command = [sys.executable, __file__, "--read", json.dumps(case)]
    # without a fixed threshold glibc keeps freed memory, and the peak depends on the layout of its heap
    one = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "131072"}
    done = subprocess.run(command, capture_output=True, text=True, env=one, check=False)
    if done.returncode:
        raise RuntimeError(f"{case}: {done.stderr.strip()[-2000:]}")
    found: measure.Result = json.loads(done.stdout.splitlines()[-1])
    return found


@torch.no_grad()
def read(case: measure.Result) -> measure.Result:
    """Read all rows piece by piece and score the answers, which are in the last piece."""
    model = tb.load(case["model"]).eval()
    source = tb.open_source(
        {**case["task"], "length": case["length"]}, rows=case["rows"], split="test", vocab=model.vocab
    )
    # allocate everything that is allocated once before measuring memory
    for batch in source.stream(1, min(case["piece"], case["length"])):
        model(batch.tokens)
        break
    before, state, found, seconds = measure.resident(), None, None, []
    for batch in source.stream(0, case["piece"]):
        started = time.perf_counter()
        out = model(batch.tokens, state)
        seconds.append(time.perf_counter() - started)
        state = out.state
        scored = score(out.logits, batch.targets)
        found = scored if found is None else found.plus(scored)
    tenth = max(1, len(seconds) // 10)
    return {
        "length": case["length"],
        "rows": case["rows"],
        "accuracy": found.accuracy,
        "asked": found.counted,
        "seconds": sum(seconds),
        "tokens_per_second": case["length"] * case["rows"] / sum(seconds),
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
        "machine": measure.machine_table(results, []),
    }


def add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--tasks", nargs="+", metavar="TASK", help="needle, needle_kv (default: both)")
    add("--runs", type=Path, metavar="FOLDER", help="where the runs are (default: benchmarks/runs/needle)")


def measured(arguments: argparse.Namespace, results: measure.Result) -> measure.Result:
    settings = read_file(HERE / "settings" / "needle.yaml") | (QUICK if arguments.quick else {})
    tasks = {name: settings["tasks"][name] for name in arguments.tasks or settings["tasks"]}
    with tempfile.TemporaryDirectory() as temporary:
        runs = arguments.runs or (Path(temporary) if arguments.quick else HERE / "runs" / "needle")
        done = [f"{name}: {file.parent.name}" for name in tasks for file in sorted((runs / name).glob("*/stage.json"))]
        trained = {name: train(task, settings, runs / name) for name, task in tasks.items()}
        cases = [
            {"rows": settings["rows"], "piece": settings["piece"], "model": trained[name]["model"], "task": task,
             "length": length}
            for length in settings["lengths"]
            for name, task in tasks.items()
        ]  # fmt: skip
        with ThreadPoolExecutor(JOBS) as executor:
            waiting = [executor.submit(find, case) for case in cases]
            try:
                for case, future in zip(cases, waiting):
                    measure.say(f"{case['task']['task']}: {future.result()}")
            except BaseException:  # also on Ctrl-C: do not start the others
                executor.shutdown(wait=False, cancel_futures=True)
                raise
    found = {}
    for name, task in tasks.items():
        of = [future.result() for case, future in zip(cases, waiting) if case["task"] is task]
        trained[name]["model"] = Path(trained[name]["model"]).parent.name
        found[name] = {"data": task, "trained": trained[name], "read": of}
    return {"done_before": done, "tasks": found}


if __name__ == "__main__":
    if sys.argv[1:2] == ["--read"]:  # the process that `find` starts
        print(json.dumps(read(json.loads(sys.argv[2]))))
    else:
        measure.benchmark("needle", __doc__, "15 minutes", measured, tables, add_options=add_options)
