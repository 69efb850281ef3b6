"""Values along a text of any length in a bounded number of bins, each with its mean and its maximum."""

from __future__ import annotations

import math

import numpy as np
from torch import Tensor

CELLS = 240_000
"""Bins of all rows and quantities together, about as many as a page of some hundred kilobytes holds."""
FEWEST, MOST = 512, 4096
"""Bins of one row, whatever the number of rows."""


def bin_width(time: int, rows: int) -> int:
    """Tokens of a bin, so that ``rows`` rows of ``time`` tokens are light enough to be shown."""
    alone = CELLS // rows
    # a bin of one token has no maximum beside its mean
    bins = min(max(alone if time <= alone else alone // 2, FEWEST), MOST)
    return math.ceil(time / bins)


class Pool:
    """Collects values token by token; ``mean`` and ``max`` are float32 ``[rows, bins]``, NaN where there were none."""

    def __init__(self, rows: int, time: int, width: int) -> None:
        self.width = width
        bins = math.ceil(time / width)
        self._time, self._at = time, 0
        self._sum, self._count = np.zeros((rows, bins)), np.zeros((rows, bins))
        self._max = np.full((rows, bins), -np.inf)

    def add(self, values: Tensor) -> None:
        """The next tokens' ``[time, rows]``; NaN counts for nothing."""
        if len(values) == 0:
            return
        given = values.cpu().double().numpy()
        bins = (self._at + np.arange(len(given))) // self.width
        real = ~np.isnan(given)
        starts = np.flatnonzero(np.r_[True, np.diff(bins) > 0])
        here = bins[starts]
        self._sum[:, here] += np.add.reduceat(np.where(real, given, 0.0), starts, axis=0).T
        self._count[:, here] += np.add.reduceat(real, starts, axis=0, dtype=np.float64).T
        largest = np.maximum.reduceat(np.where(real, given, -np.inf), starts, axis=0).T
        self._max[:, here] = np.maximum(self._max[:, here], largest)
        self._at += len(given)

    @property
    def mean(self) -> np.ndarray:
        with np.errstate(invalid="ignore"):
            return (self._sum / np.where(self._count, self._count, np.nan)).astype(np.float32)

    @property
    def max(self) -> np.ndarray:
        return np.where(self._count > 0, self._max, np.nan).astype(np.float32)
