"""Options that several commands share: which recipe, changed how, from where it may import; and where it runs."""

from __future__ import annotations

import argparse
from typing import Any

import torch

from .. import recipes
from ..recipes.composing import DTYPES, as_device, as_dtype
from ..recipes.reading import read_value
from .terminal import UsageError


def add_recipe(parser: argparse.ArgumentParser, *, several: bool = False) -> None:
    """The recipe itself and what changes it."""
    parser.add_argument(
        "recipes" if several else "recipe",
        nargs="+" if several else None,
        metavar="RECIPE",
        help="a packaged recipe (mac, mag-170m, ...; see `titans-build list`), a YAML or JSON file, or a saved folder",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="PATH=VALUE",
        help="change one value of the recipe, as in layers.mac.0.segment=256; may be given many times",
    )
    parser.add_argument(
        "--allow-imports",
        action="store_true",
        help="import the modules that the recipe names under `imports`: runs their code",
    )


def load(source: str, arguments: argparse.Namespace) -> recipes.Recipe:
    """The recipe that the command line describes. Raises ``RecipeError`` or ``UsageError``."""
    return recipes.load_recipe(source, overrides=overrides(arguments.set), allow_imports=arguments.allow_imports)


def overrides(settings: list[str]) -> dict[str, Any]:
    """``["dim=64", "tie=true"]`` -> ``{"dim": 64, "tie": True}``; values are read as a recipe file's are."""
    found: dict[str, Any] = {}
    for setting in settings:
        path, equals, text = setting.partition("=")
        path = path.strip()
        if not equals or not path:
            raise UsageError(f"--set {setting}: expected PATH=VALUE, as in --set layers.mac.0.segment=256")
        if path in found:
            raise UsageError(f"--set {path}: given twice")
        found[path] = read_value(text)
    return found


def add_placement(parser: argparse.ArgumentParser) -> None:
    """Device and dtype."""
    parser.add_argument("--device", default="cpu", metavar="DEVICE", help="cpu (default), cuda, cuda:1, mps")
    parser.add_argument("--dtype", default="float32", metavar="DTYPE", help=f"{', '.join(DTYPES)} (default: float32)")


def placement(arguments: argparse.Namespace) -> tuple[torch.device, torch.dtype]:
    """The device and dtype asked for. Raises ``UsageError`` when this machine does not have them."""
    try:
        device, dtype = as_device(arguments.device), as_dtype(arguments.dtype)
    except ValueError as error:
        raise UsageError(str(error)) from None
    if device.type == "meta":
        raise UsageError("--device meta: a model without values; `titans-build check` validates a recipe without them")
    try:
        torch.ones(1, device=device).item()
    # every backend reports its absence in its own way: AssertionError, NotImplementedError, RuntimeError
    except Exception as error:
        first = str(error).partition("\n")[0]
        raise UsageError(f"--device {arguments.device}: cannot be used on this machine: {first}") from None
    return device, dtype
