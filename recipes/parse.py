"""Reads YAML and JSON text into plain data, within limits and without running code from the text.

YAML is read from PyYAML's events, not with its constructors, so that scalars have the meaning of YAML 1.2 (``1e-3`` is
a number, ``no`` and ``on`` are text), and so that all duplicate keys, tags and bad numbers are reported at once.
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from ..registry import MAX_INTEGER, Problem, RecipeError, join, show

MAX_BYTES = 128 * 1024
MAX_NODES = 20_000
"""Values in one file. Each use of an alias counts in full."""
MAX_DEPTH = 64
MAX_DIGITS = 30

_INTEGER = re.compile(r"[-+]?[0-9]+|0x[0-9a-fA-F]+|0o[0-7]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_WORDS: dict[str, Any] = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL")),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
}


def recipe_error(source: str, message: str) -> RecipeError:
    """A ``RecipeError`` about ``source`` as a whole."""
    return RecipeError([Problem("", message)], source)


def is_recipe_file(path: Path) -> bool:
    """Whether the suffix of a file name is that of YAML or JSON."""
    return path.suffix.lower() in (".yaml", ".yml", ".json")


def read_file(path: str | os.PathLike[str]) -> Any:
    """Read plain data from a YAML or JSON file. Raises ``RecipeError`` naming the file."""
    source = str(path)
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise recipe_error(source, "not a regular file")
        with open(path, "rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except RecipeError:
        raise
    except (FileNotFoundError, NotADirectoryError):
        raise recipe_error(source, "no such file") from None
    except (OSError, ValueError) as error:
        raise recipe_error(source, f"cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if len(raw) > MAX_BYTES:
        raise recipe_error(source, f"larger than {MAX_BYTES // 1024} KiB: not a recipe")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise recipe_error(source, f"not UTF-8 text: byte {raw[error.start]:#04x} at offset {error.start}") from None
    return read_text(text, source)


def read_text(text: str, source: str = "recipe") -> Any:
    """Read plain data from YAML or JSON text. Raises ``RecipeError`` with all problems of the text."""
    if len(text) > MAX_BYTES:
        raise recipe_error(source, f"larger than {MAX_BYTES // 1024} KiB: not a recipe")
    try:
        if text.lstrip().startswith("{"):
            # most JSON is YAML, but not all of it: tabs, escapes
            try:
                return plain(json.loads(text, object_pairs_hook=_Pairs, parse_int=_integer), source)
            except json.JSONDecodeError:
                pass
        reader = _Reader(text, source)
        return _plain(reader.document(), source, reader.problems)
    except RecipeError:
        raise
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        what = ", ".join(part for part in (error.context, error.problem) if part)
        raise recipe_error(source, f"not valid YAML: {where}{what}") from None
    except yaml.reader.ReaderError as error:
        raise recipe_error(source, f"not text: character {error.character:#04x} at offset {error.position}") from None
    except RecursionError:
        raise recipe_error(source, f"nested more than {MAX_DEPTH} deep") from None
    except (yaml.YAMLError, ValueError) as error:
        raise recipe_error(source, f"not valid YAML: {error}") from None


def read_value(text: str) -> Any:
    """Read one value of a recipe: ``read_value("256")`` is 256, ``"[a, b]"`` is a list, ``""`` is null."""
    return None if not text.strip() else read_text(text, "value")


def plain(data: Any, source: str = "recipe") -> Any:
    """Copy ``data``, which may contain mappings with text keys, lists, text, finite numbers, booleans and null.

    Raises ``RecipeError`` with everything else it contains, or if it is too large or nested too deeply.
    """
    return _plain(data, source, [])


def _plain(data: Any, source: str, problems: list[Problem]) -> Any:
    count = 0

    def copy(value: Any, path: str, depth: int) -> Any:
        nonlocal count
        count += 1
        if count > MAX_NODES:
            raise recipe_error(source, f"more than {MAX_NODES} values, aliases counted in full: not a recipe")
        if depth > MAX_DEPTH:
            raise recipe_error(source, f"nested more than {MAX_DEPTH} deep")
        if isinstance(value, _Pairs):
            problems.extend(Problem(join(path, key), "the key is given twice") for key in value.repeated)
        if isinstance(value, dict):
            problems.extend(
                Problem(path, f"expected keys to be text, got {show(key)}") for key in value if not isinstance(key, str)
            )
            return {key: copy(item, join(path, key), depth + 1) for key, item in value.items() if isinstance(key, str)}
        if isinstance(value, (list, tuple)):
            return [copy(item, join(path, index), depth + 1) for index, item in enumerate(value)]
        if isinstance(value, _TooLong):
            problems.append(Problem(path, f"an integer of {len(value)} digits is too large for a recipe"))
        elif isinstance(value, int) and abs(value) > MAX_INTEGER:
            problems.append(Problem(path, f"{show(value)} is too large for any number in a recipe"))
        elif isinstance(value, float) and not math.isfinite(value):
            problems.append(Problem(path, f"expected a finite number, got {value}"))
        elif type(value) not in (str, int, float, bool, type(None)):
            problems.append(Problem(path, f"expected plain data (text, number, list, mapping), got {show(value)}"))
        return value

    copied = copy(data, "", 0)
    if problems:
        raise RecipeError(problems, source)
    return copied


def write_yaml(data: Any) -> str:
    """YAML text that reads back as ``data``."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, default_flow_style=None, width=110, allow_unicode=True)


