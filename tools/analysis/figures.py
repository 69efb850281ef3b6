"""The figures of an analysis: what each of them shows. ``page`` and ``plots`` draw them."""

from __future__ import annotations

import colorsys
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from ..plotting import COLORS, DASHES
from .recording import QUANTITIES

WIDE = 30
"""Ratio of the largest to the smallest value from which a scale is logarithmic."""
MAX_LINES = 24
"""Lines at most whose names and errors are shown."""
TEXTS = {
    "loss": (
        "Loss along the text",
        "loss ({unit})",
        "Means over stretches of the text. Below the frozen line, the live memory predicts better.",
    ),
    "saved": (
        "Loss that the live memory saves (bands: one standard error)",
        "saved ({unit})",
        "Above zero, the live memory predicts better than the other one.",
    ),
    "surprise": (
        "Surprise",
        "surprise (norm of the gradient)",
        "The norm of the gradient of the memory's loss at a token, before clipping.",
    ),
    "error": ("Error", "error |M(k) − v|²", "The squared distance of the memory's output for a key from the value."),
    "step": ("Step size", "step size θ", "That of the gradient descent at a token; 0: the token is not written."),
    "momentum": ("Momentum", "momentum η", "The decay of the momentum: near 1, a write continues for many tokens."),
    "forgetting": (
        "Forgetting",
        "forgetting α",
        "The share of the weights that is removed: 0.01 halves them in 69 tokens.",
    ),
    "recall-kept": (
        "Recall of planted pairs: what is left of the write",
        "share of the write's effect",
        "The effect of the write on the output for its key, relative to the effect right after the write. Momentum "
        "continues the write, so the line may rise first. The half-life is the distance at which it has fallen to half "
        "of its largest value. In a head whose line swings to both sides, small changes grow: it recalls nothing.",
    ),
    "recall-cosine": (
        "Recall of planted pairs: cosine (thin: without the pair)",
        "cosine of output and value",
        "Only what lies above the thin line of the same color was remembered.",
    ),
    "recall-relative_error": (
        "Recall of planted pairs: relative error (thin: without the pair)",
        "|output − value| / |value|",
        "Only what lies below the thin line of the same color was remembered.",
    ),
    "drift-distance": (
        "Weights of each head's memory: distance from the start",
        "|W − W₀| / |W₀|",
        "If a line levels off, writing and forgetting balance; if it keeps rising, they leave the trained range.",
    ),
    "drift-norm": (
        "Weights of each head's memory: norm",
        "|W|",
        "If it falls steadily, the memory forgets faster than it writes; if it rises without end, it will overflow.",
    ),
    "gates": ("Gate use", "gate, mean over features", "A flat line at one half is a gate that does not choose."),
    "branches": (
        "Attention against memory",
        "second branch's share of both norms",
        "The norms are taken before the normalization: they say how strong each branch is, not how much it helps.",
    ),
    "norms": (
        "Norms of both branches",
        "norm of the branch's output",
        "Solid lines are the first branch of a gate, dashed lines the second.",
    ),
}
"""Title, label of the values, and caption of each figure."""


class Line(NamedTuple):
    label: str
    x: np.ndarray
    y: np.ndarray
    color: str
    dash: int = 0
    """Index of ``DASHES``."""
    error: np.ndarray | None = None
    """Standard error of ``y``, drawn as a band."""
    memory: int | None = None
    """Index of the memory that the line belongs to."""
    reference: bool = False
    """Drawn thin and without a label."""
    maximum: np.ndarray | None = None
    """The largest value of the tokens that ``y`` is the mean of."""


class Figure(NamedTuple):
    name: str
    """That of its files, too."""
    title: str
    x_label: str
    y_label: str
    caption: str
    lines: list[Line]
    log_x: bool = False
    """A logarithmic axis with a tick at each point. Labels are one less than positions, as 0 has no logarithm."""
    log_y: bool = False
    y_range: tuple[float, float] | None = None
    zero_line: bool = False
    is_heat_map: bool = False
    """The files show the lines as the rows of a heat map, and the page has both."""

    @property
    def table(self) -> np.ndarray:
        """The rows of the heat map; a bin's value is its maximum."""
        return np.stack([line.y if line.maximum is None else line.maximum for line in self.lines])


