"""``titans-train RECIPE --data SPEC --out RUN``: what is typed, to a run."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from ...recipes.reading import read_file, read_value
from ...registry import Problem, RecipeError, show
from ..options import add_recipe, load, overrides, saved_folder
from ..terminal import UsageError
from .display import Display
from .folder import RECIPE, is_run
from .running import train
from .settings import Settings, fields

SUMMARY = "Train the model of a recipe on data, in a folder that holds all there is to know about the run."
EXAMPLES = (
    "titans-train mac --data copy --out runs/copy               a generated task (titans-train tasks lists them)",
    "titans-train mag --data 'src/**/*.py' --out runs/code --steps 2000 --lr 1e-3",
    "titans-train mac --set dim=64 --data mqar:pairs=8 --out runs/mqar -t warmup=0.1 -t ema=0.99",
    "titans-train mac --train my.yaml --out runs/mine           settings, and data:, from a file",
    "titans-train --resume --out runs/copy                      go on where it was left",
    "torchrun --nproc-per-node 2 -m titans_build.tools.train mac --data copy --out runs/two",
)

DIRECT = ("steps", "batch", "length", "lr", "seed", "device", "valid_every", "checkpoint_every")
"""Settings that are options of their own, too."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Recipe, data, folder and settings."""
    add_recipe(parser, optional=True, saved="a saved folder, whose weights it begins with")
    parser.add_argument(
        "--data", metavar="SPEC", help="a task (mqar:pairs=8,length=64), a text file, a folder, or a glob in quotes"
    )
    parser.add_argument("--out", required=True, metavar="RUN", help="the run's folder; the model is saved in RUN/model")
    parser.add_argument("--resume", action="store_true", help="go on with the run in RUN, where there is one")
    add_settings(parser)


def add_settings(parser: argparse.ArgumentParser, *, several_lr: bool = False) -> None:
    """A file of settings, single ones, and the most usual ones as options. ``several_lr``: ``--lr`` takes several."""
    parser.add_argument("--train", metavar="FILE", help="settings, and data:, from a YAML or JSON file")
    parser.add_argument(
        "-t",
        "--train-set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="change one setting; may be given many times: " + ", ".join(name for name in fields(Settings)),
    )
    for name in DIRECT:
        field = fields(Settings)[name]
        usual = "" if field.default is None else f" (default: {field.default})"
        letter, more = _letter(field.type_text), ""
        if name == "lr" and several_lr:
            letter, more = "X,X,...", "; of several the best is kept"
        parser.add_argument(_option(name), dest=name, metavar=letter, help=field.description + more + usual)


def run(arguments: argparse.Namespace) -> int:
    """Train, and show what happens."""
    out = Path(arguments.out)
    if not arguments.out:
        raise UsageError("--out: expected the name of a folder, got none")
    settings, data = read_settings(arguments)
    goes_on = arguments.resume and is_run(out)
    if goes_on and arguments.recipe is None and arguments.set:
        raise UsageError("--set: the recipe of a run does not change on its way")
    source = str(out / RECIPE) if arguments.recipe is None and goes_on else arguments.recipe
    if source is None:
        raise UsageError(f"expected a RECIPE{'' if arguments.resume else '; --resume goes on with a run without one'}")
    recipe = load(source, arguments)
    if data is None and not goes_on:
        raise UsageError("--data: expected what to train on: a task (titans-train tasks), a file, a folder or a glob")
    folder = saved_folder(source)
    display = Display(as_json=arguments.json, quiet=os.environ.get("RANK", "0") != "0")
    with display:
        train(recipe, data, settings, out, on_event=display, resume=arguments.resume, weights=folder)
    return 0


def read_settings(arguments: argparse.Namespace) -> tuple[dict[str, Any], Any]:
    """What is said of the settings, and the data; single settings go before those of the file."""
    given: dict[str, Any] = {}
    if arguments.train is not None:
        given = read_file(arguments.train)
        if not isinstance(given, dict):
            raise RecipeError([Problem("", f"expected a mapping of settings, got {show(given)}")], arguments.train)
    data = given.pop("data", None)
    single = overrides(arguments.train_set, "-t", "KEY=VALUE, as in -t lr=1e-3")
    for name in DIRECT:
        text = getattr(arguments, name)
        if text is None:
            continue
        value = read_option(_option(name), text)
        if single.get(name, value) != value:
            raise UsageError(f"{_option(name)} {text} and -t {name}={show(single[name])}: expected one of them")
        single[name] = value
    given |= single
    return given, data if arguments.data is None else arguments.data


def read_option(option: str, text: str) -> Any:
    """The value of an option, read as one in a file is. Raises ``RecipeError`` that names the option."""
    try:
        return read_value(text)
    except RecipeError as error:
        raise RecipeError(error.problems, option) from None


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _letter(kind: str) -> str:
    return "N" if kind.startswith("integer") else "X" if kind.startswith("number") else "NAME"
