"""Training of the variants on one task, with equal numbers of parameters and tokens.

python benchmarks/variants.py copy|mqar|language [--quick] [--jobs N] [--runs FOLDER] [--json FILE]

An interrupted run is resumed.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import measure

import titans_build as tb
from titans_build.recipes.parse import read_file
from titans_build.tools.training.commands import draw
from titans_build.tools.training.trials import RESULT, threads_per_job

HERE = Path(__file__).parent


class Task(NamedTuple):
    """A comparison; its data and settings are in ``settings/NAME.yaml``."""

    title: str
    variants: tuple[str, ...]
    """Names in ``recipes/``. All have as many parameters as the first."""
    wanted: float | None = None
    """The accuracy that is the goal of the variants with a memory."""
    changes: Mapping[str, dict[str, Any]] = {}
    """Overrides of some of the recipes."""
    quick: Mapping[str, Any] = {}
    """Overrides of the settings for a quick run."""


FIVE = ("mac", "mag", "mal", "lmm", "transformer")
QUICK = {"steps": 2, "batch": 2, "valid_every": 1, "valid_batches": 1, "log_every": 1, "checkpoint_every": None}
TASKS = {
    "copy": Task("Copy: 48 tokens of 9, once more", (*FIVE, "window"), 0.99),
    "mqar": Task("MQAR: vocabulary 256, length 64, 4 pairs", (*FIVE, "window"), 0.99),
    "language": Task("The Python standard library's sources", FIVE, quick={"length": 64}),
}


def compared(name: str, runs: Path, quick: bool, jobs: int) -> measure.Result:
    task = TASKS[name]
    settings = read_file(HERE / "settings" / f"{name}.yaml")
    data = settings.pop("data")
    variants = task.variants
    if quick:
        settings |= QUICK | task.quick
        variants = (variants[0], variants[-1])
    recipes = {
        variant: tb.load_recipe(HERE / "recipes" / f"{variant}.yaml", task.changes.get(variant)) for variant in variants
    }
    found = tb.compare(recipes, data, settings, runs, jobs=jobs, told=_tell)
    for variant in found["variants"]:
        # the curves of single runs would be most of the file
        variant["runs"] = [{key: value for key, value in each.items() if key != "curve"} for each in variant["runs"]]
    return found


def _tell(label: str, event: dict[str, Any]) -> None:
    if event["event"] == "valid":
        numbers = (f"{key} {value:.4f}" for key, value in event.items() if isinstance(value, float))
        measure.say(f"{label}: step {event['step']:,}  {'  '.join(numbers)}")


# -- the tables --------------------------------------------------------------------------------------------------------


def tables(results: measure.Result) -> dict[str, str]:
    task, metric = TASKS[results["program"]], results["comparison"]["metric"]
    name = metric.replace("_", " ")
    rows, frozen = [], any(variant["frozen"] for variant in results["comparison"]["variants"])
    for variant in results["comparison"]["variants"]:
        if variant.get("failed"):
            row = [variant["name"], f"{variant['parameters']:,}", None, None, None, f"failed: {variant['failed']}"]
            rows.append(row + [None] * ((task.wanted is not None) + frozen))
            continue
        reached = variant["test"][metric]
        row = [
            variant["name"],
            f"{variant['parameters']:,}",
            f"{variant['steps']:,}",
            f"{variant['tokens'] / 1e6:.2f}M",
            f"{variant['seconds']:,.0f} s",
            f"{reached:.4f}",
        ]
        if task.wanted is not None:
            row.append("" if variant["name"] == "window" else "yes" if reached >= task.wanted else "no")
        if frozen:
            row.append(f"{variant['frozen'][metric]:.4f}" if variant["frozen"] else None)
        rows.append(row)
    head = ["variant", "parameters", "steps", "tokens", "time", f"test {name}"]
    head += [f">= {task.wanted}"] * (task.wanted is not None) + ["memory frozen"] * frozen
    picture = f"![{name} against tokens](plots/{results['program']}.svg)"
    return {"results": f"{measure.table(head, rows)}\n\n{picture}", "machine": measure.machine_table(results, [])}


def add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("task", choices=TASKS)
    add("--jobs", type=int, default=2, metavar="N", help="runs side by side, which share the cores (default: 2)")
    add("--runs", type=Path, metavar="FOLDER", help="where the runs are (default: benchmarks/runs/TASK)")
    add("--plots", type=Path, metavar="FOLDER", help="where the plot is written")


def measured(arguments: argparse.Namespace, results: measure.Result) -> measure.Result:
    name = results["program"] = arguments.task
    jobs = 1 if arguments.quick else arguments.jobs
    if jobs > 1:
        results["environment"]["threads"] = threads_per_job(jobs)
    with tempfile.TemporaryDirectory() as temporary:
        runs = arguments.runs or (Path(temporary) if arguments.quick else HERE / "runs" / name)
        done = [each for each in TASKS[name].variants if (runs / each / RESULT).is_file()]
        found = compared(name, runs, arguments.quick, jobs)
    if arguments.plots is not None:
        arguments.plots.mkdir(parents=True, exist_ok=True)
        for ending, content in draw(found, TASKS[name].title).items():
            (arguments.plots / f"{name}.{ending}").write_bytes(content)
    return {"done_before": done, "comparison": found}


if __name__ == "__main__":
    measure.benchmark("variants", __doc__, "20 minutes", measured, tables, add_options=add_options)
