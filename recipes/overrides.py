"""Changing single values of a recipe by path, before it is checked: ``layers.mac.0.segment`` = 256."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from ..registry import Problem, RecipeError, lookup, nearest, show


def override(data: dict[str, Any], overrides: Mapping[str, Any]) -> list[Problem]:
    """Set each path of ``overrides`` in ``data``, in place; the problems of paths that lead nowhere.

    A path may go through a block that the recipe gives by its bare name or leaves at its default. Whether the
    value, and the last key, make sense is left to the check of the whole recipe.
    """
    problems = []
    for path, value in overrides.items():
        try:
            _set(data, path, value)
        except _LeadsNowhere as error:
            problems.append(Problem(show(path, 100).strip("'"), str(error)))
    return problems


class _LeadsNowhere(Exception):
    pass


def _set(data: Any, path: Any, value: Any) -> None:
    keys = path.split(".") if isinstance(path, str) else []
    if not keys or not all(keys):
        raise _LeadsNowhere("expected a path such as layers.mac.0.segment")
    holder = data
    for depth, key in enumerate(keys[:-1]):
        holder = _open(holder, key, ".".join(keys[:depth]))
    last, where = keys[-1], ".".join(keys[:-1])
    if isinstance(holder, list):
        holder[_index(holder, last, where)] = value
    else:
        holder[last] = value


def _open(holder: Any, key: str, where: str) -> Any:
    """The container at ``key``, ready to be written into."""
    if isinstance(holder, list):
        if key == "of" and where:
            return holder  # a list of blocks is short for a chain, whose field is called `of`
        place: Any = _index(holder, key, where)
    elif key in holder:
        place = key
    else:
        place = key
        holder[key] = _default(holder, key, where)
    if isinstance(holder[place], str):
        holder[place] = {"type": holder[place]}  # a bare name
    if not isinstance(holder[place], (dict, list)):
        raise _LeadsNowhere(f"{where + '.' if where else ''}{key} is {show(holder[place])}, which has nothing inside")
    return holder[place]


def _index(holder: list[Any], key: str, where: str) -> int:
    if not key.isascii() or not key.isdigit() or len(key) > 9 or int(key) >= len(holder):
        raise _LeadsNowhere(f"{where} is a list: expected a number from 0 to {len(holder) - 1}, got {show(key)}")
    return int(key)


def _default(holder: dict[str, Any], key: str, where: str) -> Any:
    """What stands at a field that the recipe does not give."""
    try:
        fields = lookup(holder.get("type", "")).fields
    except (RecipeError, TypeError):  # the check of the recipe will say what is wrong with the type
        fields = {}
    field = fields.get(key)
    if field is not None and not field.required and field.holds_blocks and field.default is not None:
        return copy.deepcopy(field.default)
    if field is not None:
        holds = "is not given" if field.required else f"is {show(field.default)}, which has nothing inside"
        raise _LeadsNowhere(f"{where}.{key} {holds}")
    known = [name for name in [*holder, *fields] if isinstance(name, str)]
    raise _LeadsNowhere(f"there is no {show(key)} in {where or 'the recipe'}{nearest(key, known)}")
