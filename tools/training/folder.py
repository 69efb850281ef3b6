"""A run's folder: what was asked for, so that the run can be understood, gone on with, and done again."""

from __future__ import annotations

import contextlib
import json
import platform
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ...recipes import Recipe, StorageError, load_recipe
from ...recipes.reading import read_file, write_yaml
from ...recipes.replacing import replacing
from ...registry import Problem, RecipeError, show
from ..terminal import CommandFailed
from .settings import FIXED, Settings, as_settings

RUN, RECIPE, TRAIN = "run.json", "recipe.yaml", "train.yaml"
FORMAT = "titans-build run"
SAME = ("files", "fingerprint", "tokenizer_hash", "fields", "vocab", "length")
"""Of what a source says of itself, that which does not change while a run goes on."""


def is_run(folder: Path) -> bool:
    """Whether there is a run in a folder."""
    return (folder / RUN).is_file()


def record(
    folder: Path, recipe: Recipe, data: Any, settings: Settings, description: dict[str, Any], **more: Any
) -> None:
    """Write down what a run is: the recipe, the data and settings, and in ``run.json`` everything else there is to it.

    ``run.json`` is written last: a folder that has it has all of them.
    """
    run = {
        "format": FORMAT,
        "recipe": recipe.name,
        "fingerprint": recipe.fingerprint,
        "overrides": recipe.overrides,
        "seed": settings.seed,
        "data": description,
        "versions": {
            **{name: version(name) for name in ("titans-build", "torch", "numpy")},
            "python": platform.python_version(),
            "platform": platform.platform(),
        },
        **more,
    }
    texts = {
        RECIPE: recipe.to_yaml(),
        TRAIN: write_yaml({"data": data, **settings.to_dict()}),
        RUN: json.dumps(run, indent=2, ensure_ascii=False) + "\n",
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            with replacing(folder / name) as path:
                path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise StorageError(f"{folder}: cannot be written: {error.strerror or error}") from error


def described(folder: Path) -> dict[str, Any]:
    """What ``run.json`` says of the run in a folder. Raises ``StorageError`` where it says nothing."""
    path = folder / RUN
    try:
        run = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise StorageError(f"{path}: expected the description of a run: {error}") from None
    if not isinstance(run, dict) or run.get("format") != FORMAT:
        raise StorageError(f"{path}: expected the description of a run (format {FORMAT!r}), got {show(run)}")
    return run


def expect_the_same_data(folder: Path, before: Any, now: dict[str, Any]) -> None:
    """Raise ``RecipeError`` where a run's data, as sources describe them, are not what they were when it was begun."""
    before = before if isinstance(before, dict) else {}
    problems = [
        Problem(name.replace("_", " "), f"the run was begun with {show(before[name])}, and now it is {show(now[name])}")
        for name in SAME
        if name in before and name in now and before[name] != now[name]
    ]
    if problems:
        what = show(", ".join(now["text"]) if "text" in now else now.get("task"), 200)
        problems.append(Problem("", f"{what} has changed: put back what it was, or begin a run in another folder"))
        raise RecipeError(problems, f"{folder}: --resume: data")


def recorded(folder: Path, *, allow_imports: bool = False) -> tuple[Recipe, Any, Settings]:
    """The recipe, data and settings of the run in a folder. Raises ``StorageError`` where there is none."""
    if not is_run(folder):
        what = f"there is no {RUN}" if folder.is_dir() else "no such folder"
        raise StorageError(f"{folder}: {what}; expected the folder of a run")
    settings = read_file(folder / TRAIN)
    if not isinstance(settings, dict):
        raise RecipeError([Problem("", f"expected a mapping of settings, got {show(settings)}")], str(folder / TRAIN))
    data = settings.pop("data", None)
    return load_recipe(folder / RECIPE, allow_imports=allow_imports), data, as_settings(settings)


def changed(folder: Path, recorded: Settings, settings: Settings) -> dict[str, Any]:
    """The settings that are others than those of the run, and their new values.

    Raises ``RecipeError`` for those that a run cannot change on its way.
    """
    old, new = recorded.to_dict(), settings.to_dict()
    changes = {key: value for key, value in new.items() if value != old[key]}
    fixed = [
        Problem(key, f"the run was begun with {show(old[key])}, and cannot go on with {show(new[key])}")
        for key in changes
        if key in FIXED
    ]
    if fixed:
        raise RecipeError(fixed, f"{folder}: --resume")
    return changes


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raise ``CommandFailed`` where a file cannot be written in a ``with`` block, because the disk is full for one."""
    try:
        yield
    except OSError as error:
        raise CommandFailed(f"{path}: cannot be written: {error.strerror or error}") from error


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Nobody else trains in this folder for the length of a ``with`` block. Raises ``StorageError`` if someone does."""
    try:
        import fcntl
    except ImportError:  # there are no such locks on Windows
        yield
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / ".lock", "ab")  # noqa: SIM115 - closed below
    except OSError as error:
        raise StorageError(f"{folder}: cannot be written: {error.strerror or error}") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise StorageError(f"{folder}: another process is training in this folder") from None
        yield
