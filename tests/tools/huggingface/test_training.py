"""``Trainer`` of transformers, and TRL's, on models of recipes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.testing import assert_close
from transformers import Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

from titans_build.huggingface import TitansBuildForCausalLM, byte_tokenizer, from_pretrained

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


def test_the_best_model_is_loaded_at_the_end(small: Make, rows: list[Any], tmp_path: Path) -> None:
    model = small("mag", torch.float32)
    settings = arguments(
        tmp_path, learning_rate=0.3, load_best_model_at_end=True, eval_strategy="steps", eval_steps=2, optim="sgd"
    )
    trainer = Trainer(model=model, args=settings, train_dataset=rows, eval_dataset=rows)
    trainer.train()
    losses = {entry["step"]: entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry}
    assert set(losses) == {2, 4}
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(losses.values()), rel=1e-6)
    best = from_pretrained(tmp_path / f"checkpoint-{min(losses, key=losses.__getitem__)}")
    for (name, mine), other in zip(model.named_parameters(), best.parameters(), strict=True):
        assert torch.equal(mine, other), name


def test_label_smoothing_of_trainer_is_warned_of(small: Make, rows: list[Any], tmp_path: Path) -> None:
    settings = arguments(tmp_path, max_steps=1, save_strategy="no", label_smoothing_factor=0.1)
    with pytest.warns(UserWarning, match="For label_smoothing_factor it does not shift them"):
        Trainer(model=small("mag", torch.float32), args=settings, train_dataset=rows).train()


TEXTS = ["once upon a time", "there was", "a memory that", "read"]


def fine_tuning(model: Any, folder: Path, **changes: Any) -> SFTTrainer:
    """One step over ``TEXTS``."""
    settings = {"max_steps": 1, "per_device_train_batch_size": 4, "optim": "sgd", "learning_rate": 0.1}
    settings |= {"max_length": 24, "max_grad_norm": 0, "save_strategy": "no", "lr_scheduler_type": "constant"}
    settings |= {"report_to": "none", "use_cpu": True, "bf16": False, "disable_tqdm": True}
    data = Dataset.from_dict({"text": TEXTS})
    args = SFTConfig(str(folder), **(settings | changes))
    return SFTTrainer(model=model, args=args, train_dataset=data, processing_class=byte_tokenizer())


def test_supervised_fine_tuning_by_trl(small: Make, tmp_path: Path) -> None:
    """It reads hidden states by ``base_model``, and the head's weights; its texts end with the byte 0."""
    model, by_hand = small("mac", torch.float32, vocab=256), small("mac", torch.float32, vocab=256)
    fine_tuning(model, tmp_path).train()
    rows = [torch.tensor([[*text.encode(), 0]]) for text in TEXTS]
    count = sum(row.shape[1] - 1 for row in rows)
    torch.stack([by_hand(row, labels=row, num_items_in_batch=count).loss for row in rows]).sum().backward()
    for (name, mine), other in zip(model.named_parameters(), by_hand.parameters(), strict=True):
        assert_close(mine, other - 0.1 * other.grad, msg=name, atol=1e-4, rtol=1e-4)
    adapted = get_peft_model(small("mac", torch.float32, vocab=256), LoraConfig(r=2, target_modules="all-linear"))
    fine_tuning(adapted, tmp_path).train()
    assert any(p.any() for name, p in adapted.named_parameters() if "lora_B" in name)


@pytest.mark.parametrize("changes", [{"packing": True}, {"padding_free": True, "max_length": None}], ids=str)
def test_packed_rows_of_trl_are_documents_apart(small: Make, llama: Any, tmp_path: Path, changes: dict) -> None:
    def swapped() -> Any:
        return llama.swapped("beside", dtype=torch.float32, vocab_size=256)

    for make in (lambda: small("mac", torch.float32, vocab=256), swapped):
        model, by_hand = make().train(), make().train()
        fine_tuning(model, tmp_path, **changes).train()
        rows = [torch.tensor([[*text.encode(), 0]]) for text in TEXTS]
        count = sum(row.shape[1] - 1 for row in rows)
        if changes.get("packing"):
            assert sum(row.shape[1] for row in rows) > 24  # more than one packed row
        losses = [by_hand(row, labels=row, num_items_in_batch=count).loss for row in rows]
        torch.stack(losses).sum().backward()
        for (name, mine), other in zip(model.named_parameters(), by_hand.parameters(), strict=True):
            assert_close(mine, other - 0.1 * other.grad, msg=name, atol=1e-4, rtol=1e-4)
