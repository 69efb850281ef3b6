"""Forecasting: real series of numbers as tokens."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from ..extras import from_extra
from ..randomness import Draws
from .task import IGNORED, Rows, Task, register_task

Floats = NDArray[np.float64]
RANGE = 4.0
"""Numbers further than this from the mean, in standard deviations, have the outermost tokens."""
SHARES = {"train": (0.0, 0.7), "valid": (0.7, 0.8), "test": (0.8, 1.0)}
"""The part of a series that each split forecasts, as is usual for ETTh (arXiv 2012.07436)."""


@register_task("forecast")
@dataclass(kw_only=True)
class Forecast(Task):
    """Continue a real series of numbers. A number is a token, its place among ``vocab - 1`` equal intervals.

    A row is consecutive numbers and then ``horizon - 1`` markers (``vocab - 1``). The targets are the next number, at
    the last one that is shown, and those that follow it, at the markers. With ``vocab: 33, length: 6, horizon: 3``
    (``.`` is a target that does not count)::

        tokens    14 15 17 20 32 32
        targets   .  .  .  22 21 19

    The series is standardized by the mean and the standard deviation of its first 70%, which is for training; the
    next 10% are forecast in validation, the rest in the test. ``mse`` is the mean squared error of the expectation of
    the predicted distribution. Data: ``el_nino``, sea surface temperatures of each month from 1950 to 2010, and
    ``sunspots`` of each year from 1700 to 2008, both as statsmodels (extra ``examples``) ships them.
    """

    series: Annotated[Literal["el_nino", "sunspots"], Field(description="the series")] = "el_nino"
    vocab: Annotated[int, Field(ge=4, le=2**16, description="intervals, and the marker")] = 65
    length: Annotated[int, Field(ge=2, description="tokens of a row")] = 71
    horizon: Annotated[int, Field(ge=1, description="numbers to forecast")] = 12

    def __post_init__(self) -> None:
        self.split = "train"
        self.shown = self.length + 1 - self.horizon
        """The numbers that a row shows."""
        numbers = load_series(self.series)
        first = numbers[: round(SHARES["train"][1] * len(numbers))]
        self.numbers = (numbers - first.mean()) / first.std()
        """The standardized series."""
        edges = np.linspace(-RANGE, RANGE, self.vocab)
        self.token_values = np.append((edges[:-1] + edges[1:]) / 2, 0.0)
        self.tokens = np.clip(np.searchsorted(edges, self.numbers, side="right") - 1, 0, self.vocab - 2)
        for split in SHARES:
            if self._starts(split)[1] < 1:
                have = round(len(numbers) * (SHARES[split][1] - SHARES[split][0]))
                raise ValueError(f"length: {self.length} is too long for the {have} numbers of the {split} split")

    @classmethod
    def problems(cls, fields: dict[str, Any]) -> Iterable[tuple[str, str]]:
        if fields["horizon"] > fields["length"]:
            yield "horizon", f"expected at most the length {fields['length']}, got {fields['horizon']}"

    def of_split(self, split: str) -> Forecast:
        task = copy.copy(self)
        task.split = split
        return task

    def _starts(self, split: str) -> tuple[int, int]:
        """The first start of a row, and the number of starts. What a split forecasts is all in its part."""
        begin, end = (round(share * len(self.numbers)) for share in SHARES[split])
        first = max(0, begin - self.shown)
        return first, end - self.length - first

    def rows(self, draws: Draws) -> Rows:
        first, count = self._starts(self.split)
        window = self.tokens[first + draws.integers("starts", 1, count) + np.arange(self.length + 1)]
        tokens, targets = window[:, :-1].copy(), window[:, 1:].copy()
        tokens[:, self.shown :] = self.vocab - 1
        targets[:, : self.shown - 1] = IGNORED
        return Rows(tokens, targets)

    def references(self) -> dict[str, float]:
        first, count = self._starts(self.split)
        first += self.shown
        last, *ahead = (self.tokens[first - 1 + step :][:count] for step in range(1 + self.horizon))
        return {"the last number again": float(np.mean([last == each for each in ahead]))}


def load_series(name: str) -> Floats:
    """The numbers of a series in order. Raises ``UsageError`` if statsmodels is missing."""
    datasets = from_extra("statsmodels.datasets", "examples", "the task forecast")
    if name == "sunspots":
        found: Floats = datasets.sunspots.load_pandas().data["SUNACTIVITY"].to_numpy(np.float64)
        return found
    months: Floats = datasets.elnino.load_pandas().data.iloc[:, 1:].to_numpy(np.float64)
    return months.ravel()
