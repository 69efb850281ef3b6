"""Half-lives, labels and JSON numbers."""

from __future__ import annotations

import math

import numpy as np
import pytest

from titans_build.tools.analysis.analysis import labels, rounded
from titans_build.tools.analysis.recall import half_life


def test_half_life() -> None:
    assert half_life([0, 1, 2, 4], np.array([1, 0.75, 0.5, 0.25])) == pytest.approx(2.0)
    assert half_life([0, 10, 20], np.array([1, 3, 0])) == pytest.approx(15.0)  # half of the largest
    # a head whose answers swing has lost the pair at the first swing
    assert half_life([0, 1, 2, 4], np.array([1, 0.0, -6, 7])) == pytest.approx(0.5)
    assert half_life([0, 1, 2], np.array([1, 0.9, 0.8])) is None
    assert half_life([0, 1], np.array([np.nan, np.nan])) is None


def test_labels_are_layers_where_these_are_unique() -> None:
    names = ["layers.0.blocks.0.memory", "layers.1.blocks.0", "layers.1.blocks.1.memory"]
    assert labels(names) == ["layer 0", "layer 1, 1 of 2", "layer 1, 2 of 2"]


def test_rounded_is_plain_json() -> None:
    given = {"a": np.array([[1.23456789, np.nan]], dtype=np.float32), "b": (math.inf, 3), "c": "text", "d": None}
    assert rounded(given) == {"a": [[1.2346, None]], "b": [None, 3], "c": "text", "d": None}
