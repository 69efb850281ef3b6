"""What there is to know about a block type, for people: name, meaning, fields, abilities."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

from .catalogue import BLOCKS, Catalogue
from .schema import Field

PROTOCOLS = {"memory": ("read", "write")}
"""Abilities beyond ``forward`` and ``init_state`` that combinators ask for, by the methods that make them."""


@dataclass(frozen=True)
class FieldDescription:
    """One field of a block type."""

    name: str
    type: str
    required: bool
    default: Any
    """``None`` when the field is required."""
    description: str


@dataclass(frozen=True)
class Description:
    """A block type, ready to be printed or dumped (``dataclasses.asdict``)."""

    name: str
    summary: str
    doc: str
    source: str
    """The package it comes from."""
    place: str
    """``file:line`` of the class."""
    fields: list[FieldDescription]
    protocols: list[str]
    """What it can stand as besides a plain block: ``memory`` when it has ``read`` and ``write`` of its own."""


def describe(name: str, catalogue: Catalogue = BLOCKS) -> Description:
    """Describe a registered block type, or what another catalogue holds.

    Raises ``RecipeError`` with the nearest name when there is none.
    """
    entry = catalogue.lookup(name)
    return Description(
        name=entry.name,
        summary=entry.summary,
        doc=inspect.getdoc(entry.cls) or "",
        source=entry.source,
        place=entry.place,
        fields=[_describe(field) for field in entry.fields.values()],
        protocols=[
            protocol
            for protocol, methods in PROTOCOLS.items()
            if all(callable(getattr(entry.cls, method, None)) for method in methods)
            and not getattr(entry.cls, "delegates", ())
        ],
    )


def _describe(field: Field) -> FieldDescription:
    default = None if field.required else field.default
    return FieldDescription(field.name, field.type_text, field.required, default, field.description)
