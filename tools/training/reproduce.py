"""``reproduce``: the family of learners side by side on small published tasks, at equal parameters."""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ... import recipes
from ...kernels.dispatch import BackendError
from ...recipes import Recipe, load_recipe
from ...registry import Problem, RecipeError, nearest
from ..data import open_source
from .compare import compare, fit, parameters_of
from .distributed import Processes
from .family import (
    BENCHMARKS,
    LEARNERS,
    MAD_AVERAGE,
    PUBLISHED,
    QUICK_LEARNERS,
    SLOW,
    Benchmark,
    Kind,
    learners_named,
    mad_average,
    recipe_of,
    with_bottleneck,
)
from .run_folder import write_file
from .settings import Settings, as_settings
from .train_step import TrainStep
from .trials import RESULT, TEST_BATCHES, Listener, Result
from .validation import validate

CELLS, RESULTS = "cells.jsonl", "results.json"
SETTINGS = {
    "batch": 16,
    "checkpoint_every": None,
    "log_every": 50,
    "surprise_every": None,
    "spike": None,
    "tensorboard": False,
}
"""Settings of every run that are not the default."""
SAME = 0.01
"""Accuracies that differ by less, or by less than the spread over the seeds, count as equal."""


class Form(NamedTuple):
    """How much is done unless the command line says otherwise."""

    dim: int
    steps: int
    valid_batches: int
    lrs: tuple[float, ...]
    learners: tuple[str, ...]
    tasks: tuple[str, ...]


LONG = Form(128, 600, 20, (1e-3, 3e-3), tuple(n for n in LEARNERS if n not in SLOW), tuple(BENCHMARKS))
QUICK = Form(64, 500, 8, (5e-3,), QUICK_LEARNERS, tuple(n for n, each in BENCHMARKS.items() if each.quick is not None))


