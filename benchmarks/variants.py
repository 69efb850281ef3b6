"""Training of the variants on one task, with equal numbers of parameters and tokens: ``titans-train compare``.

python benchmarks/variants.py copy|mqar|language|family [--quick] [--jobs N] [--json FILE] [--plots FOLDER]

An interrupted run is resumed: the runs are in benchmarks/runs/. The data and settings are in settings/TASK.yaml.
``family``: ``titans-train reproduce --quick``, the learners on several small tasks.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

import measure

from titans_build.tools.training.reproduce_command import markdown

HERE = Path(__file__).parent
FIVE = ("mac", "mag", "mal", "lmm", "transformer")
TASKS = {"copy": (*FIVE, "window"), "mqar": (*FIVE, "window"), "language": FIVE}
"""The recipes of each task; all have as many parameters as the first."""
FAMILY = "family"
TRIED = ("transformer", "titans", "titans_linear", "--tasks", "parity", "--dim", "16", "--steps", "2", "-t", "batch=2")
"""What a quick run does of the family."""
WANTED = 0.99
"""The accuracy that is the goal of the variants with a memory."""
QUICK = ("steps=2", "batch=2", "length=64", "valid_every=1", "valid_batches=1", "log_every=1", "checkpoint_every=null")


def measured(arguments: argparse.Namespace, results: measure.Result) -> measure.Result:
    name = results["program"] = arguments.task
    if name == FAMILY:
        return _family(arguments, results)
    variants, changes = TASKS[name], []
    if arguments.quick:
        variants = (variants[0], variants[-1])
        changes = [word for change in QUICK[: 2 if name != "language" else None] for word in ("-t", change)]
    results["environment"]["threads"] = max(1, (os.cpu_count() or 1) // arguments.jobs)
    with tempfile.TemporaryDirectory() as temporary:
        runs = Path(temporary) / name if arguments.quick else HERE / "runs" / name
        done = [variant for variant in variants if (runs / variant / "result.json").is_file()]
        recipes = [str(HERE / "recipes" / f"{variant}.yaml") for variant in variants]
        where = ["--train", str(HERE / "settings" / f"{name}.yaml"), "--out", str(runs), "--jobs", str(arguments.jobs)]
        command = [sys.executable, "-m", "titans_build.tools.train", "compare", *recipes, *where, *changes]
        subprocess.run(command, check=True, stdout=sys.stderr)
        found = json.loads((runs / "comparison.json").read_text(encoding="utf-8"))
        _copy_plots(runs.glob("comparison.*g"), arguments.plots, name)
    for variant in found["variants"]:
        # the curves of single runs would be most of the file
        variant["runs"] = [{key: value for key, value in each.items() if key != "curve"} for each in variant["runs"]]
    return {"done_before": done, "comparison": found}


def _family(arguments: argparse.Namespace, results: measure.Result) -> measure.Result:
    results["environment"]["threads"] = max(1, (os.cpu_count() or 1) // arguments.jobs)
    with tempfile.TemporaryDirectory() as temporary:
        runs = Path(temporary) if arguments.quick else HERE / "runs" / FAMILY
        done = sorted(f"{each.parent.parent.name}, {each.parent.name}" for each in runs.rglob("result.json"))
        words = ["--quick", "--out", str(runs), "--jobs", str(arguments.jobs), *(TRIED if arguments.quick else ())]
        command = [sys.executable, "-m", "titans_build.tools.train", "reproduce", *words]
        subprocess.run(command, check=True, stdout=sys.stderr)
        _copy_plots(runs.glob("table.*g"), arguments.plots, FAMILY)
        return {"done_before": done, "family": json.loads((runs / "results.json").read_text(encoding="utf-8"))}


def _copy_plots(plots: Iterable[Path], folder: Path | None, name: str) -> None:
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        for plot in plots:
            shutil.copyfile(plot, folder / f"{name}{plot.suffix}")


def tables(results: measure.Result) -> dict[str, str]:
    if results["program"] == FAMILY:
        return {"results": markdown(results["family"]).strip(), "machine": measure.machine_table(results)}
    metric, variants, rows = results["comparison"]["metric"], results["comparison"]["variants"], []
    name, goal = metric.replace("_", " "), metric == "accuracy"
    for of in variants:
        row = [of["name"], f"{of['parameters']:,}"]
        if of.get("failed"):
            rows.append([*row, None, None, None, f"failed: {of['failed']}", *[None] * (goal + 1)])
            continue
        reached = of["test"][metric]
        row += [f"{of['steps']:,}", f"{of['tokens'] / 1e6:.2f}M", f"{of['seconds']:,.0f} s", f"{reached:.4f}"]
        if goal:
            row.append("" if of["name"] == "window" else "yes" if reached >= WANTED else "no")
        rows.append([*row, f"{of['frozen'][metric]:.4f}" if of["frozen"] else None])
    head = ["variant", "parameters", "steps", "tokens", "time", f"test {name}", *[f">= {WANTED}"] * goal]
    picture = f"![{name} against tokens](plots/{results['program']}.svg)"
    table = measure.table([*head, "memory frozen"], rows)
    return {"results": f"{table}\n\n{picture}", "machine": measure.machine_table(results)}


def add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("task", choices=[*TASKS, FAMILY])
    add("--jobs", type=int, default=2, metavar="N", help="runs side by side, which share the cores (default: 2)")
    add("--plots", type=Path, metavar="FOLDER", help="where the plot is written")


if __name__ == "__main__":
    measure.benchmark("variants", __doc__, "20 minutes", measured, tables, add_options=add_options)
