"""Diagnostics of a run: nonfinite values and loss spikes, and which memory or parameter they come from."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

import torch
from torch import nn

from ...blocks import observe
from ...blocks.state import State
from ..data import Batch
from .distributed import full_tensor
from .train_step import TrainStep

RECENT = 32
"""Losses whose median a spike is measured against."""
FEWEST = 8
"""Losses needed before a spike can be told."""

Surprise = dict[str, dict[str, float]]
"""For each memory, by its path: ``mean``, ``peak`` and ``weights``."""


def find_fault(loss: float, norm: float, losses: Sequence[float], spike: float | None) -> str | None:
    """What is wrong with a step, or ``None``: a nonfinite loss or gradient norm, or a loss spike.

    A spike is a loss more than ``spike`` nats above the median of ``losses``, those of recent good steps.
    """
    if not math.isfinite(loss):
        return f"the loss is {loss}"
    if not math.isfinite(norm):
        return f"the gradient norm is {norm} (the loss is {loss:.4g})"
    if spike is not None and len(losses) >= FEWEST:
        median = statistics.median(losses)
        if loss > median + spike:
            return f"the loss is {loss:.4g}, the median of recent losses {median:.4g} (spike: {spike})"
    return None


def memory_surprise(step: TrainStep, batch: Batch, state: State) -> Surprise:
    """The surprise of every memory for the rows of all processes. Nothing is changed.

    ``mean`` and ``peak`` are over the tokens' gradient norms, before clipping; ``weights`` is the largest norm of the
    memory's weights. Of packed documents, the first of each row is measured.
    """
    if batch.documents is not None:
        first = batch.documents == batch.documents[:, :1]
        fresh = batch.fresh if state is None else batch.fresh | (state.document.cpu() != batch.documents[:, 0])
        batch = batch._replace(mask=first if batch.mask is None else batch.mask & first, fresh=fresh, documents=None)
    with torch.no_grad(), step.processes.whole(step.model, compute=True), observe(step.model) as seen:
        step.forward(batch, state)
    step.processes.reshard(step.model)
    rows = []
    for record in seen.memories.values():
        surprise = record.surprise
        if batch.mask is not None:
            surprise = surprise[batch.mask.to(surprise.device)]
        count = surprise.numel()
        norms = (surprise.mean(), surprise.max(), record.norms.max()) if count else (0.0, -math.inf, -math.inf)
        rows.append([float(count), *map(float, norms)])
    # each process has measured its own rows and heads
    numbers = step.processes.gather(torch.tensor(rows, dtype=torch.float64).view(-1, 4))
    counts, means, peaks, weights = numbers.unbind(-1)
    every = torch.stack(((counts * means).sum(0) / counts.sum(0), peaks.amax(0), weights.amax(0)), 1).tolist()
    return {
        path: dict(zip(("mean", "peak", "weights"), norms))
        for path, norms, valid in zip(seen.memories, every, (counts > 0).any(0))
        if valid
    }


def largest_growth(now: Surprise, before: Surprise) -> str | None:
    """A sentence about the memory whose surprise has grown most; ``None`` for a model without memories."""
    if not now:
        return None

    def growth(path: str) -> float:
        ratio = now[path]["peak"] / max(before.get(path, now[path])["peak"], 1e-12)
        return ratio if math.isfinite(now[path]["peak"]) else math.inf

    worst = max(now, key=growth)
    norms, earlier = now[worst], before.get(worst)
    peak, weights = ("", "") if earlier is None else (f" (was {earlier[k]:.3g})" for k in ("peak", "weights"))
    return (
        f"the inner update of {worst} has grown most: surprise up to {norms['peak']:.3g}{peak}, "
        f"weights of norm {norms['weights']:.3g}{weights}"
    )


def largest_gradient(model: nn.Module) -> str | None:
    """A sentence about the parameter whose gradient is nonfinite, or else the largest."""
    norms = {n: float(full_tensor(p.grad.norm())) for n, p in model.named_parameters() if p.grad is not None}
    if not norms:
        return None
    name = max(norms, key=lambda name: norms[name] if math.isfinite(norms[name]) else math.inf)
    return f"the gradient of {name} has norm {norms[name]:.3g}"
