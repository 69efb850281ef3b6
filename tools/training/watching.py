"""Watching a run: is a step's loss or gradient bad, and which block's inner update has grown?"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Iterable

import torch
from torch import nn

from ...blocks import observe
from ...blocks.state import State
from ..data import Batch
from .distributed import local
from .stepping import Reader

LATE = 32
"""Losses that a spike is measured against."""
FEWEST = 8


class Watch:
    """Tells a bad step from a good one. A spike is so many nats above the median of the late losses."""

    def __init__(self, spike: float | None, losses: Iterable[float] = ()) -> None:
        self.spike = spike
        self.losses = deque(losses, maxlen=LATE)

    def fault(self, loss: float, norm: float) -> str | None:
        """What is bad about a step, or ``None``; a good loss is remembered."""
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        if not math.isfinite(norm):
            return f"the gradient's norm is {norm} (the loss is {loss:.4g})"
        if self.spike is not None and len(self.losses) >= FEWEST:
            usual = statistics.median(self.losses)
            if loss > usual + self.spike:
                return f"the loss is {loss:.4g}, where it was {usual:.4g} of late (spike: {self.spike})"
        self.losses.append(loss)
        return None


def surprises(reader: Reader, batch: Batch, state: State) -> dict[str, dict[str, float]]:
    """How surprised each memory of the model is by a batch, by its path. Nothing is changed.

    ``mean`` and ``peak`` of the norms of the tokens' gradients, before they are clipped; ``weights``: the largest norm
    of the memory's weights.
    """
    with torch.no_grad(), observe(reader.model) as seen:
        Reader(reader.model, reader.settings, reader.processes).outputs(batch, state)
    reader.processes.release(reader.model)
    found = {}
    for path, record in seen.memories.items():
        real = record.surprise if batch.mask is None else record.surprise[batch.mask.to(record.surprise.device)]
        if real.numel():
            norms = {"mean": real.mean(), "peak": real.max(), "weights": record.norms.max()}
            found[path] = {name: float(value) for name, value in norms.items()}
    return found


def finite(memories: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    """Those of ``surprises`` that later ones can be measured against, and that JSON holds."""
    return {path: norms for path, norms in memories.items() if all(map(math.isfinite, norms.values()))}


def grown(now: dict[str, dict[str, float]], before: dict[str, dict[str, float]]) -> str | None:
    """Which memory's surprise has grown most since, in words; ``None`` where there is no memory."""
    if not now:
        return None

    def growth(path: str) -> float:
        ratio = now[path]["peak"] / max(before.get(path, now[path])["peak"], 1e-12)
        return ratio if math.isfinite(now[path]["peak"]) else math.inf

    worst = max(now, key=growth)
    came, was = now[worst], before.get(worst)
    earlier = "" if was is None else f", where it was {was['peak']:.3g}"
    return (
        f"the inner update of {worst} has grown most: surprise up to {came['peak']:.3g}{earlier}, "
        f"weights of norm {came['weights']:.3g}" + ("" if was is None else f" (were {was['weights']:.3g})")
    )


def wildest(model: nn.Module) -> str | None:
    """The parameter whose gradient is no number, or else the largest, in words."""
    norms = {n: float(local(p.grad).norm()) for n, p in model.named_parameters() if p.grad is not None}
    if not norms:
        return None
    name = max(norms, key=lambda name: norms[name] if math.isfinite(norms[name]) else math.inf)
    return f"the gradient of {name} has norm {norms[name]:.3g}"
