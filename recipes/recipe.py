"""``Recipe``: the complete, checked description of a model."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import json
import re
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any

from ..registry import MAX_PROBLEMS, Checker, Field, Problem, RecipeError, join, lookup, nearest, show
from .parse import write_yaml

VERSION = 1
MAX_DIM = 2**17
MAX_VOCAB = 2**24
MAX_LAYERS = 1024
"""Layers in the stack, with repeats expanded."""
MAX_BUILT = 2**13
"""Blocks of all layers in the stack, with repeats expanded."""

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_-]{0,63}")
KEYS = ("version", "name", "dim", "vocab", "tie", "imports", "layers", "stack")
_REQUIRED = ("version", "dim", "layers", "stack")


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A checked recipe, created by ``load_recipe``. Equal recipes describe the same model."""

    dim: int
    layers: dict[str, list[dict[str, Any]]]
    """Layer name -> its blocks, each in full form: ``{type: name, ...}`` with all fields."""
    stack: list[Any]
    """Layer names and ``{repeat: n, of: [...]}``, as in the file."""
    vocab: int | None = None
    """Number of tokens. ``None``: the model maps vectors to vectors, without embedding and head."""
    tie: bool = False
    """Whether the head shares the weight of the embedding."""
    name: str | None = None
    imports: list[str] = dataclasses.field(default_factory=list)
    overrides: dict[str, Any] = dataclasses.field(default_factory=dict, compare=False)
    """Overrides by path that have already been applied."""
    version: int = VERSION

    def expand(self) -> list[str]:
        """Layer names from first to last, with repeats expanded."""
        return list(_expand(self.stack))

    @property
    def depth(self) -> int:
        """Number of layers in the model."""
        return len(self.expand())

    def to_dict(self) -> dict[str, Any]:
        """Plain data from which ``load_recipe`` creates an equal recipe."""
        data = {
            "version": self.version,
            "name": self.name,
            "dim": self.dim,
            "vocab": self.vocab,
            "tie": self.tie,
            "imports": self.imports,
            "layers": self.layers,
            "stack": self.stack,
        }
        copied: dict[str, Any] = json.loads(json.dumps(data))
        for key in ("name", "imports"):
            if not copied[key]:
                del copied[key]
        return copied

    def to_yaml(self) -> str:
        """``to_dict`` as YAML."""
        return write_yaml(self.to_dict())

    def to_json(self) -> str:
        """``to_dict`` as JSON."""
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False)

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits that identify the model. The names of the recipe and of its layers' imports do not matter.

        Fields at their defaults are left out, so that a release may add a field and still load what was saved before,
        and so are fields marked ``SameFunction``.
        """
        return self._hash(function_fields)

    @cached_property
    def earlier_fingerprint(self) -> str:
        """The fingerprint that earlier versions wrote, of which fields marked ``SameFunction`` were a part."""
        return self._hash(lambda block: block)

    def _hash(self, select: Callable[[Any], Any]) -> str:
        data = self.to_dict()
        layers = {name: _without_defaults(select(blocks)) for name, blocks in data["layers"].items()}
        same = {key: data[key] for key in ("version", "dim", "vocab", "tie")}
        same |= {"layers": layers, "stack": self.expand()}
        return hashlib.sha256(json.dumps(same, sort_keys=True).encode()).hexdigest()[:16]


def function_fields(value: Any) -> Any:
    """A block in plain form, or the blocks in a field's value, without the fields marked ``SameFunction``."""
    return _select(value, lambda field, part: field.changes_function)


def original_fields(value: Any) -> Any:
    """A block in plain form, or the blocks in a field's value, without fields marked ``Added`` at their defaults."""
    return _select(value, lambda field, part: not field.added or part != field.default)


def _select(value: Any, wanted: Callable[[Field, Any], bool]) -> Any:
    if isinstance(value, list):
        return [_select(part, wanted) for part in value]
    if not isinstance(value, dict) or not isinstance(value.get("type"), str):
        return value
    fields = lookup(value["type"]).fields
    return {
        name: _select(part, wanted) if name in fields and fields[name].holds_blocks else part
        for name, part in value.items()
        if name not in fields or wanted(fields[name], part)
    }


