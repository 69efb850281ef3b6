"""Drawing PNG and SVG files with Matplotlib: the colors, the style, and the same bytes for the same data."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from .extras import from_extra

COLORS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9")
"""The colors of Okabe and Ito, which color-blind readers can tell apart."""
DASHES = ("-", "--", ":", "-.")
SIZE = (9.0, 3.6)
"""Inches."""
DPI = 150
STYLE: dict[Any, Any] = {
    "svg.hashsalt": "titans-analyze",  # the same data gives the same bytes
    "svg.fonttype": "none",  # text stays text
    "font.size": 9,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "axes.spines.top": False,
    "axes.spines.right": False,
}
METADATA: dict[str, dict[str, None]] = {"png": {"Software": None}, "svg": {"Date": None}}


def need_matplotlib(extra: str, purpose: str) -> None:
    """Raise ``UsageError`` that names ``extra`` and ``purpose`` where Matplotlib is missing."""
    from_extra("matplotlib.figure", extra, purpose)


def draw(plot: Callable[[Any], None], formats: Sequence[str] = ("png", "svg"), size: tuple[float, float] = SIZE) -> Any:
    """``{"png": bytes, "svg": bytes}`` of what ``plot`` draws on the axes that it is given."""
    import matplotlib
    from matplotlib.figure import Figure

    files = {}
    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # an SVG's text needs no glyph here
        figure = Figure(figsize=size, layout="constrained")
        plot(figure.subplots())
        for format in formats:
            file = io.BytesIO()
            figure.savefig(file, format=format, dpi=DPI, metadata=METADATA[format])
            files[format] = file.getvalue()
    return files
