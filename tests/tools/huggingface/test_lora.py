"""LoRA adapters of PEFT in a model with memories."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from torch import Tensor
from torch.testing import assert_close

import titans_build as tb
from titans_build.huggingface import from_pretrained
from titans_build.tools.huggingface.cache import CACHE
from titans_build.tools.swapping import SwapError


def lora(**settings: Any) -> LoraConfig:
    return LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", **settings)


def randomised(model: Any, part: str) -> None:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if part in name:
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)


def generated(model: Any, tokens: Tensor, **settings: Any) -> Tensor:
    return model.generate(
        input_ids=tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=6, do_sample=False, **settings
    )


def test_lora_beside_memories(llama: Any, tokens: Tensor, tmp_path: Path) -> None:
    base = llama.swapped("beside")
    base.save_pretrained(tmp_path / "base")
    with torch.no_grad():
        before = base(tokens).logits
    model = get_peft_model(base, lora()).eval()
    with torch.no_grad():
        assert_close(model(tokens).logits, before)  # an adapter starts at nothing
    randomised(model, "lora_B")
    for name, parameter in model.named_parameters():
        if ".titans." in name:
            parameter.requires_grad_(True)  # PEFT freezes all that is not its own
    model(input_ids=tokens, labels=tokens).loss.backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert {"lora" in name or ".titans." in name for name in trained} == {True}
    assert any("lora" in name for name in trained) and any(".titans." in name for name in trained)
    for settings in ({}, {"num_beams": 3}):
        assert torch.equal(generated(model, tokens, **settings), generated(model, tokens, use_cache=False, **settings))
    with torch.no_grad():
        logits = model(tokens).logits
        assert not torch.allclose(logits, before)
        # the adapter in a folder of its own, over the swapped model in its
        model.save_pretrained(tmp_path / "adapter")
        again = PeftModel.from_pretrained(from_pretrained(tmp_path / "base"), tmp_path / "adapter").eval()
        assert_close(again(tokens).logits, logits)
        # or merged into one
        merged = model.merge_and_unload()
        merged.save_pretrained(tmp_path / "merged")
        assert_close(from_pretrained(tmp_path / "merged")(tokens).logits, logits)


def test_memories_saved_in_the_adapter_folder(llama: Any, tokens: Tensor, tmp_path: Path) -> None:
    model = get_peft_model(llama.swapped("beside"), lora(modules_to_save=["titans"])).eval()
    randomised(model, "lora_B")
    randomised(model, "modules_to_save")
    with torch.no_grad():
        logits = model(tokens).logits
        with model.disable_adapter():
            assert_close(model(tokens).logits, llama.swapped("beside")(tokens).logits)
        model.save_pretrained(tmp_path)
        again = PeftModel.from_pretrained(llama.swapped("beside"), tmp_path).eval()
        assert_close(again(tokens).logits, logits)
    assert torch.equal(generated(model, tokens), generated(model, tokens, use_cache=False))
    model(input_ids=tokens, labels=tokens).loss.backward()
    assert any("modules_to_save" in name and p.grad is not None for name, p in model.named_parameters())


def test_memories_and_an_adapter_without_the_model(llama: Any, tokens: Tensor, tmp_path: Path) -> None:
    base = llama.swapped("beside")
    tb.save_swaps(base, tmp_path / "memories.safetensors")
    model = get_peft_model(base, lora(modules_to_save=["titans"])).eval()
    randomised(model, "lora_B")
    randomised(model, "modules_to_save")
    model.save_pretrained(tmp_path)
    again = llama.plain()
    tb.load_swaps(again, tmp_path / "memories.safetensors")
    with torch.no_grad():
        assert_close(PeftModel.from_pretrained(again, tmp_path).eval()(tokens).logits, model(tokens).logits)


def test_other_methods_of_peft(llama: Any, tokens: Tensor) -> None:
    adapted = get_peft_model(llama.plain(), lora())
    for model, where in ((adapted, f"**.{llama.attention[6:]}"), (adapted.get_base_model(), llama.attention)):
        with pytest.raises(SwapError, match=r"swap first, then get_peft_model\(model, LoraConfig"):
            tb.swap(model, where, "memory", "beside")
    tb.swap(adapted.merge_and_unload(), llama.attention, "memory", "beside")
    prompt = get_peft_model(llama.swapped("beside"), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    if (
        CACHE == "past_key_values"
    ):  # under the name it has from transformers 5.24 on, PEFT does not find it in any model
        assert torch.equal(generated(prompt.eval(), tokens), generated(prompt, tokens, use_cache=False))
    prefix = get_peft_model(llama.swapped("beside"), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    with pytest.raises(SwapError, match=r"3 tokens without the memory: .* or of prefix tuning \(prompt tuning works\)"):
        prefix(tokens)


def test_lora_on_single_parameters(llama: Any, small: Any, tokens: Tensor) -> None:
    def adapted(name: str, model: Any) -> Any:
        model = get_peft_model(model, LoraConfig(r=2, target_parameters=[name], target_modules=[])).eval()
        randomised(model, "lora_B")
        return model

    for name, base in (("block.controls.weight", llama.swapped("beside")), ("memory.controls.weight", small())):
        model = adapted(name, base)
        with torch.no_grad():
            logits = model(tokens).logits
            model.merge_adapter()
            assert_close(model(tokens).logits, logits)
    for name in ("initial_weights.0", "titans.block.convolution"):
        with pytest.raises((TypeError, SwapError), match=r"ParamWrapper now: .* linear layers .*modules_to_save"):
            adapted(name, llama.swapped("beside"))(tokens)
    for name in ("embedding", "model.head"):
        with pytest.raises(TypeError, match=r"ParamWrapper now: .*, and not embedding and head"):
            adapted(name, small())(tokens)


@pytest.mark.parametrize("how", ["beside", "replace"])
def test_lora_on_every_linear_layer(llama: Any, tokens: Tensor, how: str) -> None:
    base = llama.swapped(how)
    model = get_peft_model(base, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")).eval()
    with torch.no_grad():
        before = model(tokens).logits
        randomised(model, "lora_B")
        assert not torch.allclose(model(tokens).logits, before)
    assert torch.equal(generated(model, tokens), generated(model, tokens, use_cache=False))
