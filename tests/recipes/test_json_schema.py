from __future__ import annotations

import json
import re
from typing import Any

import pytest

from titans_build.recipes import load_recipe, packaged_names, recipe_schema
from titans_build.registry import list_blocks


def fits(value: Any, schema: dict[str, Any], root: dict[str, Any]) -> bool:
    """The part of JSON Schema that recipe schemas use, checked independently of how they are made."""
    if "$ref" in schema and not fits(value, root["$defs"][schema["$ref"].removeprefix("#/$defs/")], root):
        return False
    if "if" in schema:
        branch = "then" if fits(value, schema["if"], root) else "else"
        if not fits(value, schema.get(branch, {}), root):
            return False
    if not all(fits(value, rule, root) for rule in schema.get("allOf", ())):
        return False
    if "anyOf" in schema and not any(fits(value, option, root) for option in schema["anyOf"]):
        return False
    if "const" in schema and value != schema["const"]:
        return False
    if "enum" in schema and value not in schema["enum"]:
        return False
    kinds = schema.get("type", [])
    kinds = [kinds] if isinstance(kinds, str) else kinds
    python = {
        "integer": int,
        "number": (int, float),
        "string": str,
        "boolean": bool,
        "array": list,
        "object": dict,
        "null": type(None),
    }
    if kinds and not any(
        isinstance(value, python[k]) and not (k in ("integer", "number") and isinstance(value, bool)) for k in kinds
    ):
        return False
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        if value < schema.get("minimum", value) or value > schema.get("maximum", value):
            return False
        if value <= schema.get("exclusiveMinimum", value - 1):
            return False
    if isinstance(value, str) and "pattern" in schema and not re.search(schema["pattern"], value):
        return False
    if isinstance(value, list):
        if not schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", len(value)):
            return False
        return all(fits(item, schema["items"], root) for item in value) if "items" in schema else True
    if isinstance(value, dict):
        properties = schema.get("properties", {})
        if any(key not in value for key in schema.get("required", [])):
            return False
        extra = schema.get("additionalProperties", True)
        for key, item in value.items():
            if key in properties:
                if not fits(item, properties[key], root):
                    return False
            elif extra is False or (isinstance(extra, dict) and not fits(item, extra, root)):
                return False
    return True


@pytest.fixture(scope="module")
def schema() -> dict[str, Any]:
    return json.loads(json.dumps(recipe_schema()))


@pytest.mark.parametrize("name", packaged_names())
def test_packaged_recipes_match_the_schema(name: str, schema: dict[str, Any]):
    assert fits(load_recipe(name).to_dict(), schema, schema)


def test_only_the_rules_of_its_own_type_apply_to_a_block(schema: dict[str, Any]):
    """A validator reports an error inside a block once, not once for each type of block."""
    for name in ("any_block", "block.context"):
        definition = schema["$defs"][name]
        rules = definition if name == "any_block" else definition["properties"]["memory"]
        block = {"type": "memory", "depht": 3}
        failing = [rule for rule in rules["allOf"] if not fits(block, rule, schema)]
        assert [rule["then"] for rule in failing] == [{"$ref": "#/$defs/block.memory"}]
        assert not any("anyOf" in rule for rule in rules["allOf"])


def test_every_block_is_defined_and_every_reference_resolves(schema: dict[str, Any]):
    assert {f"block.{name}" for name in list_blocks()} <= schema["$defs"].keys()
    references = re.findall(r'"#/\$defs/([^"]+)"', json.dumps(schema))
    assert references and set(references) <= schema["$defs"].keys()
    assert "x-titans-build" not in json.dumps(schema)


@pytest.mark.parametrize(
    ("change", "good"),
    [
        (lambda r: r, True),
        (lambda r: r["layers"].update(mac=["context", ["memory", "ffn"]]), True),
        (lambda r: r["layers"]["mac"][0].update(segmnt=3), False),
        (lambda r: r["layers"]["mac"][0].update(segment=0), False),
        (lambda r: r["layers"]["mac"][0]["memory"].update(depht=3), False),
        (lambda r: r["layers"]["mac"][0].update(memory="attention"), False),
        (lambda r: r["layers"]["mac"][0].update(memory="memory"), True),
        (lambda r: r["layers"]["mac"][0]["memory"].update(clip=None), True),
        (lambda r: r["layers"]["mac"][0]["memory"].update(depth=None), False),
        (lambda r: r["layers"].update(mac=["memroy"]), False),
        (lambda r: r["layers"].update(mac=[]), False),
        (lambda r: r.update(version=2), False),
        (lambda r: r.update(extra=2), False),
        (lambda r: r.pop("dim"), False),
        (lambda r: r.update(stack=["mac", {"repeat": 2, "of": ["mac", {"repeat": 2, "of": ["mac"]}]}]), True),
        (lambda r: r.update(stack=[{"repeat": 2}]), False),
    ],
)
def test_invalid_recipes_do_not_match_the_schema(change: Any, good: bool, schema: dict[str, Any]):
    data = load_recipe("mac").to_dict()
    change(data)
    assert fits(data, schema, schema) is good
