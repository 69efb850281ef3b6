"""JSON Schema of blocks, for completion and validation in editors."""

from __future__ import annotations

from typing import Any

from .catalogue import Catalogue, Entry, known_names, lookup
from .errors import RecipeError
from .schema import BLOCK_PLACEHOLDER, Field, Needs, block_places, describe_type
from .validation import CHAIN

ANY = {"$ref": "#/$defs/any_block"}


def block_definitions() -> dict[str, Any]:
    """The ``$defs`` of all usable blocks: ``any_block``, and ``block.NAME`` for each block."""
    entries = []
    for name in known_names():
        try:
            entries.append(lookup(name))
        except RecipeError:
            continue  # an installed block that cannot be imported cannot be used in a recipe
    definitions = {f"block.{entry.name}": _block(entry) for entry in entries}
    for entry in entries:
        for field in entry.fields.values():
            if field.part is not None and f"part.{field.part.catalogue.kind}" not in definitions:
                definitions[f"part.{field.part.catalogue.kind}"] = part_schema(field.part.catalogue)
    definitions["any_block"] = _one_of([entry.name for entry in entries], lists=True)
    return definitions


def block_schema(name: str) -> dict[str, Any]:
    """A complete JSON Schema for one block. Raises ``RecipeError`` for an unknown name."""
    lookup(name)
    return {"$schema": DIALECT, "$ref": f"#/$defs/block.{name}", "$defs": block_definitions()}


DIALECT = "https://json-schema.org/draft/2020-12/schema"


def _block(entry: Entry) -> dict[str, Any]:
    properties: dict[str, Any] = {"type": {"const": entry.name}}
    for field in entry.fields.values():
        properties[field.name] = _field(field)
    return {
        "type": "object",
        "description": entry.summary,
        "properties": properties,
        "required": ["type", *(field.name for field in entry.fields.values() if field.required)],
        "additionalProperties": False,
    }


def part_schema(catalogue: Catalogue) -> dict[str, Any]:
    """The schema of a part: a name, or a mapping with its type and fields."""
    objects = []
    for row in catalogue.rows():
        if row.problem is None:  # an installed part that cannot be imported cannot be used in a recipe
            objects.append(_block(catalogue.lookup(row.name)))
    names = [entry["properties"]["type"]["const"] for entry in objects]
    return {"anyOf": [{"type": "string", "enum": names}, *objects]}


def _field(field: Field) -> dict[str, Any]:
    schema: dict[str, Any]
    if field.part is not None:
        reference = {"$ref": f"#/$defs/part.{field.part.catalogue.kind}"}
        schema = {"anyOf": [reference, {"type": "null"}]} if field.part.optional else {"allOf": [reference]}
    else:
        schema = dict(field.adapter.json_schema())
    if field.holds_blocks:
        needs = next((needs for _, needs in block_places(field.annotation, _sample(field))), None)
        fitting = [] if needs is None else _fitting(needs)
        schema = _insert(schema, ANY if needs is None else _one_of(fitting, lists=CHAIN in fitting))
    if field.description:
        schema["description"] = field.description
    if field.keeps_weights:
        schema["x-keeps-weights"] = True
    if not field.required:
        schema["default"] = field.default
    return schema


def _sample(field: Field) -> Any:
    # any value with a block in the right place: only the annotation is read
    return [""] if describe_type(field.annotation).startswith("list of") else ""


def _insert(schema: Any, block: dict[str, Any]) -> Any:
    if isinstance(schema, dict):
        if BLOCK_PLACEHOLDER in schema:
            return dict(block)
        options = schema.get("anyOf", ())
        others = [option for option in options if BLOCK_PLACEHOLDER not in option]
        if len(others) < len(options):
            return {key: value for key, value in schema.items() if key != "anyOf"} | {
                "if": {"anyOf": others},
                "else": dict(block),
            }
        return {key: _insert(value, block) for key, value in schema.items()}
    if isinstance(schema, list):
        return [_insert(item, block) for item in schema]
    return schema


def _fitting(needs: Needs) -> list[str]:
    names = []
    for name in known_names():
        try:
            if not needs.missing(lookup(name).cls):
                names.append(name)
        except RecipeError:
            continue
    return names


def _one_of(names: list[str], *, lists: bool) -> dict[str, Any]:
    """A block of one of these names. Errors are those of its own type, since each form and type is a condition."""
    rules: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({"type": "string"}, {"enum": names}),
        ({"type": "object"}, {"properties": {"type": {"enum": names}}, "required": ["type"]}),
        ({"type": "array"}, {"items": ANY, "minItems": 1}),
    ]
    for name in names:
        is_type = {"type": "object", "properties": {"type": {"const": name}}, "required": ["type"]}
        rules.append((is_type, {"$ref": f"#/$defs/block.{name}"}))
    return {
        "type": ["string", "object", *(["array"] if lists else [])],
        "allOf": [{"if": condition, "then": rule} for condition, rule in rules],
    }