def _without_defaults(value: Any) -> Any:
    """Remove the fields at their defaults from a block in full form, or from the blocks in a field's value."""
    if isinstance(value, list):
        return [_without_defaults(part) for part in value]
    if not isinstance(value, dict) or not isinstance(value.get("type"), str):
        return value
    entry = lookup(value["type"])
    fields = entry.fields
    defaults = {name: field.default for name, field in fields.items()} | getattr(entry.cls, "former_defaults", {})
    given = {name: part for name, part in value.items() if name == "type" or part != defaults[name]}
    for name, part in given.items():
        if name == "type":
            continue
        if fields[name].holds_blocks:
            given[name] = _without_defaults(part)
        elif fields[name].part is not None and isinstance(part, dict):
            own = fields[name].part.catalogue.lookup(part["type"]).fields
            given[name] = {k: v for k, v in part.items() if not (k in own and own[k].added and v == own[k].default)}
    return given


def check_recipe(data: Any, *, source: str = "recipe", allow_imports: bool = False) -> Recipe:
    """Check plain ``data`` and create its recipe. Raises ``RecipeError`` with all problems.

    ``allow_imports``: whether to import the modules under ``imports:``, which runs their code.
    """
    if not isinstance(data, dict):
        raise RecipeError(
            [Problem("", f"expected a mapping with the keys {', '.join(_REQUIRED)}, got {show(data)}")], source
        )
    problems = list(_top_level(data))
    problems += _imports(data.get("imports", []), allow_imports)
    dim = data.get("dim")
    checker = Checker(dim if _is_count(dim, MAX_DIM) else None)
    sizes: dict[str, int] = {}
    layers = _layers(data.get("layers"), checker, sizes) if "layers" in data else None
    problems += checker.problems
    if "stack" in data:
        problems += _stack(data["stack"], layers, sizes)
    if problems:
        raise RecipeError(problems, source)
    return Recipe(
        dim=data["dim"],
        vocab=data.get("vocab"),
        tie=data.get("tie", False),
        name=data.get("name"),
        imports=list(data.get("imports") or []),
        layers=layers or {},
        stack=data["stack"],
    )


def _top_level(data: dict[str, Any]) -> Iterator[Problem]:
    for key in list(data)[:MAX_PROBLEMS]:
        if key not in KEYS:
            yield Problem(join("", key), f"unknown key{nearest(key, KEYS)} (keys: {', '.join(KEYS)})")
    for key in _REQUIRED:
        if key not in data:
            hint = f"; this release reads version {VERSION}" if key == "version" else ""
            yield Problem("", f"the recipe needs {key!r}{hint}")
    version = data.get("version", VERSION)
    if version != VERSION or type(version) is not int:
        newer = "; a newer titans-build wrote it" if _is_count(version) and version > VERSION else ""
        yield Problem("version", f"expected {VERSION}, got {show(version)}{newer}")
    if "dim" in data and not _is_count(data["dim"], MAX_DIM):
        yield Problem("dim", f"expected an integer from 1 to {MAX_DIM}, got {show(data['dim'])}")
    vocab, tie = data.get("vocab"), data.get("tie", False)
    if vocab is not None and not _is_count(vocab, MAX_VOCAB):
        yield Problem("vocab", f"expected an integer from 1 to {MAX_VOCAB} or null, got {show(vocab)}")
    if not isinstance(tie, bool):
        yield Problem("tie", f"expected true or false, got {show(tie)}")
    elif tie and vocab is None:
        yield Problem("tie", "there is no embedding to tie the head to: the recipe gives no vocab")
    name = data.get("name")
    if name is not None and not (isinstance(name, str) and 0 < len(name) <= 200 and name.isprintable()):
        yield Problem("name", f"expected a line of text, got {show(name)}")


def _imports(modules: Any, allowed: bool) -> Iterator[Problem]:
    if not isinstance(modules, list):
        yield Problem("imports", f"expected a list of modules, got {show(modules)}")
        return
    sound = True
    for index, module in enumerate(modules):
        if not isinstance(module, str) or not re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", module):
            sound = False
            yield Problem(f"imports.{index}", f"expected the name of a module, got {show(module)}")
    if sound and modules and not allowed:
        yield Problem(
            "imports",
            f"the recipe asks to import {_some(modules)}, which runs that code; "
            "allow it with allow_imports=True (--allow-imports on the command line)",
        )
    elif sound:
        for index, module in enumerate(modules):
            try:
                importlib.import_module(module)
            except Exception as error:  # any error of the user's module
                first = str(error).partition("\n")[0]
                yield Problem(f"imports.{index}", f"cannot import {module}: {type(error).__name__}: {first}")


