"""The needle at 2M tokens: trained for minutes on short haystacks, then asked in ever longer ones.

python benchmarks/needle.py [--quick] [--runs FOLDER] [--json FILE]

What was interrupted goes on where it was; the haystacks are read again.
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

import torch
from measure import GOALS, Result, environment, goal, machine_table, resident, run, say, show, table, write

import titans_build as tb
from titans_build.recipes import StorageError
from titans_build.recipes.reading import read_file
from titans_build.tools.data import score
from titans_build.tools.training import as_settings
from titans_build.tools.training.trials import Trial, check_trial

HERE = Path(__file__).parent
JOBS = 2
"""Haystacks that are read at once, with one thread each."""
WANTED = 0.94
"""Share of the needles that are to be found in the longest haystack."""
QUICK: dict[str, Any] = {
    "stages": {
        task: [{"length": length, "batch": 4, "steps": 2} for length in (32, 64)] for task in ("needle", "needle_kv")
    },
    "lengths": [64, 256],
    "rows": 2,
    "piece": 64,
}


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a few steps and short haystacks: whether it runs")
    parser.add_argument("--tasks", nargs="+", metavar="TASK", help="needle, needle_kv (default: both)")
    parser.add_argument(
        "--runs", type=Path, metavar="FOLDER", help="where the runs are (default: benchmarks/runs/needle)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results here")
    parser.add_argument("--read", metavar="CASE", help=argparse.SUPPRESS)  # the process that `find` starts
    return parser.parse_args()


# -- training ----------------------------------------------------------------------------------------------------------


def train(task: dict[str, Any], settings: Result, runs: Path) -> Result:
    """One run for each length, each going on from the weights of the one before."""
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
            # of the steps, wherever it was interrupted
            speeds = [event["tokens_per_second"] for event in done.history if event["event"] == "step"]
            took = stage["steps"] * stage["batch"] * stage["length"] / statistics.median(speeds)
            seen = [event for event in done.history if event["event"] == "valid"]
            last = {key: seen[-1][key] for key in ("loss", "accuracy")} if seen else None
            file.write_text(json.dumps({**stage, "seconds": took, "valid": last}), encoding="utf-8")
        stages.append(json.loads(file.read_text(encoding="utf-8")))
        before = out / "model"
        say(f"{runs.name}: {stages[-1]}")
    model = tb.load(before)
    return {
        "model": str(before),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "state_bytes": tb.state.nbytes(model.init_state(1)),
        "stages": stages,
    }


# -- reading -----------------------------------------------------------------------------------------------------------


def find(case: Result) -> Result:
    """What reading haystacks of one length came to, in a process of its own, whose memory is that of this case."""
    command = [sys.executable, __file__, "--read", json.dumps(case)]
    # glibc gives back what is freed only under a fixed threshold: without one the peak tells how it lays out its heap
    one = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "131072"}
    done = subprocess.run(command, capture_output=True, text=True, env=one, check=False)
    if done.returncode:
        raise RuntimeError(f"{case}: {done.stderr.strip()[-2000:]}")
    found: Result = json.loads(done.stdout.splitlines()[-1])
    return found


@torch.no_grad()
def read(case: Result) -> Result:
    """Read all rows piece by piece; the answers are in the last."""
    model = tb.load(case["model"]).eval()
    source = tb.open_source(
        {**case["task"], "length": case["length"]}, rows=case["rows"], split="test", vocab=model.vocab
    )
    # everything that is allocated once has been, before memory is looked at
    for batch in source.stream(1, min(case["piece"], case["length"])):
        model(batch.tokens)
        break
    before, state, found, seconds = resident(), None, None, []
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
        "peak": max(resident("VmHWM"), before),
    }


# -- the tables --------------------------------------------------------------------------------------------------------


def tables(results: Result) -> dict[str, str]:
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
            rows.append(
                (
                    name,
                    f"{row['length']:,}",
                    row["asked"],
                    f"{row['accuracy']:.3f}",
                    f"{row['tokens_per_second']:,.0f}",
                    f"{row['peak'] / 1e6:,.0f}",
                )
            )
        short, long = of["read"][0], of["read"][-1]
        goals += [
            goal(
                f"{name}: found in {long['length']:,} tokens",
                f"{WANTED:.0%}",
                [long["accuracy"]],
                lambda v: v >= WANTED,
                "{:.3f}",
            ),
            goal(
                f"{name}: peak memory there over that of {short['length']:,} tokens",
                "at most 1.1",
                [long["peak"] / short["peak"]],
                lambda v: v <= 1.1,
            ),
            goal(
                f"{name}: time of a piece in the last tenth over the first",
                "at most 1.1",
                [long["last_tenth"] / long["first_tenth"]],
                lambda v: v <= 1.1,
            ),
        ]
    trained = ("task", "parameters", "state, bytes", "steps", "tokens", "longest haystack", "training")
    return {
        "goals": table(GOALS, goals),
        "training": table(trained, training),
        "reading": table(("task", "haystack, tokens", "needles", "found", "tokens/s", "peak MB"), rows),
        "machine": machine_table(results, []),
    }


def main() -> None:
    given = options()
    if given.read is not None:
        print(json.dumps(read(json.loads(given.read))))
        return
    say("needle: half an hour, on a machine with nothing else to do; --quick takes seconds")
    settings = read_file(HERE / "settings" / "needle.yaml") | (QUICK if given.quick else {})
    chosen = given.tasks or list(settings["tasks"])
    results: Result = {"program": "needle", "quick": given.quick, "environment": environment(), "skipped": {}}
    results["tasks"] = {}
    with tempfile.TemporaryDirectory() as temporary:
        usual = Path(temporary) if given.quick else HERE / "runs" / "needle"
        trained = {}
        results["done_before"] = [
            f"{name}: {file.parent.name}"
            for name in chosen
            for file in sorted(((given.runs or usual) / name).glob("*/stage.json"))
        ]
        for name in chosen:
            trained[name] = train(settings["tasks"][name], settings, (given.runs or usual) / name)
        with ThreadPoolExecutor(JOBS) as side_by_side:
            cases = {key: settings[key] for key in ("rows", "piece")}
            waiting = {
                (name, length): side_by_side.submit(
                    find,
                    {**cases, "model": trained[name]["model"], "task": settings["tasks"][name], "length": length},
                )
                for length in settings["lengths"]
                for name in chosen
            }
            try:
                for (name, _), case in waiting.items():
                    say(f"{name}: {case.result()}")
            except BaseException:  # one that was interrupted, too: the others are not begun any more
                side_by_side.shutdown(wait=False, cancel_futures=True)
                raise
        for name in chosen:
            read_by = [case.result() for (of, _), case in waiting.items() if of == name]
            trained[name]["model"] = Path(trained[name]["model"]).parent.name
            results["tasks"][name] = {"data": settings["tasks"][name], "trained": trained[name], "read": read_by}
    write(results, given.json)
    show(tables(results))


if __name__ == "__main__":
    run(main)
