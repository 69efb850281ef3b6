"""A model to save, and a state of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from saved import TINY

from titans_build.blocks.language_model import LanguageModel
from titans_build.recipes import build


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def model() -> LanguageModel:
    return build(TINY, seed=3)


@pytest.fixture
def state(model: LanguageModel) -> Any:
    with torch.no_grad():
        return model(torch.arange(14).view(2, 7)).state
