"""``load_recipe``: one entrance for packaged names, files, text and plain data."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from ..registry import Problem, RecipeError, list_blocks, nearest, show
from .overrides import override
from .packaged import base_names, packaged_names, read_packaged
from .parse import is_recipe_file, plain, read_file, read_text
from .recipe import Recipe, check_recipe
from .saved_format import StorageError, read_index

Source: TypeAlias = "str | os.PathLike[str] | Mapping[str, Any] | Recipe"


def load_recipe(source: Source, overrides: Mapping[str, Any] | None = None, allow_imports: bool = False) -> Recipe:
    """Read and check a recipe.

    ``source``: a packaged name (``"mac"``, ``"mac-170m"``), a path to a YAML or JSON file, YAML or JSON text, a
    mapping, a recipe, or the folder of a saved model. A packaged name goes before a file of the same name; write
    ``./mac`` for the file.

    ``overrides``: values by path, ``{"layers.mac.0.segment": 256}``. They are checked like the rest and kept in
    ``recipe.overrides`` and in what is saved.

    ``allow_imports``: whether modules under ``imports:`` may be imported, which runs their code.

    Raises ``RecipeError`` listing every problem with its path.
    """
    data, label, earlier = _read(source)
    changes: dict[str, Any] = {}
    problems: list[Problem] = []
    if overrides is not None:
        if not isinstance(overrides, Mapping):
            raise RecipeError([Problem("", f"expected overrides as a mapping, got {show(overrides)}")], label)
        for path, value in overrides.items():
            try:
                changes[path] = plain(value, label)
            except RecipeError as error:
                problems += [Problem(str(path), problem.message) for problem in error.problems]
        if isinstance(data, dict):
            problems += override(data, plain(changes, label))
    try:
        recipe = check_recipe(data, source=label, allow_imports=allow_imports)
    except RecipeError as error:
        raise RecipeError([*problems, *error.problems], label) from None
    if problems:
        raise RecipeError(problems, label)
    return dataclasses.replace(recipe, overrides={**earlier, **changes})


class _Read(NamedTuple):
    data: Any
    """Plain, and freshly made."""
    label: str
    """What to call it in messages."""
    overrides: Mapping[str, Any] = {}
    """What had been changed before it came here."""


def _read(source: Source) -> _Read:
    if isinstance(source, Recipe):
        return _Read(source.to_dict(), source.name or "recipe", source.overrides)
    if isinstance(source, Mapping):
        data = plain(dict(source))
        return _Read(data, f"recipe {data['name']}" if isinstance(data.get("name"), str) else "recipe")
    if isinstance(source, os.PathLike):
        return _read_path(Path(source), str(source))
    if not isinstance(source, str):
        raise _fail("recipe", f"expected a packaged name, a path, YAML text or a mapping, got {show(source)}")
    if source in packaged_names():
        return _Read(read_packaged(source), source)
    if not source.strip():
        raise _fail("recipe", "empty: expected a recipe")
    if "\n" in source or source.lstrip().startswith("{"):
        return _Read(read_text(source), "recipe")
    if _exists(source) or is_recipe_file(Path(source)) or "/" in source or os.sep in source:
        return _read_path(Path(source), source)
    if ": " in source or source.endswith(":"):
        return _Read(read_text(source), "recipe")
    names = packaged_names()
    if source in list_blocks():
        raise _fail(show(source), f"a block, not a recipe; titans-build describe {source} describes it ({_list()})")
    raise _fail(show(source), f"no packaged recipe and no file of that name{nearest(source, names)} ({_list()})")


def _read_path(path: Path, label: str) -> _Read:
    try:
        folder = path.is_dir()
    except (OSError, ValueError):  # too long a name, or one that no file can have: reading it says so
        folder = False
    if not folder:
        return _Read(read_file(path), label)
    try:
        index = read_index(path)
    except StorageError as error:
        raise _fail(label, str(error).removeprefix(f"{path}: ")) from None
    return _Read(index["recipe"], label, index["overrides"])


def _exists(name: str) -> bool:
    try:
        return os.path.exists(name)
    except ValueError:  # a NUL character
        return False


def _list() -> str:
    return "packaged: " + ", ".join(base_names()) + "; sizes as in mac-170m"


def _fail(source: str, message: str) -> RecipeError:
    return RecipeError([Problem("", message)], source)
