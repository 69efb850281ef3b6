"""Validation and normalization of block descriptions, and the creation of blocks."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

from .catalogue import Entry, known_names, lookup
from .errors import MAX_PROBLEMS, Problem, RecipeError, join, nearest, show
from .schema import Field, Needs, block_places

CHAIN = "chain"
"""A list of blocks is short for this block with the list as its field ``of``."""

MAX_NESTING = 32
MAX_BLOCKS = 1024
"""Maximal number of blocks in one recipe (a repeated layer counts once)."""


def validate(node: Any, *, dim: int | None = None, path: str = "") -> Any:
    """Return the normalized form of a block: ``{type: name, ...}`` with all fields, nested blocks included.

    Args:
        node: a name, a mapping, a list (a chain), or a built block, which is returned unchanged.
        dim: the width, if known.
        path: the path of the node, used in error messages.

    Raises ``RecipeError`` with all problems.
    """
    checker = Checker(dim)
    checked = checker.check(node, path)
    if checker.problems:
        raise RecipeError(checker.problems, "recipe" if path else "block")
    return checked


def create(spec: Any, *, dim: int) -> Any:
    """Build the block that ``spec`` describes, with width ``dim``. A built block is returned unchanged.

    Raises ``RecipeError`` with all problems of ``spec``.
    """
    if not isinstance(dim, int) or isinstance(dim, bool) or dim < 1:
        raise RecipeError([Problem("dim", f"expected integer >= 1, got {show(dim)}")], "block")
    node = validate(spec, dim=dim)
    if is_block(node):
        return node
    entry = lookup(node["type"])
    arguments = {name: field.to_python(node[name]) for name, field in entry.fields.items()}
    try:
        return entry.cls(dim, **arguments)
    except RecipeError:
        raise
    except ValueError as error:
        # a ValueError of the constructor is a problem of the description
        raise RecipeError([Problem("", f"{entry.name}: {error}")], "block") from error


def is_block(value: Any) -> bool:
    """Whether ``value`` is a built block, and not a class or a description."""
    return not isinstance(value, type) and all(callable(getattr(value, m, None)) for m in ("forward", "init_state"))


def check_settings(name: str, fields: dict[str, Field], given: dict[str, Any], path: str = "") -> dict[str, Any]:
    """Check ``given`` against ``fields`` and return the arguments of the constructor, defaults included.

    The fields must not hold blocks. ``name`` is used in messages. Raises ``RecipeError`` with all problems.
    """
    problems = [
        Problem(join(path, key), f"unknown field of {name}{nearest(key, fields)} (fields: {_listed(fields)})")
        for key in list(given)[:MAX_PROBLEMS]
        if key not in fields
    ]
    values = {}
    for field in fields.values():
        if field.name not in given and field.required:
            problems.append(Problem(path or field.name, f"{name} needs the field {field.name!r} ({field.type_text})"))
            continue
        value, wrong = field.check(given.get(field.name, field.default), join(path, field.name))
        problems += wrong
        if not wrong:
            values[field.name] = field.to_python(value)
    if problems:
        raise RecipeError(problems, name)
    return values


class Checker:
    """Checks trees of blocks and collects all ``problems``.

    One checker is used for a whole recipe, so its limits on blocks and problems apply to the recipe.
    """

    def __init__(self, dim: int | None = None) -> None:
        self.dim = dim
        self.problems: list[Problem] = []
        self.blocks = 0
        """Number of blocks so far, with those inside of others."""

    def check(self, node: Any, path: str = "") -> Any:
        """Return the normalized form of ``node``, which is valid if no problem was added."""
        return self._block(node, path, None, 0)

    def _block(self, node: Any, path: str, needs: Needs | None, depth: int) -> Any:
        if len(self.problems) >= MAX_PROBLEMS:
            return node
        self.blocks += 1
        if depth > MAX_NESTING:
            return self._refuse(path, f"blocks are nested more than {MAX_NESTING} deep", node)
        if self.blocks > MAX_BLOCKS:
            if self.blocks == MAX_BLOCKS + 1:
                self._refuse(path, f"more than {MAX_BLOCKS} blocks", node)
            return node
        if is_block(node):
            return self._built(node, path, needs)
        given = self._as_mapping(node, path)
        entry = (
            None if given is None else self._entry(given["type"], path if isinstance(node, str) else join(path, "type"))
        )
        if given is None or entry is None:
            return node
        self._check_needs(entry.name, entry.cls, needs, path)
        # in the file, the items of a list are directly under the path of the list
        return self._fields(entry, given, path, depth, needs, of_path=path if isinstance(node, list) else None)

    def _refuse(self, path: str, message: str, node: Any) -> Any:
        self.problems.append(Problem(path, message))
        return node

    def _as_mapping(self, node: Any, path: str) -> dict[str, Any] | None:
        if isinstance(node, str):
            return {"type": node}
        if isinstance(node, list):
            if not node:
                self._refuse(path, "an empty list of blocks", node)
                return None
            return {"type": CHAIN, "of": node}
        if isinstance(node, dict):
            if "type" in node:
                return node
            hint = next((nearest(key, ["type"]) for key in node if isinstance(key, str) and nearest(key, ["type"])), "")
            named = next((key for key in node if key in known_names()), None)
            if named is not None:  # {memory: {depth: 2}}
                hint = f"; a block is written {{type: {named}, ...}}"
            self._refuse(path, f"a block needs a type, got {show(node)}{hint}", node)
            return None
        self._refuse(path, f"expected a block (a name, a mapping with a type, or a list), got {show(node)}", node)
        return None

    def _entry(self, name: Any, path: str) -> Entry | None:
        if not isinstance(name, str):
            self._refuse(path, f"expected the name of a block, got {show(name)}", name)
            return None
        try:
            return lookup(name)
        except RecipeError as error:
            self.problems += [Problem(path, problem.message) for problem in error.problems]
            return None

    def _built(self, block: Any, path: str, needs: Needs | None) -> Any:
        width = getattr(block, "dim", None)
        if self.dim is not None and width is not None and width != self.dim:
            self._refuse(path, f"expected a block of dim {self.dim}, got {type(block).__name__} of dim {width}", block)
        self._check_needs(type(block).__name__, block, needs, path)
        if needs is not None:
            for name in _delegates(block):
                held = getattr(block, name)
                for inner in held if isinstance(held, Iterable) else [held]:
                    self._built(inner, join(path, name), needs)
        return block

    def _check_needs(self, name: str, holder: Any, needs: Needs | None, path: str) -> None:
        missing = needs.missing(holder) if needs is not None else []
        if needs is not None and missing:
            fit = [other for other in known_names() if _fits(other, needs)]
            fit = [other for other in fit if getattr(lookup(other).cls, "variant_of", None) is None]
            around = [other for other in fit if _delegates(lookup(other).cls)]
            can = ", ".join(other for other in fit if other not in around)
            if around:
                can += f"; or {', '.join(around)} with nothing else inside"
            can = f" ({can})" if can else ""
            wanted = " and ".join(needs.methods)
            self._refuse(
                path,
                f"expected a block with {wanted}{can}, got {name!r}, which has no {' and no '.join(missing)}",
                None,
            )

    def _fields(
        self, entry: Entry, given: dict[str, Any], path: str, depth: int, needs: Needs | None, of_path: str | None
    ) -> dict[str, Any]:
        before = len(self.problems)
        self._unknown(entry, given, path)
        node: dict[str, Any] = {"type": entry.name}
        for name, field in entry.fields.items():
            place = of_path if of_path is not None and name == "of" else join(path, name)
            if name not in given and field.required:
                self._refuse(path or name, f"{entry.name} needs the field {name!r} ({field.type_text})", None)
                continue
            value, problems = field.check(given.get(name, field.default), place)
            self.problems += problems
            if field.holds_blocks and not problems:
                passed_on = needs if name in _delegates(entry.cls) else None
                value = self._nested(field.annotation, value, place, depth, passed_on)
            node[name] = value
        if len(self.problems) == before and _checks_fields(entry):
            for name, message in entry.cls.problems(self.dim, {key: x for key, x in node.items() if key != "type"}):
                self._refuse(join(path, name), message, None)
        return node

    def _unknown(self, entry: Entry, given: dict[str, Any], path: str) -> None:
        for key in given:
            if len(self.problems) >= MAX_PROBLEMS:
                return
            if not isinstance(key, str):
                self._refuse(path, f"expected field names to be text, got {show(key)}", None)
            elif key == "dim":
                self._refuse(join(path, key), "the width is given once, at the top of the recipe", None)
            elif key != "type" and key not in entry.fields:
                self._refuse(
                    join(path, key),
                    f"unknown field of {entry.name}{nearest(key, entry.fields)} (fields: {_listed(entry.fields)})",
                    None,
                )

    def _nested(self, annotation: Any, value: Any, path: str, depth: int, passed_on: Needs | None) -> Any:
        value = _copy(value)
        for keys, own in block_places(annotation, value):
            needs = Needs(*own.methods, *passed_on.methods) if own and passed_on else own or passed_on
            if not keys:
                return self._block(value, path, needs, depth + 1)
            place, holder = path, value
            for key in keys[:-1]:
                place, holder = join(place, key), holder[key]
            holder[keys[-1]] = self._block(holder[keys[-1]], join(place, keys[-1]), needs, depth + 1)
        return value


def _listed(fields: dict[str, Field]) -> str:
    return ", ".join(fields) or "it has none"


def _fits(name: str, needs: Needs) -> bool:
    try:
        return not needs.missing(lookup(name).cls)
    except RecipeError:
        return False


def _delegates(holder: Any) -> tuple[str, ...]:
    """The fields of a class or built block to which it passes required methods on."""
    return getattr(holder, "delegates", ())


def _copy(value: Any) -> Any:
    """Copy lists and mappings, so that the argument of the caller is not modified."""
    if isinstance(value, list):
        return [_copy(item) for item in value]
    if isinstance(value, dict):
        return {key: _copy(item) for key, item in value.items()}
    return value


def _checks_fields(entry: Entry) -> bool:
    """Whether the class has conditions on its fields. Inherited ones do not fit a constructor with fewer fields."""
    owner = next((cls for cls in entry.cls.__mro__ if "problems" in vars(cls)), None)
    if owner is None or owner is entry.cls:
        return owner is not None
    return inspect.signature(owner).parameters.keys() - {"dim"} <= entry.fields.keys()
