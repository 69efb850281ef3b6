"""``titans-train reproduce``: its options, table and picture."""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import sys
import threading
from pathlib import Path
from typing import Any

from ..options import overrides
from ..plotting import draw, need_matplotlib
from ..terminal import Columns, CommandFailed, complain, progress, say, say_columns, say_json
from .family import BENCHMARKS, LEARNERS, SLOW
from .log import Event
from .reproduce import LONG, QUICK, Column, columns_of, number_text, published, reproduce, verdict
from .run_folder import write_file
from .train_command import positive, read_rates, write_plots
from .trials import TEST_BATCHES, Result

SUMMARY = "Compare the family of learners on small published tasks, at equal parameters, with the published figures."
EXAMPLES = (
    "titans-train reproduce --quick --out runs/family           20 minutes on two cores",
    "titans-train reproduce --out runs/family                   all tasks, 22 learners: a night on two cores",
    "titans-train reproduce titans yaad 'deep={type: memory, depth: 3}' --tasks recall,A5 --out runs/three",
)
TABLE = "table"
"""The name of the table's files: .md, .svg, .png."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Learners, tasks, folder and settings."""
    add = parser.add_argument
    text = f"{', '.join(LEARNERS)}; a block, a recipe, or NAME=BLOCK (default: all but {', '.join(SLOW)})"
    add("learners", nargs="*", metavar="LEARNER", help=text)
    add("--out", required=True, metavar="FOLDER", help="a folder for each run, and the results")
    add("--quick", action="store_true", help=f"shorter rows and runs, {len(QUICK.learners)} learners, five tasks")
    add("--tasks", metavar="A,B,...", help=f"{', '.join(BENCHMARKS)} (default: all)")
    add("--dim", type=positive, metavar="N", help=f"width of the models (default: {LONG.dim}; quick: {QUICK.dim})")
    add("--steps", type=positive, metavar="N", help=f"steps of a run (default: {LONG.steps}; quick: {QUICK.steps})")
    long, quick = (",".join(f"{rate:g}" for rate in form.lrs) for form in (LONG, QUICK))
    add("--lr", metavar="X,X,...", help=f"learning rates, of which the best is kept (default: {long}; quick: {quick})")
    add("--seeds", type=positive, default=1, metavar="N", help="runs of each cell (default: 1)")
    add("--jobs", type=positive, default=os.cpu_count() or 1, metavar="N", help="runs in parallel (default: the cores)")
    text = "change one setting of the runs, as in -t batch=32; may be given many times"
    add("-t", "--train-set", action="append", default=[], metavar="KEY=VALUE", help=text)


def run(arguments: argparse.Namespace) -> int:
    """Run everything that is not finished yet, and show the table."""
    settings = overrides(arguments.train_set, "-t", "KEY=VALUE, as in -t batch=32")
    if arguments.steps is not None:
        settings["steps"] = arguments.steps
    folder = Path(arguments.out)
    with _Display(arguments.json) as display:
        result = reproduce(
            folder,
            quick=arguments.quick,
            learners=arguments.learners,
            tasks=[] if arguments.tasks is None else [task.strip() for task in arguments.tasks.split(",")],
            settings=settings,
            dim=arguments.dim,
            lrs=[] if arguments.lr is None else read_rates(arguments.lr),
            seeds=arguments.seeds,
            jobs=arguments.jobs,
            told=display,
            begins=display.begin,
            planned=functools.partial(_say_plan, arguments.jobs),
        )
    columns, said = columns_of(result), verdict(result)
    write_file(folder / f"{TABLE}.md", markdown(result))
    files = [str(folder / f"{TABLE}.md")]
    if columns:
        files += write_plots(lambda: picture(result, columns), folder, TABLE)
    if arguments.json:
        say_json({"event": "reproduction", **result, "verdict": said, "files": files}, in_one_line=True)
    else:
        say("")
        table = Columns("learner", "parameters", *(column.heading for column in columns))
        for row in rows_of(result, columns):
            table.add(*row)
        say_columns(table)
        say("", *notes_of(result), "", said, "", f"written: {', '.join(files)}")
    if not columns:
        raise CommandFailed("no learner was trained")
    return 0


def _say_plan(jobs: int, plan: dict[str, tuple[int, float]]) -> None:
    """The runs of each task and the hours that they take, on standard error."""
    for task, (runs, seconds) in plan.items():
        complain(f"{task}: {runs} run{'s' * (runs != 1)}, about {_hours(seconds / jobs)}", "info")
    runs, seconds = (sum(each) for each in zip(*plan.values()))
    complain(
        f"in all {runs} run{'s' * (runs != 1)}, about {_hours(seconds / jobs)}; finished runs are not repeated", "info"
    )


def _hours(seconds: float) -> str:
    return f"{seconds / 3600:.1f} hours" if seconds >= 3600 else f"{seconds / 60:.0f} minutes"


