"""``titans-train compare``, ``search`` and ``tasks``: their options, tables and plots."""

from __future__ import annotations

import argparse
import os
import sys
import threading
from pathlib import Path
from typing import Any

from rich.text import Text

from ...recipes import Recipe, load_recipe
from ...recipes.parse import is_recipe_file, read_value
from ...registry import RecipeError, describe, nearest, show
from ..command_line import Command
from ..data.files import find
from ..data.records import documents_in
from ..data.tokenizer import train_tokenizer
from ..options import add_pattern, add_recipe, load, overrides, whole_number
from ..plotting import COLORS, DASHES, need_matplotlib
from ..plotting import draw as draw_files
from ..tasks import TASKS
from ..terminal import Columns, CommandFailed, UsageError, complain, count, plain, say, say_columns, say_json
from . import reproduce_command
from .compare import COMPARISON, DIAL, TOLERANCE, compare
from .log import Event
from .run_folder import write_file
from .search import BEST_RECIPE, BEST_TRAIN, SAMPLERS, TRIALS, search
from .train_command import (
    add_settings,
    add_unquoted,
    metrics_text,
    positive,
    read_rates,
    refuse_unquoted,
    settings_and_data,
    write_plots,
)
from .trials import Result

SIZE = (7.0, 4.2)
"""Of the plot, in inches."""
LABELS = {"mse": "mean squared error", "accuracy": "accuracy", "bits_per_byte": "bits per byte", "loss": "loss (nats)"}


def _add_trials(parser: argparse.ArgumentParser, out: str) -> None:
    """Data, folder and jobs of many runs."""
    add = parser.add_argument
    add("--data", "--task", metavar="SPEC", help="a task, a text file, a folder, or a glob in quotes")
    add("--out", required=True, metavar="FOLDER", help=out)
    add("--jobs", type=positive, default=1, metavar="N", help="runs in parallel (default: 1)")


class _Display:
    """Prints a line for every validation of every run, or JSON lines with the run's name."""

    def __init__(self, as_json: bool) -> None:
        self._json, self._lock = as_json, threading.Lock()

    def __call__(self, label: str, event: Event) -> None:
        with self._lock:
            if self._json:
                if event["event"] not in ("tick", "result"):
                    say_json({"run": label, **event}, in_one_line=True)
            elif event["event"] == "valid":
                print(f"{label}: step {event['step']:,}  {metrics_text(event)}")
            elif event["event"] == "warning" or "failed" in event:
                complain(f"{label}: {event.get('message') or event['failed']}", "warning")
            sys.stdout.flush()


# -- compare -----------------------------------------------------------------------------------------------------------


def _add_compare(parser: argparse.ArgumentParser) -> None:
    saved = "a saved folder; NAME=RECIPE gives it a name; --set changes those with the path"
    add_recipe(parser, several=True, saved=saved)
    _add_trials(parser, "a folder for each run, and the results")
    add = parser.add_argument
    sizes = f"parameters of each, within {TOLERANCE:.0%}%: a number, first (those of the first recipe), or none"
    add("--parameters", default="first", metavar="N", help=sizes)
    add("--fit", default=DIAL, metavar="BLOCK.FIELD", help=f"the field that is changed for that (default: {DIAL})")
    add("--seeds", type=positive, default=1, metavar="N", help="runs of each recipe (default: 1)")
    add_settings(parser, several_lr=True)


