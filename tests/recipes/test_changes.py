"""Which changes of a recipe keep the weights of its model, by declaration of the blocks."""

from __future__ import annotations

from typing import Annotated, Any

import pytest
from pydantic import Field

import titans_build as tb
from titans_build.recipes.changes import change, shapes_of, tensors_of
from titans_build.registry import SameWeights, lookup, scratch

MEMORY = {"chunk": 8, "max_step": 0.5, "clip": None, "window": 5, "reset": 32, "threshold": 0.5, "retrieve": "anchor",
          "read": "before", "use": "read", "keep": 2}  # fmt: skip
OTHERS: dict[str, dict[str, Any]] = {
    "memory": MEMORY,
    "attention": {"window": 5, "rope": None},
    "context": {"segment": 8},
    "self_modifying": {"chunk": 4, "max_step": 0.1},
    "hf_mamba2": {"chunk": 32},
}
"""Another value of each marked field."""


def test_the_marked_fields() -> None:
    blocks = [name for name in tb.list_blocks() if lookup(name).source == "titans_build"]
    marked = {name: {field for field, each in lookup(name).fields.items() if each.keeps_weights} for name in blocks}
    variants = {name for name in blocks if getattr(lookup(name).cls, "variant_of", None) == "memory"}
    assert all(marked.pop(name) == set(MEMORY) for name in variants)
    assert {name: fields for name, fields in marked.items() if fields} == {k: set(v) for k, v in OTHERS.items()}


@pytest.mark.parametrize("name", ["memory", "attention", "context", "self_modifying"])
def test_marked_fields_keep_the_shapes(name: str) -> None:
    start = {"type": name} | ({"window": 3} if name == "memory" else {})
    recipe = tb.load_recipe({"version": 1, "dim": 16, "layers": {"a": [start]}, "stack": ["a"]})
    before = shapes_of(tensors_of(tb.build(recipe, device="meta")))
    for field, value in OTHERS[name].items():
        if field == "threshold":  # does not go with a window
            continue
        changed = change(recipe, {f"layers.a.0.{field}": value})
        assert changed.layers["a"][0][field] == value
        assert shapes_of(tensors_of(tb.build(changed, device="meta"))) == before


def test_fields_of_custom_blocks() -> None:
    with scratch():

        @tb.register("measured")
        class Measured(tb.Block):
            def __init__(
                self, dim: int, *, free: Annotated[int, SameWeights(), Field(ge=1)] = 1, fixed: int = 1
            ) -> None:
                super().__init__(dim)

            def init_state(self, batch_size: int) -> None:
                return None

            def forward(self, x: Any, state: None = None, *, mask: Any = None) -> Any:
                return x, None

        recipe = tb.load_recipe({"version": 1, "dim": 16, "layers": {"a": ["measured"]}, "stack": ["a"]})
        assert change(recipe, {"layers.a.0.free": 2}).layers["a"][0]["free"] == 2
        assert change(recipe, {"name": "other"}).name == "other"
        with pytest.raises(tb.RecipeError, match=r"layers.a.0.fixed: .* \(of measured, free may change\)"):
            change(recipe, {"layers.a.0.fixed": 2})


def test_modules_of_a_loaded_recipe_are_allowed_and_no_others() -> None:
    data = {"version": 1, "dim": 16, "imports": ["colorsys"], "layers": {"a": ["memory"]}, "stack": ["a"]}
    recipe = tb.load_recipe(data, allow_imports=True)
    assert change(recipe, {"layers.a.0.chunk": 8}).imports == ["colorsys"]
    with pytest.raises(tb.RecipeError, match="asks to import this"):
        change(recipe, {"imports": ["this"]})
