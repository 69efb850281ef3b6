"""The figures of an analysis: what each of them shows. ``page`` and ``plots`` draw them."""

from __future__ import annotations

import colorsys
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from ..plotting import COLOURS, DASHES
from .recording import QUANTITIES

WIDE = 30
"""Ratio of the largest to the smallest value from which a scale is logarithmic."""


class Line(NamedTuple):
    label: str
    x: np.ndarray
    y: np.ndarray
    colour: str
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


class LineChart(NamedTuple):
    name: str
    title: str
    x_label: str
    y_label: str
    lines: list[Line]
    caption: str
    log_x: bool = False
    """A logarithmic axis with a tick at each point. Labels are one less than positions, as 0 has no logarithm."""
    log_y: bool = False
    y_range: tuple[float, float] | None = None
    zero_line: bool = False
    along_text: bool = True


class HeatMap(NamedTuple):
    name: str
    title: str
    x_label: str
    colour_label: str
    table: np.ndarray
    """``[rows, bins]``."""
    sizes: list[int]
    """Rows of each memory."""
    time: int
    """Tokens of all bins."""
    log: bool


class Quantity(NamedTuple):
    title: str
    axis: str
    caption: str


QUANTITY: dict[str, Quantity] = {
    "surprise": Quantity(
        "Surprise",
        "surprise (norm of the gradient)",
        "The norm of the gradient of the memory's loss for a token's key and value, before clipping: how badly the "
        "memory predicted this token.",
    ),
    "error": Quantity(
        "Error",
        "error |M(k) − v|²",
        "The squared distance between the memory's answer to a token's key and the token's value.",
    ),
    "step": Quantity(
        "Step size",
        "step size θ",
        "The step size of the memory's gradient descent at a token; 0 means that the token is not written.",
    ),
    "momentum": Quantity(
        "Momentum",
        "momentum η",
        "The decay of past surprise at a token: near 1, a write continues for many tokens.",
    ),
    "forgetting": Quantity(
        "Forgetting",
        "forgetting α",
        "The share of the memory's weights that is removed at a token: 0.01 halves what was there in 69 tokens.",
    ),
}
RECALL = {
    "kept": (
        "share of the write's effect",
        "what is left of the write",
        "The effect of the write on the answer to its key, relative to the effect right after the write. Momentum "
        "continues the write, so the line may rise first. The distance at which it has fallen to half of its largest "
        "value is the half-life of the pair. A line with large swings to both sides belongs to a head in which every "
        "small change grows: it recalls nothing.",
    ),
    "cosine": (
        "cosine of answer and value",
        "cosine",
        "The cosine between the memory's answer to the planted key and the planted value. Thin lines are those of a "
        "memory without the pair: only what lies above the thin line of the same colour was remembered.",
    ),
    "relative_error": (
        "|answer − value| / |value|",
        "relative error",
        "The distance of the memory's answer to the planted key from the planted value. Thin lines are those of a "
        "memory without the pair: only what lies below the thin line of the same colour was remembered.",
    ),
}
DRIFT = {
    "distance": (
        "|W − W₀| / |W₀|",
        "distance from the start",
        "The distance of a head's weights from the initial ones, relative to the norm of these. A line that levels off "
        "has writing and forgetting in balance; one that keeps rising will leave the range the model was trained in.",
    ),
    "norm": (
        "|W|",
        "norm",
        "The Frobenius norm of a head's weights, over all layers of its network. If it falls steadily, the memory "
        "forgets faster than it writes; if it rises without end, it will overflow.",
    ),
}


def figures(analysis: dict[str, Any]) -> Iterator[LineChart | HeatMap]:
    """The figures of which PNG and SVG files are written; a figure's name is that of its files."""
    yield loss(analysis)
    yield saved(analysis)
    for quantity in QUANTITIES:
        yield heat_map(analysis, quantity)
    if analysis["recall"]["memories"]:
        for kind in RECALL:
            yield recall(analysis, kind)
    for kind in DRIFT:
        yield drift(analysis, kind)
    if analysis["gates"]:
        yield gates(analysis)
        yield branches(analysis)


