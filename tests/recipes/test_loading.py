"""Loading of recipes: sources, overrides and packaged recipes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from titans_build.recipes import build, load_recipe, packaged_names
from titans_build.registry import RecipeError

PLAIN = "version: 1\ndim: 64\nvocab: 256\nlayers:\n  plain: [attention, ffn]\nstack: [plain]\n"


def test_all_kinds_of_sources(tmp_path: Path):
    recipe = load_recipe(PLAIN)
    (tmp_path / "a.yaml").write_text(PLAIN)
    (tmp_path / "a.json").write_text(recipe.to_json())
    (tmp_path / "no_suffix").write_text(PLAIN)
    sources: list[Any] = [
        tmp_path / "a.yaml",
        str(tmp_path / "a.yaml"),
        tmp_path / "a.json",
        str(tmp_path / "no_suffix"),
    ]
    for source in [
        *sources,
        recipe.to_dict(),
        recipe.to_json(),
        recipe,
        "{version: 1, dim: 64, vocab: 256, layers: {plain: [attention, ffn]}, stack: [plain]}",
    ]:
        assert load_recipe(source) == recipe


def test_a_packaged_name_takes_precedence_over_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "mac").write_text(PLAIN)
    monkeypatch.chdir(tmp_path)
    assert load_recipe("mac").name == "mac"
    assert load_recipe("./mac") == load_recipe(PLAIN)
    (tmp_path / "mine").write_text(PLAIN)
    assert load_recipe("mine") == load_recipe(PLAIN)


@pytest.mark.parametrize(
    ("source", "fragment"),
    [
        ("mca", "no packaged recipe and no file of that name; did you mean 'mac'?"),
        ("MAC", "did you mean 'mac'?"),
        ("mac-170", "did you mean 'mac-170m'?"),
        ("transfomer", "did you mean 'transformer'?"),
        ("zzzzzz", "packaged: "),
        ("missing.yaml", "missing.yaml: 1 problem\n  no such file"),
        ("no/such/file", "no such file"),
        ("../nothing.yml", "no such file"),
        ("", "empty: expected a recipe"),
        (" \n", "empty: expected a recipe"),
        ("a\0b", "no packaged recipe"),
        ("zzz", "memory-as-ffn, tnt, transformer, two-memories, windows-and-mac; sizes as in mac-170m"),
        ("x" * 5000, "no packaged recipe"),
        ("version: 1", "the recipe needs 'dim'"),
        (3, "expected a packaged name, a path, YAML text or a mapping, got 3"),
        (None, "got null"),
        (b"mac", "got b'mac'"),
        ([], "got []"),
    ],
)
def test_invalid_sources(source: Any, fragment: str):
    with pytest.raises(RecipeError) as caught:
        load_recipe(source)
    assert fragment in str(caught.value), str(caught.value)


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


def test_override_of_a_top_level_key():
    assert changed("dim", 128)["dim"] == 128
    assert changed("tie", True)["tie"] is True
    assert changed("vocab", None)["vocab"] is None
    assert changed("name", "mine")["name"] == "mine"


def test_override_of_the_stack():
    assert changed("stack.0.repeat", 6)["stack"] == [{"repeat": 6, "of": ["mac"]}]
    assert changed("stack", ["mac"])["stack"] == ["mac"]


def test_override_inside_a_bare_name():
    assert changed("layers.mac.0.segment", 32)["layers"]["mac"][0]["segment"] == 32


def test_override_inside_a_default():
    assert changed("layers.mac.0.memory.depth", 3)["layers"]["mac"][0]["memory"]["depth"] == 3
    assert load_recipe(TEXT).layers["mac"][0]["memory"]["depth"] != 3  # the default itself is untouched


def test_override_inside_a_list_that_is_a_chain():
    for path in ("layers.mac.1.of.0.chunk", "layers.mac.1.of.of.0.chunk"):
        assert changed(path, 3)["layers"]["mac"][1]["of"]["of"][0]["chunk"] == 3


def test_override_inside_a_list_of_blocks():
    assert changed("layers.mac.2.branches.1.depth", 3)["layers"]["mac"][2]["branches"][1]["depth"] == 3


def test_override_of_a_block():
    assert changed("layers.mac.0.attend", {"type": "attention", "heads": 2})["layers"]["mac"][0]["attend"]["heads"] == 2
    assert changed("layers.mac.1", "ffn")["layers"]["mac"][1]["type"] == "ffn"


def test_override_that_adds_a_layer():
    recipe = load_recipe(TEXT, {"layers.plain": ["ffn"], "stack": ["plain", "mac"]})
    assert recipe.expand() == ["plain", "mac"]


def test_repeated_overrides():
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


def test_override_values_are_copied():
    stack = [{"repeat": 2, "of": ["mac"]}]
    recipe = load_recipe(TEXT, {"stack": stack})
    stack[0]["repeat"] = 5
    assert recipe.depth == 2 and recipe.overrides["stack"][0]["repeat"] == 2


BASES = ["lmm", "mac", "mag", "mal", "transformer"]
SIZED = [*BASES, "tnt"]
HYBRIDS = [
    "continuum", "deltas-and-mac", "hope", "llama-and-memory", "memory-as-ffn", "tnt", "two-memories", "windows-and-mac"
]  # fmt: skip
SIZES = {"30m": 30e6, "170m": 170e6, "340m": 340e6, "400m": 400e6, "760m": 760e6, "1.3b": 1.3e9}
PUBLISHED = {"170m": (12, 768, 16), "340m": (24, 1024, 16), "760m": (24, 1536, 16), "1.3b": (18, 2048, 8)}


def test_packaged_names():
    assert sorted(packaged_names()) == sorted(
        [*BASES, *HYBRIDS, *(f"{base}-{size}" for base in SIZED for size in SIZES)]
    )


@pytest.mark.parametrize("name", [*BASES, *HYBRIDS])
def test_packaged_recipes(name: str):
    recipe = load_recipe(name)
    assert (recipe.name, recipe.dim, recipe.vocab) == (name, 256, 256)
    assert recipe.depth == (8 if "-and-" in name else 4)
    model = build(recipe, device="meta")
    assert not model.grows
    assert all(parameter.is_meta for parameter in model.parameters())
    assert model.recipe == recipe


@pytest.mark.parametrize("base", SIZED)
@pytest.mark.parametrize("size", SIZES)
def test_numbers_of_parameters_of_packaged_sizes(base: str, size: str):
    recipe = load_recipe(f"{base}-{size}")
    assert recipe.name == f"{base}-{size}" and recipe.overrides == {}
    model = build(recipe, device="meta")
    count = sum(parameter.numel() for parameter in model.parameters())
    assert abs(count / SIZES[size] - 1) < 0.01
    assert recipe.vocab == 32000
    if size in PUBLISHED:
        depth, dim, _ = PUBLISHED[size]
        assert recipe.dim == dim and (recipe.depth == depth) == (base != "tnt")


def test_settings_of_packaged_sizes():
    (context, _), (persistent, _) = load_recipe("mac-1.3b").layers["mac"], load_recipe("mag-760m").layers["mag"]
    assert (context["segment"], context["persistent"], context["attend"]["heads"]) == (512, 128, 8)
    memory = context["memory"]
    assert [memory[key] for key in ("heads", "depth", "expansion", "chunk", "conv")] == [8, 2, 4, 64, 4]
    assert (persistent["tokens"], persistent["of"]["branches"][0]["window"]) == (128, 2048)
    assert [branch["heads"] for branch in persistent["of"]["branches"]] == [16, 16]
    for name, heads in (("tnt-170m", 16), ("tnt-1.3b", 8)):
        world, *local = load_recipe(name).layers["tnt"][0]["branches"]
        assert (world["chunk"], world["retrieve"], world["heads"]) == (2048, "anchor", heads)
        assert [(each["chunk"], each["reset"], each["heads"]) for each in local] == [
            (8, 2048, heads),
            (16, 2048, heads),
        ]
    mal = load_recipe("mal-340m").layers["mal"][0]
    assert (mal["tokens"], mal["of"]["of"][0]["chunk"], mal["of"]["of"][1]["window"]) == (128, 64, 2048)
