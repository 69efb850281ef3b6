"""Steps lie where their values are, and every position and value is inside of the axes."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree

import pytest

from titans_build.tools.inference.plot import BOTTOM, COLOURS, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Curve, draw


def corners(picture: str, colour: str) -> list[tuple[float, float]]:
    paths = [mark for mark in ElementTree.fromstring(picture) if mark.get("stroke") == colour]
    numbers = [float(number) for number in re.findall(r"-?[\d.]+", str(paths[0].get("d")))]
    return list(zip(numbers[::2], numbers[1::2]))


@pytest.mark.parametrize(
    "steps",
    [
        [(0, 128, 2.0), (128, 256, 1.0), (256, 512, 1.5)],
        [(0, 2, 7.0)],
        [(0, 128, 0.0), (128, 2**21, 1e-5)],
        [(100, 101, 1e6), (101, 2**40, -3.0)],
    ],
    ids=str,
)
def test_every_step_is_inside(steps: list[tuple[int, int, float]]) -> None:
    picture = draw([Curve("a", steps), Curve("b", steps)], "a <title> \x00")
    assert ElementTree.fromstring(picture)[0].text == "a <title> \ufffd"
    for colour in COLOURS:
        points = corners(picture, colour)
        assert points[0][0] == LEFT and points[-1][0] == pytest.approx(WIDTH - RIGHT, abs=0.1)
        assert all(LEFT <= x <= WIDTH - RIGHT + 0.1 and TOP - 0.1 <= y <= HEIGHT - BOTTOM + 0.1 for x, y in points)


def test_lower_values_are_lower() -> None:
    points = corners(draw([Curve("a", [(0, 128, 2.0), (128, 256, 1.0)])], "t"), COLOURS[0])
    assert points[0][1] < points[-1][1]
