from __future__ import annotations

import builtins
import re
from pathlib import Path
from typing import Any

import pytest

import titans_build as tb
from titans_build.registry import Problem, RecipeError, join, nearest, show


def test_messages():
    error = RecipeError([Problem("layers.a.0", "wrong"), Problem("", "also wrong")], "a.yaml")
    assert str(error) == "a.yaml: 2 problems\n  layers.a.0: wrong\n  also wrong"
    assert str(RecipeError([Problem("dim", "wrong")])) == "recipe: 1 problem\n  dim: wrong"
    assert isinstance(error, ValueError)


def test_many_problems_are_shortened_in_the_message_only():
    error = RecipeError(Problem(str(i), "x") for i in range(50))
    assert len(error.problems) == 50
    assert str(error).endswith("\n  ... and 30 more") and str(error).count("\n") == 21


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "null"),
        (True, "true"),
        (3, "3"),
        pytest.param(10**5000, "an integer of 16610 bits", id="huge"),
        ("a\nb\x1b", r"'a\nb\x1b'"),
        ([1, 2, 3, 4], "[1, 2, 3, ...]"),
        ({"a": None}, "{'a': null}"),
    ],
)
def test_values_in_messages(value: Any, text: str):
    assert show(value) == text


@pytest.mark.parametrize("value", ["x" * 10**6, ["y" * 10**6] * 9, {"z" * 10**6: ["z" * 10**6]}, list(range(10**6))])
def test_values_in_messages_are_shortened(value: Any):
    assert len(show(value)) <= 60


@pytest.mark.parametrize(
    ("name", "names", "found"),
    [
        ("depht", ["heads", "depth"], "depth"),
        ("MAC", ["mac", "mag"], "mac"),
        ("mca", ["mal", "mag", "mac"], "mac"),
        ("Depth", ["DEPTH"], "DEPTH"),
        ("*dept?", ["heads", "depth"], "depth"),
        ("--learning-rate", ["--length", "--lr"], "--lr"),
        ("--temp", ["--template", "--temperature"], "--temperature"),
        ("zzz", ["heads", "depth"], None),
        ("x" * 10_000, ["x" * 10_000], None),
        ("", ["a"], None),
        (3, ["a"], None),
    ],
)
def test_nearest(name: Any, names: list[str], found: str | None):
    assert nearest(name, names) == (f"; did you mean {found!r}?" if found else "")


def test_paths():
    assert join("", "a") == "a" and join("a", 0) == "a.0" and join("a", "b-c_d") == "a.b-c_d"
    assert join("a", "b.c") == "a.'b.c'" and join("a", "") == "a.''" and join("a", "\x1b") == r"a.'\x1b'"


def test_the_errors_of_the_page_are_public_names():
    page = (Path(__file__).parents[2] / "docs" / "concepts.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `tb\.(\w+)` \(an? `(?:tb\.)?(\w+)`\) \|", page, flags=re.M)
    assert len(rows) == 6
    for name, base in rows:
        assert name in tb.__all__
        assert issubclass(getattr(tb, name), getattr(tb, base, None) or getattr(builtins, base))
