"""The whole analysis of a model on a text, as one tree of plain data and arrays."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from torch import nn

from ...blocks.freezing import thawed
from ...blocks.language_model import LanguageModel
from ...blocks.live_or_frozen import MemoryCheck, memory_check
from ...blocks.memory import NeuralMemory
from .material import Material
from .pooling import Pool
from .recall import PLACES, Recall, recall_of
from .seeing import QUANTITIES, see

FORMAT, VERSION = "titans-build analysis", 1
PIECE = 64, 512
"""Tokens that are read at once, at least and at most."""
FARTHEST = 2048
"""The largest distance at which a planted pair is asked for."""
AROUND = 40
"""Tokens shown before and after a surprising one."""
AT_ONCE = 1024
"""Bins whose text is made at once."""
EXCERPT = 24
"""Characters of a bin's text that are kept at most."""


class Plan:
    """How a text is gone through, known before it is: what a progress bar needs."""

    def __init__(self, model: LanguageModel, material: Material, reset_every: int | None) -> None:
        time = material.tokens.shape[1]
        with thawed(model):
            self.memories = {name: block.heads for name, block in model.named_modules() if _is_seen(block)}
        self.piece = min(max(math.ceil(time / 96), PIECE[0]), PIECE[1])
        self.reset_every = reset_every if reset_every is not None else min(max(time // 8, 16), 1024)
        taken = min(time, FARTHEST + FARTHEST // 4)
        start = min(time - taken, time // 4) // self.piece * self.piece
        self.stretch = start, min(math.ceil((start + taken) / self.piece) * self.piece, time)
        self.longest = min(FARTHEST, (self.stretch[1] - start) * 3 // 4)
        cuts = {*range(0, time, self.piece), *range(0, time, self.reset_every)}
        self.steps = math.ceil(time / self.piece) + 3 * len(cuts) + len(self.memories)


def _is_seen(block: nn.Module) -> bool:
    return isinstance(block, NeuralMemory) and block.use == "both"


def analyse(
    model: LanguageModel,
    material: Material,
    plan: Plan,
    *,
    pairs: int = 8,
    seed: int = 0,
    advance: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Everything but what is known of the model itself. Arrays are NumPy's; ``docs/analyze.md`` has the schema."""
    check = memory_check(
        model, material.tokens, targets=material.targets, mask=material.mask, reset_every=plan.reset_every,
        piece=plan.piece, advance=advance,
    )  # fmt: skip
    row = material.tokens[:1] if material.mask is None else material.tokens[:1, material.mask[0]]
    with thawed(model):
        seen = see(model, row, plan.memories, piece=plan.piece, stretch=plan.stretch, advance=advance)
    recalls = {}
    for name, stretch in seen.stretches.items():
        recalls[name] = recall_of(stretch, longest=plan.longest, pairs=pairs, seed=seed)
        advance()
    names = [name for name in plan.memories if name in seen.drift]
    rows, time = material.tokens.shape
    # a bin of one token has no maximum beside its mean
    kinds = ("mean", "max") if seen.width > 1 else ("mean",)
    return {
        "format": FORMAT,
        "version": VERSION,
        "text": {
            "name": material.name,
            "unit": material.unit,
            "rows": rows,
            "tokens": time,
            "goes_on": material.goes_on,
            "shown": row.shape[1],
            "bin": seen.width,
            "excerpts": _excerpts(material, row.shape[1], seen.width),
        },
        "memories": [
            {"name": name, "label": label, "heads": plan.memories[name]} for name, label in zip(names, labels(names))
        ],
        "check": _check(check, material.unit),
        "tokens": {
            quantity: {kind: [getattr(seen.tokens[name][quantity], kind) for name in names] for kind in kinds}
            for quantity in QUANTITIES
        },
        "peaks": [_peak(material, position, surprise, row.shape[1]) for position, surprise in seen.peaks],
        "recall": {
            "planted": pairs * PLACES,
            "from": plan.stretch[0],
            "to": plan.stretch[1],
            "memories": [_recall(recalls[name]) for name in names if name in recalls],
        },
        "drift": [
            {"positions": drift.positions, "norm": drift.norm, "distance": drift.distance}
            for drift in (seen.drift[name] for name in names)
        ],
        "gates": [
            {"name": name, "label": label, **_gate(model.get_submodule(name), seen.gates[name])}
            for name, label in zip(seen.gates, labels(list(seen.gates)))
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


def _recall(recall: Recall) -> dict[str, Any]:
    found: dict[str, Any] = recall._asdict()
    found["half_life"] = [half_life(recall.distances, kept) for kept in recall.kept]
    return found


def half_life(distances: list[int], kept: np.ndarray) -> float | None:
    """Tokens until a write's effect is half of its largest so far, between distances; ``None`` where more stays."""
    if not np.isfinite(kept).all():
        return None  # nothing was written
    halves = np.maximum.accumulate(kept) / 2
    for at in range(1, len(distances)):
        if kept[at] < halves[at]:
            share = (kept[at - 1] - halves[at]) / (kept[at - 1] - kept[at])
            return float(distances[at - 1] + share * (distances[at] - distances[at - 1]))
    return None


def _gate(block: nn.Module, pool: Pool) -> dict[str, Any]:
    gate, first, second = pool.mean
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
    """What a gate's two branches are called: the memory, or whatever else it is."""
    branches = getattr(block, "branches", None)
    if branches is None:
        return ["attention", "memory"]  # a context's
    return [
        "memory" if any(isinstance(part, NeuralMemory) for part in branch.modules()) else type(branch).__name__.lower()
        for branch in branches
    ]


def _excerpts(material: Material, time: int, width: int) -> list[str]:
    found = []
    for first in range(0, time, AT_ONCE * width):
        words = material.words(first, min(first + AT_ONCE * width, time))
        texts = ["".join(words[start : start + width]) for start in range(0, len(words), width)]
        found += [text if len(text) <= EXCERPT else text[: EXCERPT - 1] + "…" for text in texts]
    return found


def _peak(material: Material, position: int, surprise: float, time: int) -> dict[str, Any]:
    start, stop = max(position - AROUND, 0), min(position + AROUND + 1, time)
    words = material.words(start, stop)
    at = position - start
    return {
        "position": position,
        "surprise": surprise,
        "before": "".join(words[:at]),
        "token": words[at],
        "after": "".join(words[at + 1 :]),
    }


def labels(names: list[str]) -> list[str]:
    """How places are said: ``layers.0.blocks.0.memory`` is ``layer 0`` where it is the only one there."""
    parted = [name.split(".") for name in names]
    layers = [f"layer {parts[1]}" if parts[0] == "layers" and len(parts) > 1 else ".".join(parts) for parts in parted]
    return [
        layer if layers.count(layer) == 1 else f"{layer}, {layers[:index].count(layer) + 1} of {layers.count(layer)}"
        for index, layer in enumerate(layers)
    ]