def figures(analysis: dict[str, Any]) -> Iterator[Figure]:
    """All figures but that of :func:`branch_norms`."""
    yield from _losses(analysis)
    for quantity in QUANTITIES:
        yield _quantity(analysis, quantity)
    if analysis["recall"]["memories"]:
        for kind in ("kept", "cosine", "relative_error"):
            yield _recall(analysis, kind)
    at = [np.array(drift["positions"]) for drift in analysis["drift"]]
    for kind in ("distance", "norm"):
        yield _figure(
            analysis, f"drift-{kind}", _head_lines(analysis, at, [drift[kind] for drift in analysis["drift"]])
        )
    if analysis["gates"]:
        yield from _gates(analysis)


def _figure(
    analysis: dict[str, Any], name: str, lines: list[Line], facts: Sequence[str] = (), **options: Any
) -> Figure:
    """``facts`` are added to the caption."""
    title, y_label, caption = TEXTS[name]
    x_label = f"position in the text ({analysis['text']['unit']}s)"
    found = Figure(name, title, x_label, y_label.format(unit=analysis["check"]["unit"]), caption, lines)
    return found._replace(caption=" ".join([caption, *facts]), **options)


def _losses(analysis: dict[str, Any]) -> Iterator[Figure]:
    check = analysis["check"]
    edges = np.array([*check["positions"], analysis["text"]["tokens"]])
    at, losses = (edges[1:] + edges[:-1]) / 2, check["losses"]
    lines = [
        Line("live", at, losses["live"], COLORS[0]),
        Line("frozen", at, losses["frozen"], COLORS[4], 1),
        Line(f"reset every {check['reset_every']:,}", at, losses["reset"], COLORS[2], 2),
    ]
    yield _figure(analysis, "loss", lines)
    saved = [
        line._replace(label=f"{line.label} minus live", y=line.y - losses["live"], error=error, dash=dash)
        for dash, (line, error) in enumerate(zip(lines[1:], check["errors"].values()))
    ]
    yield _figure(analysis, "saved", saved, zero_line=True)


def _quantity(analysis: dict[str, Any], name: str) -> Figure:
    kinds, width = analysis["tokens"][name], analysis["text"]["bin"]
    lines = _head_lines(analysis, [positions(analysis)] * len(kinds["mean"]), kinds["mean"], maximum=kinds.get("max"))
    facts = [
        "The bars at the right are the distribution of the values. The text under the cursor stands above the values."
    ]
    values = np.concatenate(kinds["mean"])
    if len(values := values[np.isfinite(values)]):
        facts.append(f"Over all heads: mean {values.mean():.4g}, from {values.min():.4g} to {values.max():.4g}.")
    if width > 1:
        facts.insert(0, f"A column stands for {width} tokens: its color is their maximum, the line their mean.")
    found = _figure(analysis, name, lines, facts, is_heat_map=True)
    pooled = f", maximum of {width} tokens" if width > 1 else ""
    return found._replace(title=f"{found.title} of each head{pooled}", log_y=is_wide(name, found.table))


def is_wide(quantity: str, values: np.ndarray) -> bool:
    """Whether values of a quantity are shown on a logarithmic scale."""
    real = values[np.isfinite(values) & (values > 0)]
    return len(real) > 0 and quantity != "momentum" and bool(real.max() > WIDE * real.min())


