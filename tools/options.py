"""Options of several commands: the recipe with its overrides and imports, device and dtype."""

from __future__ import annotations

import argparse
import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from .. import recipes
from ..blocks.device import DTYPES, as_device, as_dtype
from ..recipes.parse import read_value
from ..registry import Problem, RecipeError, show
from .terminal import UsageError


def expect_text_file(path: str, option: str) -> None:
    """Raise ``UsageError`` for a name that is that of compressed texts or records, and for a pipe in a folder, which
    would wait for its writer. ``<(command)`` is none.
    """
    from .data.files import NOT_READ

    if path.lower().endswith((".parquet", ".gz", *NOT_READ)):
        raise UsageError(f"{option} {path}: expected a text, not a file whose bytes are none")
    if stat.S_ISFIFO(os.stat(path).st_mode) and not os.path.abspath(path).startswith(("/dev/", "/proc/")):
        raise UsageError(f"{option} {path}: a named pipe; expected a file, or <(command) for the output of a command")


def add_recipe(
    parser: argparse.ArgumentParser,
    *,
    several: bool = False,
    optional: bool = False,
    saved: str = "a saved folder (its recipe alone)",
) -> None:
    """Add the recipe and ``--set`` and ``--allow-imports``. ``saved``: the help text for a saved model's folder."""
    parser.add_argument(
        "recipes" if several else "recipe",
        nargs="+" if several else "?" if optional else None,
        metavar="RECIPE",
        help=f"a packaged recipe (mac, mag-170m, ...; see `titans-build list`), a YAML or JSON file, or {saved}",
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
    """The recipe of the command line, with its overrides. Raises ``RecipeError`` or ``UsageError``."""
    return recipes.load_recipe(source, overrides=overrides(arguments.set), allow_imports=arguments.allow_imports)


def saved_folder(source: str) -> Path | None:
    """The folder of a saved model if ``source``, which was loaded as a recipe, is one."""
    return Path(source) if source not in recipes.packaged_names() and Path(source).is_dir() else None


def overrides(
    settings: list[str], option: str = "--set", example: str = "PATH=VALUE, as in --set layers.mac.0.segment=256"
) -> dict[str, Any]:
    """``["dim=64", "tie=true"]`` -> ``{"dim": 64, "tie": True}``; values are parsed as in recipe files.

    ``option`` and ``example`` are used in error messages. Raises ``UsageError`` for a setting that has no path or no
    value or is given twice, and ``RecipeError`` with the paths of values that cannot be parsed.
    """
    found: dict[str, Any] = {}
    problems: list[Problem] = []
    for setting in settings:
        path, equals, text = setting.partition("=")
        path = path.strip()
        if not equals or not path:
            raise UsageError(f"{option} {show(setting, 100).strip(chr(39))}: expected {example}")
        if path in found:
            raise UsageError(f"{option} {show(path, 100).strip(chr(39))}: given twice")
        found[path] = None
        try:
            found[path] = read_value(text)
        except RecipeError as error:
            place = show(path, 100).strip("'")
            problems += [
                Problem(f"{place}.{problem.path}" if problem.path else place, problem.message)
                for problem in error.problems
            ]
    if problems:
        raise RecipeError(problems, option)
    return found


def add_pattern(parser: argparse.ArgumentParser) -> None:
    """Add ``PATTERN``, a wildcard over names."""
    parser.add_argument(
        "pattern", nargs="?", default="*", metavar="PATTERN", help="a wildcard over names (default: all)"
    )


def add_placement(parser: argparse.ArgumentParser, dtype: str | None = "float32") -> None:
    """Add ``--device`` and ``--dtype``. ``dtype``: the default; ``None`` is that of a saved model."""
    parser.add_argument("--device", default="cpu", metavar="DEVICE", help="cpu (default), cuda, cuda:1, mps")
    default = "the model's own" if dtype is None else dtype
    parser.add_argument("--dtype", default=dtype, metavar="DTYPE", help=f"{', '.join(DTYPES)} (default: {default})")


def placement(device_name: str, dtype_name: str) -> tuple[torch.device, torch.dtype]:
    """The device and dtype of these names. Raises ``UsageError`` if this machine does not have them."""
    try:
        device, dtype = as_device(device_name), as_dtype(dtype_name)
    except ValueError as error:
        raise UsageError(str(error)) from None
    if device.type == "meta":
        raise UsageError("--device meta: a model without values; `titans-build check` validates a recipe without them")
    return device, dtype


def writable_folder(out: str | None, force: bool, holds: Sequence[str], what: str) -> Path | None:
    """The folder of ``--out``, or ``None`` without it. ``holds``: names of files that show that ``what`` is in it.

    Raises ``UsageError``, before any work, if it cannot be written, or if it holds ``what`` and ``force`` is false.
    """
    if out is None:
        if force:
            raise UsageError(f"--force: lets --out DIR replace {what}, and there is no --out")
        return None
    if not out:
        raise UsageError("--out: expected the name of a folder, got none")
    folder = Path(out)
    try:
        place = next(each for each in (folder.absolute(), *folder.absolute().parents) if each.exists())
        taken = any((folder / name).exists() for name in holds)
    except (OSError, ValueError) as error:
        raise UsageError(f"--out {out}: {getattr(error, 'strerror', None) or error}") from None
    if not place.is_dir():
        raise UsageError(f"--out {out}: {place} is a file, not a folder")
    if not os.access(place, os.W_OK | os.X_OK):
        raise UsageError(f"--out {out}: {place} cannot be written to")
    if taken and not force:
        raise UsageError(f"--out {out}: {what} is there; --force replaces it")
    return folder


def whole_number(text: str) -> int:
    """For ``add_argument(type=whole_number)``: an integer of at least 0, such as a seed."""
    try:
        number = int(text)
    except ValueError:
        number = -1
    if not 0 <= number < 2**63:
        raise argparse.ArgumentTypeError(f"expected an integer from 0 to 2^63 - 1, got {show(text)}")
    return number