def _layers(layers: Any, checker: Checker, sizes: dict[str, int]) -> dict[str, Any] | None:
    """The layers with all blocks in full form. ``None`` if the names of the layers are unknown.

    Stores the number of blocks of each layer in ``sizes``.
    """

    def refuse(path: str, message: str) -> None:
        checker.problems.append(Problem(path, message))

    if not isinstance(layers, dict) or not layers:
        refuse("layers", f"expected a mapping of layer names to lists of blocks, got {show(layers)}")
        return None
    checked: dict[str, Any] = {}
    for name, blocks in layers.items():
        path = join("layers", name)
        if not _NAME.fullmatch(name):
            refuse(path, "a layer's name starts with a letter and has only letters, digits, _ and -")
        if not isinstance(blocks, list) or not blocks:
            refuse(path, f"expected a list of blocks, got {show(blocks)}")
            checked[name] = []
        else:
            before = checker.blocks
            checked[name] = [checker.check(block, join(path, index)) for index, block in enumerate(blocks)]
            sizes[name] = checker.blocks - before
    return checked


def _stack(stack: Any, layers: dict[str, Any] | None, sizes: dict[str, int]) -> list[Problem]:
    """Check the stack. ``layers``: ``None`` if their names are unknown; no layer is then reported as unknown."""
    problems: list[Problem] = []
    used: set[str] = set()
    unread = False  # whether an invalid part may have named any layer

    def refuse(path: str, message: str) -> None:
        problems.append(Problem(path, message))

    def count(items: Any, path: str) -> tuple[int, int]:
        """Numbers of layers and of blocks in ``items``, with repeats expanded."""
        nonlocal unread
        if not isinstance(items, list) or not items:
            unread = True
            refuse(path, f"expected a list of layer names and {{repeat: n, of: [...]}}, got {show(items)}")
            return 0, 0
        total = blocks = 0
        for index, item in enumerate(items):
            place = join(path, index)
            if len(problems) >= MAX_PROBLEMS:
                unread = True
                break
            if isinstance(item, str):
                total += 1
                blocks += sizes.get(item, 0)
                used.add(item)
                if layers is not None and item not in layers:
                    refuse(place, f"unknown layer {show(item)}{nearest(item, layers)} (layers: {_some(layers)})")
            elif isinstance(item, dict) and ("repeat" in item or "of" in item):
                for key in item.keys() - {"repeat", "of"}:
                    refuse(join(place, key), "unknown key (keys: repeat, of)")
                repeat = item.get("repeat")
                if not _is_count(repeat):
                    refuse(join(place, "repeat"), f"expected an integer >= 1, got {show(repeat)}")
                inner = count(item.get("of"), join(place, "of"))
                total += (repeat if isinstance(repeat, int) else 1) * inner[0]
                blocks += (repeat if isinstance(repeat, int) else 1) * inner[1]
            else:
                unread = True
                refuse(place, f"expected a layer's name or {{repeat: n, of: [...]}}, got {show(item)}")
        return total, blocks

    total, blocks = count(stack, "stack")
    if blocks > MAX_BUILT:
        refuse("stack", f"{show(blocks)} blocks with repeats expanded; at most {MAX_BUILT} are allowed")
    if total > MAX_LAYERS:
        refuse("stack", f"{show(total)} layers with repeats expanded; at most {MAX_LAYERS} are allowed")
    if not unread:
        for name in layers or ():
            if name not in used:
                refuse(
                    join("layers", name), f"the layer is not in the stack (in it: {_some(used)}); use it or remove it"
                )
    return problems


def _expand(stack: list[Any]) -> Iterator[str]:
    for item in stack:
        if isinstance(item, str):
            yield item
        else:
            for _ in range(item["repeat"]):
                yield from _expand(item["of"])


def _some(names: Any) -> str:
    shown = sorted(names)[:8]
    return ", ".join(show(name, 30).strip("'") for name in shown) + (", ..." if len(names) > 8 else "")


def _is_count(value: Any, limit: int | None = None) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1 and (limit is None or value <= limit)