def loss(analysis: dict[str, Any]) -> LineChart:
    check = analysis["check"]
    at = _middles(analysis)
    lines = [
        Line(label, at, check["losses"][key], COLOURS[colour], dash)
        for dash, ((key, label), colour) in enumerate(zip(_modes(check).items(), (0, 4, 2)))
    ]
    return LineChart(
        "loss", "Loss along the text", _position(analysis), f"loss ({check['unit']})", lines,
        "Each point is the mean over a stretch of the text. Where the live line lies below the frozen one, having "
        "written the text so far makes the next token easier to predict.",
    )  # fmt: skip


def saved(analysis: dict[str, Any]) -> LineChart:
    check = analysis["check"]
    at = _middles(analysis)
    lines = [
        Line(
            f"{_modes(check)[key]} minus live", at, check["losses"][key] - check["losses"]["live"],
            COLOURS[colour], dash, error=check["errors"][key],
        )
        for dash, (key, colour) in enumerate((("frozen", 4), ("reset", 2)))
    ]  # fmt: skip
    return LineChart(
        "saved", "Loss that the live memory saves (bands: one standard error)", _position(analysis),
        f"saved ({check['unit']})", lines,
        "Above zero, the live memory predicts better than the other one. The band is one standard error over the "
        "tokens of the stretch.", zero_line=True,
    )  # fmt: skip


def heat_map(analysis: dict[str, Any], quantity: str) -> HeatMap:
    kinds, text = analysis["tokens"][quantity], analysis["text"]
    tables = kinds.get("max", kinds["mean"])
    table = np.concatenate(tables)
    pooled = f", maximum of {text['bin']} tokens" if text["bin"] > 1 else ""
    return HeatMap(
        quantity, f"{quantity.capitalize()} of each head{pooled}", _position(analysis), QUANTITY[quantity].axis,
        table, [len(part) for part in tables], text["shown"], is_wide(quantity, table),
    )  # fmt: skip


def is_wide(quantity: str, values: np.ndarray) -> bool:
    """Whether values of a quantity are shown on a logarithmic scale."""
    real = values[np.isfinite(values) & (values > 0)]
    return len(real) > 0 and quantity != "momentum" and bool(real.max() > WIDE * real.min())


def recall(analysis: dict[str, Any], kind: str) -> LineChart:
    y_label, name, caption = RECALL[kind]
    recalls = analysis["recall"]["memories"]
    at = [np.array(recall["distances"]) + 1 for recall in recalls]
    errors = [recall[f"{kind}_error"] for recall in recalls] if f"{kind}_error" in recalls[0] else None
    lines = head_lines(analysis, at, [recall[kind] for recall in recalls], errors=errors)
    if f"{kind}_without" in recalls[0]:
        without = head_lines(analysis, at, [recall[f"{kind}_without"] for recall in recalls])
        lines += [line._replace(reference=True) for line in without]
    thin = "" if kind == "kept" else " (thin: without the pair)"
    title = f"Recall of planted pairs: {name}{thin}"
    return LineChart(
        f"recall-{kind}", title, "tokens read since the write", y_label, lines, caption,
        log_x=True, zero_line=kind == "kept", along_text=False,
    )  # fmt: skip


def drift(analysis: dict[str, Any], kind: str) -> LineChart:
    y_label, name, caption = DRIFT[kind]
    at = [np.array(drift["positions"]) for drift in analysis["drift"]]
    lines = head_lines(analysis, at, [drift[kind] for drift in analysis["drift"]])
    return LineChart(
        f"drift-{kind}", f"Weights of each head's memory: {name}", _position(analysis), y_label, lines, caption
    )


def gates(analysis: dict[str, Any]) -> LineChart:
    at = positions(analysis)
    lines = [
        Line(gate["label"], at, gate["gate"], COLOURS[index % len(COLOURS)])
        for index, gate in enumerate(analysis["gates"])
    ]
    forms = {"sigmoid": "the sigmoid", "silu": "SiLU", "sum": "1, as the branches are added,"}
    caption = " ".join(
        f"{gate['label']}: {gate['branches'][0]} is multiplied by {forms.get(gate['form'], 'the gate')} of the "
        f"normalised output of {gate['branches'][1]}; mean over the text {gate['mean_gate']:.3g}."
        for gate in analysis["gates"]
    )
    return LineChart(
        "gates", "Gate use", _position(analysis), "gate, mean over features", lines,
        f"{caption} A flat line at one half is a gate that does not choose.",
    )  # fmt: skip


