from __future__ import annotations

import pytest

from titans_build.recipes import build, load_recipe, packaged_names

BASES = ["lmm", "mac", "mag", "mal", "transformer"]
HYBRIDS = ["deltas-and-mac", "llama-and-memory", "memory-as-ffn", "two-memories", "windows-and-mac"]
SIZES = {"30m": 30e6, "170m": 170e6, "340m": 340e6, "400m": 400e6, "760m": 760e6, "1.3b": 1.3e9}
PUBLISHED = {"170m": (12, 768, 16), "340m": (24, 1024, 16), "760m": (24, 1536, 16), "1.3b": (18, 2048, 8)}


def test_names():
    assert sorted(packaged_names()) == sorted(
        [*BASES, *HYBRIDS, *(f"{base}-{size}" for base in BASES for size in SIZES)]
    )


@pytest.mark.parametrize("name", [*BASES, *HYBRIDS])
def test_small_recipes(name: str):
    recipe = load_recipe(name)
    assert (recipe.name, recipe.dim, recipe.vocab) == (name, 256, 256)
    assert recipe.depth == (8 if "-and-" in name else 4)
    model = build(recipe, device="meta")
    assert not model.grows
    assert all(parameter.is_meta for parameter in model.parameters())
    assert model.recipe == recipe


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("size", SIZES)
def test_sizes_have_the_parameters_of_their_name(base: str, size: str):
    recipe = load_recipe(f"{base}-{size}")
    assert recipe.name == f"{base}-{size}" and recipe.overrides == {}
    model = build(recipe, device="meta")
    count = sum(parameter.numel() for parameter in model.parameters())
    assert abs(count / SIZES[size] - 1) < 0.01
    assert recipe.vocab == 32000
    if size in PUBLISHED:
        depth, dim, _ = PUBLISHED[size]
        assert (recipe.depth, recipe.dim) == (depth, dim)


def test_sizes_have_the_published_settings():
    (context, _), (persistent, _) = load_recipe("mac-1.3b").layers["mac"], load_recipe("mag-760m").layers["mag"]
    assert (context["segment"], context["persistent"], context["attend"]["heads"]) == (512, 128, 8)
    memory = context["memory"]
    assert [memory[key] for key in ("heads", "depth", "expansion", "chunk", "conv")] == [8, 2, 4, 16, 4]
    assert (persistent["tokens"], persistent["of"]["branches"][0]["window"]) == (128, 2048)
    assert [branch["heads"] for branch in persistent["of"]["branches"]] == [16, 16]
    mal = load_recipe("mal-340m").layers["mal"][0]
    assert (mal["tokens"], mal["of"]["of"][0]["chunk"], mal["of"]["of"][1]["window"]) == (128, 16, 2048)
