"""Catalogues of classes by name, filled by ``@register`` and by the entry points of installed packages."""

from __future__ import annotations

import contextlib
import fnmatch
import functools
import importlib.metadata
import inspect
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

from .errors import Problem, RecipeError, nearest, show
from .schema import Field, fields_of

ENTRY_POINT_GROUP = "titans_build.blocks"
NAME_RULE = "a name starts with a letter and has only letters, digits, _ and -, at most 100"

Class = TypeVar("Class", bound=type)


@dataclass(frozen=True)
class Entry:
    """A registered class."""

    name: str
    cls: type
    fields: dict[str, Field]
    place: str
    """``file:line`` of the class."""
    source: str
    """The package it comes from: ``titans_build``, or the one that registered it."""
    number: int
    """1 for the first class of this name, more for those that were registered later."""

    @property
    def summary(self) -> str:
        """First line of the class's docstring."""
        return (inspect.getdoc(self.cls) or "").strip().partition("\n")[0]


@dataclass(frozen=True)
class Row:
    """One line of a listing. ``problem`` is the reason why an installed class cannot be used."""

    name: str
    source: str
    summary: str
    problem: str | None


class Catalogue:
    """The registered classes of one kind, such as blocks or tasks.

    Args:
        kind: the word for one of them in messages (``block``).
        group: the entry point group of packages that provide more.
        methods: the methods that a class must have.
        base: the class of which it must be a subclass, without abstract methods.
        lead: the first parameter of the constructor, which is not a field; ``None`` if every parameter is a field.
    """

    def __init__(
        self, kind: str, group: str, *, methods: tuple[str, ...] = (), base: type = object, lead: str | None
    ) -> None:
        self.kind, self.group, self.methods, self.base, self.lead = kind, group, methods, base, lead
        self._entries: dict[str, Entry] = {}
        self._numbers = Counter[str]()
        self._broken: dict[str, str] = {}  # entry points that were tried and failed: the import is not repeated
        self._loading: str | None = None  # the entry point being imported just now

    def register(self, name: str, *, replace: bool = False) -> Callable[[Class], Class]:
        """Register a class under a name. The signature of its constructor is its schema.

        Raises ``ValueError`` if the name is taken and ``replace`` is false, and ``TypeError`` if the class lacks a
        required method or its signature is not a valid schema.
        """
        if not is_name(name):
            raise ValueError(f"register({show(name)}): {NAME_RULE}")

        def add(cls: Class) -> Class:
            if not (isinstance(cls, type) and issubclass(cls, self.base)):
                raise TypeError(f"register({name!r}): {cls!r} is no {self.kind}: it is no subclass of "
                                f"{self.base.__name__}")  # fmt: skip
            missing = [method for method in self.methods if not callable(getattr(cls, method, None))]
            missing += sorted(getattr(cls, "__abstractmethods__", ()) if self.base is not object else ())
            if missing:
                raise TypeError(f"register({name!r}): {cls!r} is no {self.kind}: it has no {' and no '.join(missing)}")
            source, number = cls.__module__.partition(".")[0], self._numbers[name] + 1
            entry = Entry(name, cls, fields_of(cls, self.lead), self._place(cls), source, number)
            taken = self._entries.get(name)
            if taken is not None and not replace:
                raise ValueError(
                    f"the {self.kind} name {name!r} is taken by {taken.cls.__qualname__} ({taken.place}); "
                    f"{cls.__qualname__} ({entry.place}) needs another name, or replace=True to take its place"
                )
            if taken is not None and self._loading is not None and _is_built_in(taken):
                raise ValueError(
                    f"the installed {self.kind} {self._loading!r} may not replace the built-in {name!r} ({taken.place})"
                )
            if self._loading is not None:
                self._refuse_anothers(name, self._loading)
            self._entries[name], self._numbers[name] = entry, number
            return cls

        return add

    def lookup(self, name: str) -> Entry:
        """Return the entry of a name. Imports the installed package that provides it if necessary.

        Raises ``RecipeError`` for an unknown name and for a package that cannot be imported.
        """
        if name in self._entries:
            return self._entries[name]
        points = self._entry_points().get(name)
        if points is None:
            names = self.known_names()
            near = nearest(name, names) or (f"; expected one of {', '.join(names)}" if len(names) <= 12 else "")
            raise RecipeError([Problem("", f"unknown {self.kind} {show(name)}{near}")], self.kind)
        if name not in self._broken:
            try:
                self._load(name, points)
            # an installed package may raise anything when it is imported, SystemExit included
            except (Exception, SystemExit) as error:
                self._broken[name] = (
                    f"the installed {self.kind} {name!r} ({_origin(points)}) cannot be used: {_first_line(error)}"
                )
        if name in self._broken:
            raise RecipeError([Problem("", self._broken[name])], self.kind)
        return self._entries[name]

    def known_names(self) -> list[str]:
        """All usable names in natural order (``block2`` before ``block10``). Nothing is imported."""
        return sorted({*self._entries, *self._entry_points()}, key=_natural)

    def names(self, pattern: str = "*") -> list[str]:
        """Names that match a wildcard pattern. Installed packages are not imported."""
        if not isinstance(pattern, str):
            raise TypeError(f"pattern: expected text with wildcards such as '*mem*', got {show(pattern)}")
        return [name for name in self.known_names() if fnmatch.fnmatchcase(name, pattern)]

    def rows(self, pattern: str = "*") -> list[Row]:
        """The names that match, with summaries, or with the reason why an installed class cannot be used."""
        rows = []
        for name in self.names(pattern):
            try:
                entry = self.lookup(name)
            except RecipeError as error:
                rows.append(Row(name, _origin(self._entry_points()[name]), "", error.problems[0].message))
            else:
                rows.append(Row(name, entry.source, entry.summary, None))
                shadowed = self._entry_points().get(name)
                if shadowed is not None and _is_built_in(entry):
                    rows.append(Row(name, _origin(shadowed), "", f"ignored: {name!r} is built in"))
        return rows

    @contextlib.contextmanager
    def scratch(self) -> Iterator[None]:
        """Undo, at the end of the ``with`` block, all registrations made inside it. For tests and notebooks.

        Built-in classes that are imported for the first time inside the block stay: they are not registered again.
        """
        entries, broken = dict(self._entries), dict(self._broken)
        try:
            yield
        finally:
            built_in = {name: entry for name, entry in self._entries.items() if _is_built_in(entry)}
            self._entries, self._broken = {**built_in, **entries}, broken

    def _load(self, name: str, points: list[importlib.metadata.EntryPoint]) -> None:
        if len(points) > 1:
            raise ImportError("several installed packages provide this name")
        before, outer, self._loading = dict(self._entries), self._loading, name
        try:
            target: Any = points[0].load()
            if name not in self._entries:
                if not isinstance(target, type):
                    raise ImportError(f"{points[0].value} registers no {self.kind} of that name")
                self.register(name)(target)
        except BaseException:
            # a half-imported package leaves nothing behind
            self._entries = before
            raise
        finally:
            self._loading = outer

    def _refuse_anothers(self, name: str, loading: str) -> None:
        """Raise if the package that is being imported registers a name that another installed package provides."""
        points = self._entry_points()
        mine = {point.dist.name for point in points[loading] if point.dist is not None}
        others = [point for point in points.get(name, ()) if point.dist is not None and point.dist.name not in mine]
        if others:
            raise ValueError(f"the {self.kind} name {name!r} is that of the installed package {_origin(others)}")

    def _entry_points(self) -> dict[str, list[importlib.metadata.EntryPoint]]:
        return _scan(self.group, tuple(sys.path))

    def _place(self, cls: type) -> str:
        for name in ("__init__", *self.methods[:1]):
            code = getattr(inspect.unwrap(vars(cls).get(name) or type), "__code__", None)
            if code is not None and code.co_filename != "<string>":  # a dataclass's constructor is in no file
                return f"{code.co_filename}:{code.co_firstlineno}"
        return f"module {cls.__module__}"