class _Display:
    """A progress bar for each task on standard error; a line, or JSON, for each finished run."""

    def __init__(self, as_json: bool) -> None:
        self._json, self._lock, self._bar = as_json, threading.Lock(), contextlib.ExitStack()
        self._task, self._advance = "", lambda: None

    def __enter__(self) -> _Display:
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.close()

    def begin(self, task: str, runs: int) -> None:
        self._bar.close()
        self._task, self._advance = task, self._bar.enter_context(progress(task, runs))

    def __call__(self, label: str, event: Event) -> None:
        if event["event"] != "result":
            return
        with self._lock:
            self._advance()
            if self._json:
                run = {key: value for key, value in event.items() if key not in ("event", "curve")}
                say_json({"event": "run", "task": self._task, "run": label, **run}, in_one_line=True)
            elif "failed" in event:
                complain(f"{self._task}: {label}: {event['failed']}", "warning")
            else:
                shown = "  ".join(f"{name} {value:.4f}" for name, value in event["test"].items())
                print(f"{self._task}: {label}: {shown}")
            sys.stdout.flush()


# -- the table ---------------------------------------------------------------------------------------------------------


def rows_of(result: Result, columns: list[Column]) -> list[list[str]]:
    """Learner, parameters, and for each column our figure, with the published one in brackets; last the chance."""
    parameters: dict[str, list[int]] = {}
    for cell in result["cells"]:
        parameters.setdefault(cell["learner"], []).append(cell["parameters"])
    rows = []
    for learner, sizes in parameters.items():
        low, high = f"{min(sizes):,}", f"{max(sizes):,}"
        row = [learner, low if low == high else f"{low} to {high}"]
        for column in columns:
            value, other = column.values.get(learner), published(learner, column)
            ours = "failed" if value is None else number_text(value, column)
            row.append(ours if other is None else f"{ours} [{number_text(other, column)}]")
        rows.append(row)
    if rows:
        chances = ("" if column.chance is None else number_text(column.chance, column) for column in columns)
        rows.append(["without solving it", "", *chances])
    return rows


def notes_of(result: Result) -> list[str]:
    """What the figures are, and which learners are missing."""
    settings = result["settings"]
    sizes = f"{settings['steps']:,} steps of {settings['batch']} rows, {result['dim']} wide, two layers"
    rates = ", ".join(f"{rate:g}" for rate in result["lrs"])
    errors = ", ".join(column.heading for column in columns_of(result) if column.metric == "mse")
    rows = TEST_BATCHES * settings["valid_batches"] * settings["batch"]
    notes = [
        f"Test accuracy in percent{f' ({errors}: mean squared error)' * bool(errors)} on {rows:,} rows after {sizes}, "
        f"learning rate {rates}, {result['seeds']} seed{'s' * (result['seeds'] > 1)}.",
        "In brackets: published, at other sizes and with more training. x2, x4: rows so many times as long as those of "
        "the training, at the positions beyond them.",
    ]
    return notes + [f"Left out: {name}: {reason}" for name, reason in result["left_out"].items()]


def markdown(result: Result) -> str:
    """The table, its notes and the verdict."""
    columns = columns_of(result)
    head = ["learner", "parameters", *(column.heading for column in columns)]
    lines = [head, ["---", "--:", *["--:"] * len(columns)], *rows_of(result, columns)]
    table = "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)
    notes = "\n".join(f"- {note}" for note in notes_of(result))
    return f"{table}\n\n{notes}\n\n{verdict(result)}\n"


def picture(result: Result, columns: list[Column]) -> dict[str, bytes]:
    """The table as a heat map: ``{"png": ..., "svg": ...}``. Raises ``UsageError`` if matplotlib is missing."""
    need_matplotlib("train", "drawing the table")
    rows = rows_of(result, columns)

    def plot(axes: Any) -> None:
        nothing = float("nan")
        shades = [
            [column.values.get(row[0], nothing) if column.metric == "accuracy" else nothing for column in columns]
            for row in rows[:-1]
        ]
        shades.append([nothing if column.chance is None else column.chance for column in columns])
        axes.imshow(shades, cmap="Blues", vmin=0, vmax=1.5, aspect="auto")
        for y, row in enumerate(rows):
            for x, text in enumerate(row[2:]):
                axes.text(x, y, text.replace(" [", "\n["), ha="center", va="center", fontsize=7)
        axes.set_xticks(range(len(columns)), [column.heading for column in columns], rotation=30, ha="right")
        axes.set_yticks(range(len(rows)), [row[0] for row in rows])
        axes.grid(False)
        axes.set_title("test accuracy in percent; in brackets: published")

    size = (3 + 0.75 * len(columns), 1.5 + 0.4 * len(rows))
    files: dict[str, bytes] = draw(plot, size=size)
    return files
