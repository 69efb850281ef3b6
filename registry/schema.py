"""The schema of a block, read from the signature of its constructor: fields, types, defaults and descriptions."""

from __future__ import annotations

import inspect
import json
import re
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, Literal, TypeAlias, Union

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.errors import PydanticSchemaGenerationError, PydanticUndefinedAnnotation
from pydantic.fields import FieldInfo

from .errors import Problem, join, nearest, show


class Needs:
    """Requires methods of the block in a field: ``Annotated[Spec, Needs("read", "write")]``."""

    def __init__(self, *methods: str) -> None:
        self.methods = methods

    def missing(self, cls: Any) -> list[str]:
        """The required methods that ``cls`` (a class or an instance) lacks."""
        return [method for method in self.methods if not callable(getattr(cls, method, None))]

    def __repr__(self) -> str:
        return f"Needs({', '.join(map(repr, self.methods))})"


class SameFunction:
    """Marks a field that changes how a block computes, and not what: ``Annotated[int | None, SameFunction()]``.

    Recipes that differ in such fields alone have one fingerprint, and take each other's states.
    """


class SameWeights:
    """Marks a field that may change while the weights are kept: ``Annotated[int, SameWeights()]``.

    A model may be loaded, and a run may go on in another stage, with other values of such fields.
    """


class Added:
    """Marks a field that a later version added. States saved before do not know it, and mean its default."""


class HoldsBlock:
    """Marks an annotation whose value is a block. Used by ``Spec`` only."""

    def __get_pydantic_json_schema__(self, core_schema: Any, handler: Any) -> dict[str, Any]:
        return {BLOCK_PLACEHOLDER: True}


BLOCK_PLACEHOLDER = "x-titans-build-block"
"""Placeholder in the JSON Schema of a field, replaced by the schema of a block."""

Spec: TypeAlias = Annotated[Any, HoldsBlock()]
"""The type of a field that holds a block.

The value is a registered name (``memory``), a mapping ``{type: memory, depth: 2}``, a list of these (short for
``{type: chain, of: [...]}``) or, in Python only, a built block. The constructor creates the block with
``create(field, dim=dim)``. ``list[Spec]`` and ``Spec | None`` are supported.
"""

MAX_INTEGER = 2**63 - 1
"""Larger integers are refused, because no tensor shape can hold them."""

_REQUIRED: Any = inspect.Parameter.empty
_SCALARS = (int, str, bool, type(None))


