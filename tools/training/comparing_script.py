"""``titans-train compare RECIPE...``: what is typed, to a table, a plot and files."""

from __future__ import annotations

import argparse
import sys
import threading
from pathlib import Path
from typing import Any

from ...recipes import Recipe, load_recipe
from ...recipes.reading import read_value
from ...recipes.replacing import replacing
from ...registry import show
from ..options import overrides
from ..terminal import Columns, CommandFailed, UsageError, complain, count, say, say_columns, say_json
from . import curves
from .comparing import COMPARISON, compare
from .fitting import DIAL, TOLERANCE
from .folder import writing
from .journal import Event
from .script import add_settings, read_option, read_settings

SUMMARY = "Train several recipes on the same data, with equal parameters and tokens, and say which did best."
EXAMPLES = (
    "titans-train compare mac mag mal lmm transformer --data mqar --out runs/mqar --steps 2000",
    "titans-train compare mac wide=mac.yaml --data 'src/**/*.py' --out runs/code --lr 1e-3,3e-3 --seeds 3 --jobs 2",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Recipes, data, folder, how they are made equal, and settings."""
    parser.add_argument(
        "recipes", nargs="+", metavar="RECIPE", help="a packaged recipe or a file; NAME=RECIPE calls it so"
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="PATH=VALUE",
        help="change one value in every recipe that has the path; may be given many times",
    )
    parser.add_argument(
        "--allow-imports", action="store_true", help="import the modules that recipes name: runs their code"
    )
    parser.add_argument("--data", "--task", metavar="SPEC", help="a task, a text file, a folder, or a glob in quotes")
    parser.add_argument(
        "--out", required=True, metavar="FOLDER", help="where each run has a folder, and what came of them"
    )
    parser.add_argument(
        "--parameters",
        default="first",
        metavar="N",
        help=f"parameters of each, within {TOLERANCE:.0%}%: a number, first (those of the first recipe), or none",
    )
    parser.add_argument(
        "--fit", default=DIAL, metavar="BLOCK.FIELD", help=f"what is changed for that (default: {DIAL})"
    )
    parser.add_argument("--seeds", type=positive, default=1, metavar="N", help="runs of each recipe (default: 1)")
    parser.add_argument("--jobs", type=positive, default=1, metavar="N", help="runs side by side (default: 1)")
    add_settings(parser, several_lr=True)


def run(arguments: argparse.Namespace) -> int:
    """Compare, and show what came of it."""
    lrs = rates(arguments)
    settings, data = read_settings(arguments)
    if data is None:
        raise UsageError("--data: expected what to train on: a task (titans-train tasks), a file, a folder or a glob")
    chosen = named_recipes(arguments)
    progress = Progress(arguments.json)
    found = compare(
        chosen,
        data,
        settings,
        arguments.out,
        parameters=_parameters(arguments.parameters),
        dial=arguments.fit,
        lrs=lrs,
        seeds=arguments.seeds,
        jobs=arguments.jobs,
        allow_imports=arguments.allow_imports,
        told=progress,
        on_fit=None if arguments.json else _say_fit,
    )
    place = Path(arguments.out)
    files = _plot(found, place)
    if arguments.json:
        say_json({"event": "comparison", **found, "files": files}, in_one_line=True)
    else:
        say("")
        say_columns(table(found))
        say("", f"written: {', '.join(files)}")
    if all(variant.get("failed") for variant in found["variants"]):
        raise CommandFailed(f"every recipe came to nothing; the first: {found['variants'][0]['failed']}")
    return 0


def table(found: dict[str, Any]) -> Columns:
    """The variants of a comparison, side by side."""
    metric, several = found["metric"], len(found["variants"][0]["runs"]) > 1
    name = metric.replace("_", " ")
    columns = Columns("recipe", "parameters", "steps", "tokens", "lr", "time", f"test {name}", "memory frozen")
    for variant in found["variants"]:
        if variant.get("failed"):
            columns.add(
                variant["name"], f"{variant['parameters']:,}", "", "", "", "", f"failed: {variant['failed']}", ""
            )
            continue
        spread = variant["spread"][metric]
        seconds = variant["seconds"]
        columns.add(
            variant["name"],
            f"{variant['parameters']:,}",
            f"{variant['steps']:,}",
            count(variant["tokens"]),
            f"{variant['lr']:g}",
            "" if seconds is None else f"{seconds:,.0f} s",
            f"{variant['test'][metric]:.4f}" + (f" (spread {spread:.4f})" if several and spread else ""),
            "" if variant["frozen"] is None else f"{variant['frozen'][metric]:.4f}",
        )
    return columns


class Progress:
    """A line for every validation of every run, or JSON lines with the run's name."""

    def __init__(self, as_json: bool) -> None:
        self._json, self._lock = as_json, threading.Lock()

    def __call__(self, label: str, event: Event) -> None:
        with self._lock:
            if self._json:
                if event["event"] not in ("tick", "result"):
                    say_json({"run": label, **event}, in_one_line=True)
            elif event["event"] == "valid":
                kept = {
                    key: value for key, value in event.items() if key not in ("event", "step") and value is not None
                }
                said = "  ".join(f"{key.replace('_', ' ')} {value:.4f}" for key, value in kept.items())
                say(f"{label}: step {event['step']:,}  {said}")
            elif event["event"] == "warning":
                complain(f"{label}: {event['message']}", "warning")
            elif "failed" in event:
                complain(f"{label}: {event['failed']}", "warning")
            sys.stdout.flush()


def rates(arguments: argparse.Namespace) -> list[float]:
    """Several learning rates of ``--lr a,b``; none where there is one, which is then a setting as ever."""
    if arguments.lr is None or "," not in arguments.lr:
        return []
    found = [read_option("--lr", part.strip()) for part in arguments.lr.split(",")]
    if not all(isinstance(lr, (int, float)) and not isinstance(lr, bool) and lr > 0 for lr in found):
        raise UsageError(f"--lr {arguments.lr}: expected numbers > 0 with commas between them")
    if any(setting.partition("=")[0].strip() == "lr" for setting in arguments.train_set):
        raise UsageError(f"--lr {arguments.lr} and -t lr=...: expected one of them")
    arguments.lr = None
    return list(dict.fromkeys(map(float, found)))


def named_recipes(arguments: argparse.Namespace) -> dict[str, Recipe]:
    """The recipes by the names they are to have, with what ``--set`` changes in those that have the path."""
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
        mine = {path: value for path, value in changes.items() if _has(recipe, path)}
        used |= mine.keys()
        found[name] = load_recipe(recipe, mine, allow_imports=arguments.allow_imports) if mine else recipe
    for path in changes:
        if path not in used:
            raise UsageError(f"--set {show(path, 100).strip(chr(39))}: none of the recipes has it")
    return found


def _has(recipe: Recipe, path: str) -> bool:
    """Whether a path leads to something in a recipe, all of whose fields are written out."""
    place: Any = recipe.to_dict()
    for key in path.split("."):
        if isinstance(place, list) and key.isascii() and key.isdigit() and int(key) < len(place):
            place = place[int(key)]
        elif isinstance(place, dict) and key in place:
            place = place[key]
        else:
            return False
    return True


def _plot(found: dict[str, Any], place: Path) -> list[str]:
    files = [str(place / COMPARISON)]
    try:
        drawn = curves.draw(found, place.name)
    except UsageError as error:
        complain(str(error), "warning")
        return files
    for ending, content in drawn.items():
        file = place / f"comparison.{ending}"
        with writing(file), replacing(file) as path:
            path.write_bytes(content)
        files.append(str(file))
    return files


def _say_fit(name: str, parameters: int, changes: dict[str, int]) -> None:
    said = "".join(f", {path} = {value}" for path, value in changes.items())
    say(f"{name}: {parameters:,} parameters{said}")


def _parameters(text: str) -> Any:
    if text in ("first", "none"):
        return None if text == "none" else "first"
    value = read_value(text)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UsageError(f"--parameters {text}: expected a number >= 1, first or none")
    return value


def positive(text: str) -> int:
    """For ``add_argument(type=positive)``: an integer from 1 on."""
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected an integer >= 1, got {show(text)}")
    return int(text)