BLOCKS = Catalogue("block", ENTRY_POINT_GROUP, methods=("forward", "init_state"), lead="dim")
"""The block types."""


def register(name: str, *, replace: bool = False) -> Callable[[Class], Class]:
    """Register a block class, to be used in recipes as ``type: name``. The constructor's signature is its schema.

    The constructor takes ``dim`` first and annotated keyword fields after it: ``depth: Annotated[int,
    Field(ge=1, description="layers of the memory")] = 2``. A field annotated ``Spec`` holds another block.

    A class method ``problems(dim, fields)`` may yield ``(field, message)`` for conditions on several values, such as
    heads that do not divide the width. ``dim`` is ``None`` if the width is not known.

    A class attribute ``variant_of = "memory"`` says that the class is that block with other defaults. Pages list these
    alone.

    A class attribute ``delegates = ("of",)`` lists the fields whose blocks must have the methods that an enclosing
    block ``Needs`` of this one. A wrapper uses it to pass ``read`` and ``write`` on to the wrapped block.

    Raises ``ValueError`` if the name is taken and ``replace`` is false, and ``TypeError`` if the class is not a block
    or its signature is not a valid schema.
    """
    return BLOCKS.register(name, replace=replace)


def lookup(name: str) -> Entry:
    """The block type of a name; ``Catalogue.lookup``."""
    return BLOCKS.lookup(name)


