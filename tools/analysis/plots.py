"""The figures as PNG and SVG files, drawn by Matplotlib."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np

from .. import plotting
from ..plotting import DASHES
from .figures import MAX_LINES, Figure, figures, first_rows

MAX_POINTS = 300
"""Of a line; longer ones are averaged."""


def draw(analysis: dict[str, Any]) -> Iterator[tuple[str, bytes]]:
    """Yields names and contents of files."""
    labels = [memory["label"] for memory in analysis["memories"]]
    for figure in figures(analysis):
        plot = (
            partial(_heat_map, figure, labels, first_rows(analysis)) if figure.is_heat_map else partial(_lines, figure)
        )
        for ending, content in plotting.draw(plot).items():
            yield f"{figure.name}.{ending}", content


def _lines(figure: Figure, axes: Any) -> None:
    for line in figure.lines:
        x, y = _averaged(line.x), _averaged(line.y)
        if line.reference:
            axes.plot(x, y, color=line.color, linewidth=0.7, alpha=0.5)
            continue
        axes.plot(x, y, DASHES[line.dash], color=line.color, label=line.label)
        if line.error is not None and len(figure.lines) <= MAX_LINES:
            axes.fill_between(x, y - line.error, y + line.error, color=line.color, alpha=0.2, linewidth=0)
    if figure.zero_line:
        axes.axhline(0, color="gray", linewidth=0.8)
    if figure.log_x:
        ticks = figure.lines[0].x
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, [f"{tick - 1:,}" for tick in ticks])
        axes.minorticks_off()
    axes.set(title=figure.title, xlabel=figure.x_label, ylabel=figure.y_label, ylim=figure.y_range)
    if len(figure.lines) <= MAX_LINES:
        outside = {"fontsize": 7, "loc": "upper left", "bbox_to_anchor": (1, 1)}
        axes.legend(**(outside if len(figure.lines) > 3 else {}))


def _heat_map(figure: Figure, labels: list[str], edges: np.ndarray, axes: Any) -> None:
    from matplotlib.colors import LogNorm

    table, x = figure.table, figure.lines[0].x
    picture = axes.imshow(
        np.where(table > 0, table, np.nan) if figure.log_y else table, aspect="auto", interpolation="nearest",
        cmap="viridis", extent=(0, x[0] + x[-1] + 1, len(table), 0), norm=LogNorm() if figure.log_y else None,
    )  # fmt: skip
    axes.set_yticks((edges[1:] + edges[:-1]) / 2, labels)
    for start in edges[1:-1]:
        axes.axhline(start, color="white", linewidth=1.5)
    axes.grid(False)
    axes.set(title=figure.title, xlabel=figure.x_label)
    axes.figure.colorbar(picture, ax=axes, label=figure.y_label, pad=0.01)


def _averaged(values: np.ndarray) -> np.ndarray:
    """Means of equally many neighbors, without NaN, ``MAX_POINTS`` at most."""
    width = math.ceil(len(values) / MAX_POINTS)
    if width == 1:
        return values
    padded = np.pad(np.asarray(values, float), (0, -len(values) % width), constant_values=np.nan).reshape(-1, width)
    real = ~np.isnan(padded)
    with np.errstate(invalid="ignore"):
        means: np.ndarray = np.where(real, padded, 0).sum(1) / real.sum(1)
    return means
