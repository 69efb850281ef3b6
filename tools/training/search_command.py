"""``titans-train search RECIPE --space FILE``: options, and a table of the trials."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..options import add_recipe, load, whole_number
from ..terminal import Columns, CommandFailed, UsageError, say, say_columns, say_json
from .compare_command import TrialDisplay, add_trials, positive
from .search import BEST_RECIPE, BEST_TRAIN, SAMPLERS, TRIALS, search
from .train_command import DATA_EXPECTED, add_settings, read_settings
from .trials import Result

SUMMARY = "Search values of a recipe and of settings for those that train best."
EXAMPLES = (
    "titans-train search mac --data mqar --space space.yaml --out runs/search --steps 500",
    "titans-train search lmm --data mqar --space space.yaml --out runs/search --sampler optuna --trials 40 --jobs 2",
    "titans-train runs/search/best-recipe.yaml --train runs/search/best-train.yaml --out runs/best",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Recipe, data, folder, space, sampler and settings."""
    add_recipe(parser, saved="a saved folder, whose recipe it takes")
    add_trials(parser, "a folder for each trial, and the results")
    parser.add_argument(
        "--space", required=True, metavar="FILE", help="YAML: `recipe:` and `train:`, each with lists or {low:, high:}"
    )
    parser.add_argument("--sampler", choices=SAMPLERS, default="grid", help="how to choose (default: grid)")
    parser.add_argument("--trials", type=positive, metavar="N", help="number of trials (default: all of a grid)")
    parser.add_argument(
        "--search-seed", type=whole_number, default=0, metavar="N", help="of random and optuna (default: 0)"
    )
    add_settings(parser)


def run(arguments: argparse.Namespace) -> int:
    """Search, and print the trials."""
    settings, data = read_settings(arguments)
    if data is None:
        raise UsageError(DATA_EXPECTED)
    if arguments.trials is None and arguments.sampler != "grid":
        raise UsageError(f"--trials: expected a number for --sampler {arguments.sampler}")
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
        told=TrialDisplay(arguments.json),
    )
    folder = Path(arguments.out)
    if arguments.json:
        say_json({"event": "search", "trials": ranked}, in_one_line=True)
    else:
        say("")
        say_columns(table(ranked))
        say("", f"written: {folder / TRIALS}")
    if ranked[0]["loss"] is None:
        raise CommandFailed(f"every trial failed; the first: {ranked[0]['failed']}")
    if not arguments.json:
        say(f"train the best: titans-train {folder / BEST_RECIPE} --train {folder / BEST_TRAIN} --out RUN")
    return 0


def table(ranked: list[Result]) -> Columns:
    """The trials, the best first."""
    columns = Columns("trial", *ranked[0]["choice"], "parameters", "validation loss", "accuracy")
    for result in ranked:
        values = [f"{value:.4g}" if isinstance(value, float) else str(value) for value in result["choice"].values()]
        if result["loss"] is None:
            numbers = ["", f"failed: {result['failed']}", ""]
        else:
            numbers = [f"{result['parameters']:,}", f"{result['loss']:.4f}", f"{result['valid']['accuracy']:.4f}"]
        columns.add(str(result["trial"]), *values, *numbers)
    return columns
