from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from titans_build.recipes import load_recipe
from titans_build.registry import RecipeError

PLAIN = "version: 1\ndim: 64\nvocab: 256\nlayers:\n  plain: [attention, ffn]\nstack: [plain]\n"


def test_every_kind_of_source_gives_the_same_recipe(tmp_path: Path):
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


def test_a_packaged_name_goes_before_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
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
        ("zzz", "memory-as-ffn, transformer, two-memories, windows-and-mac; sizes as in mac-170m"),
        ("x" * 5000, "no packaged recipe"),
        ("version: 1", "the recipe needs 'dim'"),
        (3, "expected a packaged name, a path, YAML text or a mapping, got 3"),
        (None, "got null"),
        (b"mac", "got b'mac'"),
        ([], "got []"),
    ],
)
def test_sources_that_are_none(source: Any, fragment: str):
    with pytest.raises(RecipeError) as caught:
        load_recipe(source)
    assert fragment in str(caught.value), str(caught.value)