@dataclass(frozen=True)
class Field:
    """One constructor parameter of a block."""

    name: str
    annotation: Any
    default: Any
    """``Field.REQUIRED`` when the field must be given."""

    REQUIRED = _REQUIRED

    @property
    def required(self) -> bool:
        """Whether the field has no default."""
        return self.default is _REQUIRED

    @cached_property
    def description(self) -> str:
        """The text of ``Field(description=...)`` in the annotation, or an empty string."""
        for item in _metadata(self.annotation):
            if isinstance(item, FieldInfo) and item.description:
                return item.description
        return ""

    @cached_property
    def holds_blocks(self) -> bool:
        """Whether the value of the field may contain blocks."""
        return _mentions_block(self.annotation)

    @cached_property
    def changes_function(self) -> bool:
        """Whether the field is not marked ``SameFunction``."""
        return not any(isinstance(item, SameFunction) for item in _metadata(self.annotation))

    @cached_property
    def keeps_weights(self) -> bool:
        """Whether the field is marked ``SameWeights`` or ``SameFunction``."""
        return any(isinstance(item, (SameWeights, SameFunction)) for item in _metadata(self.annotation))

    @cached_property
    def part(self) -> Any:
        """The ``PartOf`` in the annotation, or ``None``."""
        return next((item for item in _metadata(self.annotation) if hasattr(item, "catalogue")), None)

    @cached_property
    def added(self) -> bool:
        """Whether the field is marked ``Added``."""
        return any(isinstance(item, Added) for item in _metadata(self.annotation))

    @cached_property
    def adapter(self) -> TypeAdapter[Any]:
        """Validates values strictly: no conversions, no NaN, no infinity."""
        return TypeAdapter(self.annotation, config=ConfigDict(strict=True, allow_inf_nan=False))

    @cached_property
    def _accepted(self) -> dict[tuple[type, Any], Any]:
        """The checked values of scalars: a large recipe repeats the same few."""
        return {}

    @cached_property
    def type_text(self) -> str:
        """The type in words: ``integer >= 1``, ``'a' | 'b'``, ``block with read, write``."""
        return describe_type(self.annotation)

    def check(self, value: Any, path: str) -> tuple[Any, list[Problem]]:
        """Return the value in plain JSON form, and its problems. Blocks inside it are not checked."""
        key = (type(value), value) if type(value) in _SCALARS else None
        if key is not None and key in self._accepted:
            return self._accepted[key], []
        too_big = _too_big(value)
        if too_big is not None:
            return value, [Problem(path, f"expected {self.type_text}, got {show(too_big)}")]
        try:
            if self.holds_blocks:
                return self.adapter.validate_python(value), []
            # strict JSON rules, not strict Python rules: a list of two numbers is a good tuple[int, int]
            if not _is_unicode(value):  # the name of a file may be no valid text, which JSON cannot hold
                return self.adapter.validate_python(value, strict=True), []
            checked = json.loads(self.adapter.dump_json(self.adapter.validate_json(json.dumps(value))))
            if key is not None and len(self._accepted) < 1000:
                self._accepted[key] = checked
            return checked, []
        except ValidationError as error:
            return value, self._translate(error, value, path)
        except (TypeError, ValueError, RecursionError):
            return value, [Problem(path, f"expected {self.type_text}, got {show(value)}")]

    def to_python(self, value: Any) -> Any:
        """Convert a checked value to the argument of the constructor (a tuple for ``tuple[int, int]``)."""
        if self.holds_blocks or not _is_unicode(value):
            return value
        return self.adapter.validate_json(json.dumps(value))

    def _translate(self, error: ValidationError, value: Any, path: str) -> list[Problem]:
        details = error.errors(include_url=False, include_context=True)
        if len(details) > 1 and _is_union(self.annotation):
            return [Problem(path, f"expected {self.type_text}, got {show(value)}")]
        if _is_fixed(self.annotation) and any(detail["type"] in _WRONG_LENGTH for detail in details):
            return [Problem(path, f"expected {self.type_text}, got {show(value)}")]
        problems = []
        for detail in details:
            place, got = path, value
            for part in detail["loc"]:
                try:
                    got = got[part]
                except (KeyError, IndexError, TypeError):
                    break
                place = join(place, part)
            problems.append(Problem(place, self._message(detail, got)))
        return problems

    def _message(self, detail: Any, got: Any) -> str:
        text = detail["msg"]
        kind = detail["type"]
        if kind == "literal_error" or kind == "enum":
            choices = re.findall(r"'([^']*)'", str(detail.get("ctx", {}).get("expected", "")))
            return f"expected {detail['ctx']['expected']}, got {show(got)}" + (
                nearest(got, choices) if isinstance(got, str) else ""
            )
        if not detail["loc"] and kind in _DESCRIBED_BY_TYPE:
            return f"expected {self.type_text}, got {show(got)}"
        if text.startswith("Input should be "):
            return f"expected {text.removeprefix('Input should be ')}, got {show(got)}"
        if kind in ("too_short", "too_long"):
            least = kind == "too_short"
            bound = detail["ctx"]["min_length" if least else "max_length"]
            things = "blocks" if self.holds_blocks else "items"
            return f"expected {'at least' if least else 'at most'} {bound} {things}, got {len(got)}"
        text = text.removeprefix("Value error, ")
        text = f"{text[:1].lower()}{text[1:]}"
        # the error of a field inside of the value names it already
        return text if ", got " in text or show(got) in text else f"{text}, got {show(got)}"


def _is_unicode(value: Any) -> bool:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    except (TypeError, ValueError, RecursionError):
        pass  # reported as an invalid value
    return True


_DESCRIBED_BY_TYPE = {
    *("int_type", "int_from_float", "int_parsing", "float_type", "bool_type", "string_type", "list_type"),
    *("greater_than", "greater_than_equal", "less_than", "less_than_equal", "finite_number", "multiple_of"),
}


_WRONG_LENGTH = {"missing", "too_long", "tuple_type"}
"""Errors of pydantic that concern a ``tuple`` as a whole."""


def fields_of(cls: type, lead: str | None = "dim") -> dict[str, Field]:
    """The schema of ``cls``: the parameters of its constructor after ``lead`` (all of them if ``lead`` is ``None``).

    Raises ``TypeError`` if the signature is not a valid schema.
    """
    where = f"{cls.__name__}.__init__"
    constructor = cls.__init__  # type: ignore[misc]
    # the signature of object.__init__ is (*args, **kwargs), but it takes no arguments
    parameters = [] if constructor is object.__init__ else list(inspect.signature(constructor).parameters.values())[1:]
    if lead is not None:
        if not parameters or parameters[0].name != lead:
            got = [p.name for p in parameters[:1]]
            raise TypeError(f"{where}: the first parameter must be {lead}, the width; got {got}")
        parameters = parameters[1:]
    try:
        hints = typing.get_type_hints(constructor, localns={cls.__name__: cls}, include_extras=True)
    except NameError as error:
        raise TypeError(f"{where}: an annotation cannot be read: {error}; its names must be module globals") from None
    fields = {}
    for parameter in parameters:
        name = parameter.name
        if parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL, parameter.POSITIONAL_ONLY):
            raise TypeError(f"{where}: {parameter} hides the schema; name every field as a keyword parameter")
        if name == "type":
            raise TypeError(f"{where}: a field cannot be called 'type', the key of a block's name")
        if name not in hints:
            raise TypeError(f"{where}: {name} has no annotation; every field needs a type, as in `{name}: int = 4`")
        field = Field(name, hints[name], parameter.default)
        try:
            _ = field.adapter
        except (PydanticSchemaGenerationError, PydanticUndefinedAnnotation) as error:
            raise TypeError(f"{where}: {name} has a type no recipe can hold: {error.message.splitlines()[0]}") from None
        fields[name] = field
    return fields


