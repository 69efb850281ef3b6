"""``titans-train search RECIPE --space FILE``: what is typed, to a table of what was tried."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..options import add_recipe, load, whole_number
from ..terminal import Columns, CommandFailed, UsageError, say, say_columns, say_json
from .comparing_script import Progress, positive
from .script import add_settings, read_settings
from .searching import BEST_RECIPE, BEST_TRAIN, SAMPLERS, TRIALS, Result, search

SUMMARY = "Try values of a recipe and of settings, and keep those that train best."
EXAMPLES = (
    "titans-train search mac --data mqar --space space.yaml --out runs/search --steps 500",
    "titans-train search lmm --data mqar --space space.yaml --out runs/search --sampler optuna --trials 40 --jobs 2",
    "titans-train runs/search/best-recipe.yaml --train runs/search/best-train.yaml --out runs/best",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Recipe, data, folder, space, how it is searched, and settings."""
    add_recipe(parser, saved="a saved folder, whose recipe it takes")
    parser.add_argument("--data", "--task", metavar="SPEC", help="a task, a text file, a folder, or a glob in quotes")
    parser.add_argument(
        "--out", required=True, metavar="FOLDER", help="where each trial has a folder, and their results are"
    )
    parser.add_argument(
        "--space", required=True, metavar="FILE", help="YAML: `recipe:` and `train:`, each with lists or {low:, high:}"
    )
    parser.add_argument("--sampler", choices=SAMPLERS, default="grid", help="how to choose (default: grid)")
    parser.add_argument("--trials", type=positive, metavar="N", help="how many; without it, all of a grid")
    parser.add_argument(
        "--search-seed", type=whole_number, default=0, metavar="N", help="of random and optuna (default: 0)"
    )
    parser.add_argument("--jobs", type=positive, default=1, metavar="N", help="runs side by side (default: 1)")
    add_settings(parser)


def run(arguments: argparse.Namespace) -> int:
    """Search, and show what was found."""
    settings, data = read_settings(arguments)
    if data is None:
        raise UsageError("--data: expected what to train on: a task (titans-train tasks), a file, a folder or a glob")
    if arguments.trials is None and arguments.sampler != "grid":
        raise UsageError(f"--trials: expected how many, for --sampler {arguments.sampler}")
    ranked = search(
        load(arguments.recipe, arguments),
        data,
        settings,
        arguments.space,
        arguments.out,
        sampler=arguments.sampler,
        trials=arguments.trials,
        seed=arguments.search_seed,
        jobs=arguments.jobs,
        allow_imports=arguments.allow_imports,
        told=Progress(arguments.json),
    )
    place = Path(arguments.out)
    if arguments.json:
        say_json({"event": "search", "trials": ranked}, in_one_line=True)
    else:
        say("")
        say_columns(table(ranked))
        say("", f"written: {place / TRIALS}")
    if ranked[0]["loss"] is None:
        raise CommandFailed(f"every trial came to nothing; the first: {ranked[0]['failed']}")
    if not arguments.json:
        say(f"train the best: titans-train {place / BEST_RECIPE} --train {place / BEST_TRAIN} --out RUN")
    return 0


def table(ranked: list[Result]) -> Columns:
    """The trials, the best first."""
    names = list(ranked[0]["choice"])
    columns = Columns("trial", *names, "parameters", "validation loss", "accuracy")
    for result in ranked:
        values = [f"{value:.4g}" if isinstance(value, float) else str(value) for value in result["choice"].values()]
        if result["loss"] is None:
            columns.add(str(result["trial"]), *values, "", f"failed: {result['failed']}", "")
            continue
        numbers = f"{result['parameters']:,}", f"{result['loss']:.4f}", f"{result['valid']['accuracy']:.4f}"
        columns.add(str(result["trial"]), *values, *numbers)
    return columns
