"""A run's folder: its recipe, settings and description, from which it can be understood, resumed and repeated."""

from __future__ import annotations

import contextlib
import json
import os
import platform
from collections.abc import Collection, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ...recipes import Recipe, StorageError, load_recipe
from ...recipes.atomic_write import atomic_write, read_regular
from ...recipes.parse import read_file, recipe_error, write_yaml
from ...recipes.saved_format import RUN, TOKENIZER, saved_folder
from ...registry import Problem, RecipeError, show
from ..data import Source
from ..data.open_source import as_mapping, with_tokenizer
from ..data.tokenizer import BYTES
from ..randomness import ORDER
from ..terminal import CommandFailed
from .settings import FIXED, Settings, as_settings, read_settings

RECIPE, TRAIN = "recipe.yaml", "train.yaml"
FORMAT = "titans-build run"
DATA_IDENTITY = ("files", "fingerprint", "tokenizer_hash", "fields", "vocab", "length")
"""Keys of a source's description that stay the same while its data does."""


def is_run(folder: Path) -> bool:
    """Whether there is a run in a folder."""
    return (folder / RUN).is_file()


def expect_no_run(folder: Path) -> None:
    """Raise ``StorageError`` if a folder for many runs is that of one."""
    if is_run(folder):
        raise StorageError(f"{folder}: this is the folder of a run: choose another one, which gets a folder for each")


def write_inputs(folder: Path, recipe: Recipe, data: Any, settings: Settings) -> None:
    """Write the recipe, and the settings with the data."""
    write_file(folder / RECIPE, recipe.to_yaml(), StorageError)
    write_file(folder / TRAIN, write_yaml({"data": data, **settings.to_dict()}), StorageError)


def write_run(folder: Path, recipe: Recipe, data: Any, settings: Settings, source: Source, **more: Any) -> None:
    """Write the recipe, the data and settings, the tokenizer, and in ``run.json`` everything else about the run.

    ``run.json`` is written last: a folder with it is complete.
    """
    run = {
        "format": FORMAT,
        "recipe": recipe.name,
        "fingerprint": recipe.fingerprint,
        "overrides": recipe.overrides,
        "seed": settings.seed,
        "data": source.describe(),
        "versions": {
            **{name: version(name) for name in ("titans-build", "torch", "numpy")},
            "python": platform.python_version(),
            "platform": platform.platform(),
        },
        **more,
    }
    write_inputs(folder, recipe, data, settings)
    if source.tokenizer is not None:
        write_file(folder / TOKENIZER, source.tokenizer, StorageError)
    write_file(folder / RUN, json_text(run, indent=2), StorageError)


def read_run(folder: Path) -> dict[str, Any]:
    """``run.json``. Raises ``StorageError`` if it is not the description of a run."""
    return read_json(folder / RUN, FORMAT, "the description of a run")


def read_json(path: Path, format: str, what: str) -> dict[str, Any]:
    """A JSON file of this ``format``. Raises ``StorageError``, which says that ``what`` was expected."""
    try:
        found = json.loads(read_regular(path))
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise StorageError(f"{path}: expected {what}: {reason}") from None
    if not isinstance(found, dict) or found.get("format") != format:
        raise StorageError(f"{path}: expected {what} (format {format!r}), got {show(found)}")
    return found


def read_inputs(folder: Path, *, imports: Collection[str] = ()) -> tuple[Recipe, Any, Settings]:
    """The recipe, data and settings of the run in a folder.

    ``imports``: the modules that the caller has allowed, which the recipe in the folder may name. Raises
    ``StorageError`` if there is no run, and ``RecipeError`` for other modules.
    """
    if not is_run(folder):
        what = f"there is no {RUN}" if folder.is_dir() else "no such folder"
        raise StorageError(f"{folder}: {what}; expected the folder of a run")
    settings = read_settings(folder / TRAIN)
    data = settings.pop("data", None)
    recipe = read_file(folder / RECIPE)
    named = recipe.get("imports") if isinstance(recipe, dict) else None
    allowed = isinstance(named, list) and all(module in imports for module in named)
    try:
        return load_recipe(recipe, allow_imports=allowed), data, as_settings(settings)
    except RecipeError as error:
        raise RecipeError(error.problems, str(folder / RECIPE)) from None