def block_places(annotation: Any, value: Any) -> Iterator[tuple[tuple[str | int, ...], Needs | None]]:
    """Yield the keys that lead to each block in ``value``, and the methods that the block must have."""
    kind, metadata = _strip(annotation)
    if any(isinstance(item, HoldsBlock) for item in metadata):
        methods = [method for item in metadata if isinstance(item, Needs) for method in item.methods]
        yield (), Needs(*methods) if methods else None
    elif _is_union(kind):
        for option in typing.get_args(kind):
            if value is not None and _mentions_block(option):
                yield from block_places(option, value)
                return
    elif typing.get_origin(kind) is list and isinstance(value, list):
        for index, item in enumerate(value):
            for place, needs in block_places(typing.get_args(kind)[0], item):
                yield (index, *place), needs
    elif typing.get_origin(kind) is dict and isinstance(value, dict):
        for key, item in value.items():
            for place, needs in block_places(typing.get_args(kind)[1], item):
                yield (key, *place), needs


def describe_type(annotation: Any) -> str:
    """Describe an annotation in words."""
    kind, metadata = _strip(annotation)
    if any(isinstance(item, HoldsBlock) for item in metadata):
        methods = [method for item in metadata if isinstance(item, Needs) for method in item.methods]
        return f"block with {', '.join(methods)}" if methods else "block"
    own = next((item.describe() for item in metadata if hasattr(item, "describe")), None)
    if own is not None:
        return str(own)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is type(None):
        text = "null"
    elif _is_union(kind):
        # a bound on a union applies to the members that are not null
        return " or ".join(
            describe_type(_annotate(option, metadata) if option is not type(None) else option) for option in arguments
        )
    elif origin is Literal:
        text = " | ".join(show(choice) for choice in arguments)
    elif origin is list:
        text = f"list of {describe_type(arguments[0])}"
    elif origin is tuple:
        text = "list of (" + ", ".join("..." if item is ... else describe_type(item) for item in arguments) + ")"
    elif origin is dict:
        text = f"mapping of {describe_type(arguments[0])} to {describe_type(arguments[1])}"
    else:
        text = _TYPE_NAMES.get(kind, getattr(kind, "__name__", str(kind)))
    return " ".join([text, *_bounds(metadata)])


_TYPE_NAMES = {int: "integer", float: "number", str: "text", bool: "true or false", list: "list", dict: "mapping"}
_BOUNDS = {"ge": ">= {}", "gt": "> {}", "le": "<= {}", "lt": "< {}", "multiple_of": "(a multiple of {})",
           "min_length": "(at least {})", "max_length": "(at most {})", "pattern": "matching {}"}  # fmt: skip


def _bounds(metadata: tuple[Any, ...]) -> Iterator[str]:
    flat = [part for item in metadata for part in (item.metadata if isinstance(item, FieldInfo) else [item])]
    limits = {bound: limit for bound in _BOUNDS for item in flat if (limit := getattr(item, bound, None)) is not None}
    if "min_length" in limits and "max_length" in limits:
        least, most = limits.pop("min_length"), limits.pop("max_length")
        yield f"(exactly {least})" if least == most else f"({least} to {most})"
    if "ge" in limits and "le" in limits:
        yield f"from {limits.pop('ge')} to {limits.pop('le')}"
    for bound, limit in limits.items():
        yield _BOUNDS[bound].format(limit)


def _annotate(kind: Any, metadata: tuple[Any, ...]) -> Any:
    arguments = (kind, *metadata)
    return Annotated[arguments] if metadata else kind


def _strip(annotation: Any) -> tuple[Any, tuple[Any, ...]]:
    if typing.get_origin(annotation) is Annotated:
        return annotation.__origin__, annotation.__metadata__
    return annotation, ()


def _metadata(annotation: Any) -> tuple[Any, ...]:
    return _strip(annotation)[1]


def _is_union(annotation: Any) -> bool:
    return typing.get_origin(_strip(annotation)[0]) in (Union, types.UnionType)


def _is_fixed(annotation: Any) -> bool:
    """Whether it is a ``tuple`` of fixed length."""
    kind = _strip(annotation)[0]
    return typing.get_origin(kind) is tuple and ... not in typing.get_args(kind)


def _mentions_block(annotation: Any) -> bool:
    kind, metadata = _strip(annotation)
    return any(isinstance(item, HoldsBlock) for item in metadata) or any(map(_mentions_block, typing.get_args(kind)))


def _too_big(value: Any) -> int | None:
    if isinstance(value, int) and abs(value) > MAX_INTEGER:
        return value
    if isinstance(value, (list, tuple)):
        return next((found for item in value if (found := _too_big(item)) is not None), None)
    return None
