"""The page: one HTML file with its style, its scripts and the packed numbers inside, which loads nothing."""

from __future__ import annotations

import base64
import html
import json
import math
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from ..rounding import rounded

SCRIPTS = ("data", "chart", "heat", "page", "worth", "activity", "values", "lasting", "gates", "start")
"""In the order in which they stand in the page, as parts of one function."""
STEPS = 254
"""Between the lowest and the highest value of a packed row; one more stands for a missing value."""


def render(analysis: dict[str, Any]) -> str:
    """The page of an analysis, as ``analyse`` makes it with ``model`` added."""
    folder = Path(__file__).parent
    read = lambda name: (folder / name).read_text(encoding="utf-8")  # noqa: E731
    data = json.dumps(_packed(analysis), ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    parts = {
        "title": html.escape(f"Memory of {analysis['model']['name']} on {analysis['text']['name']}"),
        "style": read("style.css"),
        "script": "\n".join(read(f"{name}.js") for name in SCRIPTS),
        # a text may hold "</script>"
        "data": data.replace("<", "\\u003c"),
    }
    pieces = read("page.html").split("{{")
    return pieces[0] + "".join(parts[name] + rest for name, _, rest in (piece.partition("}}") for piece in pieces[1:]))


def _packed(analysis: dict[str, Any]) -> dict[str, Any]:
    """Plain JSON, in which the long tables, one value for each bin of the text, are packed."""
    tokens = {
        quantity: {kind: pack(np.concatenate(tables)) for kind, tables in kinds.items()}
        for quantity, kinds in analysis["tokens"].items()
    }
    gates = [
        {key: pack(value[None]) if isinstance(value, np.ndarray) else rounded(value) for key, value in gate.items()}
        for gate in analysis["gates"]
    ]
    rest = {key: value for key, value in analysis.items() if key not in ("tokens", "gates")}
    return {**rounded(rest), "tokens": tokens, "gates": gates}


def pack(table: np.ndarray) -> dict[str, Any]:
    """Rows of numbers in a byte each, deflated: ``data.js`` says how, and reads them."""
    finite = np.isfinite(table)
    low = np.min(table, axis=1, where=finite, initial=math.inf)
    high = np.max(table, axis=1, where=finite, initial=-math.inf)
    empty = ~finite.any(axis=1)
    low[empty], high[empty] = 0, 0
    log = bool((low > 0).all() and (high > 30 * low).any())
    bend = np.log if log else np.asarray
    with np.errstate(invalid="ignore", divide="ignore"):
        reach = np.asarray(bend(high) - bend(low))[:, None]
        share = np.where(reach > 0, (bend(table) - np.asarray(bend(low))[:, None]) / np.where(reach > 0, reach, 1), 0)
        steps = np.where(finite, np.rint(np.nan_to_num(share) * STEPS), STEPS + 1).astype(np.uint8)
    data = zlib.compress(steps.tobytes(), 9)
    ranges = [[float(f"{a:.6g}"), float(f"{b:.6g}")] for a, b in zip(low.tolist(), high.tolist())]
    return {"shape": list(table.shape), "ranges": ranges, "log": log, "bytes": base64.b64encode(data).decode()}
