"""The picture: well-formed, complete, inside its frame, and nothing in it that the recipe does not say."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import titans_build as tb
from titans_build.recipes import packaged_names
from titans_build.registry import scratch
from titans_build.tools.diagram import draw
from titans_build.tools.svg import text_width

Run = Callable[..., Any]
SVG = "{http://www.w3.org/2000/svg}"
BASES = [name for name in packaged_names() if not name.endswith(("m", "b"))]


def texts(picture: str) -> list[str]:
    return [element.text or "" for element in ElementTree.fromstring(picture).iter(f"{SVG}text")]


def small_picture(recipe: object, **overrides: object) -> str:
    return draw(tb.load_recipe(recipe, overrides), "a <name> & more")


def marks(
    element: ElementTree.Element, x: float = 0, y: float = 0
) -> Iterator[tuple[ElementTree.Element, float, float]]:
    """The marks of a picture with the origins of their coordinates."""
    for child in element:
        moved = re.fullmatch(r"translate\((-?[\d.]+) (-?[\d.]+)\)", child.get("transform", "translate(0 0)"))
        assert moved
        origin = x + float(moved[1]), y + float(moved[2])
        yield child, *origin
        if child.tag == f"{SVG}g":
            yield from marks(child, *origin)


@pytest.mark.parametrize("name", BASES)
def test_everything_is_inside_the_frame(name: str) -> None:
    root = ElementTree.fromstring(small_picture(name, dim=32))
    width, height = float(root.get("width", 0)), float(root.get("height", 0))
    seen = set()
    for mark, left, top in marks(root):
        seen.add(mark.tag.removeprefix(SVG))
        x, y = left + float(mark.get("x", 0)), top + float(mark.get("y", 0))
        if mark.tag == f"{SVG}rect":
            assert 0 <= x <= x + float(mark.get("width", 0)) <= width + 1
            assert 0 <= y <= y + float(mark.get("height", 0)) <= height + 1
        elif mark.tag == f"{SVG}text":
            long = text_width(mark.text or "", float(mark.get("font-size", 0)))
            x -= {"start": 0, "middle": long / 2, "end": long}[mark.get("text-anchor", "start")]
            assert 0 <= x <= x + long <= width, mark.text
            assert 0 < y < height
        elif mark.tag == f"{SVG}path" and mark.get("stroke"):
            for x, y in re.findall(r"[ML](-?[\d.]+) (-?[\d.]+)", mark.get("d", "")):
                assert 0 <= left + float(x) <= width and 0 <= top + float(y) <= height
    assert {"rect", "text", "path"} <= seen


@pytest.mark.parametrize("name", BASES)
def test_every_block_and_repeat_is_drawn(name: str) -> None:
    recipe = tb.load_recipe(name, {"dim": 32})
    words = texts(draw(recipe, name))

    def check(node: Any) -> None:
        if isinstance(node, dict):
            if "type" in node and node["type"] != "chain":
                assert node["type"] in words
            for value in node.values():
                check(value)
        elif isinstance(node, list):
            for value in node:
                check(value)

    check(recipe.layers)
    assert all(label in words for label in recipe.layers)
    assert f"×{recipe.stack[0]['repeat']}" in words
    assert {"tokens", "embedding", "head", "logits"} <= set(words)


def test_mac_shows_the_four_steps_and_their_order() -> None:
    picture = small_picture("mac", dim=32)
    heights = {mark.text: top + float(mark.get("y", 0)) for mark, _, top in marks(ElementTree.fromstring(picture))}
    steps = ["1  read", "2  attend", "3  write", "4  gate"]
    assert [heights[step] for step in steps] == sorted(heights[step] for step in steps)
    assert "causal, over 16 learned tokens, h and x" in heights and "segments of 128 tokens" in heights
    assert any(text.startswith("snapshot ") for text in texts(picture))


def test_what_is_written_is_said() -> None:
    written = {"layers.mac.0.write": "inputs", "layers.mac.0.persistent": 0}
    words = texts(draw(tb.load_recipe("mac", {"dim": 32, **written}), "mac"))
    assert "x into the memory," in words and "y and M(x)" in words
    assert not any("learned tokens" in text for text in words)


def test_nested_repeats_and_layers_drawn_once() -> None:
    layers = {"a": ["ffn"], "b": ["attention"]}
    recipe = {"version": 1, "dim": 32, "layers": layers, "stack": [{"repeat": 3, "of": ["a", "a", "b"]}, "a"]}
    words = texts(small_picture(recipe))
    assert {"×3", "×2"} <= set(words)
    assert words.count("a") == 2 and words.count("as above") == 1
    assert words.count("vectors") == 2 and "grows" in words
    assert any("grows with every token" in text for text in words)


def test_an_unknown_combinator_shows_what_is_inside() -> None:
    with scratch():

        @tb.register("switch")
        class Switch(tb.Block):
            """Left on even tokens, right on odd ones."""

            def __init__(self, dim: int, *, left: tb.Spec = "ffn", right: tb.Spec = "memory") -> None:
                super().__init__(dim)
                self.left = tb.create(left, dim=dim)
                self.right = tb.create(right, dim=dim)

            def init_state(self, batch_size: int) -> Any:
                return (self.left.init_state(batch_size), self.right.init_state(batch_size))

        words = texts(small_picture({"version": 1, "dim": 32, "layers": {"a": ["switch"]}, "stack": ["a"]}))
    assert {"switch", "left", "right", "ffn", "memory"} <= set(words)


def test_names_are_escaped() -> None:
    assert texts(small_picture("lmm", dim=32))[0] == "a <name> & more"


def test_the_same_recipe_gives_the_same_picture(titans_build: Run, small: Path, tmp_path: Path) -> None:
    out = tmp_path / "small.svg"
    assert titans_build("diagram", small, "--out", out) == (0, f"wrote {out}\n", "")
    assert titans_build("diagram", small).out == out.read_text(encoding="utf-8")
    assert titans_build("diagram", small, "--json").json["svg"] == out.read_text(encoding="utf-8")
    # nothing is fetched when it is looked at
    assert "href" not in out.read_text(encoding="utf-8") and "url(#" in out.read_text(encoding="utf-8")
