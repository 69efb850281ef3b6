"""Recipe text to plain data: strict, bounded, and never running anything.

YAML is read event by event rather than by PyYAML's constructors. That gives the YAML 1.2 meaning of scalars
(``1e-3`` is a number, ``no`` and ``on`` are text), lets every limit act before anything is built, and reports all
duplicate keys, tags and bad numbers of a file at once.
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
"""Values in one file, each use of an alias counted in full."""
MAX_DEPTH = 64
MAX_DIGITS = 30

_INTEGER = re.compile(r"[-+]?[0-9]+|0x[0-9a-fA-F]+|0o[0-7]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_WORDS: dict[str, Any] = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL")),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
}


def read_file(path: str | os.PathLike[str]) -> Any:
    """Plain data from a YAML or JSON file. Raises ``RecipeError`` naming the file."""
    source = str(path)
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise _fail(source, "not a regular file")
        with open(path, "rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except (FileNotFoundError, NotADirectoryError):
        raise _fail(source, "no such file") from None
    except (OSError, ValueError) as error:
        if isinstance(error, RecipeError):
            raise
        raise _fail(source, f"cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if len(raw) > MAX_BYTES:
        raise _fail(source, f"larger than {MAX_BYTES // 1024} KiB: not a recipe")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise _fail(source, f"not UTF-8 text: byte {raw[error.start]:#04x} at offset {error.start}") from None
    return read_text(text, source)


def read_text(text: str, source: str = "recipe") -> Any:
    """Plain data from YAML or JSON text. Raises ``RecipeError`` with all problems of the text."""
    if len(text) > MAX_BYTES:
        raise _fail(source, f"larger than {MAX_BYTES // 1024} KiB: not a recipe")
    try:
        if text.lstrip().startswith("{"):
            # most JSON is YAML, but not all of it: tabs, escapes
            try:
                return plain(json.loads(text, object_pairs_hook=_Pairs, parse_int=_integer), source)
            except json.JSONDecodeError:
                pass
        return plain(_Reader(text).document(), source)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        what = ", ".join(part for part in (error.context, error.problem) if part)
        raise _fail(source, f"not valid YAML: {where}{what}") from None
    except yaml.reader.ReaderError as error:
        raise _fail(source, f"not text: character {error.character:#04x} at offset {error.position}") from None
    except _Refused as error:
        raise RecipeError(error.problems, source) from None
    except RecursionError:
        raise _fail(source, f"nested more than {MAX_DEPTH} deep") from None
    except (yaml.YAMLError, ValueError) as error:
        if isinstance(error, RecipeError):
            raise
        raise _fail(source, f"not valid YAML: {error}") from None


def read_value(text: str) -> Any:
    """One value as it would stand in a recipe: ``read_value("256")`` is 256, ``"[a, b]"`` a list, ``""`` is null."""
    return None if not text.strip() else read_text(text, "value")


def plain(data: Any, source: str = "recipe") -> Any:
    """A deep copy of ``data`` made of mappings with text keys, lists, text, finite numbers, booleans and null.

    Raises ``RecipeError`` with all that is something else, too large, too deep or too much.
    """
    problems: list[Problem] = []
    count = 0

    def copy(value: Any, path: str, depth: int) -> Any:
        nonlocal count
        count += 1
        if count > MAX_NODES:
            raise _fail(source, f"more than {MAX_NODES} values: not a recipe")
        if depth > MAX_DEPTH:
            raise _fail(source, f"nested more than {MAX_DEPTH} deep")
        if isinstance(value, _Pairs):
            for key in value.repeated:
                problems.append(Problem(join(path, key), "the key is given twice"))
        if isinstance(value, dict):
            for key in value:
                if not isinstance(key, str):
                    problems.append(Problem(path, f"expected keys to be text, got {show(key)}"))
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


class _Refused(Exception):
    def __init__(self, problems: list[Problem]) -> None:
        self.problems = problems


class _Pairs(dict[Any, Any]):
    """A JSON object that remembers which of its keys were given more than once."""

    def __init__(self, pairs: list[tuple[str, Any]]) -> None:
        super().__init__(pairs)
        seen: set[str] = set()
        self.repeated = [key for key, _ in pairs if key in seen or seen.add(key)]  # type: ignore[func-returns-value]


class _TooLong(str):
    """An integer in JSON text with more digits than any number of a recipe."""


def _integer(text: str) -> int | str:
    # Python itself refuses thousands of digits, in words of its own
    return int(text) if len(text) <= MAX_DIGITS else _TooLong(text)


class _Reader:
    """Builds one document from YAML events, keeping count of what it costs."""

    def __init__(self, text: str) -> None:
        self._events: Iterator[yaml.Event] = yaml.parse(text, Loader=yaml.SafeLoader)
        self._problems: list[Problem] = []
        self._anchors: dict[str, tuple[Any, int]] = {}
        self._nodes = 0

    def document(self) -> Any:
        next(self._events)  # stream start
        if isinstance(next(self._events), yaml.StreamEndEvent):
            raise _Refused([Problem("", "empty: expected a recipe")])
        data = self._node(next(self._events), "", 0)
        next(self._events)  # document end
        if not isinstance(next(self._events), yaml.StreamEndEvent):
            raise _Refused([Problem("", "more than one document: expected a single recipe")])
        if self._problems:
            raise _Refused(self._problems)
        return data

    def _node(self, event: yaml.Event, path: str, depth: int) -> Any:
        if depth > MAX_DEPTH:
            raise _Refused([Problem("", f"nested more than {MAX_DEPTH} deep")])
        if isinstance(event, yaml.AliasEvent):
            return self._alias(event, path)
        assert isinstance(event, yaml.NodeEvent)
        before = self._nodes
        self._spend(1)
        # the anchor is known from here on, so that a node that holds itself is told from an unknown one
        if event.anchor is not None:
            self._anchors[event.anchor] = (_UNFINISHED, 0)
        if event.tag is not None:  # type: ignore[attr-defined]
            self._problems.append(Problem(path, f"tags are not allowed, got {show(event.tag)}"))  # type: ignore[attr-defined]
        value: Any
        if isinstance(event, yaml.ScalarEvent):
            value = self._scalar(event, path)
        elif isinstance(event, yaml.SequenceStartEvent):
            value = []
            while not isinstance(item := next(self._events), yaml.SequenceEndEvent):
                value.append(self._node(item, join(path, len(value)), depth + 1))
        else:
            value = self._mapping(path, depth)
        if event.anchor is not None:
            self._anchors[event.anchor] = (value, self._nodes - before)
        return value

    def _mapping(self, path: str, depth: int) -> dict[str, Any]:
        value: dict[str, Any] = {}
        lines: dict[str, int] = {}
        while not isinstance(event := next(self._events), yaml.MappingEndEvent):
            line = event.start_mark.line + 1  # type: ignore[union-attr] # events from text have their marks
            key = self._node(event, path, depth + 1)
            if not isinstance(key, str):
                self._problems.append(Problem(path, f"line {line}: expected keys to be text, got {show(key)}"))
                key = show(key)
            elif key == "<<":
                self._problems.append(Problem(path, f"line {line}: merge keys (<<) are not part of a recipe"))
            elif key in lines:
                self._problems.append(
                    Problem(join(path, key), f"the key is given twice, on lines {lines[key]} and {line}")
                )
            lines[key] = line
            value[key] = self._node(next(self._events), join(path, key), depth + 1)
        return value

    def _alias(self, event: yaml.AliasEvent, path: str) -> Any:
        if event.anchor not in self._anchors:
            raise _Refused([Problem(path, f"unknown alias *{show(event.anchor)}")])
        value, nodes = self._anchors[event.anchor]
        if value is _UNFINISHED:
            raise _Refused([Problem(path, f"the alias *{event.anchor} stands inside what it names")])
        self._spend(nodes)
        return value

    def _scalar(self, event: yaml.ScalarEvent, path: str) -> Any:
        text = event.value
        if not event.implicit[0]:  # quoted, or a block of text
            return text
        if text in _WORDS:
            return _WORDS[text]
        if _INTEGER.fullmatch(text):
            if len(text) > MAX_DIGITS:
                self._problems.append(Problem(path, f"an integer of {len(text)} digits is too large for a recipe"))
                return 0
            return int(text, 0) if text[:2] in ("0x", "0o") else int(text)
        if _FLOAT.fullmatch(text):
            return float(
                text.replace(".inf", "inf").replace(".Inf", "inf").replace(".INF", "inf").lower().replace(".nan", "nan")
            )
        return text

    def _spend(self, nodes: int) -> None:
        self._nodes += nodes
        if self._nodes > MAX_NODES:
            raise _Refused([Problem("", f"more than {MAX_NODES} values, aliases counted in full: not a recipe")])


_UNFINISHED = object()


class _Dumper(yaml.SafeDumper):
    """Quotes what only YAML 1.2 takes for a number, and writes no aliases."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


for _pattern in (_INTEGER, _FLOAT):
    _Dumper.add_implicit_resolver(
        "tag:yaml.org,2002:str-like-number", re.compile(f"^(?:{_pattern.pattern})$"), list("-+.0123456789")
    )


def _fail(source: str, message: str) -> RecipeError:
    return RecipeError([Problem("", message)], source)


def is_recipe_file(path: Path) -> bool:
    """Whether a file name says that it is a recipe."""
    return path.suffix.lower() in (".yaml", ".yml", ".json")
