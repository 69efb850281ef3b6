"""JSON Schema of a whole recipe, for editors."""

from __future__ import annotations

from typing import Any

from ..registry import DIALECT, block_definitions
from .recipe import MAX_DIM, MAX_VOCAB, VERSION


def recipe_schema() -> dict[str, Any]:
    """The JSON Schema (2020-12) of recipes with the blocks that are currently registered.

    It covers single values. Rules between values (heads that divide the width, unused layers) are checked when a recipe
    is loaded.
    """
    layer_name = {"pattern": "^[A-Za-z_][A-Za-z0-9_-]{0,63}$"}
    definitions = block_definitions()
    definitions["stack"] = {
        "type": "array",
        "minItems": 1,
        "items": {
            "type": ["string", "object"],
            "if": {"type": "object"},
            "then": {
                "properties": {"repeat": {"type": "integer", "minimum": 1}, "of": {"$ref": "#/$defs/stack"}},
                "required": ["repeat", "of"],
                "additionalProperties": False,
            },
            "else": layer_name,
        },
    }
    return {
        "$schema": DIALECT,
        "title": "titans-build recipe",
        "type": "object",
        "properties": {
            "version": {"const": VERSION, "description": "Version of the format."},
            "name": {"type": "string", "description": "Name of the model, without effect on it."},
            "dim": {"type": "integer", "minimum": 1, "maximum": MAX_DIM, "description": "Width of all blocks."},
            "vocab": {
                "type": ["integer", "null"],
                "minimum": 1,
                "maximum": MAX_VOCAB,
                "default": None,
                "description": "Number of token ids; null for a model of vectors, without embedding and head.",
            },
            "tie": {"type": "boolean", "default": False, "description": "The head shares the embedding's weight."},
            "imports": {
                "type": "array",
                "items": {"type": "string"},
                "default": [],
                "description": "Python modules that register blocks. They are imported only if that is allowed.",
            },
            "layers": {
                "type": "object",
                "minProperties": 1,
                "propertyNames": layer_name,
                "additionalProperties": {"type": "array", "minItems": 1, "items": {"$ref": "#/$defs/any_block"}},
                "description": "Layers by name: lists of blocks, each with a norm before it and a residual connection.",
            },
            "stack": {"$ref": "#/$defs/stack", "description": "Names of layers in order, with nested repeats."},
        },
        "required": ["version", "dim", "layers", "stack"],
        "additionalProperties": False,
        "$defs": definitions,
    }