def _compare(arguments: argparse.Namespace) -> int:
    lrs = _learning_rates(arguments)
    settings, data = settings_and_data(arguments, need_data=True)
    result = compare(
        _named_recipes(arguments),
        data,
        settings,
        arguments.out,
        parameters=_parameters(arguments.parameters),
        dial=arguments.fit,
        lrs=lrs,
        seeds=arguments.seeds,
        jobs=arguments.jobs,
        allow_imports=arguments.allow_imports,
        told=_Display(arguments.json),
        on_fit=None if arguments.json else _say_fit,
    )
    folder = Path(arguments.out)
    files = [str(folder / COMPARISON), *write_plots(lambda: draw(result, folder.name), folder, "comparison")]
    if arguments.json:
        say_json({"event": "comparison", **result, "files": files}, in_one_line=True)
    else:
        say("")
        say_columns(_comparison_table(result))
        say("", f"written: {', '.join(files)}")
    if all(variant.get("failed") for variant in result["variants"]):
        raise CommandFailed(f"every recipe failed; the first: {result['variants'][0]['failed']}")
    return 0


def _comparison_table(result: dict[str, Any]) -> Columns:
    metric, several = result["metric"], len(result["variants"][0]["runs"]) > 1
    test = f"test {metric.replace('_', ' ')}"
    columns = Columns("recipe", "parameters", "steps", "tokens", "lr", "time", test, "memory frozen")
    for variant in result["variants"]:
        size = f"{variant['parameters']:,}"
        if variant.get("failed"):
            columns.add(variant["name"], size, "", "", "", "", f"failed: {variant['failed']}", "")
            continue
        spread = variant["spread"][metric]
        seconds = variant["seconds"]
        columns.add(
            variant["name"],
            size,
            f"{variant['steps']:,}",
            count(variant["tokens"]),
            f"{variant['lr']:g}",
            "" if seconds is None else f"{seconds:,.0f} s",
            f"{variant['test'][metric]:.4f}" + (f" (spread {spread:.4f})" if several and spread else ""),
            "" if variant["frozen"] is None else f"{variant['frozen'][metric]:.4f}",
        )
    return columns