class _Pairs(dict[Any, Any]):
    """A JSON object that records which of its keys were given more than once."""

    def __init__(self, pairs: list[tuple[str, Any]]) -> None:
        super().__init__(pairs)
        seen: set[str] = set()
        self.repeated = [key for key, _ in pairs if key in seen or seen.add(key)]  # type: ignore[func-returns-value]


class _TooLong(str):
    """The digits of an integer that is too long to convert."""


def _integer(text: str) -> int | str:
    # Python refuses thousands of digits, with a message of its own
    if len(text) > MAX_DIGITS:
        return _TooLong(text)
    return int(text, 0) if text[:2] in ("0x", "0o") else int(text)


_UNFINISHED = object()
"""The value of an anchor while the value it names is being read."""


class _Reader:
    """Builds the data of one document from YAML events. Problems that do not prevent this are collected."""

    def __init__(self, text: str, source: str) -> None:
        self.problems: list[Problem] = []
        self._source = source
        self._events: Iterator[Any] = yaml.parse(text, Loader=yaml.SafeLoader)
        self._anchors: dict[str | None, Any] = {}

    def document(self) -> Any:
        next(self._events)  # stream start
        if isinstance(next(self._events), yaml.StreamEndEvent):
            raise recipe_error(self._source, "empty: expected a recipe")
        data = self._node(next(self._events), "", 0)
        next(self._events)  # document end
        if not isinstance(next(self._events), yaml.StreamEndEvent):
            raise recipe_error(self._source, "more than one document: expected a single recipe")
        return data

    def _node(self, event: Any, path: str, depth: int) -> Any:
        if depth > MAX_DEPTH:  # here too: PyYAML takes quadratic time
            raise recipe_error(self._source, f"nested more than {MAX_DEPTH} deep")
        if isinstance(event, yaml.AliasEvent):
            return self._alias(event.anchor, path)
        if event.anchor is not None:
            self._anchors[event.anchor] = _UNFINISHED
        if event.tag is not None:
            self.problems.append(Problem(path, f"tags are not allowed, got {show(event.tag)}"))
        value: Any
        if isinstance(event, yaml.ScalarEvent):
            value = _scalar(event.value) if event.implicit[0] else event.value  # not implicit: quoted, a block of text
        elif isinstance(event, yaml.SequenceStartEvent):
            value = []
            while not isinstance(item := next(self._events), yaml.SequenceEndEvent):
                value.append(self._node(item, join(path, len(value)), depth + 1))
        else:
            value = self._mapping(path, depth)
        if event.anchor is not None:
            self._anchors[event.anchor] = value
        return value

    def _mapping(self, path: str, depth: int) -> dict[str, Any]:
        value: dict[str, Any] = {}
        lines: dict[str, int] = {}
        while not isinstance(event := next(self._events), yaml.MappingEndEvent):
            line = event.start_mark.line + 1
            key = self._node(event, path, depth + 1)
            if not isinstance(key, str):
                self.problems.append(Problem(path, f"line {line}: expected keys to be text, got {show(key)}"))
                key = show(key)
            elif key == "<<":
                self.problems.append(Problem(path, f"line {line}: merge keys (<<) are not part of a recipe"))
            elif key in lines:
                twice = f"the key is given twice, on lines {lines[key]} and {line}"
                self.problems.append(Problem(join(path, key), twice))
            lines[key] = line
            value[key] = self._node(next(self._events), join(path, key), depth + 1)
        return value

    def _alias(self, name: str | None, path: str) -> Any:
        if name not in self._anchors:
            raise RecipeError([Problem(path, f"unknown alias *{show(name)}")], self._source)
        if self._anchors[name] is _UNFINISHED:
            raise RecipeError([Problem(path, f"the alias *{name} is inside the value that it names")], self._source)
        return self._anchors[name]


def _scalar(text: str) -> Any:
    if text in _WORDS:
        return _WORDS[text]
    if _INTEGER.fullmatch(text):
        return _integer(text)
    if _FLOAT.fullmatch(text):
        lower = text.lower()
        return float(lower.replace(".inf", "inf").replace(".nan", "nan"))
    return text


class _Dumper(yaml.SafeDumper):
    """Quotes text that YAML 1.2 reads as a number, and writes no aliases."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


for _pattern in (_INTEGER, _FLOAT):
    _Dumper.add_implicit_resolver(
        "tag:yaml.org,2002:str-like-number", re.compile(f"^(?:{_pattern.pattern})$"), list("-+.0123456789")
    )