def reproduce(
    out: str | os.PathLike[str],
    *,
    quick: bool = False,
    learners: Sequence[str] = (),
    tasks: Sequence[str] = (),
    settings: Mapping[str, Any] | None = None,
    dim: int | None = None,
    lrs: Sequence[float] = (),
    seeds: int = 1,
    jobs: int = 1,
    told: Listener | None = None,
    begins: Callable[[str, int], None] | None = None,
    planned: Callable[[dict[str, tuple[int, float]]], None] | None = None,
) -> Result:
    """Train every learner on every task, each in its own folder under ``out``.

    Args:
        quick: shorter rows, fewer tasks and learners, and fewer steps.
        learners: names of ``LEARNERS``, blocks or recipes, and NAME=BLOCK; by default those of the form.
        tasks: names of ``BENCHMARKS``.
        settings: training settings that replace those of the form.
        dim: width of the models.
        lrs: learning rates; the one with the lowest validation loss is kept.
        seeds: runs of each cell.
        jobs: runs in parallel.
        told: called with the label and each event of the runs.
        begins: called with the name of each task, and the number of its runs.
        planned: called before the first run, with the number of unfinished runs of each task, and the seconds that
            their training takes, estimated from one step of each model.

    All models of a task have as many parameters as the transformer, within 1%, by the width of their feed-forward
    networks. A learner that cannot run here is left out, with the reason. An interrupted call resumes; finished runs
    are not repeated. ``out/cells.jsonl`` has a line for each cell, ``out/results.json`` the result: ``quick``, ``dim``,
    ``settings``, ``lrs``, ``seeds``, ``tasks``, ``learners``, ``left_out`` and ``cells``.
    """
    folder, form = Path(out), QUICK if quick else LONG
    given = {**SETTINGS, "steps": form.steps, "valid_batches": form.valid_batches, **(settings or {})}
    setup = as_settings(given)
    if "valid_every" not in given:
        setup = as_settings({**setup.to_dict(), "valid_every": max(1, setup.steps // 4)})
    chosen = benchmarks_named(tasks or form.tasks, quick)
    wanted = learners_named(list(learners) or form.learners)
    rates = list(lrs or form.lrs)
    width = dim or form.dim
    before = read_cells(folder / CELLS)
    cells: list[Result] = []
    left_out: dict[str, str] = {}
    plans = {task: _models(wanted, benchmark, width, setup, left_out) for task, benchmark in chosen.items()}
    if planned is not None:
        planned({task: _left(folder / task, models, rates, seeds, setup) for task, models in plans.items()})
    for task, benchmark in chosen.items():
        models = plans[task]
        if begins is not None:
            begins(task, len(models) * len(rates) * seeds)
        if not models:
            continue
        found = compare(
            {name: model.recipe for name, model in models.items()},
            benchmark.data,
            setup,
            folder / task,
            parameters=None,
            lrs=rates,
            seeds=seeds,
            jobs=jobs,
            allow_imports=True,
            told=told,
        )
        for variant in found["variants"]:
            name = variant["name"]
            cell = {"task": task, "learner": name, "kind": wanted[name][0], "metric": found["metric"]}
            cell |= {key: value for key, value in variant.items() if key not in ("name", "curve", "changes", "frozen")}
            cell |= {"ffn": models[name].ffn, "chance": max(found["data"]["references"].values(), default=None)}
            cell["runs"] = [{key: value for key, value in run.items() if key != "curve"} for run in variant["runs"]]
            same = next((old for old in before if cell.items() <= old.items()), None)
            cell["longer"] = same["longer"] if same else _longer(benchmark, folder / task, cell, setup)
            cells.append(cell)
        write_file(folder / CELLS, "".join(json.dumps(cell) + "\n" for cell in cells))
    result = {
        "quick": quick,
        "dim": width,
        "settings": setup.to_dict(),
        "lrs": rates,
        "seeds": seeds,
        "tasks": {task: benchmark.data for task, benchmark in chosen.items()},
        "learners": {name: kind for name, (kind, _) in wanted.items()},
        "left_out": left_out,
        "cells": cells,
    }
    write_file(folder / RESULTS, json.dumps(result, indent=1) + "\n")
    return result


def benchmarks_named(names: Sequence[str], quick: bool) -> dict[str, Benchmark]:
    """The benchmarks of these names in the sizes of the form. Raises ``RecipeError`` for other names."""
    unknown = [Problem(name, f"no such task{nearest(name, BENCHMARKS)}") for name in names if name not in BENCHMARKS]
    if unknown:
        raise RecipeError(unknown, f"tasks: expected some of {', '.join(BENCHMARKS)}")
    found = {}
    for name in names:
        each = BENCHMARKS[name]
        found[name] = each._replace(data={**each.data, **(each.quick or {})}) if quick else each
    return found


def read_cells(file: Path) -> list[Result]:
    """The cells of an earlier call; none if there are none."""
    try:
        return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError):
        return []


# -- models ------------------------------------------------------------------------------------------------------------


class Model(NamedTuple):
    """The recipe of a cell, the width of its feed-forward networks, and the seconds that a step takes."""

    recipe: Recipe
    ffn: int | None
    seconds: float


def _models(
    wanted: Mapping[str, tuple[Kind | None, str | dict[str, Any]]],
    benchmark: Benchmark,
    dim: int,
    settings: Settings,
    left_out: dict[str, str],
) -> dict[str, Model]:
    """The models of a task, each after a trial step. Learners that cannot be trained are added to ``left_out``."""
    source = open_source(benchmark.data, rows=settings.batch, split="valid")
    target = parameters_of(load_recipe(recipe_of({"type": "attention"}, dim), {"vocab": source.vocab}))
    found = {}
    for name, (_, learner) in wanted.items():
        if name in left_out:
            continue
        try:
            fitted = fit(load_recipe(recipe_of(learner, dim), {"vocab": source.vocab}), target, name=name)
            recipe = fitted.recipe
            if benchmark.bottleneck:
                recipe = with_bottleneck(recipe, source.length // 2)
            model = recipes.build(recipe, seed=0, device=settings.device, dtype=settings.dtype)
            batch = source.batch(0)
            for _ in range(2):  # the first step takes longer
                begun = time.perf_counter()
                loss = model(batch.tokens.to(settings.device), targets=batch.targets.to(settings.device)).loss
                loss.backward()
                seconds = time.perf_counter() - begun
            if not bool(torch.isfinite(loss)):
                raise ValueError("the loss of the first step is not finite")
        except Exception as error:  # of other libraries any: the table of a night must not be lost to one learner
            known = isinstance(error, (RecipeError, BackendError, ValueError, RuntimeError))
            reason = str(error).strip().splitlines()[-1:] or [""]
            left_out[name] = reason[0].strip(" -") if known else f"{type(error).__name__}: {reason[0]}"
            continue
        found[name] = Model(recipe, next(iter(fitted.changes.values()), 4 * dim), seconds)
    return found


def _left(
    folder: Path, models: Mapping[str, Model], lrs: Sequence[float], seeds: int, settings: Settings
) -> tuple[int, float]:
    """The number of runs of a task that are not finished, and the seconds of their steps."""
    ends = [[f"seed-{seed}"] for seed in range(seeds)] if seeds > 1 else [[]]
    labels = [(name, "/".join([name, f"lr-{lr!r}", *end])) for name in models for lr in lrs for end in ends]
    left = [name for name, label in labels if not (folder / label / RESULT).exists()]
    return len(left), settings.steps * sum(models[name].seconds for name in left)


# -- tests beyond the trained length -----------------------------------------------------------------------------------


def _longer(benchmark: Benchmark, folder: Path, cell: Result, settings: Settings) -> dict[str, float]:
    """The metric at multiples of the length, the mean over the runs that were kept."""
    if not benchmark.longer or cell.get("failed"):
        return {}
    found: dict[str, list[float]] = {str(multiple): [] for multiple in benchmark.longer}
    for index, run in enumerate(run for run in cell["runs"] if run["lr"] == cell["lr"]):
        several = sum(run["lr"] == cell["lr"] for run in cell["runs"]) > 1
        label = "/".join([cell["learner"], f"lr-{cell['lr']!r}", *[f"seed-{index}"] * several])
        model = recipes.load(folder / label / "model", device=settings.device, dtype=settings.dtype)
        step = TrainStep(model, settings, Processes(device=torch.device(settings.device)))
        for multiple in benchmark.longer:
            source = open_source(benchmark.at(multiple), rows=settings.batch, split="test", seed=run["seed"])
            metrics = validate(step, source, TEST_BATCHES * settings.valid_batches // multiple)
            found[str(multiple)].append(metrics[cell["metric"]])
    return {multiple: statistics.mean(each) for multiple, each in found.items()}


# -- what the numbers say ----------------------------------------------------------------------------------------------


class Column(NamedTuple):
    """A column of the table."""

    heading: str
    task: str
    metric: str
    values: dict[str, float]
    """By learner; none where a run failed."""
    chance: float | None = None
    spread: float = 0.0
    """The largest over the learners."""


def columns_of(result: Result) -> list[Column]:
    """The columns of the table: each task, tests beyond the trained length, and the average over MAD."""
    found = []
    accuracies: dict[str, dict[str, float]] = {}
    for task in result["tasks"]:
        cells = [cell for cell in result["cells"] if cell["task"] == task and not cell.get("failed")]
        if not cells:
            continue
        metric = cells[0]["metric"]
        values = {cell["learner"]: cell["test"][metric] for cell in cells}
        spread = max(cell["spread"][metric] for cell in cells)
        found.append(Column(task, task, metric, values, cells[0]["chance"] if metric == "accuracy" else None, spread))
        for multiple in cells[0]["longer"]:
            far = {cell["learner"]: cell["longer"][multiple] for cell in cells}
            found.append(Column(f"{task} x{multiple}", "", metric, far, cells[0]["chance"]))
        for learner, value in values.items():
            accuracies.setdefault(learner, {})[task] = value
    averages = {name: average for name, each in accuracies.items() if (average := mad_average(each)) is not None}
    if averages:
        found.append(Column(MAD_AVERAGE, MAD_AVERAGE, "accuracy", averages))
    return found


def published(learner: str, column: Column) -> float | None:
    """The published figure beside a cell."""
    return PUBLISHED.get(learner, {}).get(column.task)


def verdict(result: Result) -> str:
    """One or two sentences: where a learner whose memory is a matrix is as good as every one whose memory is deep."""
    kinds: dict[str, Kind | None] = result["learners"]
    equal, better, unsolved = list[str](), list[str](), list[str]()
    for column in columns_of(result):
        sign = 1 if column.metric == "accuracy" else -1
        best: dict[str, tuple[float, str]] = {}
        for learner, value in column.values.items():
            kind = kinds[learner] or ""
            best[kind] = max(best.get(kind, (-float("inf"), "")), (sign * value, learner))
        if "linear" not in best or "deep" not in best:
            continue
        (linear, name), (deep, other) = best["linear"], best["deep"]
        if column.chance is not None and max(linear, deep) < column.chance + 0.1:
            unsolved.append(column.heading)
            continue
        figures = f"{name} {number_text(sign * linear, column)}, {other} {number_text(sign * deep, column)}"
        shown = f"{column.heading} ({figures})"
        same = max(SAME if sign > 0 else SAME * -deep, column.spread)
        (equal if linear >= deep - same else better).append(shown)
    if not equal and not better and not unsolved:
        return "No task has both a linear and a deep memory to compare."
    parts = []
    if equal:
        parts.append(f"A linear memory is as good as the best deep one, or better, on {', '.join(equal)}.")
    if better:
        parts.append(f"A deep memory is better on {', '.join(better)}.")
    if unsolved:
        parts.append(f"No memory is more than 10 points above chance on {', '.join(unsolved)}.")
    return " ".join(parts)


def number_text(value: float, column: Column) -> str:
    """A figure of a column: an accuracy in percent."""
    return f"{100 * value:.1f}" if column.metric == "accuracy" else f"{value:.3f}"