def draw(result: dict[str, Any], title: str) -> dict[str, bytes]:
    """Validation curves: ``{"png": ..., "svg": ...}``. Raises ``UsageError`` if matplotlib is missing."""
    need_matplotlib("train", "drawing a plot")
    metric = result["metric"]

    def plot(axes: Any) -> None:
        for index, variant in enumerate(result["variants"]):
            points = [(point["tokens"], point[metric]) for point in variant["curve"] or () if metric in point]
            axes.plot(
                *zip(*points or [(0, float("nan"))]),
                DASHES[index // len(COLORS) % len(DASHES)],
                color=COLORS[index % len(COLORS)],
                label=variant["name"],
            )
        axes.set_xlabel("training tokens")
        axes.set_ylabel(f"{LABELS[metric]}, validation")
        axes.set_title(title)
        axes.legend()

    return draw_files(plot, size=SIZE)


def _say_fit(name: str, parameters: int, changes: dict[str, int]) -> None:
    say(f"{name}: {parameters:,} parameters{''.join(f', {path} = {value}' for path, value in changes.items())}")


def _learning_rates(arguments: argparse.Namespace) -> list[float]:
    """The rates of ``--lr a,b``; none if there is only one, which then is an ordinary setting."""
    if arguments.lr is None or "," not in arguments.lr:
        return []
    if any(setting.partition("=")[0].strip() == "lr" for setting in arguments.train_set):
        raise UsageError(f"--lr {arguments.lr} and -t lr=...: expected one of them")
    rates = read_rates(arguments.lr)
    arguments.lr = None
    return rates


def _named_recipes(arguments: argparse.Namespace) -> dict[str, Recipe]:
    """The recipes by name, each changed by the ``--set`` whose path it has."""
    changes = overrides(arguments.set)
    found: dict[str, Recipe] = {}
    used: set[str] = set()
    for text in arguments.recipes:
        name, equals, source = text.partition("=")
        if not equals:
            name, source = Path(text).stem if text.endswith((".yaml", ".yml", ".json")) else Path(text).name, text
        if not name or "/" in name or name in (".", "..") or name in found:
            what = "given twice: NAME=RECIPE gives it another name" if name in found else "expected NAME=RECIPE"
            raise UsageError(f"{text}: {what}")
        try:
            recipe = load_recipe(source, allow_imports=arguments.allow_imports)
        except RecipeError as error:
            if os.path.isfile(source) and not is_recipe_file(Path(source)):  # the shell has expanded a wildcard
                hint = "no recipe; --data takes one SPEC: put a wildcard in quotes, as in --data 'texts/*.md'"
                raise UsageError(f"{source}: {hint}") from error
            raise
        mine = {path: value for path, value in changes.items() if _has_path(recipe, path)}
        used |= mine.keys()
        found[name] = load_recipe(recipe, mine, allow_imports=arguments.allow_imports) if mine else recipe
    for path in changes:
        if path not in used:
            raise UsageError(f"--set {show(path, 100).strip(chr(39))}: no recipe has this path")
    return found


def _has_path(recipe: Recipe, path: str) -> bool:
    value: Any = recipe.to_dict()
    for key in path.split("."):
        if isinstance(value, list) and key.isascii() and key.isdigit() and int(key) < len(value):
            value = value[int(key)]
        elif isinstance(value, dict) and key in value:
            value = value[key]
        else:
            return False
    return True


def _parameters(text: str) -> Any:
    if text in ("first", "none"):
        return None if text == "none" else "first"
    value = read_value(text)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UsageError(f"--parameters {text}: expected a number >= 1, first or none")
    return value


# -- search ------------------------------------------------------------------------------------------------------------


def _add_search(parser: argparse.ArgumentParser) -> None:
    add_recipe(parser, saved="a saved folder, whose recipe it takes")
    _add_trials(parser, "a folder for each trial, and the results")
    add = parser.add_argument
    add("--space", required=True, metavar="FILE", help="YAML: `recipe:` and `train:`, each with lists or {low:, high:}")
    add("--sampler", choices=SAMPLERS, default="grid", help="how to choose (default: grid)")
    add("--trials", type=positive, metavar="N", help="number of trials (default: all of a grid)")
    add_unquoted(parser)
    add("--search-seed", type=whole_number, default=0, metavar="N", help="of random and optuna (default: 0)")
    add_settings(parser)


def _search(arguments: argparse.Namespace) -> int:
    refuse_unquoted(arguments)
    settings, data = settings_and_data(arguments, need_data=True)
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
        told=_Display(arguments.json),
    )
    folder = Path(arguments.out)
    if arguments.json:
        say_json({"event": "search", "trials": ranked}, in_one_line=True)
    else:
        say("")
        say_columns(_trials_table(ranked))
        say("", f"written: {folder / TRIALS}")
    if ranked[0]["loss"] is None:
        raise CommandFailed(f"every trial failed; the first: {ranked[0]['failed']}")
    if not arguments.json:
        say(f"train the best: titans-train {folder / BEST_RECIPE} --train {folder / BEST_TRAIN} --out RUN")
    return 0


def _trials_table(ranked: list[Result]) -> Columns:
    columns = Columns("trial", *ranked[0]["choice"], "parameters", "validation loss", "accuracy")
    for result in ranked:
        values = [f"{value:.4g}" if isinstance(value, float) else str(value) for value in result["choice"].values()]
        if result["loss"] is None:
            numbers = ["", f"failed: {result['failed']}", ""]
        else:
            numbers = [f"{result['parameters']:,}", f"{result['loss']:.4f}", f"{result['valid']['accuracy']:.4f}"]
        columns.add(str(result["trial"]), *values, *numbers)
    return columns


# -- tokenizer ---------------------------------------------------------------------------------------------------------


MAX_VOCAB = 1_000_000
"""Training allocates memory for this many tokens at once."""


