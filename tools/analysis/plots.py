"""Each figure of the page as a picture of its own, in PNG and SVG, drawn by Matplotlib."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np

from .. import plotting
from ..plotting import COLOURS, DASHES
from .seeing import QUANTITIES

POINTS = 300
"""Of a line along the text, at most."""
AXES = {
    "surprise": "surprise (norm of the gradient)",
    "error": "error |M(k) - v|²",
    "step": "step size θ",
    "momentum": "momentum η",
    "forgetting": "forgetting α",
}


def draw(analysis: dict[str, Any]) -> Iterator[tuple[str, bytes]]:
    """Yields file names and contents."""
    for name, plot in _plots(analysis):
        for ending, content in plotting.draw(partial(plot, analysis)).items():
            yield f"{name}.{ending}", content


Plot = Callable[[dict[str, Any], Any], None]


def _plots(analysis: dict[str, Any]) -> list[tuple[str, Plot]]:
    plots: list[tuple[str, Plot]] = [("loss", _loss), ("saved", _saved)]
    plots += [(quantity, partial(_heat, quantity=quantity)) for quantity in QUANTITIES]
    if analysis["recall"]["memories"]:
        plots += [(f"recall-{kind}", partial(_recall, kind=kind)) for kind in _RECALL]
    plots += [(f"drift-{kind}", partial(_drift, kind=kind)) for kind in _DRIFT]
    if analysis["gates"]:
        plots += [("gates", _gates), ("branches", _branches)]
    return plots


def _middles(check: dict[str, Any], time: int) -> np.ndarray:
    edges = np.array([*check["positions"], time])
    return (edges[1:] + edges[:-1]) / 2


def _along(analysis: dict[str, Any], axes: Any) -> None:
    axes.set_xlabel(f"position in the text ({analysis['text']['unit']}s)")


def _loss(analysis: dict[str, Any], axes: Any) -> None:
    check = analysis["check"]
    at = _middles(check, analysis["text"]["tokens"])
    for index, (key, label) in enumerate(_modes(check).items()):
        axes.plot(at, check["losses"][key], DASHES[index], color=COLOURS[(0, 4, 2)[index]], label=label)
    axes.set(title="Loss along the text", ylabel=f"loss ({check['unit']})")
    _along(analysis, axes)
    axes.legend()


def _saved(analysis: dict[str, Any], axes: Any) -> None:
    check = analysis["check"]
    at = _middles(check, analysis["text"]["tokens"])
    for index, key in enumerate(("frozen", "reset")):
        mean = check["losses"][key] - check["losses"]["live"]
        error, colour = check["errors"][key], COLOURS[(4, 2)[index]]
        axes.plot(at, mean, DASHES[index], color=colour, label=f"{_modes(check)[key]} minus live")
        axes.fill_between(at, mean - error, mean + error, color=colour, alpha=0.2, linewidth=0)
    axes.axhline(0, color="grey", linewidth=0.8)
    axes.set(title="What a live memory saves (bands: one standard error)", ylabel=f"saved ({check['unit']})")
    _along(analysis, axes)
    axes.legend()


def _modes(check: dict[str, Any]) -> dict[str, str]:
    return {"live": "live", "frozen": "frozen", "reset": f"reset every {check['reset_every']:,}"}


def _heat(analysis: dict[str, Any], axes: Any, quantity: str) -> None:
    from matplotlib.colors import LogNorm

    kinds = analysis["tokens"][quantity]
    tables = kinds.get("max", kinds["mean"])
    table = np.concatenate(tables)
    real = table[np.isfinite(table) & (table > 0)]
    far = len(real) > 0 and quantity != "momentum" and real.max() > 30 * real.min()
    text = analysis["text"]
    picture = axes.imshow(
        np.where(table > 0, table, np.nan) if far else table,
        aspect="auto", interpolation="nearest", cmap="viridis", extent=(0, text["shown"], len(table), 0),
        norm=LogNorm() if far else None,
    )  # fmt: skip
    sizes = [len(part) for part in tables]
    starts = np.cumsum([0, *sizes])[:-1]
    axes.set_yticks(starts + np.array(sizes) / 2, [memory["label"] for memory in analysis["memories"]])
    for start in starts[1:]:
        axes.axhline(start, color="white", linewidth=1.5)
    axes.grid(False)
    pooled = f", maximum of {text['bin']} tokens" if text["bin"] > 1 else ""
    axes.set_title(f"{quantity.capitalize()} of each head{pooled}")
    _along(analysis, axes)
    axes.figure.colorbar(picture, ax=axes, label=AXES[quantity], pad=0.01)


_RECALL = {
    "kept": "share of the write's effect",
    "cosine": "cosine of answer and value",
    "relative_error": "|answer - value| / |value|",
}
_DRIFT = {"distance": "|W - W₀| / |W₀|", "norm": "|W|"}


def _heads(analysis: dict[str, Any]) -> Iterator[tuple[int, int, dict[str, Any]]]:
    """Memory, head and how its line looks: a head has its colour, a memory its dashes."""
    for index, memory in enumerate(analysis["memories"]):
        for head in range(memory["heads"]):
            look = {"color": COLOURS[head % len(COLOURS)], "linestyle": DASHES[index % len(DASHES)]}
            yield index, head, {**look, "label": f"{memory['label']}, head {head}"}


def _recall(analysis: dict[str, Any], axes: Any, kind: str) -> None:
    recalls = analysis["recall"]["memories"]
    for index, head, look in _heads(analysis):
        recall = recalls[index]
        at = np.array(recall["distances"]) + 1
        axes.plot(at, recall[kind][head], **look)
        if f"{kind}_without" in recall:
            axes.plot(at, recall[f"{kind}_without"][head], color=look["color"], linewidth=0.7, alpha=0.5)
    distances = recalls[0]["distances"]
    axes.set_xscale("log", base=2)
    axes.set_xticks([distance + 1 for distance in distances], [f"{distance:,}" for distance in distances])
    axes.minorticks_off()
    thin = "" if kind == "kept" else " (thin: never told)"
    axes.set(title=f"Recall of planted pairs{thin}", xlabel="tokens read since the write", ylabel=_RECALL[kind])
    _legend(axes)


def _drift(analysis: dict[str, Any], axes: Any, kind: str) -> None:
    for index, head, look in _heads(analysis):
        drift = analysis["drift"][index]
        axes.plot(drift["positions"], drift[kind][head], **look)
    axes.set(title="Weights of each head's memory", ylabel=_DRIFT[kind])
    _along(analysis, axes)
    _legend(axes)


def _gates(analysis: dict[str, Any], axes: Any) -> None:
    at, long = _points(analysis)
    for index, gate in enumerate(analysis["gates"]):
        axes.plot(
            at, _smooth(gate["gate"], long), color=COLOURS[index % len(COLOURS)], linewidth=0.8, label=gate["label"]
        )
    axes.set(title="Gate use", ylabel="gate, mean over features")
    _along(analysis, axes)
    _legend(axes)


def _branches(analysis: dict[str, Any], axes: Any) -> None:
    at, long = _points(analysis)
    for index, gate in enumerate(analysis["gates"]):
        colour = COLOURS[index % len(COLOURS)]
        label = f"{gate['label']}: {gate['branches'][1]} beside {gate['branches'][0]}"
        axes.plot(at, _smooth(gate["share"], long), color=colour, linewidth=0.8, label=label)
    axes.set(title="Attention against memory", ylabel="second branch's share of both norms", ylim=(0, 1))
    _along(analysis, axes)
    _legend(axes)


def _points(analysis: dict[str, Any]) -> tuple[np.ndarray, int]:
    """Where points of a line stand that has a value for each bin, and how many bins each is the mean of."""
    bins = len(analysis["text"]["excerpts"])
    long = max(math.ceil(bins / POINTS), 1)
    return (np.arange(math.ceil(bins / long)) + 0.5) * long * analysis["text"]["bin"], long


def _smooth(values: np.ndarray, long: int) -> np.ndarray:
    starts = np.arange(0, len(values), long)
    real = np.isfinite(values)
    with np.errstate(invalid="ignore", divide="ignore"):
        smooth: np.ndarray = np.add.reduceat(np.where(real, values, 0), starts) / np.add.reduceat(
            real, starts, dtype=float
        )
    return smooth


def _legend(axes: Any) -> None:
    if len(axes.get_lines()) <= 32:
        axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