def known_names() -> list[str]:
    """All usable block names; see ``Catalogue.known_names``."""
    return BLOCKS.known_names()


def list_blocks(pattern: str = "*") -> list[str]:
    """Names that match a wildcard pattern: ``list_blocks("*mem*")``. Installed packages are not imported."""
    return BLOCKS.names(pattern)


def list_rows(pattern: str = "*") -> list[Row]:
    """The blocks that match, with summaries; see ``Catalogue.rows``."""
    return BLOCKS.rows(pattern)


def scratch() -> contextlib.AbstractContextManager[None]:
    """Undo, at the end of the ``with`` block, all registrations of blocks inside it. For tests and notebooks."""
    return BLOCKS.scratch()


def is_name(name: Any) -> bool:
    """Whether ``name`` is a valid name (``NAME_RULE``)."""
    return isinstance(name, str) and re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]{0,99}", name) is not None


@functools.lru_cache(maxsize=8)
def _scan(group: str, search_path: tuple[str, ...]) -> dict[str, list[importlib.metadata.EntryPoint]]:
    # reading the metadata of every installed package takes tens of milliseconds: once per search path
    found: dict[str, list[importlib.metadata.EntryPoint]] = {}
    for point in importlib.metadata.entry_points(group=group):
        same = found.setdefault(point.name, [])
        if point not in same:  # an editable install may be listed twice
            same.append(point)
    return found


def _origin(points: list[importlib.metadata.EntryPoint]) -> str:
    return ", ".join(point.dist.name if point.dist is not None else point.value for point in points)


def _is_built_in(entry: Entry) -> bool:
    return entry.source == __name__.partition(".")[0]


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".partition("\n")[0]


def _natural(name: str) -> list[tuple[int, int | str]]:
    return [(0, int(part)) if part.isdigit() else (1, part) for part in re.findall(r"[0-9]+|[^0-9]+", name)]


PROTOCOLS = {"memory": ("read", "write")}
"""Protocols beyond ``forward`` and ``init_state``, with their methods."""


@dataclass(frozen=True)
class FieldDescription:
    """One field of a block type."""

    name: str
    type: str
    required: bool
    default: Any
    """``None`` when the field is required."""
    description: str
    keeps_weights: bool
    """Whether it may change while the weights of a model are kept."""


@dataclass(frozen=True)
class Description:
    """The description of a block type."""

    name: str
    summary: str
    doc: str
    source: str
    """The package it comes from."""
    place: str
    """``file:line`` of the class."""
    fields: list[FieldDescription]
    variant_of: str | None
    """The block of which this one is a variant, with other defaults."""
    protocols: list[str]
    """``["memory"]`` if the block has ``read`` and ``write`` of its own."""


def describe(name: str, catalogue: Catalogue = BLOCKS) -> Description:
    """Describe a registered block, or a class of another catalogue. Raises ``RecipeError`` for an unknown name."""
    entry = catalogue.lookup(name)
    return Description(
        name=entry.name,
        summary=entry.summary,
        doc=inspect.getdoc(entry.cls) or "",
        source=entry.source,
        place=entry.place,
        fields=[_describe(field) for field in entry.fields.values()],
        variant_of=getattr(entry.cls, "variant_of", None),
        protocols=[
            protocol
            for protocol, methods in PROTOCOLS.items()
            if all(callable(getattr(entry.cls, method, None)) for method in methods)
            and not getattr(entry.cls, "delegates", ())
        ],
    )


def _describe(field: Field) -> FieldDescription:
    default = None if field.required else field.default
    return FieldDescription(
        field.name, field.type_text, field.required, default, field.description, field.keeps_weights
    )