def _add_tokenizer(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("texts", nargs="+", metavar="TEXTS", help="text files, JSON lines, parquet, folders or wildcards")
    add("--vocab", type=positive, default=8000, metavar="N", help="most tokens, from 256 on (default: 8000)")
    add("--field", default="text", metavar="NAME", help="field of a record that has its text (default: text)")
    add("--out", required=True, metavar="FILE", help="the file that is written, as in tokenizer.json")


def _tokenizer(arguments: argparse.Namespace) -> int:
    out = Path(arguments.out)
    if not 256 <= arguments.vocab <= MAX_VOCAB:
        message = f"expected at least 256, one token for each byte, and at most {MAX_VOCAB:,}"
        raise UsageError(f"--vocab {arguments.vocab}: {message}")
    if out.exists():
        raise UsageError(f"--out {out}: there is such a file, and nothing is replaced")
    files = find(arguments.texts)
    documents = (document for file in files for document in documents_in(file, arguments.field))
    made = train_tokenizer(
        (block.decode("utf-8", "replace") for blocks in documents for block in blocks), arguments.vocab
    )
    size = made.get_vocab_size()
    write_file(out, made.to_str(pretty=True))
    if arguments.json:
        say_json({"event": "tokenizer", "vocab": size, "file": str(out)}, in_one_line=True)
        return 0
    if size < arguments.vocab:
        complain(f"the texts give only {size:,} tokens, not {arguments.vocab:,}", "warning")
    say(
        f"{size:,} tokens, written to {out}", f"train with it: titans-train RECIPE --set vocab={size} --tokenizer {out}"
    )
    return 0


# -- tasks -------------------------------------------------------------------------------------------------------------


def _tasks(arguments: argparse.Namespace) -> int:
    rows = TASKS.rows(arguments.pattern)
    if not rows:
        raise UsageError(f"no task is called {show(arguments.pattern)}{nearest(arguments.pattern, TASKS.names())}")
    fields = [[] if row.problem else describe(row.name, TASKS).fields for row in rows]
    if arguments.json:
        tasks = [{**vars(row), "fields": list(map(vars, each))} for row, each in zip(rows, fields)]
        say_json({"tasks": tasks}, in_one_line=True)
        return 0
    table = Columns("task", "description", "settings and defaults")
    for row, each in zip(rows, fields):
        if row.problem is not None:
            table.add(row.name, Text(f"{row.problem} (from {row.source})", style="yellow"), "")
            continue
        source = "" if row.source == "titans_build" else f" (from {row.source})"
        settings = ", ".join(f.name if f.required else f"{f.name}={show(f.default)}" for f in each)
        table.add(Text(row.name, style="bold cyan"), plain(row.summary) + source, settings)
    say_columns(table)
    return 0


COMMANDS = {
    "compare": Command(
        "Train several recipes on the same data, with equal parameters and tokens, and compare them.",
        (
            "titans-train compare mac mag mal lmm transformer --data mqar --out runs/mqar --steps 2000",
            "titans-train compare mac wide=mac.yaml --data 'src/**/*.py' --out runs/code --lr 1e-3,3e-3 --jobs 2",
        ),
        _add_compare,
        _compare,
    ),
    "search": Command(
        "Search values of a recipe and of settings for those that train best.",
        (
            "titans-train search mac --data mqar --space space.yaml --out runs/search --steps 500",
            "titans-train search lmm --data mqar --space space.yaml --out runs/search --sampler optuna --trials 40",
            "titans-train runs/search/best-recipe.yaml --train runs/search/best-train.yaml --out runs/best",
        ),
        _add_search,
        _search,
    ),
    "reproduce": Command.of(reproduce_command),
    "tokenizer": Command(
        "Train a tokenizer on texts: byte-level BPE, which encodes any text.",
        ("titans-train tokenizer texts/ --vocab 8000 --out tok.json",),
        _add_tokenizer,
        _tokenizer,
    ),
    "tasks": Command(
        "List the tasks that --data accepts, with their settings and defaults.",
        ("titans-train tasks", "titans-train tasks 'needle*'      names that match a wildcard"),
        add_pattern,
        _tasks,
    ),
}
