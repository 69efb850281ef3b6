"""Loads recipes: from packaged names, files, text, plain data and saved models, with overrides of single values."""

from __future__ import annotations

import copy
import dataclasses
import difflib
import itertools
import math
import os
import re
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from ..registry import Problem, RecipeError, list_blocks, lookup, nearest, show
from .parse import is_recipe_file, plain, read_file, read_text, recipe_error
from .recipe import KEYS, Recipe, check_recipe
from .saved_format import StorageError, read_index, saved_folder

Source: TypeAlias = "str | os.PathLike[str] | Mapping[str, Any] | Recipe"


def load_recipe(source: Source, overrides: Mapping[str, Any] | None = None, allow_imports: bool = False) -> Recipe:
    """Read and check a recipe.

    ``source``: a packaged name (``"mac"``, ``"mac-170m"``), a path to a YAML or JSON file, YAML or JSON text, a
    mapping, a recipe, or the folder of a saved model or of a run. A packaged name takes precedence over a file of the
    same name, which can be given as ``./mac``.

    ``overrides``: values by path, ``{"layers.mac.0.segment": 256}``. They are checked like the rest, and recorded in
    ``recipe.overrides`` and in what is saved.

    ``allow_imports``: whether to import the modules under ``imports:``, which runs their code.

    Raises ``RecipeError`` with all problems and their paths.
    """
    data, label, earlier = _read(source)
    problems: list[Problem] = []
    if overrides is None:
        overrides = {}
    if not isinstance(overrides, Mapping):
        raise recipe_error(label, f"expected overrides as a mapping, got {show(overrides)}")
    values: dict[str, Any] = {}
    for path, value in overrides.items():
        try:
            values[path] = plain(value, label)
        except RecipeError as error:
            problems += [Problem(str(path), problem.message) for problem in error.problems]
    if isinstance(data, dict):
        problems += apply_overrides(data, plain(values, label))
    try:
        recipe = check_recipe(data, source=label, allow_imports=allow_imports)
    except RecipeError as error:
        problems += error.problems
    if problems:
        known = list(itertools.islice(_paths(data), MAX_PATHS))
        unknown = [problem.path in values or problem.message.startswith("unknown ") for problem in problems]
        hinted = [_with_nearest_path(each, known) if fits else each for each, fits in zip(problems, unknown)]
        raise RecipeError(hinted, label)
    return dataclasses.replace(recipe, overrides={**earlier, **values})


class _Read(NamedTuple):
    data: Any
    """Plain data, a new copy."""
    label: str
    """Name of the source in messages."""
    overrides: Mapping[str, Any] = {}
    """Overrides that were applied earlier."""


def _read(source: Source) -> _Read:
    if isinstance(source, Recipe):
        return _Read(source.to_dict(), source.name or "recipe", source.overrides)
    if isinstance(source, Mapping):
        data = plain(dict(source))
        return _Read(data, f"recipe {data['name']}" if isinstance(data.get("name"), str) else "recipe")
    if isinstance(source, os.PathLike):
        return _read_path(Path(source), str(source))
    if not isinstance(source, str):
        raise recipe_error("recipe", f"expected a packaged name, a path, YAML text or a mapping, got {show(source)}")
    if source in packaged_names():
        return _Read(read_packaged(source), source)
    if not source.strip():
        raise recipe_error("recipe", "empty: expected a recipe")
    if "\n" in source or source.lstrip().startswith("{"):
        return _Read(read_text(source), "recipe")
    if _exists(source) or is_recipe_file(Path(source)) or "/" in source or os.sep in source:
        return _read_path(Path(source), source)
    if ": " in source or source.endswith(":"):
        return _Read(read_text(source), "recipe")
    known = f"packaged: {', '.join(base_names())}; sizes as in mac-170m"
    if source in list_blocks():
        raise recipe_error(show(source), f"a block, not a recipe; see titans-build describe {source} ({known})")
    raise recipe_error(show(source), f"no packaged recipe and no file of that name{nearest_recipe(source)} ({known})")


