"""Memories saved without their model."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, LlamaModel

import titans_build as tb
from titans_build.tools.swapping import SwapError, swaps

CONFIG = {"vocab_size": 20, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "pad_token_id": 0}
ATTENTION = {"num_attention_heads": 4, "num_key_value_heads": 2}


def test_a_model_gets_the_blocks_of_another(plain, randomised, tokens, tmp_path):
    model, t = plain(), tokens()
    tb.swap(model, "layers.*", {"type": "memory", "heads": 2, "chunk": 4}, "beside", every=2, train="memory")
    tb.swap(model, "layers.1", ["memory", "ffn"], "replace")
    randomised(model)
    tb.save_swaps(model, tmp_path / "memories.safetensors")
    other = plain()
    plans = tb.load_swaps(other, tmp_path / "memories.safetensors")
    assert [plan.record for plan in plans] == [plan.record for plan in swaps(model)] == [p.record for p in swaps(other)]
    assert torch.equal(other(t), model(t))
    trains = [[name for name, p in one.named_parameters() if p.requires_grad] for one in (model, other)]
    assert trains[0] == trains[1]
    # without the weights of the model itself, and beside blocks that it has already
    saved = load_file(tmp_path / "memories.safetensors")
    assert all(name.startswith(("0.layers.0.", "0.layers.2.", "1.layers.1.")) for name in saved)
    more = plain()
    tb.swap(more, "layers.0", "ffn", "beside")
    tb.load_swaps(more, tmp_path / "memories.safetensors")
    assert_same_swaps(more.layers[0].titans_2, model.layers[0].titans)


def assert_same_swaps(one: nn.Module, two: nn.Module) -> None:
    for (name, a), (_, b) in zip(one.named_parameters(), two.named_parameters(), strict=True):
        assert torch.equal(a, b), name


def test_other_heads_of_a_model(randomised, tmp_path):
    config = LlamaConfig(**CONFIG, **ATTENTION)
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    weights = copy.deepcopy(model.model.state_dict())
    tb.swap(model, "model.layers.*.self_attn", "memory", "beside")
    randomised(model)
    tb.save_swaps(model, tmp_path / "memories.safetensors")
    t = torch.randint(1, 20, (2, 9))
    expected = model.model(t).last_hidden_state
    for kind in (LlamaForSequenceClassification, LlamaModel):
        other = kind(config).eval()
        body = other.base_model
        body.load_state_dict(weights)
        tb.load_swaps(other, tmp_path / "memories.safetensors")
        assert torch.equal(body(t).last_hidden_state, expected)


def test_what_does_not_fit_leaves_the_model_unchanged(plain, tokens, tmp_path):
    file, t = tmp_path / "memories.safetensors", tokens()
    with pytest.raises(SwapError, match="Plain has no swaps in it"):
        tb.save_swaps(plain(), file)
    model = plain()
    tb.swap(model, "layers.0", tb.build_block("memory", dim=16), "beside")
    with pytest.raises(SwapError, match="was given as a module, and has no record"):
        tb.save_swaps(model, file)
    tb.unswap(model)
    with pytest.raises(tb.StorageError, match="no such file"):
        tb.load_swaps(model, file)
    before = model(t)
    tb.swap(model, "layers.*", "memory", "beside")
    tb.save_swaps(model, file)
    tb.unswap(model)
    with pytest.raises(SwapError, match=r"matches no module of Sequential"):
        tb.load_swaps(nn.Sequential(nn.Linear(3, 3)), file)
    wide = nn.ModuleDict({"layers": nn.ModuleList(nn.Sequential(nn.Linear(8, 8)) for _ in range(3))})
    with pytest.raises(SwapError, match="width"):
        tb.load_swaps(wide, file)
    assert not swaps(wide) and not swaps(model)
    tensors = load_file(file)
    save_file(tensors, file)
    with pytest.raises(tb.StorageError, match="format"):
        tb.load_swaps(model, file)
    assert torch.equal(model(t), before)


def test_the_blocks_that_peft_trains_are_saved(randomised, tmp_path):
    def model():
        llama = LlamaForCausalLM(LlamaConfig(**CONFIG, **ATTENTION)).eval()
        tb.swap(llama, "model.layers.*.self_attn", {"type": "memory", "heads": 2}, "beside", gate=0.5)
        return llama

    trained = get_peft_model(model(), LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["titans"])).eval()
    randomised(trained.base_model.model.model.layers[0].self_attn.titans.modules_to_save)
    tb.save_swaps(trained.base_model.model, tmp_path / "memories.safetensors")
    other = LlamaForCausalLM(LlamaConfig(**CONFIG, **ATTENTION)).eval()
    tb.load_swaps(other, tmp_path / "memories.safetensors")
    saved, loaded = trained.merge_and_unload().state_dict(), other.state_dict()
    assert all(torch.equal(saved[name], loaded[name]) for name in loaded if ".titans." in name)
    inside = get_peft_model(model(), LoraConfig(r=2, target_modules=["qkv"])).base_model.model
    with pytest.raises(SwapError, match=r"model.layers.0.self_attn: the block has adapters of PEFT"):
        tb.save_swaps(inside, tmp_path / "memories.safetensors")
