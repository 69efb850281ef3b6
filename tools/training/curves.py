"""A comparison as a picture: what each variant reached, against the tokens it had read."""

from __future__ import annotations

import io
from typing import Any

from ..extras import from_extra
from ..plotting import COLOURS, DPI, STYLE

SIZE = (7.0, 4.2)
"""Inches."""
NAMES = {"accuracy": "accuracy", "bits_per_byte": "bits per byte", "loss": "loss (nats)"}


def draw(comparison: dict[str, Any], title: str) -> dict[str, bytes]:
    """``{"png": ..., "svg": ...}`` of what ``compare`` has found. Raises ``UsageError`` where matplotlib is missing."""
    matplotlib = from_extra("matplotlib", "train", "drawing a plot")
    figure = from_extra("matplotlib.figure", "train", "drawing a plot")
    metric = comparison["metric"]
    # the same comparison gives the same bytes
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": "titans-train"}):
        drawn = figure.Figure(figsize=SIZE, layout="constrained")
        axes = drawn.subplots()
        for index, variant in enumerate(comparison["variants"]):
            points = [(point["tokens"], point[metric]) for point in variant["curve"] or () if metric in point]
            style = ("-", "--", ":")[index // len(COLOURS) % 3]
            axes.plot(
                *zip(*points or [(0, float("nan"))]), style, color=COLOURS[index % len(COLOURS)], label=variant["name"]
            )
        axes.set_xlabel("tokens read in training")
        axes.set_ylabel(f"{NAMES[metric]}, validation")
        axes.set_title(title)
        axes.legend()
        files = {}
        for ending, metadata in (("png", {"Software": None}), ("svg", {"Date": None})):
            file = io.BytesIO()
            drawn.savefig(file, format=ending, dpi=DPI, metadata=metadata)
            files[ending] = file.getvalue()
    return files
