"""The learning rate over the steps of a run."""

from __future__ import annotations

import pytest
import torch

from titans_build.tools.training.optimizer import learning_rate, stage_at
from titans_build.tools.training.settings import as_settings


def test_linear_warmup_and_cosine_decay() -> None:
    settings = as_settings({"steps": 100, "lr": 2.0, "warmup": 0.1, "final_lr": 0.25})
    rates = [learning_rate(step, settings) for step in range(101)]
    assert rates[:10] == pytest.approx([2.0 * (i + 1) / 11 for i in range(10)])
    assert max(rates) == rates[10] == 2.0
    assert rates[55] == pytest.approx((2.0 + 0.5) / 2)
    assert rates[99] == pytest.approx(0.5, abs=1e-3) and rates[99] > 0.5
    # torch's own, from the top on
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2.0)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 90, eta_min=0.5)
    for rate in rates[10:100]:
        assert rate == pytest.approx(cosine.get_last_lr()[0])
        optimizer.step()
        cosine.step()


def test_rate_without_warmup_starts_at_the_peak_and_is_never_zero() -> None:
    settings = as_settings({"steps": 3, "lr": 1.0, "warmup": 0.0, "final_lr": 0.0})
    rates = [learning_rate(step, settings) for step in range(3)]
    assert rates[0] == 1.0 and rates == sorted(rates, reverse=True) and rates[-1] > 0
    assert learning_rate(0, as_settings({"steps": 1, "lr": 1.0, "warmup": 0.5})) == 0.5


def test_each_stage_has_its_own_schedule() -> None:
    stages = [{"steps": 10, "train": ["*"]}, {"steps": 4, "train": ["*"], "lr": 0.1}]
    settings = as_settings({"stages": stages, "lr": 1.0, "warmup": 0.5, "final_lr": 0.1})
    assert [stage_at(step, settings)[::2] for step in (0, 9, 10, 13)] == [(0, 0), (0, 9), (1, 0), (1, 3)]
    alone = as_settings({"steps": 4, "lr": 0.1, "warmup": 0.5, "final_lr": 0.1})
    assert [learning_rate(10 + i, settings) for i in range(4)] == [learning_rate(i, alone) for i in range(4)]
