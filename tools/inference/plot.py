"""A picture of values by position: positions double to the right, each bucket is a step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from ..drawing.svg import Canvas

WIDTH, HEIGHT = 720.0, 400.0
LEFT, RIGHT, TOP, BOTTOM = 64.0, 24.0, 60.0, 52.0
COLOURS = ("#0f766e", "#b45309")
INK, GRID = "#374151", "#e5e7eb"
MOST_TICKS = 10


class Curve(NamedTuple):
    """One line: ``(start, stop, value)`` for each bucket."""

    name: str
    steps: list[tuple[int, int, float]]


def draw(curves: Sequence[Curve], title: str) -> str:
    """An SVG document. Each curve has at least one step."""
    canvas = Canvas()
    steps = [step for curve in curves for step in curve.steps]
    # the first bucket begins at 0, which has no place on this axis
    first = min(max(start, stop // 2, 1) for start, stop, _ in steps)
    last = max(stop for _, stop, _ in steps)
    low, high, tick = _scale(min(value for *_, value in steps), max(value for *_, value in steps))
    octaves = max(math.log2(last / first), 1e-9)

    def x(position: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * math.log2(max(position, first) / first) / octaves

    def y(value: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (value - low) / (high - low)

    canvas.text(LEFT, 20, _printable(title), size=14, bold=True, anchor="start", colour=INK)
    for index in range(round((high - low) / tick) + 1):
        value = low + index * tick
        canvas.line([(LEFT, y(value)), (WIDTH - RIGHT, y(value))], stroke=GRID, thickness=1)
        canvas.text(LEFT - 8, y(value), f"{value:.{max(0, -math.floor(math.log10(tick)))}f}", anchor="end", colour=INK)
    powers = range(math.ceil(math.log2(first)), math.floor(math.log2(last)) + 1)
    for power in powers[:: max(1, math.ceil(len(powers) / MOST_TICKS))]:
        canvas.line([(x(2**power), HEIGHT - BOTTOM), (x(2**power), HEIGHT - BOTTOM + 5)], stroke=INK, thickness=1)
        canvas.text(x(2**power), HEIGHT - BOTTOM + 16, _short(2**power), colour=INK)
    canvas.text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 14, "position in the text (tokens)", colour=INK)
    for index, (curve, colour) in enumerate(zip(curves, COLOURS)):
        corners = [(x(at), y(value)) for start, stop, value in curve.steps for at in (start, stop)]
        canvas.line(corners, stroke=colour, thickness=2, bend=0)
        canvas.line([(LEFT + 150 * index, 42), (LEFT + 150 * index + 22, 42)], stroke=colour, thickness=2)
        canvas.text(LEFT + 150 * index + 28, 42, curve.name, anchor="start", colour=INK)
    return canvas.document(WIDTH, HEIGHT, _printable(title), INK)


def _scale(least: float, most: float) -> tuple[float, float, float]:
    """An axis from low to high with a round distance between its ticks."""
    span = max(most - least, abs(most) * 1e-3, 1e-6)
    power = 10.0 ** math.floor(math.log10(span / 5))
    tick = next(power * step for step in (1, 2, 5, 10) if span / (power * step) <= 5)
    low = math.floor(least / tick) * tick
    return low, max(math.ceil(most / tick) * tick, low + tick), tick


def _short(number: int) -> str:
    for size, unit in ((2**20, "M"), (2**10, "k")):
        if number >= size:
            return f"{number // size}{unit}"
    return str(number)


def _printable(text: str) -> str:
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text)
