from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import titans_build as tb
from titans_build.tools.randomness import Draws
from titans_build.tools.tasks import IGNORED, make_task
from titans_build.tools.training import as_settings
from titans_build.tools.training.distributed import Processes
from titans_build.tools.training.train_step import TrainStep

Array = np.ndarray


class Made:
    """Rows of a task, and how well predictors of them do."""

    def __init__(self, name: str, rows: int, fields: dict[str, Any]) -> None:
        self.task, self.fields = make_task(name, fields)
        self.draws = Draws(7, np.arange(rows))
        self.tokens, self.targets = self.task.rows(self.draws)
        self.counts = self.targets != IGNORED

    def right(self, predicted: Array) -> float:
        """Share of the counted tokens; ``predicted`` [rows, time] or what broadcasts to it."""
        return float((np.broadcast_to(predicted, self.tokens.shape) == self.targets)[self.counts].mean())

    def by(self, predictor: Callable[[list[int]], int]) -> float:
        """Share that ``predictor`` gets right when it sees the tokens up to and with the one at which it predicts."""
        answers = [
            predictor(self.tokens[row, : time + 1].tolist()) == self.targets[row, time]
            for row, time in zip(*np.nonzero(self.counts))
        ]
        return float(np.mean(answers))

    def best_position(self) -> float:
        """What the best of all predictors gets that always give the token at one position, once it has been seen."""
        times = np.arange(self.task.length)
        return max(self.right(np.where(times >= at, self.tokens[:, [at]], -1)) for at in times)

    def slack(self) -> float:
        """Four standard deviations of a share, were each counted token an independent one in two."""
        return 2 / float(np.sqrt(self.counts.sum()))


@pytest.fixture
def make() -> Callable[..., Made]:
    """``make("mqar", rows, pairs=2)``."""
    return lambda name, rows, **fields: Made(name, rows, fields)


@pytest.fixture
def tiny_step() -> Callable[[int], TrainStep]:
    """``tiny_step(vocab)``: what runs a model without any memory, for validations."""

    def make(vocab: int) -> TrainStep:
        recipe = {"version": 1, "dim": 8, "vocab": vocab, "layers": {"ffn": ["ffn"]}, "stack": ["ffn"]}
        return TrainStep(tb.build(recipe, seed=0), as_settings(), Processes(device=torch.device("cpu")))

    return make
