"""Which parameters decay: of recipe models, of models with memories, and under PEFT."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainingArguments

from titans_build.huggingface import DecayMixin, TitansBuildForCausalLM, parameter_groups

Make = Callable[..., TitansBuildForCausalLM]
NEVER = (
    "gain",
    "norm_gain",
    "gate.gain_a",
    "persistent",
    "initial_weights",
    "titans.gate",
    "bias",
    "persistent.tokens",
)


class MemoryTrainer(DecayMixin, Trainer):
    pass


@pytest.fixture(params=["recipe", "swapped", "lora"])
def anything(request: pytest.FixtureRequest, small: Make, llama: Any) -> Any:
    if request.param == "recipe":
        return small("mac", torch.float32)
    model = llama.swapped("beside", dtype=torch.float32)
    if request.param == "lora":
        return get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["titans"]))
    return model


def arguments(folder: Path, **settings: Any) -> TrainingArguments:
    return TrainingArguments(str(folder), report_to="none", use_cpu=True, disable_tqdm=True, max_steps=1, **settings)


def test_gates_gains_and_initial_values_do_not_decay(anything: Any, tmp_path: Path) -> None:
    names = dict(anything.named_parameters())
    plain = set(Trainer(anything, arguments(tmp_path)).get_decay_parameter_names(anything))
    decays = set(MemoryTrainer(anything, arguments(tmp_path)).get_decay_parameter_names(anything))
    spared = plain - decays
    assert decays <= plain
    assert all(names[name].dim() < 2 or any(part in name for part in NEVER) for name in spared)
    assert any("initial_weights" in name for name in spared) and any("gain" in name for name in spared)
    assert not any(names[name].dim() < 2 or any(part in name for part in NEVER) for name in decays)
    assert any(name.endswith("qkv.weight") for name in decays)
    groups = {group["name"]: {name for name, _ in group["params"]} for group in parameter_groups(anything, 0.1)}
    assert decays <= groups["decay"] and spared <= groups["no_decay"]
    assert groups["decay"] | groups["no_decay"] == set(names)


def test_trainer_steps_with_these_groups(anything: Any, tmp_path: Path) -> None:
    rows = [{"input_ids": torch.arange(1, 8), "labels": torch.arange(1, 8)}]
    settings = arguments(tmp_path, weight_decay=0.1, learning_rate=0.1, optim="sgd", save_strategy="no")
    trainer = MemoryTrainer(anything, settings, train_dataset=rows)
    before = {name: parameter.detach().clone() for name, parameter in anything.named_parameters()}
    trainer.train()
    decay = set(trainer.get_decay_parameter_names(anything))
    grouped = {id(p): group["weight_decay"] for group in trainer.optimizer.param_groups for p in group["params"]}
    for name, parameter in anything.named_parameters():
        if parameter.requires_grad:
            assert grouped[id(parameter)] == (0.1 if name in decay else 0.0), name
        else:
            assert torch.equal(parameter, before[name]), name
    by_hand = torch.optim.AdamW(parameter_groups(anything, 0.1), lr=1e-3)
    given = Trainer(anything, settings, train_dataset=rows, optimizers=(by_hand, None))
    given.train()
    assert {group["weight_decay"] for group in by_hand.param_groups} == {0.0, 0.1}