def _read_path(path: Path, label: str) -> _Read:
    try:
        folder = path.is_dir()
    except (OSError, ValueError):  # not a possible name; reading it raises the error
        folder = False
    if not folder:
        return _Read(read_file(path), label)
    try:
        index = read_index(saved_folder(path))
    except StorageError as error:
        raise recipe_error(label, str(error).removeprefix(f"{path}: ")) from None
    return _Read(index["recipe"], label, index["overrides"])


def _exists(name: str) -> bool:
    try:
        return os.path.exists(name)
    except ValueError:  # a NUL character
        return False


def nearest_recipe(name: str) -> str:
    """As ``nearest``; of a size that there is not, the nearest number: ``mac-170m`` for ``mac-200m``."""
    base, _, size = name.lower().rpartition("-")
    sizes = {_parameters(known): known for known in _sizes()}
    if not base or math.isnan(_parameters(size)):
        return nearest(name, packaged_names())
    near = min(sizes, key=lambda number: abs(math.log(number / _parameters(size))))
    return nearest(f"{base}-{sizes[near]}", packaged_names())


def _parameters(size: str) -> float:
    """``170e6`` of ``170m``; NaN of what is no size."""
    match = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?)([mb])", size)
    return float(match[1]) * {"m": 1e6, "b": 1e9}[match[2]] or math.nan if match else math.nan


# Packaged recipes: a YAML file each, and the sizes of the published models as overrides of them.

_FOLDER = Path(__file__).parent
_SIZES = "sizes"


def packaged_names() -> list[str]:
    """Names of all packaged recipes: ``mac``, ..., and their sizes: ``mac-170m``, ..."""
    return [*base_names(), *(f"{base}-{size}" for size, bases in _sizes().items() for base in bases)]


def base_names() -> list[str]:
    """Names of the packaged recipes that have their own file, without the sizes."""
    return sorted(path.stem for path in _FOLDER.glob("*.yaml") if path.stem != _SIZES)


def read_packaged(name: str) -> dict[str, Any]:
    """Plain data of the packaged recipe ``name``, one of ``packaged_names()``."""
    if name in base_names():
        data: dict[str, Any] = read_file(_FOLDER / f"{name}.yaml")
    else:
        base, _, size = name.rpartition("-")
        data = read_packaged(base)
        problems = apply_overrides(data, copy.deepcopy(_sizes()[size][base]))
        if problems:
            raise ValueError(f"{_SIZES}.yaml, {name}: {'; '.join(map(str, problems))}")
    data["name"] = name
    return data


@cache
def _sizes() -> dict[str, dict[str, dict[str, Any]]]:
    """Size -> base recipe -> overrides. ``sizes.yaml`` describes its format."""
    data = read_file(_FOLDER / f"{_SIZES}.yaml")
    return {
        size: {
            base: {
                "dim": shape["dim"],
                "vocab": data["vocab"],
                "tie": data["tie"],
                **data["settings"][base],
                **{
                    path: ({**shape, "hidden": shape["hidden"].get(base)} | shape.get(base, {}))[number]
                    for number, paths in places.items()
                    for path in paths
                },
            }
            for base, places in data["places"].items()
        }
        for size, shape in data["sizes"].items()
    }


def apply_overrides(data: dict[str, Any], overrides: Mapping[str, Any]) -> list[Problem]:
    """Set the value at each path of ``overrides`` in ``data``, in place. Return a problem for each invalid path.

    A path may pass through a block that the recipe gives by its bare name or leaves at its default. The values and
    the last key of a path are not checked here, but with the whole recipe.
    """
    problems = []
    for path, value in overrides.items():
        try:
            _set(data, path, value)
        except _InvalidPath as error:
            problems.append(Problem(show(path, 100).strip("'"), str(error)))
    return problems


class _InvalidPath(Exception):
    pass


# The paths that a recipe has, for the message about one that it has not.

MAX_PATHS = 10_000
"""Paths that are compared with an unknown one."""


