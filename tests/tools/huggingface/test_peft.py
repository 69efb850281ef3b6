"""Adapters of PEFT on recipe models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from torch import Tensor
from torch.testing import assert_close

from titans_build.huggingface import TitansBuildForCausalLM

Make = Callable[..., TitansBuildForCausalLM]


def generated(model: Any, tokens: Tensor, **settings: Any) -> Tensor:
    return model.generate(
        input_ids=tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=6, do_sample=False, **settings
    )


@pytest.mark.parametrize("name", ["mac", "mag"])
def test_lora(small: Make, tokens: Tensor, tmp_path: Path, name: str) -> None:
    model = get_peft_model(small(name), LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")).eval()
    with torch.no_grad():
        assert_close(model(tokens).logits, small(name)(tokens).logits)
        generator = torch.Generator().manual_seed(3)
        for key, parameter in model.named_parameters():
            if "lora_B" in key:
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    out = model(input_ids=tokens, labels=tokens, output_hidden_states=True)
    out.loss.backward()
    trained = {key for key, parameter in model.named_parameters() if parameter.grad is not None}
    assert trained == {key for key, _ in model.named_parameters() if "lora_" in key}
    for settings in ({}, {"num_beams": 2}):
        assert torch.equal(generated(model, tokens, **settings), generated(model, tokens, use_cache=False, **settings))
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        assert_close(PeftModel.from_pretrained(small(name), tmp_path).eval()(tokens).logits, out.logits)
        assert_close(model.merge_and_unload()(tokens).logits, out.logits)


def test_prompt_tuning(small: Make, tokens: Tensor, tmp_path: Path) -> None:
    settings = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, num_attention_heads=1)
    model = get_peft_model(small("mac"), settings).eval()
    out = model(input_ids=tokens, attention_mask=torch.ones_like(tokens), labels=tokens)
    inner = small("mac").model
    with torch.no_grad():
        prompt = model.get_prompt(3).to(torch.float64)
        expected = inner(embeddings=torch.cat([prompt, inner.embed(tokens)], dim=1)).logits
    assert_close(out.logits, expected)
    out.loss.backward()
    assert [key for key, parameter in model.named_parameters() if parameter.grad is not None] == [
        "prompt_encoder.default.embedding.weight"
    ]
    assert torch.equal(generated(model, tokens)[:, 11], expected[:, -1].argmax(-1))
    assert torch.equal(generated(model, tokens), generated(model, tokens, use_cache=False))
    model.save_pretrained(tmp_path)
    assert_close(PeftModel.from_pretrained(small("mac"), tmp_path)(input_ids=tokens).logits, out.logits)


def test_what_a_recipe_model_cannot_do_is_refused(small: Make, tokens: Tensor) -> None:
    prefix = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, num_attention_heads=1)
    with pytest.raises(TypeError, match="prompt tuning works in place of prefix tuning"):
        get_peft_model(small("mac"), prefix)(input_ids=tokens)
    for name in ("embed_tokens", "lm_head"):
        whole = LoraConfig(r=2, target_modules=["qkv"], modules_to_save=[name])
        with pytest.raises(ValueError, match="modules_to_save cannot train it"):
            get_peft_model(small("mac"), whole)
        with pytest.raises(ValueError, match="is not supported"):
            get_peft_model(small("mac"), LoraConfig(r=2, target_modules=[name]))
