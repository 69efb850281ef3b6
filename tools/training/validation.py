"""Validation: over batches, or over whole documents, each from a fresh state."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ...blocks.language_model import IGNORED
from ...blocks.state import State, detach
from ..data import Score, Source, score
from ..data.windows import TextSource
from .train_step import TrainStep, count_targets


@torch.no_grad()
def validate(
    step: TrainStep, source: Source, batches: int, documents: list[dict[str, Any]] | None = None
) -> dict[str, float]:
    """Metrics over the first ``batches`` batches: ``loss`` (nats) and ``accuracy``; ``exact`` for tasks, the share of
    rows without an error; ``mse`` for tasks of numbers, that of the mean of the predicted distribution;
    ``bits_per_byte`` for text, with the mean length of its tokens.

    The state is carried where the source's rows continue from batch to batch. Of a source of packed documents, whole
    documents are read that fill these batches, each from a fresh state. ``loss`` is then the mean over their tokens,
    ``document_loss`` the mean over documents, and ``documents`` is extended by the ``document`` (its name), ``tokens``
    (those that are predicted) and ``loss`` of each.
    """
    training = step.model.training
    step.model.eval()
    try:
        if isinstance(source, TextSource) and source.packed:
            places = batches * source.describe()["rows"] * source.length
            with step.processes.whole(step.model, compute=True):  # documents have any length
                loss, scored, each = _read_documents(step, source, places)
            squared = 0.0
        else:
            with step.processes.whole(step.model):
                (loss, scored, squared), each = _read_batches(step, source, batches), []
    finally:
        step.model.train(training)
        step.processes.reshard(step.model)
    loss, squared, *counts = step.processes.sum_of_groups(loss, squared, *scored)
    scored = Score(*map(int, counts))
    metrics = {"loss": loss / max(scored.counted, 1), "accuracy": scored.accuracy}
    described = source.describe()
    if each:
        metrics["document_loss"] = sum(document["loss"] for document in each) / len(each)
    if documents is not None:
        documents.extend(each)
    if "task" in described:
        metrics["exact"] = scored.exact
    if source.token_values is not None:
        metrics["mse"] = squared / max(scored.counted, 1)
    if "tokens_are" in described:
        metrics["bits_per_byte"] = metrics["loss"] / math.log(2) / described.get("bytes_per_token", 1.0)
    return metrics


def _read_batches(step: TrainStep, source: Source, batches: int) -> tuple[float, Score, float]:
    """The summed loss, the score and the summed squared error of this process's rows."""
    loss, scored, squared, state = 0.0, Score(0, 0, 0, 0), 0.0, None
    for index in range(batches):
        batch = source.batch(index)
        out = step.forward(batch, state if source.carries else None)
        assert out.loss is not None and out.logits is not None
        loss += float(out.loss) * count_targets(batch)
        targets = batch.targets.to(step.processes.device)
        accepted = None if batch.accepted is None else batch.accepted.to(targets.device)
        scored = scored.plus(score(out.logits, targets, accepted))
        if source.token_values is not None:
            squared += _squared_error(out.logits, targets, source.token_values.to(targets.device))
        state = detach(out.state)
    return loss, scored, squared


def _squared_error(logits: Tensor, targets: Tensor, values: Tensor) -> float:
    """The summed squared difference of the predicted distributions' means and the numbers of the targets."""
    counts = targets != IGNORED
    means = logits[counts].double().softmax(-1) @ values
    return float((means - values[targets[counts]]).square().sum())


def _read_documents(step: TrainStep, source: TextSource, places: int) -> tuple[float, Score, list[dict[str, Any]]]:
    """The same of this process's documents, and the results of all documents."""
    loss, scored, found = 0.0, Score(0, 0, 0, 0), []
    for together in source.read_whole(places):
        state: State = None
        sums = torch.zeros(len(together.names), dtype=torch.float64)
        for batch in together.batches:
            out = step.forward(batch, state)
            assert out.logits is not None
            targets, state = batch.targets.to(step.processes.device), out.state
            scored = scored.plus(score(out.logits, targets))
            # [rows, vocab, time]
            logits = out.logits.to(torch.promote_types(out.logits.dtype, torch.float32)).mT
            losses = cross_entropy(logits, targets, ignore_index=IGNORED, reduction="none").double().sum(1).cpu()
            mine = sums[together.first :][: len(losses)]
            mine += losses[: len(mine)]
        loss += float(sums.sum())
        every = zip(together.names, together.tokens.tolist(), step.processes.sum_of_groups(*sums.tolist()))
        found += [{"document": name, "tokens": count, "loss": total / count} for name, count, total in every]
    return loss, scored, found
