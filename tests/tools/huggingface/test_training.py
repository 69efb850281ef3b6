"""``Trainer`` of transformers on models of recipes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from transformers import Trainer, TrainingArguments

from titans_build.huggingface import TitansBuildForCausalLM, from_pretrained

Make = Callable[..., TitansBuildForCausalLM]


def arguments(folder: Path, **changes: Any) -> TrainingArguments:
    settings = {
        "output_dir": str(folder),
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_steps": 2,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    return TrainingArguments(**(settings | changes))


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Tensor]]:
    drawn = torch.randint(1, 40, (8, 9), generator=torch.Generator().manual_seed(4))
    return [{"input_ids": row, "labels": row} for row in drawn]


def test_training_and_exact_resume(small: Make, rows: list[Any], tmp_path: Path) -> None:
    model = small("mag", torch.float32)
    with torch.no_grad():
        before = model(torch.stack([row["input_ids"] for row in rows]), labels=torch.stack([r["labels"] for r in rows]))
    trainer = Trainer(model=model, args=arguments(tmp_path / "run"), train_dataset=rows)
    assert trainer.evaluate(rows)["eval_loss"] == pytest.approx(before.loss.item(), rel=1e-4)
    trainer.train()
    assert trainer.evaluate(rows)["eval_loss"] < before.loss.item() - 0.1
    # the checkpoint is a model like any other, and from the one half-way the rest is the same
    last = from_pretrained(tmp_path / "run" / "checkpoint-4")
    for (name, mine), other in zip(model.named_parameters(), last.parameters(), strict=True):
        assert torch.equal(mine, other), name
    again = Trainer(model=small("mag", torch.float32), args=arguments(tmp_path / "run"), train_dataset=rows)
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    for (name, mine), other in zip(model.named_parameters(), again.model.parameters(), strict=True):
        assert_close(mine, other, msg=name)


def test_gradient_accumulation_and_checkpointing(small: Make, rows: list[Any], tmp_path: Path) -> None:
    short = [{**row, "labels": row["labels"].clone()} for row in rows[:4]]
    short[0]["labels"][3:] = -100  # parts of unequal counts

    def trained(**changes: Any) -> dict[str, Tensor]:
        model = small("mag", torch.float64)
        settings = arguments(tmp_path, max_steps=1, save_strategy="no", optim="sgd", learning_rate=1.0, **changes)
        Trainer(model=model, args=settings, train_dataset=short).train()
        return dict(model.named_parameters())

    whole = trained(per_device_train_batch_size=4)
    parts = trained(per_device_train_batch_size=1, gradient_accumulation_steps=4)
    recomputed = trained(per_device_train_batch_size=4, gradient_checkpointing=True)
    for name, parameter in whole.items():
        assert_close(parts[name], parameter, msg=name)
        assert_close(recomputed[name], parameter, msg=name)
