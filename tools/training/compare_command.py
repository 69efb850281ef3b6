"""``titans-train compare RECIPE...``: options, a table, a plot and files."""

from __future__ import annotations

import argparse
import sys
import threading
from pathlib import Path
from typing import Any

from ...recipes import Recipe, load_recipe
from ...recipes.atomic_write import atomic_write
from ...recipes.parse import read_value
from ...registry import show
from ..options import add_recipe, overrides
from ..plotting import COLOURS, DASHES, need_matplotlib
from ..plotting import draw as draw_files
from ..terminal import Columns, CommandFailed, UsageError, complain, count, say, say_columns, say_json
from .compare import COMPARISON, DIAL, TOLERANCE, compare
from .log import Event
from .run_folder import write_errors
from .train_command import DATA_EXPECTED, add_settings, metrics_text, read_option, read_settings

SUMMARY = "Train several recipes on the same data, with equal parameters and tokens, and compare them."
EXAMPLES = (
    "titans-train compare mac mag mal lmm transformer --data mqar --out runs/mqar --steps 2000",
    "titans-train compare mac wide=mac.yaml --data 'src/**/*.py' --out runs/code --lr 1e-3,3e-3 --seeds 3 --jobs 2",
)
SIZE = (7.0, 4.2)
"""Of the plot, in inches."""
LABELS = {"accuracy": "accuracy", "bits_per_byte": "bits per byte", "loss": "loss (nats)"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Recipes, data, folder, how sizes are made equal, and settings."""
    add_recipe(
        parser, several=True, saved="a saved folder; NAME=RECIPE gives it a name; --set changes those with the path"
    )
    add_trials(parser, "a folder for each run, and the results")
    parser.add_argument(
        "--parameters",
        default="first",
        metavar="N",
        help=f"parameters of each, within {TOLERANCE:.0%}%: a number, first (those of the first recipe), or none",
    )
    parser.add_argument(
        "--fit", default=DIAL, metavar="BLOCK.FIELD", help=f"the field that is changed for that (default: {DIAL})"
    )
    parser.add_argument("--seeds", type=positive, default=1, metavar="N", help="runs of each recipe (default: 1)")
    add_settings(parser, several_lr=True)


def add_trials(parser: argparse.ArgumentParser, out: str) -> None:
    """Data, folder and jobs of many runs."""
    parser.add_argument("--data", "--task", metavar="SPEC", help="a task, a text file, a folder, or a glob in quotes")
    parser.add_argument("--out", required=True, metavar="FOLDER", help=out)
    parser.add_argument("--jobs", type=positive, default=1, metavar="N", help="runs in parallel (default: 1)")


def run(arguments: argparse.Namespace) -> int:
    """Compare, and print the table."""
    lrs = _learning_rates(arguments)
    settings, data = read_settings(arguments)
    if data is None:
        raise UsageError(DATA_EXPECTED)
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
        told=TrialDisplay(arguments.json),
        on_fit=None if arguments.json else _say_fit,
    )
    folder = Path(arguments.out)
    files = [str(folder / COMPARISON), *_write_plots(result, folder)]
    if arguments.json:
        say_json({"event": "comparison", **result, "files": files}, in_one_line=True)
    else:
        say("")
        say_columns(table(result))
        say("", f"written: {', '.join(files)}")
    if all(variant.get("failed") for variant in result["variants"]):
        raise CommandFailed(f"every recipe failed; the first: {result['variants'][0]['failed']}")
    return 0


def table(result: dict[str, Any]) -> Columns:
    """The variants of a comparison, one a row."""
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
                DASHES[index // len(COLOURS) % len(DASHES)],
                color=COLOURS[index % len(COLOURS)],
                label=variant["name"],
            )
        axes.set_xlabel("training tokens")
        axes.set_ylabel(f"{LABELS[metric]}, validation")
        axes.set_title(title)
        axes.legend()

    return draw_files(plot, size=SIZE)


def _write_plots(result: dict[str, Any], folder: Path) -> list[str]:
    files: list[str] = []
    try:
        plots = draw(result, folder.name)
    except UsageError as error:
        complain(str(error), "warning")
        return files
    for ending, content in plots.items():
        file = folder / f"comparison.{ending}"
        with write_errors(file), atomic_write(file) as path:
            path.write_bytes(content)
        files.append(str(file))
    return files


class TrialDisplay:
    """Prints a line for every validation of every run, or JSON lines with the run's name."""

    def __init__(self, as_json: bool) -> None:
        self._json, self._lock = as_json, threading.Lock()

    def __call__(self, label: str, event: Event) -> None:
        with self._lock:
            if self._json:
                if event["event"] not in ("tick", "result"):
                    say_json({"run": label, **event}, in_one_line=True)
            elif event["event"] == "valid":
                say(f"{label}: step {event['step']:,}  {metrics_text(event)}")
            elif event["event"] == "warning" or "failed" in event:
                complain(f"{label}: {event.get('message') or event['failed']}", "warning")
            sys.stdout.flush()


def _say_fit(name: str, parameters: int, changes: dict[str, int]) -> None:
    say(f"{name}: {parameters:,} parameters{''.join(f', {path} = {value}' for path, value in changes.items())}")


def _learning_rates(arguments: argparse.Namespace) -> list[float]:
    """The rates of ``--lr a,b``; none if there is only one, which then is an ordinary setting."""
    if arguments.lr is None or "," not in arguments.lr:
        return []
    found = [read_option("--lr", part.strip()) for part in arguments.lr.split(",")]
    if not all(isinstance(lr, (int, float)) and not isinstance(lr, bool) and lr > 0 for lr in found):
        raise UsageError(f"--lr {arguments.lr}: expected numbers > 0 with commas between them")
    if any(setting.partition("=")[0].strip() == "lr" for setting in arguments.train_set):
        raise UsageError(f"--lr {arguments.lr} and -t lr=...: expected one of them")
    arguments.lr = None
    return list(dict.fromkeys(map(float, found)))


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
        recipe = load_recipe(source, allow_imports=arguments.allow_imports)
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


def positive(text: str) -> int:
    """For ``add_argument(type=positive)``: an integer >= 1."""
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected an integer >= 1, got {show(text)}")
    return int(text)
