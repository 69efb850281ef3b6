"""Recipe models with a classifier's head: rewards and classes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.testing import assert_close
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from titans_build.huggingface import (
    TitansBuildForCausalLM,
    TitansBuildForSequenceClassification,
    TitansBuildModel,
    from_pretrained,
)
from titans_build.recipes import StorageError

Make = Callable[..., TitansBuildForCausalLM]


@pytest.fixture
def language_model(small: Make, tmp_path: Path) -> TitansBuildForCausalLM:
    """In a folder."""
    model = small("mac")
    model.config.pad_token_id = 0
    model.save_pretrained(tmp_path / "lm")
    return model


def test_a_classifier_from_a_language_model_and_back(
    language_model: TitansBuildForCausalLM, tokens: Tensor, tmp_path: Path
) -> None:
    made = AutoModelForSequenceClassification.from_pretrained(tmp_path / "lm", num_labels=2, dtype=torch.float64)
    assert isinstance(made, TitansBuildForSequenceClassification)
    assert made.score.weight.std().item() == pytest.approx(0.02, rel=0.5)  # drawn, and not what was in memory
    expected = language_model.model(tokens).hidden[:, -1] @ made.score.weight.T
    assert_close(made(tokens).logits, expected)
    made.save_pretrained(tmp_path / "classifier")
    for again in (
        from_pretrained(tmp_path / "classifier"),
        AutoModelForSequenceClassification.from_pretrained(tmp_path / "classifier"),
    ):
        assert_close(again(tokens).logits, expected)
    body = AutoModel.from_pretrained(tmp_path / "classifier")
    assert isinstance(body, TitansBuildModel)
    assert_close(body(tokens).last_hidden_state, language_model.model(tokens).hidden)
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "classifier")
    assert_close(whole(tokens).logits, language_model(tokens).logits)


def test_padding_does_not_change_rewards(
    language_model: TitansBuildForCausalLM, tokens: Tensor, tmp_path: Path
) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "lm", num_labels=1, dtype=torch.float64)
    lengths = [11, 6, 1]
    for side in ("left", "right"):
        padded, mask = torch.zeros_like(tokens), torch.zeros_like(tokens)
        for row, length in enumerate(lengths):
            part = slice(0, length) if side == "right" else slice(11 - length, 11)
            padded[row, part], mask[row, part] = tokens[row, :length], 1
        rewards = model(padded, attention_mask=mask).logits
        for row, length in enumerate(lengths):
            assert_close(rewards[row], model(tokens[row : row + 1, :length]).logits[0])


def test_a_classifier_trains(language_model: TitansBuildForCausalLM, tokens: Tensor, tmp_path: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "lm", num_labels=2).train()
    gradients = []
    for enable in (model.activation_checkpointing_disable, model.activation_checkpointing_enable):
        enable()
        model.zero_grad()
        model(tokens, labels=torch.tensor([0, 1, 1])).loss.backward()
        gradients.append([p.grad for name, p in model.named_parameters() if not name.endswith("model.head")])
    assert all(gradient is not None for gradient in gradients[0])
    assert_close(gradients[0], gradients[1])


def test_a_classifier_without_its_head_is_refused(language_model: TitansBuildForCausalLM, tmp_path: Path) -> None:
    AutoModelForSequenceClassification.from_pretrained(tmp_path / "lm").save_pretrained(tmp_path / "classifier")
    weights = load_file(tmp_path / "classifier" / "model.safetensors")
    del weights["score.weight"]
    save_file(weights, tmp_path / "classifier" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(StorageError, match=r"score\.weight is missing"):
        from_pretrained(tmp_path / "classifier")
    weights = load_file(tmp_path / "lm" / "model.safetensors")
    del weights["model.embedding"]
    save_file(weights, tmp_path / "lm" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(StorageError, match=r"model\.model\.embedding is missing"):
        AutoModelForSequenceClassification.from_pretrained(tmp_path / "lm")
