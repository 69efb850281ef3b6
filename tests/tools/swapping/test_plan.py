"""Patterns of module paths, and the errors for those that match nothing."""

import pytest
from torch import nn

import titans_build as tb
from titans_build.tools.swapping import SwapError
from titans_build.tools.swapping.plan import match

MEMORY = {"type": "memory", "heads": 2, "chunk": 4}


def paths(model, where, **choice):
    return list(match(model, where, **choice))


def test_patterns(plain):
    model = plain(4)
    assert paths(model, "layers.*") == ["layers.0", "layers.1", "layers.2", "layers.3"]
    assert paths(model, "layers.*.2") == [f"layers.{i}.2" for i in range(4)]
    assert paths(model, "*head") == ["head"]
    assert paths(model, "**.2.0") == ["layers.2.0"]
    assert paths(model, ["head", "layers.1"]) == ["layers.1", "head"]
    assert paths(model, "layers.*", every=2) == ["layers.0", "layers.2"]
    assert paths(model, "layers.*", every=2, start=1) == ["layers.1", "layers.3"]


@pytest.mark.parametrize(
    "where, said",
    [
        ("layer.*", "'layer.*' matches no module of Plain; did you mean 'layers'? (at the top there are: embedding,"),
        ("layers.7", "(at layers there are: 0, 1, 2)"),
        ("layers.*.attention", "(at layers.* there are: 0, 1, 2)"),
        ("head.weight", "(at head there are: none)"),
        ("**.attention", "matches no module"),
        (["layers.*", "layers.1"], "layers.1 is matched twice: by 'layers.*' and by 'layers.1'"),
        (["layers.1", "layers.1.0"], "layers.1.0 is inside layers.1, which is matched, too"),
        ("", "expected a pattern such as"),
        ([], "expected a pattern such as"),
        ([3], "expected a pattern such as"),
    ],
)
def test_patterns_that_match_nothing_or_twice(plain, where, said):
    with pytest.raises(SwapError) as raised:
        match(plain(), where)
    assert said in str(raised.value)


def test_a_module_with_two_names():
    shared = nn.Linear(4, 4)
    model = nn.ModuleDict({"a": shared, "b": shared})
    with pytest.raises(SwapError, match="a and b are one and the same module"):
        match(model, "*")
    assert paths(model, "b") == ["b"]


def test_swapped_blocks_are_not_matched(plain):
    model = plain()
    tb.swap(model, "layers.0", MEMORY, "beside")
    tb.swap(model, "layers.1", MEMORY, "replace")
    assert paths(model, "layers.*") == ["layers.0", "layers.1", "layers.2"]
    assert paths(model, "layers.*.*") == [f"layers.{i}.{j}" for i in (0, 2) for j in range(3)]
    with pytest.raises(SwapError):
        match(model, "layers.0.titans")
