from __future__ import annotations

from typing import Any

import pytest

from titans_build.recipes import load_recipe
from titans_build.registry import RecipeError

TEXT = """
version: 1
dim: 64
vocab: 256
layers:
  mac: [context, {type: persistent, of: [memory, attention]}, {type: gate, branches: [attention, memory]}]
stack: [{repeat: 2, of: [mac]}]
"""


def changed(path: str, value: Any) -> dict[str, Any]:
    recipe = load_recipe(TEXT, {path: value})
    assert recipe.overrides == {path: value}
    data = recipe.to_dict()
    assert data != load_recipe(TEXT).to_dict()
    assert load_recipe(recipe.to_yaml()) == recipe
    return data


def test_top_level():
    assert changed("dim", 128)["dim"] == 128
    assert changed("tie", True)["tie"] is True
    assert changed("vocab", None)["vocab"] is None
    assert changed("name", "mine")["name"] == "mine"


def test_stack():
    assert changed("stack.0.repeat", 6)["stack"] == [{"repeat": 6, "of": ["mac"]}]
    assert changed("stack", ["mac"])["stack"] == ["mac"]


def test_through_a_bare_name():
    assert changed("layers.mac.0.segment", 32)["layers"]["mac"][0]["segment"] == 32


def test_through_a_default():
    assert changed("layers.mac.0.memory.depth", 3)["layers"]["mac"][0]["memory"]["depth"] == 3
    assert load_recipe(TEXT).layers["mac"][0]["memory"]["depth"] != 3  # the default itself is untouched


def test_through_a_chain_written_as_a_list():
    for path in ("layers.mac.1.of.0.chunk", "layers.mac.1.of.of.0.chunk"):
        assert changed(path, 3)["layers"]["mac"][1]["of"]["of"][0]["chunk"] == 3


def test_through_a_list_of_blocks():
    assert changed("layers.mac.2.branches.1.depth", 3)["layers"]["mac"][2]["branches"][1]["depth"] == 3


def test_a_whole_block():
    assert changed("layers.mac.0.attend", {"type": "attention", "heads": 2})["layers"]["mac"][0]["attend"]["heads"] == 2
    assert changed("layers.mac.1", "ffn")["layers"]["mac"][1]["type"] == "ffn"


def test_a_new_layer():
    recipe = load_recipe(TEXT, {"layers.plain": ["ffn"], "stack": ["plain", "mac"]})
    assert recipe.expand() == ["plain", "mac"]


def test_one_after_the_other():
    recipe = load_recipe(load_recipe(TEXT, {"dim": 128}), {"layers.mac.0.segment": 8})
    assert (recipe.dim, recipe.layers["mac"][0]["segment"]) == (128, 8)
    assert recipe.overrides == {"dim": 128, "layers.mac.0.segment": 8}


@pytest.mark.parametrize(
    ("path", "value", "fragment"),
    [
        ("dmi", 64, "dmi: unknown key; did you mean 'dim'?"),
        ("dim", 63, "layers.mac.0.memory.heads"),
        ("dim", "64", "dim: expected an integer"),
        ("dim.x", 64, "dim.x: dim is 64, which has nothing inside"),
        ("layers.mca.0.segment", 1, "layers.mca.0.segment: there is no 'mca' in layers; did you mean 'mac'?"),
        ("layers.mac.9.segment", 1, "layers.mac is a list: expected a number from 0 to 2, got '9'"),
        ("layers.mac.-1.segment", 1, "expected a number from 0 to 2, got '-1'"),
        ("layers.mac.x", 1, "expected a number from 0 to 2, got 'x'"),
        ("layers.mac.0.segmnt", 1, "layers.mac.0.segmnt: unknown field of context; did you mean 'segment'?"),
        ("layers.mac.0.segment", -1, "layers.mac.0.segment: expected integer from 1 to 1048576, got -1"),
        (
            "layers.mac.0.memroy.depth",
            1,
            "layers.mac.0.memroy.depth: there is no 'memroy' in layers.mac.0; did you mean 'memory'?",
        ),
        ("layers.mac.0.segment.x", 1, "layers.mac.0.segment is 128, which has nothing inside"),
        ("layers.mac.0.memory", "attention", "layers.mac.0.memory: expected a block with read and write"),
        ("stack.0.repeat", 0, "stack.0.repeat: expected an integer >= 1, got 0"),
        ("stack.0.of.0", "mca", "unknown layer 'mca'"),
        ("dim", float("nan"), "dim: expected a finite number, got nan"),
        ("dim", 10**30, "is too large for any number in a recipe"),
        ("dim", object(), "dim: expected plain data"),
        ("", 1, "expected a path such as"),
        ("layers..mac", 1, "expected a path such as"),
        ("layers.mac.", 1, "expected a path such as"),
    ],
)
def test_wrong_overrides(path: str, value: Any, fragment: str):
    with pytest.raises(RecipeError) as caught:
        load_recipe(TEXT, {path: value})
    assert fragment in str(caught.value), str(caught.value)


def test_all_wrong_overrides_at_once():
    with pytest.raises(RecipeError) as caught:
        load_recipe(TEXT, {"dim.x": 1, "layers.mca.0": 1, "vocab": -1, "layers.mac.0.segment": 0})
    assert [problem.path for problem in caught.value.problems] == [
        "dim.x",
        "layers.mca.0",
        "vocab",
        "layers.mac.0.segment",
    ]


@pytest.mark.parametrize("overrides", [3, "dim=64", ["dim"]])
def test_overrides_are_a_mapping(overrides: Any):
    with pytest.raises(RecipeError, match="expected overrides as a mapping"):
        load_recipe(TEXT, overrides)


def test_the_value_is_copied():
    stack = [{"repeat": 2, "of": ["mac"]}]
    recipe = load_recipe(TEXT, {"stack": stack})
    stack[0]["repeat"] = 5
    assert recipe.depth == 2 and recipe.overrides["stack"][0]["repeat"] == 2
