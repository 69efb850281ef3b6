from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import titans_build as tb
from titans_build.registry import RecipeError
from titans_build.tools.tasks.forecasting import load_series
from titans_build.tools.terminal import UsageError
from titans_build.tools.training.train_step import TrainStep
from titans_build.tools.training.validation import validate

SPLITS: tuple[Any, ...] = ("train", "valid", "test")


def test_forecast_rows_are_pieces_of_the_series():
    numbers = load_series("el_nino")
    assert numbers.shape == (732,) and 18 < numbers.min() < numbers.max() < 30
    standard = (numbers - numbers[:512].mean()) / numbers[:512].std()
    for split, (begin, end) in zip(SPLITS, ((0, 512), (512, 586), (586, 732))):
        source = tb.open_source("forecast", rows=200, split=split)
        batch, values = source.batch(0), source.token_values
        assert values is not None and values.shape == (65,)
        assert (batch.tokens[:, 60:] == 64).all() and (batch.targets[:, :59] == -100).all()
        shown, ahead = values[batch.tokens[:, :60]].numpy(), values[batch.targets[:, 59:]].numpy()
        windows = np.lib.stride_tricks.sliding_window_view(standard, 72)
        for row in np.concatenate([shown, ahead], axis=1):
            error = np.abs(windows - row).max(1)
            start = int(error.argmin())
            assert error[start] <= 4 / 64 + 1e-9  # half an interval
            assert begin <= start + 60 and start + 72 <= end  # what is forecast is in the split's part


def test_forecast_reference_is_the_last_number():
    source = tb.open_source("forecast", rows=400, split="test")
    batch = source.batch(0)
    found = (batch.targets[:, 59:] == batch.tokens[:, 59:60]).double().mean()
    (expected,) = source.describe()["references"].values()
    assert abs(float(found) - expected) < 0.02


def test_forecast_numbers_beyond_the_range_have_the_outermost_token():
    task = tb.open_source("forecast:series=sunspots,length=40", rows=1).task  # type: ignore[attr-defined]
    assert task.numbers.max() > 4 and task.tokens.max() == 63 and task.tokens.min() > 0


def test_forecast_mean_squared_error_of_a_validation(tiny_step: Callable[[int], TrainStep]):
    step, source = tiny_step(65), tb.open_source("forecast:length=14,horizon=4", rows=2, split="valid")
    assert source.token_values is not None
    found = validate(step, source, 2)
    total, count = 0.0, 0
    for index in range(2):
        batch = source.batch(index)
        with torch.no_grad():
            shares = step.model(batch.tokens).logits.double().softmax(-1)
        for row, time in zip(*torch.nonzero(batch.targets != -100, as_tuple=True)):
            mean = sum(share * value for share, value in zip(shares[row, time].tolist(), source.token_values.tolist()))
            total += (mean - float(source.token_values[batch.targets[row, time]])) ** 2
            count += 1
    assert found["mse"] == pytest.approx(total / count, rel=1e-5)
    assert "mse" not in validate(step, tb.open_source("copy:length=8", rows=2, split="valid"), 1)


def test_forecast_errors(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(RecipeError, match="horizon: expected at most the length 5, got 6"):
        tb.open_source("forecast:length=5,horizon=6", rows=1)
    with pytest.raises(RecipeError, match="length: 600 is too long for the 512 numbers of the train split"):
        tb.open_source("forecast:length=600", rows=1)
    monkeypatch.setitem(sys.modules, "statsmodels.datasets", None)
    with pytest.raises(UsageError, match=r"the task forecast .*titans-build\[examples\]"):
        tb.open_source("forecast", rows=1)
