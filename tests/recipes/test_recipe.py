from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import titans_build as tb
from titans_build.recipes import Recipe, load_recipe, packaged_names
from titans_build.recipes.recipe import check_recipe
from titans_build.registry import RecipeError, scratch

HEAD = "version: 1\ndim: 64\nvocab: 256\n"
PLAIN = HEAD + "layers:\n  plain: [attention, ffn]\nstack: [plain]\n"
NESTED = (
    HEAD
    + """
layers:
  mac:
    - {type: context, segment: 16, persistent: 2, memory: {type: memory, chunk: 4}}
    - ffn
  mal: [{type: persistent, tokens: 2, of: [memory, {type: attention, window: 8}]}, ffn]
stack: [{repeat: 2, of: [mal, {repeat: 3, of: [mac]}]}, mal]
"""
)


def with_layer(blocks: str) -> str:
    return f"{HEAD}layers:\n  mac: {blocks}\nstack: [mac]\n"


def with_stack(stack: str) -> str:
    return f"{HEAD}layers:\n  plain: [attention, ffn]\n  mac: [memory]\nstack: {stack}\n"


def test_defaults_are_filled_in():
    recipe = load_recipe(PLAIN)
    assert (recipe.version, recipe.dim, recipe.vocab, recipe.tie, recipe.name) == (1, 64, 256, False, None)
    attention, ffn = recipe.layers["plain"]
    assert attention["type"] == "attention" and attention["heads"] == 4
    assert ffn["type"] == "ffn"


def test_repeats_are_expanded():
    recipe = load_recipe(NESTED)
    assert recipe.expand() == ["mal", "mac", "mac", "mac"] * 2 + ["mal"]
    assert recipe.depth == 9


@pytest.mark.parametrize("source", [PLAIN, NESTED, *packaged_names()], ids=lambda s: s if len(s) < 40 else None)
def test_round_trip_through_yaml_and_json(source: str):
    recipe = load_recipe(source)
    assert load_recipe(recipe.to_yaml()) == recipe
    assert load_recipe(recipe.to_json()) == recipe
    assert load_recipe(recipe.to_dict()) == recipe
    assert load_recipe(recipe) == recipe
    assert load_recipe(recipe.to_yaml()).to_yaml() == recipe.to_yaml()
    assert json.loads(recipe.to_json()) == yaml.safe_load(recipe.to_yaml()) == recipe.to_dict()


def test_a_new_field_does_not_change_fingerprints():
    with scratch():

        class Before(tb.Block):
            def __init__(self, dim, *, inside: tb.Spec = "ffn"):
                super().__init__(dim)

            def init_state(self, batch_size):
                return None

            def forward(self, x, state=None, *, mask=None):
                return x, None

        class After(Before):
            def __init__(self, dim, *, inside: tb.Spec = "ffn", rate: float = 0.5):
                super().__init__(dim)

        def fingerprint(cls, block):
            tb.register("changing", replace=True)(cls)
            return load_recipe({"version": 1, "dim": 8, "layers": {"a": [block]}, "stack": ["a"]}).fingerprint

        inside = {"type": "changing", "inside": {"type": "changing", "inside": "memory"}}
        for block in ("changing", inside):
            assert fingerprint(Before, block) == fingerprint(After, block)
        assert fingerprint(After, {"type": "changing", "rate": 1.0}) != fingerprint(After, "changing")
        deeper = {"type": "changing", "inside": {"type": "changing", "inside": "memory", "rate": 1.0}}
        assert fingerprint(After, deeper) != fingerprint(After, inside)


def test_fingerprints_do_not_depend_on_names():
    recipe = load_recipe(NESTED)
    assert load_recipe(NESTED + "name: other\n").fingerprint == recipe.fingerprint
    unrolled = load_recipe(NESTED, {"stack": recipe.expand()})
    assert unrolled != recipe and unrolled.fingerprint == recipe.fingerprint
    assert load_recipe(NESTED, {"layers.mac.0.segment": 8}).fingerprint != recipe.fingerprint
    assert load_recipe(NESTED, {"dim": 128}).fingerprint != recipe.fingerprint