def _recall(analysis: dict[str, Any], kind: str) -> Figure:
    recalls = analysis["recall"]["memories"]
    at = [np.array(recall["distances"]) + 1 for recall in recalls]
    errors = [recall[f"{kind}_error"] for recall in recalls] if f"{kind}_error" in recalls[0] else None
    lines = _head_lines(analysis, at, [recall[kind] for recall in recalls], error=errors)
    facts = [f"Means and standard errors (bands) are over {analysis['recall']['planted']} pairs."]
    if kind == "kept" and len(lines) <= MAX_LINES:
        lives = [
            f"{'over ' if life is None else ''}{life or recall['distances'][-1]:,.0f} tokens"
            for recall in recalls
            for life in recall["half_life"]
        ]
        facts.insert(0, f"Half-lives: {', '.join(f'{life} ({line.label})' for life, line in zip(lives, lines))}.")
    elif kind != "kept":
        without = _head_lines(analysis, at, [recall[f"{kind}_without"] for recall in recalls])
        lines += [line._replace(reference=True) for line in without]
    options = {"x_label": "tokens read since the write", "log_x": True, "zero_line": kind == "kept"}
    return _figure(analysis, f"recall-{kind}", lines, facts, **options)


def _gates(analysis: dict[str, Any]) -> Iterator[Figure]:
    at = positions(analysis)
    uses, shares, use_facts, share_facts = [], [], [], []
    for index, gate in enumerate(analysis["gates"]):
        label, (first, second), color = gate["label"], gate["branches"], COLORS[index % len(COLORS)]
        uses.append(Line(label, at, gate["gate"], color))
        form = gate["form"] or "its own gate"
        use_facts.append(f"{label}: {first} is combined with {second} ({form}); mean gate {gate['mean_gate']:.3g}.")
        shares.append(Line(f"{label}: {second} beside {first}", at, gate["share"], color))
        share_facts.append(f"{label}: {second} has {gate['mean_share']:.1%} on the mean of the text.")
    yield _figure(analysis, "gates", uses, use_facts)
    yield _figure(analysis, "branches", shares, share_facts, y_range=(0, 1))


def branch_norms(analysis: dict[str, Any]) -> Figure:
    """Shown on the page alone."""
    lines = [
        Line(f"{gate['label']}: {name}", positions(analysis), gate[key], COLORS[index % len(COLORS)], dash)
        for index, gate in enumerate(analysis["gates"])
        for dash, (name, key) in enumerate(zip(gate["branches"], ("first", "second")))
    ]
    return _figure(analysis, "norms", lines, log_y=is_wide("norms", np.concatenate([line.y for line in lines])))


def _head_lines(
    analysis: dict[str, Any], at: list[np.ndarray], tables: list[np.ndarray], **more: list[np.ndarray] | None
) -> list[Line]:
    """A line for each head: a head has its color, a memory its dashes. Tables are ``[heads, points]`` by memory.

    ``more``: tables of other fields of ``Line``.
    """
    lines = []
    for index, memory in enumerate(analysis["memories"]):
        heads = memory["heads"]
        for head in range(heads):
            label = f"{memory['label']}, head {head}" if len(analysis["memories"]) > 1 else f"head {head}"
            color = COLORS[head] if heads <= len(COLORS) else _rainbow(head / heads)
            line = Line(label, at[index], tables[index][head], color, index % len(DASHES), memory=index)
            lines.append(
                line._replace(**{name: parts[index][head] for name, parts in more.items() if parts is not None})
            )
    return lines


def _rainbow(share: float) -> str:
    red, green, blue = (round(255 * part) for part in colorsys.hls_to_rgb(share, 0.45, 0.65))
    return f"#{red:02x}{green:02x}{blue:02x}"


def first_rows(analysis: dict[str, Any]) -> np.ndarray:
    """The first row of each memory in a heat map, and the number of all rows."""
    return np.cumsum([0, *(memory["heads"] for memory in analysis["memories"])])


def positions(analysis: dict[str, Any]) -> np.ndarray:
    """Of the centers of the bins; a bin of one token is at the token's position."""
    text = analysis["text"]
    return np.arange(math.ceil(text["shown"] / text["bin"])) * text["bin"] + (text["bin"] - 1) / 2
