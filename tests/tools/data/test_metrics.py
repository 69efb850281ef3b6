from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import one_hot

from titans_build.tools.data import Score, score

TARGETS = torch.tensor([[1, 2, -100], [0, -100, 2], [-100, -100, -100]])


def logits(choices: list[list[int]]) -> torch.Tensor:
    return one_hot(torch.tensor(choices), 4).float()


def test_score_counts_tokens_and_rows():
    # one wrong in the second row; what stands where nothing counts does not matter
    made = score(logits([[1, 2, 3], [0, 0, 1], [0, 0, 0]]), TARGETS)
    assert made == Score(right=3, counted=4, rows_right=1, rows=2)
    assert (made.accuracy, made.exact) == (0.75, 0.5)
    assert score(logits([[1, 2, 0], [0, 0, 2], [0, 0, 0]]), TARGETS).exact == 1.0


def test_score_of_several_right_answers():
    accepted = torch.zeros(3, 3, 4, dtype=torch.bool)
    accepted[0, :, 1:3] = True
    made = score(logits([[2, 1, 3], [0, 0, 2], [0, 0, 0]]), TARGETS, accepted)
    # the second row accepts nothing, not even its targets
    assert made == Score(right=2, counted=4, rows_right=1, rows=2)


def test_scores_add_up():
    whole = score(logits([[1, 2, 3], [0, 0, 1], [0, 0, 0]]), TARGETS)
    parts = [score(logits([[1, 2, 3]]), TARGETS[:1]), score(logits([[0, 0, 1], [0, 0, 0]]), TARGETS[1:])]
    assert parts[0].plus(parts[1]) == whole


def test_score_without_targets_is_nan():
    made = score(logits([[0, 0, 0]]), TARGETS[2:])
    assert math.isnan(made.accuracy) and math.isnan(made.exact)


def test_shape_mismatch():
    with pytest.raises(ValueError, match=r"targets: expected \(1, 3\), got \(3, 3\)"):
        score(logits([[0, 0, 0]]), TARGETS)
