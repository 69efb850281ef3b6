"""The whole analysis of a model on a text, as one tree of plain data and arrays."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from torch import nn

from ...blocks.freezing import thawed
from ...blocks.language_model import LanguageModel
from ...blocks.memory import NeuralMemory
from ...blocks.memory_ablation import MemoryCheck, memory_check
from ..terminal import CommandFailed
from .recall import PLACES, recall_of
from .recording import QUANTITIES, Bins, record
from .sample import Sample

FORMAT, VERSION = "titans-build analysis", 1
MIN_PIECE, MAX_PIECE = 64, 512
"""Tokens that are read at once."""
MAX_DISTANCE = 2048
"""The largest distance of a query from the planted pair."""
CONTEXT = 40
"""Tokens shown before and after a surprising one."""
MAX_EXCERPT = 24
"""Characters of a bin's text."""
DIGITS = 5
"""Of numbers in JSON."""


class Plan:
    """The pieces and stretches in which a text is read, and the number of steps for a progress bar."""

    def __init__(self, model: LanguageModel, sample: Sample, reset_every: int | None) -> None:
        time = sample.tokens.shape[1]
        with thawed(model):
            self.memories = {name: block.heads for name, block in model.named_modules() if _is_written(block)}
        self.piece = min(max(math.ceil(time / 96), MIN_PIECE), MAX_PIECE)
        self.reset_every = reset_every if reset_every is not None else min(max(time // 8, 16), 1024)
        length = min(time, MAX_DISTANCE + MAX_DISTANCE // 4)
        start = min(time - length, time // 4) // self.piece * self.piece
        self.stretch = start, min(math.ceil((start + length) / self.piece) * self.piece, time)
        self.longest = min(MAX_DISTANCE, (self.stretch[1] - start) * 3 // 4)
        cuts = {*range(0, time, self.piece), *range(0, time, self.reset_every)}
        self.steps = math.ceil(time / self.piece) + 3 * len(cuts) + len(self.memories)


def _is_written(block: nn.Module) -> bool:
    # the analysis plants one key and value for each token
    return isinstance(block, NeuralMemory) and block.use == "both" and (block.rule is None or block.rule.keys == 1)


def analyse(
    model: LanguageModel,
    sample: Sample,
    plan: Plan,
    *,
    pairs: int = 8,
    seed: int = 0,
    advance: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """The analysis without ``model``, the description of the model. Arrays are NumPy's; see ``docs/analyze.md``.

    Raises ``CommandFailed`` if the loss is not finite.
    """
    check = memory_check(
        model, sample.tokens, targets=sample.targets, mask=sample.mask, reset_every=plan.reset_every,
        piece=plan.piece, advance=advance,
    )  # fmt: skip
    if not math.isfinite(check.live):
        raise CommandFailed("the loss is not finite: the model has diverged on this text")
    row = sample.tokens[:1] if sample.mask is None else sample.tokens[:1, sample.mask[0]]
    with thawed(model):
        recording = record(model, row, plan.memories, piece=plan.piece, stretch=plan.stretch, advance=advance)
    recalls = {}
    for name, stretch in recording.stretches.items():
        recalls[name] = recall_of(stretch, longest=plan.longest, pairs=pairs, seed=seed)
        advance()
    names = [name for name in plan.memories if name in recording.drift]
    rows, time = sample.tokens.shape
    # the maximum of one token is its mean
    kinds = ("mean", "max") if recording.bin_width > 1 else ("mean",)
    return {
        "format": FORMAT,
        "version": VERSION,
        "text": {
            "name": sample.name,
            "unit": sample.unit,
            "rows": rows,
            "tokens": time,
            "goes_on": sample.truncated,
            "shown": row.shape[1],
            "bin": recording.bin_width,
            "excerpts": _excerpts(sample, row.shape[1], recording.bin_width),
        },
        "memories": [
            {"name": name, "label": label, "heads": plan.memories[name]} for name, label in zip(names, labels(names))
        ],
        "check": _check(check, sample.unit),
        "tokens": {
            quantity: {kind: [getattr(recording.tokens[name][quantity], kind) for name in names] for kind in kinds}
            for quantity in QUANTITIES
        },
        "peaks": [_peak(sample, position, surprise, row.shape[1]) for position, surprise in recording.peaks],
        "recall": {
            "planted": pairs * PLACES,
            "from": plan.stretch[0],
            "to": plan.stretch[1],
            "memories": [recalls[name]._asdict() for name in names if name in recalls],
        },
        "drift": [recording.drift[name]._asdict() for name in names],
        "gates": [
            {"name": name, "label": label, **_gate(model.get_submodule(name), recording.gates[name])}
            for name, label in zip(recording.gates, labels(list(recording.gates)))
        ],
    }


def _check(check: MemoryCheck, unit: str) -> dict[str, Any]:
    bits = 1 / math.log(2)
    losses, errors = check.losses.numpy() * bits, check.errors.numpy() * bits
    return {
        "unit": f"bits per {unit}",
        "changes": check.changes,
        "helps": check.helps,
        "verdict": check.verdict(unit),
        "moved": check.moved,
        "live": check.live * bits,
        "frozen": check.frozen * bits,
        "reset": check.reset * bits,
        "reset_every": check.reset_every,
        "writing": {"mean": check.writing.mean * bits, "error": check.writing.error * bits},
        "reaching_back": {"mean": check.reaching_back.mean * bits, "error": check.reaching_back.error * bits},
        "positions": check.positions.tolist(),
        "counts": check.counts.tolist(),
        "losses": {"live": losses[0], "frozen": losses[1], "reset": losses[2]},
        "errors": {"frozen": errors[0], "reset": errors[1]},
    }


def _gate(block: nn.Module, bins: Bins) -> dict[str, Any]:
    gate, first, second = bins.mean
    with np.errstate(invalid="ignore", divide="ignore"):
        share = second / (first + second)
    return {
        "form": getattr(getattr(block, "gate", None), "form", None),
        "branches": _branches(block),
        "gate": gate,
        "first": first,
        "second": second,
        "share": share,
        "mean_gate": float(np.nanmean(gate)),
        "mean_share": float(np.nanmean(share)),
    }


def _branches(block: nn.Module) -> list[str]:
    """Names of a gate's first branch and of the others: ``memory``, or the class of the block."""
    branches = getattr(block, "branches", None)
    if branches is None:
        return ["attention", "memory"]  # a context block
    first, *others = (
        "memory" if any(isinstance(part, NeuralMemory) for part in branch.modules()) else type(branch).__name__.lower()
        for branch in branches
    )
    return [first, " and ".join(others)]


def _excerpts(sample: Sample, time: int, width: int) -> list[str]:
    """The text of each bin."""
    texts = ["".join(sample.words(start, min(start + width, time))) for start in range(0, time, width)]
    return [text if len(text) <= MAX_EXCERPT else text[: MAX_EXCERPT - 1] + "…" for text in texts]


def _peak(sample: Sample, position: int, surprise: float, time: int) -> dict[str, Any]:
    start, stop = max(position - CONTEXT, 0), min(position + CONTEXT + 1, time)
    words = sample.words(start, stop)
    at = position - start
    return {
        "position": position,
        "surprise": surprise,
        "before": "".join(words[:at]),
        "token": words[at],
        "after": "".join(words[at + 1 :]),
    }


def labels(names: list[str]) -> list[str]:
    """Short labels of module paths: ``layers.0.blocks.0.memory`` is ``layer 0`` where it is the only one there."""
    parts = [name.split(".") for name in names]
    layers = [f"layer {part[1]}" if part[0] == "layers" and len(part) > 1 else ".".join(part) for part in parts]
    return [
        layer if layers.count(layer) == 1 else f"{layer}, {layers[:index].count(layer) + 1} of {layers.count(layer)}"
        for index, layer in enumerate(layers)
    ]


def rounded(value: Any) -> Any:
    """Plain JSON: lists for arrays, ``None`` for NaN and infinity, numbers to ``DIGITS`` digits."""
    if isinstance(value, np.ndarray):
        return rounded(value.tolist())
    if isinstance(value, dict):
        return {key: rounded(child) for key, child in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(child) for child in value]
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None
    return value
