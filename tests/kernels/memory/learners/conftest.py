"""The loops that the learners are compared with, and random inputs for them."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

BATCH, HEADS = 2, 2


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def general() -> ModuleType:
    """The recurrence with all parts, as a loop."""
    return load("general_loop")


@pytest.fixture(scope="session")
def published() -> ModuleType:
    """Published learners, a loop each."""
    return load("published_loops")


class Given:
    """Random inputs in float64: unit keys and queries, and gates that include the ends of their ranges."""

    def __init__(self, time: int = 11, width: int = 4, seed: int = 0) -> None:
        self.random = torch.Generator().manual_seed(seed)
        self.time, self.width = time, width
        self.q, self.k = F.normalize(self.normal(2, BATCH, time, HEADS, width), dim=-1)
        self.v = self.normal(BATCH, time, HEADS, width)
        self.theta, self.eta, self.keep, self.gamma = self.uniform(4, BATCH, time, HEADS)
        self.theta, self.keep = 0.3 * self.theta, 0.5 + 0.5 * self.keep
        self.theta[:, 3] = self.eta[:, 2] = self.keep[0, 4] = 0
        self.eta[:, 5] = self.keep[1, 1] = 1
        self.gain = 1 + 0.1 * self.normal(HEADS, width)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.random, dtype=torch.float64)

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.random, dtype=torch.float64)

    def weights(self, *widths: int) -> tuple[Tensor, ...]:
        """Matrices from each width to the next."""
        return tuple(self.normal(BATCH, HEADS, o, i) / i**0.5 for i, o in pairwise(widths))

    def gated(self, hidden: int) -> tuple[Tensor, ...]:
        """The matrices of a gated network."""
        w1, w3 = self.normal(2, BATCH, HEADS, hidden, self.width) / self.width**0.5
        return w1, self.normal(BATCH, HEADS, self.width, hidden) / hidden**0.5, w3

    def simplex(self, weights: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(torch.softmax(w, -1) for w in weights)


@pytest.fixture
def given() -> Given:
    return Given()


@pytest.fixture(scope="session")
def make() -> type[Given]:
    return Given


Run = Callable[..., tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...]]]


def run_loop(general: ModuleType) -> Run:
    def run(*tokens: Any, **options: Any) -> tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...]]:
        y, rows = general.learn_loop(*tokens, **options)
        weights, momentum, _, _ = general.fields(rows, options.get("chunk", 16), options.get("keys", 1))
        return y, weights, momentum

    return run


def run_learn(general: ModuleType) -> Run:
    from titans_build.kernels.memory import LearnerState, learn

    def run(*tokens: Any, **options: Any) -> tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...]]:
        *inputs, weights = tokens
        y, state = learn(*inputs, LearnerState.fresh(weights), **options)
        return y, state.weights, state.momentum

    return run


@pytest.fixture
def learn_alone(general: ModuleType) -> Run:
    """``run`` for settings that the general loop does not have."""
    return run_learn(general)


@pytest.fixture
def run(request: pytest.FixtureRequest, general: ModuleType) -> Run:
    """The learner under test: outputs, weights and momentum from tokens and initial weights."""
    return {"general loop": run_loop, "learn": run_learn}[request.param](general)