def data_of_run(folder: Path, data: Any) -> Any:
    """The data of the run in a folder, with the tokenizer that is kept there."""
    if "task" in as_mapping(data):
        return data
    if (folder / TOKENIZER).is_file():
        return with_tokenizer(data, str(folder / TOKENIZER))
    described = read_run(folder).get("data")
    # earlier versions trained models of any vocabulary on bytes
    in_bytes = isinstance(described, dict) and described.get("tokens_are") == "bytes"
    return with_tokenizer(data, BYTES) if in_bytes else data


def data_of_model(folder: str | os.PathLike[str] | None, data: Any) -> Any:
    """The data, read with the tokenizer of the saved model in ``folder``, if it has one and the data name none."""
    if folder is None or "task" in (spec := as_mapping(data)) or spec.get("tokenizer") is not None:
        return data
    saved = saved_folder(Path(folder)) / TOKENIZER
    return with_tokenizer(data, str(saved)) if saved.is_file() else data


def check_same_data(folder: Path, before: Any, now: dict[str, Any]) -> None:
    """Raise ``RecipeError`` if a run's data, as sources describe them, have changed since it began."""
    before = before if isinstance(before, dict) else {}
    problems = [
        Problem(name.replace("_", " "), f"the run began with {show(before[name])}, now it is {show(now[name])}")
        for name in DATA_IDENTITY
        if name in before and name in now and before[name] != now[name]
    ]
    if problems:
        what = show(", ".join(now["text"]) if "text" in now else now.get("task"), 200)
        problems.append(Problem("", f"{what} has changed: restore it, or start a run in another folder"))
        raise RecipeError(problems, f"{folder}: --resume: data")


def check_data_order(folder: Path) -> None:
    """Raise ``RecipeError`` if the run was begun by a version that draws other data for the same seed."""
    if read_run(folder).get("data_order") != ORDER:
        message = "the run was begun by an earlier version, which reads the data in another order"
        remedy = "finish it with that version (titans-build 0.1.0), or start a run in another folder"
        raise recipe_error(f"{folder}: --resume: data", f"{message}: {remedy}")


def setting_changes(folder: Path, before: Settings, after: Settings) -> dict[str, Any]:
    """The settings that differ, and their new values. Raises ``RecipeError`` for those in ``FIXED``."""
    old, new = before.to_dict(), after.to_dict()
    changes = {key: value for key, value in new.items() if value != old[key]}
    fixed = [
        Problem(key, f"the run began with {show(old[key])} and cannot be resumed with {show(new[key])}")
        for key in changes
        if key in FIXED
    ]
    if fixed:
        raise RecipeError(fixed, f"{folder}: --resume")
    return changes


def json_text(value: Any, indent: int | None = None) -> str:
    """JSON with a line end. The names of files that are no valid text are escaped."""
    text = json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=False)
    return (text if text.isascii() or _is_unicode(text) else json.dumps(value, indent=indent)) + "\n"


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def write_file(path: Path, content: str | bytes, error: type[Exception] = CommandFailed) -> None:
    """Replace a file atomically, and make its folder. Raises ``error`` if that fails, as on a full disk."""
    with write_errors(path, error):
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as temporary:
            temporary.write_bytes(content.encode() if isinstance(content, str) else content)


@contextlib.contextmanager
def write_errors(path: Path, error: type[Exception] = CommandFailed) -> Iterator[None]:
    """Turn an ``OSError`` of the ``with`` block into ``error``, which names ``path``."""
    try:
        yield
    except OSError as failure:
        raise error(f"{path}: cannot be written: {failure.strerror or failure}") from failure


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes from training in this folder. Raises ``StorageError`` if one already does."""
    try:
        import fcntl
    except ImportError:  # Windows has no such locks
        yield
        return
    lock = folder / ".lock"
    with write_errors(folder, StorageError):
        folder.mkdir(parents=True, exist_ok=True)
        if lock.exists() and not lock.is_file():  # opening a pipe would wait
            raise StorageError(f"{lock}: not a regular file")
        file = open(lock, "ab")  # noqa: SIM115 - closed below
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise StorageError(f"{folder}: another process is training in this folder") from None
        yield