def _with_nearest_path(problem: Problem, known: list[str]) -> Problem:
    """``problem`` of an unknown path with those that were probably meant: ``layers.mac.0.segment`` for ``segment``."""
    *keys, last = problem.path.split(".")
    if problem.path in known or "did you mean" in problem.message or keys[:1] == ["stack"]:
        return problem
    if not any(path.endswith(f".{last}") for path in known):
        matches = difflib.get_close_matches(last[:100], {path.rpartition(".")[2] for path in known}, n=1)
        last = matches[0] if matches else last
    found = [path for path in known if path.endswith(f".{last}")]
    found = [path for path in found if _is_part([*keys, last], path)] or found
    found.sort(key=len)
    if f"{'.'.join(keys)}.{last}" in found:
        found = [f"{'.'.join(keys)}.{last}"]
    hint = f"; did you mean {' or '.join(map(repr, found[:3]))}?" if found else ""
    return Problem(problem.path, problem.message + hint)


def _is_part(keys: list[str], path: str) -> bool:
    """Whether ``path`` has all ``keys`` in this order, the last one at its end."""
    rest = iter(path.split("."))
    return all(key in rest for key in keys) and not any(True for _ in rest)


def _paths(data: Any) -> Iterator[str]:
    """The paths of all values of a recipe, those at their defaults included."""
    if isinstance(data, dict):
        yield from KEYS
        layers = data.get("layers")
        for name, blocks in layers.items() if isinstance(layers, dict) else ():
            yield f"layers.{name}"
            yield from _block_paths(blocks, f"layers.{name}")


def _block_paths(block: Any, path: str) -> Iterator[str]:
    if isinstance(block, list):
        for index, part in enumerate(block):
            yield f"{path}.{index}"
            yield from _block_paths(part, f"{path}.{index}")
        return
    block = {"type": block} if isinstance(block, str) else block
    try:
        fields = lookup(block["type"]).fields
    except (RecipeError, TypeError, KeyError):  # reported when the recipe is checked
        return
    yield f"{path}.type"
    for name, field in fields.items():
        yield f"{path}.{name}"
        if field.holds_blocks:
            yield from _block_paths(block.get(name, field.default), f"{path}.{name}")


def _set(data: Any, path: Any, value: Any) -> None:
    keys = path.split(".") if isinstance(path, str) else []
    if not keys or not all(keys):
        raise _InvalidPath("expected a path such as layers.mac.0.segment")
    container = data
    for depth, key in enumerate(keys[:-1]):
        container = _container(container, key, ".".join(keys[:depth]))
    last, where = keys[-1], ".".join(keys[:-1])
    container[_index(container, last, where) if isinstance(container, list) else last] = value


def _container(parent: Any, key: str, where: str) -> Any:
    """Return the mapping or list at ``key`` of ``parent``. A bare name is written out, a default is filled in."""
    place: Any = key
    if isinstance(parent, list):
        if key == "of" and where:
            return parent  # a list of blocks is short for a chain, whose field is `of`
        place = _index(parent, key, where)
    elif key not in parent:
        parent[key] = _default(parent, key, where)
    if isinstance(parent[place], str):
        parent[place] = {"type": parent[place]}
    if not isinstance(parent[place], (dict, list)):
        path = f"{where}.{key}" if where else key
        raise _InvalidPath(f"{path} is {show(parent[place])}, which has nothing inside")
    return parent[place]


def _index(items: list[Any], key: str, where: str) -> int:
    if not key.isascii() or not key.isdigit() or len(key) > 9 or int(key) >= len(items):
        raise _InvalidPath(f"{where} is a list: expected a number from 0 to {len(items) - 1}, got {show(key)}")
    return int(key)


def _default(block: dict[str, Any], key: str, where: str) -> Any:
    """The default of a field that the recipe does not give, if it is a block."""
    try:
        fields = lookup(block.get("type", "")).fields
    except (RecipeError, TypeError):  # reported when the recipe is checked
        fields = {}
    field = fields.get(key)
    if field is None:
        known = [name for name in [*block, *fields] if isinstance(name, str)]
        raise _InvalidPath(f"there is no {show(key)} in {where or 'the recipe'}{nearest(key, known)}")
    if field.required:
        raise _InvalidPath(f"{where}.{key} is not given")
    if not field.holds_blocks or field.default is None:
        raise _InvalidPath(f"{where}.{key} is {show(field.default)}, which has nothing inside")
    return copy.deepcopy(field.default)
