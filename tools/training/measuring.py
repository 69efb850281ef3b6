"""Validation: loss, accuracy and bits per byte on batches that are not trained on."""

from __future__ import annotations

import math

import torch

from ...blocks.language_model import IGNORED
from ...blocks.state import detach
from ..data import Score, Source, score
from .stepping import Reader


@torch.no_grad()
def validate(reader: Reader, source: Source, batches: int) -> dict[str, float]:
    """``loss`` (nats) and ``accuracy`` over the first ``batches`` batches; of a task ``exact``, the share of rows that
    are right as a whole; ``bits_per_byte`` where tokens are bytes.

    State is carried where the source's batches go on from each other.
    """
    processes = reader.processes
    loss, scored, state = 0.0, Score(0, 0, 0, 0), None
    training = reader.model.training
    reader.model.eval()
    try:
        for index in range(batches):
            batch = source.batch(index)
            out = reader.outputs(batch, state if source.carries else None)
            counted = int((batch.targets != IGNORED).sum())
            assert out.loss is not None and out.logits is not None
            loss += float(out.loss) * counted
            scored = scored.plus(score(out.logits, batch.targets.to(processes.device)))
            state = detach(out.state)
    finally:
        reader.model.train(training)
        processes.release(reader.model)
    loss, *counts = processes.total(loss, *scored)
    scored = Score(*map(int, counts))
    found = {"loss": loss / max(scored.counted, 1), "accuracy": scored.accuracy}
    described = source.describe()
    if "task" in described:
        found["exact"] = scored.exact
    if described.get("tokens_are") == "bytes":
        found["bits_per_byte"] = found["loss"] / math.log(2)
    return found