def test_wrong_recipes_are_refused(wrong_recipe: tuple[str, Any, str], tmp_path: Path):
    _, text, fragment = wrong_recipe
    path = tmp_path / "wrong.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    start = time.process_time()
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert time.process_time() - start < 2  # also while other processes use the cores
    message = str(caught.value)
    assert fragment in message
    headline, *lines = message.split("\n")
    assert headline.startswith(f"{path}: {len(caught.value.problems)} problem")
    assert 1 <= len(lines) <= 21 and all(line.startswith("  ") for line in lines)
    assert message.replace("\n", "").isprintable() and len(message) < 10_000


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux alone")
def test_wrong_recipes_need_little_memory(tmp_path: Path, wrong_recipes: list[Any]):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _, text, _ in wrong_recipes:
        path = tmp_path / "wrong.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        with pytest.raises(RecipeError):
            load_recipe(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 1024


def test_all_problems_of_a_file_are_reported_at_once():
    text = """
version: 1
dim: 63
vocab: -1
layers:
  mac: [{type: context, segmnt: 3, memory: {type: memory, depht: 2}}, fnn]
  spare: [{type: attention, heads: 4}]
stack: [mca]
extra: 1
"""
    with pytest.raises(RecipeError) as caught:
        load_recipe(text)
    assert {problem.path for problem in caught.value.problems} == {
        "vocab",
        "layers.mac",
        "layers.mac.0.segmnt",
        "layers.mac.0.memory.depht",
        "layers.mac.1",
        "layers.spare",
        "layers.spare.0.heads",
        "stack.0",
        "extra",
        *(problem.path for problem in caught.value.problems if problem.path == "layers.mac.0.attend.heads"),
        *(problem.path for problem in caught.value.problems if problem.path == "layers.mac.0.memory.heads"),
    }


@pytest.mark.parametrize(
    ("text", "paths"),
    [
        (HEAD + "layers: [ffn]\nstack: [a, {repeat: 2, of: [b]}]\n", ["layers"]),
        (HEAD + "stack: [a]\n", [""]),
        (with_stack("[[plain], mac]"), ["stack.0"]),
        (with_stack("[mac, {repeat: 2, of: plain}]"), ["stack.1.of"]),
        (with_stack("[mca, plain]"), ["stack.0", "layers.mac"]),
    ],
)
def test_an_invalid_part_is_reported_once(text: str, paths: list[str]):
    with pytest.raises(RecipeError) as caught:
        load_recipe(text)
    assert [problem.path for problem in caught.value.problems] == paths


def test_paths_inside_a_list_of_blocks():
    with pytest.raises(RecipeError) as caught:
        load_recipe(with_layer("[{type: persistent, of: [memory, {type: attention, windw: 8}]}]"))
    assert [problem.path for problem in caught.value.problems] == ["layers.mac.0.of.1.windw"]


@pytest.mark.parametrize("data", [None, 3, [], "x", {}, {"version": 1}])
def test_invalid_data(data: Any):
    with pytest.raises(RecipeError):
        check_recipe(data)


def test_data_that_is_not_plain():
    data = load_recipe(PLAIN).to_dict()
    data["layers"]["plain"][0] = object()
    data["dim"] = 2**70
    data[3] = 4
    data["name"] = {"a", "b"}
    with pytest.raises(RecipeError) as caught:
        load_recipe(data)
    assert len(caught.value.problems) == 4
    loop: dict[str, Any] = {}
    loop["loop"] = loop
    with pytest.raises(RecipeError, match="nested more than"):
        load_recipe(loop)


def test_arguments_are_not_modified():
    data = {"version": 1, "dim": 64, "layers": {"a": ["memory", "ffn"]}, "stack": ["a"]}
    before = json.dumps(data)
    recipe = load_recipe(data, {"layers.a.0.depth": 3, "stack.0": "a"})
    assert json.dumps(data) == before
    recipe.to_dict()["layers"]["a"].clear()
    assert len(recipe.layers["a"]) == 2


class TestImports:
    MODULE = """
from titans_build import Block, register
@register("{name}")
class Mine(Block):
    def forward(self, x, state=None, *, mask=None):
        return x, None
"""

    def write(self, folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, text: str | None = None) -> str:
        (folder / f"{name}.py").write_text(self.MODULE.format(name=name) if text is None else text)
        monkeypatch.syspath_prepend(str(folder))
        return f"imports: [{name}]\n" + with_layer(f"[{name}]")

    def test_allowed(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        with scratch():
            recipe = load_recipe(self.write(tmp_path, monkeypatch, "mine_allowed"), allow_imports=True)
            assert recipe.layers["mac"] == [{"type": "mine_allowed"}]
            assert recipe.imports == ["mine_allowed"]
            assert load_recipe(recipe.to_yaml(), allow_imports=True) == recipe

    def test_not_allowed_runs_nothing(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        text = self.write(tmp_path, monkeypatch, "mine_refused")
        with pytest.raises(RecipeError, match="allow_imports"):
            load_recipe(text)
        assert "mine_refused" not in sys.modules

    def test_a_module_that_fails(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        text = self.write(tmp_path, monkeypatch, "mine_broken", "import nothing_of_this_name")
        with pytest.raises(RecipeError, match=r"imports.0: cannot import mine_broken: ModuleNotFoundError"):
            load_recipe(text, allow_imports=True)


def test_recipes_are_immutable_and_comparable():
    assert isinstance(load_recipe(PLAIN), Recipe)
    assert load_recipe(PLAIN) == load_recipe(PLAIN)
    with pytest.raises(AttributeError):
        load_recipe(PLAIN).dim = 3  # type: ignore[misc]


ODD: list[Any] = [
    None,
    True,
    -1,
    1.5,
    "",
    "memory",
    [],
    {},
    [[]],
    ["memory"],
    2**62,
    {"type": None},
    {"repeat": 3},
    {3: 4},
    object(),
]


def places(data: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    for key, item in data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ():
        yield (*path, key)
        yield from places(item, (*path, key))


@pytest.mark.parametrize("odd", ODD, ids=lambda odd: type(odd).__name__)
def test_any_value_at_any_place_is_an_error_or_round_trips(odd: Any):
    text = load_recipe("mag").to_json()
    for path in places(json.loads(text)):
        data = holder = json.loads(text)
        for key in path[:-1]:
            holder = holder[key]
        holder[path[-1]] = odd
        try:
            recipe = load_recipe(data)
        except RecipeError as error:
            assert error.problems and all(problem.message for problem in error.problems)
        else:
            assert load_recipe(recipe.to_yaml()) == load_recipe(recipe.to_json()) == recipe