def branches(analysis: dict[str, Any]) -> LineChart:
    at = positions(analysis)
    lines = [
        Line(
            f"{gate['label']}: {gate['branches'][1]} beside {gate['branches'][0]}", at, gate["share"],
            COLOURS[index % len(COLOURS)],
        )
        for index, gate in enumerate(analysis["gates"])
    ]  # fmt: skip
    caption = " ".join(
        f"{gate['label']}: {gate['branches'][1]} has {gate['mean_share']:.1%} on the mean of the text."
        for gate in analysis["gates"]
    )
    return LineChart(
        "branches", "Attention against memory", _position(analysis), "second branch's share of both norms", lines,
        f"{caption} The norms are those of the branches' outputs before they are normalised and combined: they say "
        "how strong each branch is, not how much it helps, which the losses above show.", y_range=(0, 1),
    )  # fmt: skip


def branch_norms(analysis: dict[str, Any]) -> LineChart:
    """Shown on the page alone."""
    at = positions(analysis)
    lines = [
        Line(f"{gate['label']}: {gate['branches'][branch]}", at, gate[key], COLOURS[index % len(COLOURS)], branch)
        for index, gate in enumerate(analysis["gates"])
        for branch, key in enumerate(("first", "second"))
    ]
    return LineChart(
        "norms", "Norms of both branches", _position(analysis), "norm of the branch's output", lines,
        "Solid lines are the first branch of a gate, dashed lines the second.",
        log_y=is_wide("norms", np.concatenate([line.y for line in lines])),
    )  # fmt: skip


def quantity_lines(analysis: dict[str, Any], quantity: str) -> list[Line]:
    """The values of a heat map as lines, which are shown on the page alone."""
    kinds = analysis["tokens"][quantity]
    at = [positions(analysis)] * len(kinds["mean"])
    return head_lines(analysis, at, kinds["mean"], maxima=kinds.get("max"))


def head_lines(
    analysis: dict[str, Any],
    at: list[np.ndarray],
    tables: list[np.ndarray],
    *,
    errors: list[np.ndarray] | None = None,
    maxima: list[np.ndarray] | None = None,
) -> list[Line]:
    """A line for each head: a head has its colour, a memory its dashes. Tables are ``[heads, points]`` by memory."""
    lines = []
    for index, memory in enumerate(analysis["memories"]):
        heads = memory["heads"]
        for head in range(heads):
            label = f"{memory['label']}, head {head}" if len(analysis["memories"]) > 1 else f"head {head}"
            colour = COLOURS[head] if heads <= len(COLOURS) else _rainbow(head / heads)
            line = Line(label, at[index], tables[index][head], colour, index % len(DASHES), memory=index)
            error = None if errors is None else errors[index][head]
            maximum = None if maxima is None else maxima[index][head]
            lines.append(line._replace(error=error, maximum=maximum))
    return lines


def _rainbow(share: float) -> str:
    red, green, blue = (round(255 * part) for part in colorsys.hls_to_rgb(share, 0.45, 0.65))
    return f"#{red:02x}{green:02x}{blue:02x}"


def positions(analysis: dict[str, Any]) -> np.ndarray:
    """Of the centres of the bins; a bin of one token is at the token's position."""
    text = analysis["text"]
    return np.arange(math.ceil(text["shown"] / text["bin"])) * text["bin"] + (text["bin"] - 1) / 2


def _middles(analysis: dict[str, Any]) -> np.ndarray:
    edges = np.array([*analysis["check"]["positions"], analysis["text"]["tokens"]])
    return (edges[1:] + edges[:-1]) / 2


def _position(analysis: dict[str, Any]) -> str:
    return f"position in the text ({analysis['text']['unit']}s)"


def _modes(check: dict[str, Any]) -> dict[str, str]:
    return {"live": "live", "frozen": "frozen", "reset": f"reset every {check['reset_every']:,}"}
