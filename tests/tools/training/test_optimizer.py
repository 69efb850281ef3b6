"""Parameter groups, patterns, averaged weights and the learning-rate schedule."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import titans_build as tb
from titans_build.recipes.loading import base_names
from titans_build.tools.training.optimizer import (
    WeightAverage,
    learning_rate,
    make_optimizer,
    match_parameters,
    stage_at,
    unmatched_patterns,
)
from titans_build.tools.training.settings import as_settings

NO_DECAY = as_settings().no_decay

DECAYING = {"weight", "convolution", "embedding", "head", "gates"}
"""What the last part of a name may be in the group that decays: matrices that vectors are multiplied by, and tables."""
GAINS = {"gain", "gain_a", "gain_b", "gain_c", "gain_d", "gain_e", "norm_gain", "output_gain"}
STAYING = GAINS | {"bias", "gate_bias", "persistent", "tokens"}


def last(name: str) -> str:
    parts = name.split(".")
    return parts[-2] if parts[-1].isdigit() else parts[-1]


def groups(model: torch.nn.Module, no_decay: list[str] = NO_DECAY) -> dict[str, list[str]]:
    """The names of the parameters in each group."""
    optimizer = make_optimizer(model, as_settings({"no_decay": no_decay, "weight_decay": 0.1}), fused=False)
    for group in optimizer.param_groups:
        assert group["weight_decay"] == (0.1 if group["name"] == "decay" else 0.0)
        assert all(
            p is model.get_parameter(name) for name, p in zip(group["param_names"], group["params"], strict=True)
        )
    return {group["name"]: group["param_names"] for group in optimizer.param_groups}


@pytest.mark.parametrize("name", base_names())
def test_parameter_groups_of_packaged_recipes(name: str) -> None:
    model = tb.build(name, device="meta")
    found = groups(model)
    assert sorted(found["decay"] + found["no_decay"]) == sorted(dict(model.named_parameters()))
    assert {last(name) for name in found["decay"]} <= DECAYING
    assert {last(name) for name in found["no_decay"]} <= STAYING | {"initial_weights", "initial_momentum"}


def test_no_decay_for_initial_momentum_and_unknown_vectors(tiny: dict[str, Any]) -> None:
    tiny["layers"]["mag"] = [{"type": "memory", "heads": 2, "learn_momentum": True}]
    model = tb.build(tiny)
    model.layers[0].vector = torch.nn.Parameter(torch.ones(3))
    model.layers[0].matrix = torch.nn.Parameter(torch.ones(3, 3))
    found = groups(model)
    assert "layers.0.matrix" in found["decay"] and "layers.0.vector" in found["no_decay"]
    assert "layers.1.blocks.0.initial_momentum.0" in found["no_decay"]
    assert list(groups(model, ["*"])) == ["no_decay"]


def test_no_decay_takes_the_patterns_of_stages(tiny: dict[str, Any]) -> None:
    model = tb.build(tiny)
    found = groups(model, ["@memory", "!*.qkv*"])
    memory = {name for name in match_parameters(model, ["@memory"], "train") if model.get_parameter(name).dim() > 1}
    projections = {name for name in memory if ".qkv" in name}
    assert projections and projections <= set(found["decay"])
    assert memory - projections <= set(found["no_decay"])


def test_unmatched_no_decay_patterns(tiny: dict[str, Any]) -> None:
    model = tb.build(tiny)
    assert unmatched_patterns(model, NO_DECAY) == []
    assert unmatched_patterns(model, [*NO_DECAY, "heads", "@memory"]) == [
        f"no_decay.{len(NO_DECAY)}: no parameter has such a name: 'heads'; did you mean 'head'?"
    ]


def test_weight_decay_changes_only_its_group(tiny: dict[str, Any]) -> None:
    model = tb.build(tiny)
    optimizer = make_optimizer(model, as_settings({"lr": 0.1, "weight_decay": 0.5}), fused=True)
    before = copy.deepcopy(dict(model.named_parameters()))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    decay = groups(model)["decay"]
    for name, parameter in model.named_parameters():
        expected = before[name] * 0.95 if name in decay else before[name]
        torch.testing.assert_close(parameter, expected)


def test_patterns_match_names_and_block_types(tiny: dict[str, Any]) -> None:
    model = tb.build(tiny)
    names = set(dict(model.named_parameters()))
    memory = {name for name in names if ".memory." in name or ".branches.1." in name}
    assert match_parameters(model, ["@memory"], "train") == memory
    assert match_parameters(model, ["!@memory"], "train") == names - memory
    assert match_parameters(model, ["*"], "train") == names
    assert match_parameters(model, ["layers.0.*", "!*.gain*", "head"], "train") == {
        name for name in names if name.startswith("layers.0.") and ".gain" not in name
    } | {"head"}


@pytest.mark.parametrize(
    ("patterns", "path", "message"),
    [
        (["@memori"], "train.0", "no block of this type has a parameter: '@memori'; did you mean 'memory'?"),
        (["*", "!heads"], "train.1", "no parameter has such a name: 'heads'; did you mean 'head'?"),
        (["head", "!head"], "train", "['head', '!head'] selects no parameter to train"),
    ],
)
def test_unmatched_patterns_of_a_stage(tiny: dict[str, Any], patterns: list[str], path: str, message: str) -> None:
    with pytest.raises(tb.RecipeError) as caught:
        match_parameters(tb.build(tiny), patterns, "train")
    assert caught.value.problems == [(path, message)]


def test_weight_average_equals_torchs(tiny: dict[str, Any]) -> None:
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

    model = tb.build(tiny)
    average = WeightAverage(model, 0.9)
    reference = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    reference.update_parameters(model)  # the first takes the weights as they are
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += torch.randn(parameter.shape, generator=generator)
        average.update()
        reference.update_parameters(model)
    before = copy.deepcopy(model.state_dict())
    with average:
        for name, parameter in reference.module.named_parameters():
            assert torch.equal(parameter, dict(model.named_parameters())[name])
            assert not torch.equal(parameter, before[name])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


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
