"""Memories in the models of transformers: zero gates, caches, padding, gradient checkpointing."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from torch import Tensor
from torch.testing import assert_close
from transformers import (
    AutoModel,
    BloomConfig,
    BloomForCausalLM,
    DynamicCache,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GenerationConfig,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    MiniMaxConfig,
    MiniMaxForCausalLM,
    RwkvConfig,
    RwkvForCausalLM,
    StaticCache,
)

import titans_build as tb
from titans_build.huggingface import from_pretrained
from titans_build.tools.swapping import SwapError

NEW = 4
HOWS = {"beside": ("beside",), "replaced": ("replace",), "around": ("before", "after")}


def run(model: Any, tokens: Tensor, **settings: Any) -> Any:
    torch.manual_seed(3)
    settings.setdefault("attention_mask", torch.ones_like(tokens))
    return model.generate(tokens, max_new_tokens=NEW, **{"do_sample": False, **settings})


@pytest.mark.parametrize("how", ["beside", "before", "after"])
def test_zero_gates_change_nothing(family: Any, tokens: Tensor, how: str) -> None:
    model = family.plain(torch.float32)
    with torch.no_grad():
        before = model(tokens).logits
        tb.swap(model, family.attention, {"type": "memory", "heads": 2, "chunk": 4}, how)
        assert (model(tokens).logits - before).abs().max() <= 1e-6
        tb.swap(model, family.layer, "memory", how)
        assert (model(tokens).logits - before).abs().max() <= 1e-6
        tb.unswap(model)
        assert torch.equal(model(tokens).logits, before)
    assert type(model.config).__name__ == type(family.config()).__name__


@pytest.mark.parametrize("how", HOWS)
def test_generate_with_and_without_a_cache(family: Any, tokens: Tensor, how: str) -> None:
    model = family.swapped(*HOWS[how])
    assert not torch.equal(run(model, tokens), run(family.plain(), tokens))
    for settings in ({}, {"do_sample": True, "top_k": 10}, {"num_beams": 3, "num_return_sequences": 2}):
        assert torch.equal(run(model, tokens, **settings), run(model, tokens, use_cache=False, **settings))


@pytest.mark.parametrize("how", HOWS)
def test_left_padded_rows_equal_single_rows(family: Any, tokens: Tensor, how: str) -> None:
    model = family.swapped(*HOWS[how])
    lengths = [11, 6, 2]
    padded, mask = torch.zeros_like(tokens), torch.zeros_like(tokens)
    for row, length in enumerate(lengths):
        padded[row, 11 - length :], mask[row, 11 - length :] = tokens[row, :length], 1
    with torch.no_grad():
        places = (mask.cumsum(-1) - 1).clamp(min=0)
        logits = model(padded, attention_mask=mask, position_ids=places).logits
        for row, length in enumerate(lengths):
            alone = model(tokens[row : row + 1, :length]).logits
            assert_close(logits[row, 11 - length :], alone[0], atol=1e-6, rtol=1e-6)
    for settings in ({}, {"num_beams": 2}):
        together = run(model, padded, attention_mask=mask, **settings)
        for row, length in enumerate(lengths):
            alone = run(model, tokens[row : row + 1, :length], **settings)
            assert torch.equal(together[row, 11:], alone[0, length:])


@pytest.mark.parametrize("how", HOWS)
def test_gradient_checkpointing(family: Any, tokens: Tensor, how: str) -> None:
    model = family.swapped(*HOWS[how]).train()
    model(tokens, labels=tokens, use_cache=False).loss.backward()
    plain = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert all(gradient is not None for gradient in plain.values())
    for reentrant in (False, True):
        model.zero_grad()
        model.activation_checkpointing_enable({"use_reentrant": reentrant})
        model(tokens, labels=tokens, use_cache=False).loss.backward()
        for name, parameter in model.named_parameters():
            assert_close(parameter.grad, plain[name], msg=f"{name}, reentrant {reentrant}")


def test_some_layers_and_whole_layers(family: Any, tokens: Tensor) -> None:
    model = family.plain()
    tb.swap(model, family.attention, {"type": "memory", "heads": 2, "chunk": 4}, every=2, start=1)
    for settings in ({}, {"num_beams": 3}):
        assert torch.equal(run(model, tokens, **settings), run(model, tokens, use_cache=False, **settings))
    model = family.plain()
    tb.swap(model, family.layer, ["memory", "ffn"], start=1)
    assert torch.equal(run(model, tokens), run(model, tokens, use_cache=False))


def test_a_sequence_in_parts_with_a_cache(family: Any, tokens: Tensor) -> None:
    model = family.swapped("beside")
    with torch.no_grad():
        whole = model(tokens).logits
        first = model(tokens[:, :4], use_cache=True)
        fork = copy.deepcopy(first.past_key_values)
        rest = model(tokens[:, 4:], past_key_values=first.past_key_values)
        assert_close(torch.cat([first.logits, rest.logits], dim=1), whole, atol=1e-6, rtol=1e-6)
        again = model(tokens[:, 4:], past_key_values=fork)
        assert torch.equal(again.logits, rest.logits)
        reordered = model(tokens[:, :4], use_cache=True).past_key_values
        reordered.batch_select_indices(torch.tensor([2, 0]))
        assert_close(model(tokens[[2, 0], 4:], past_key_values=reordered).logits, rest.logits[[2, 0]])


def test_generate_continues_from_the_returned_cache(family: Any, tokens: Tensor) -> None:
    for how in HOWS.values():
        model = family.swapped(*how)
        first = run(model, tokens, return_dict_in_generate=True)
        longer = torch.cat([first.sequences, tokens[:, :3]], dim=1)
        assert torch.equal(run(model, longer, past_key_values=first.past_key_values), run(model, longer))


def test_wrong_caches_are_refused(llama: Any, tokens: Tensor) -> None:
    model, other = llama.swapped("beside"), llama.plain()
    with torch.no_grad():
        foreign = other(tokens, use_cache=True).past_key_values
        with pytest.raises(SwapError, match="the cache has read 11 tokens without the memory: it is of another model"):
            model(tokens[:, :1], past_key_values=foreign)
        foreign = llama.swapped("beside")(tokens, use_cache=True).past_key_values
        with pytest.raises(SwapError, match="holds no state of this memory"):
            model(tokens[:, :1], past_key_values=foreign)
        # none that was refused has touched the model
        assert torch.equal(model(tokens, past_key_values=DynamicCache()).logits, model(tokens).logits)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_caches_of_fixed_size(llama: Any, tokens: Tensor, attention: str) -> None:
    for model in (llama.swapped("beside", attn_implementation=attention), llama.swapped("replace")):
        cache = StaticCache(config=model.config, max_cache_len=40)
        with torch.no_grad():
            first = model(tokens[:, :5], past_key_values=cache).logits
            rest = model(tokens[:, 5:], past_key_values=cache).logits
            whole = model(tokens).logits
        assert_close(torch.cat([first, rest], dim=1), whole, atol=1e-6, rtol=1e-6)
        logits = [
            torch.stack(run(model, tokens, return_dict_in_generate=True, output_logits=True, **settings).logits)
            for settings in ({"use_cache": False}, {"cache_implementation": "static"})
        ]
        assert_close(*logits, atol=1e-6, rtol=1e-6)


def test_a_mask_with_space_for_later_tokens(tokens: Tensor) -> None:
    """BLOOM gets a mask of tokens as long as a static cache."""
    torch.manual_seed(0)
    config = BloomConfig(vocab_size=64, hidden_size=16, n_layer=2, n_head=4, eos_token_id=None, pad_token_id=0)
    model = BloomForCausalLM(config).eval()
    tb.swap(model, "transformer.h.*.self_attention", {"type": "memory", "heads": 2, "chunk": 4}, "replace")
    mask = torch.ones_like(tokens)
    mask[0, :3] = 0
    settings = {"attention_mask": mask, "output_logits": True, "return_dict_in_generate": True}
    static, whole = (
        run(model, tokens, **settings, **cache) for cache in ({"cache_implementation": "static"}, {"use_cache": False})
    )
    assert_close(torch.stack(static.logits), torch.stack(whole.logits))


def test_a_cache_with_two_kinds_of_layers(tokens: Tensor) -> None:
    sizes = {
        "vocab_size": 40,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_key_value_heads": 2,
        "num_local_experts": 2,
        "block_size": 4,
        "head_dim": 4,
        "pad_token_id": 0,
    }
    for kinds in (["full_attention", "linear_attention"], ["linear_attention", "full_attention"]):
        config = MiniMaxConfig(**sizes, num_hidden_layers=2, num_attention_heads=4, layer_types=kinds)
        torch.manual_seed(0)
        model = MiniMaxForCausalLM(config).eval()
        tb.swap(model, "model.layers.*.self_attn", {"type": "memory", "heads": 2, "chunk": 4}, "beside", gate=0.5)
        for settings in ({}, {"num_beams": 3}):
            assert torch.equal(run(model, tokens, **settings), run(model, tokens, use_cache=False, **settings))
        # and without any layer that has keys
        model = MiniMaxForCausalLM(config).eval()
        where = f"model.layers.{kinds.index('full_attention')}.self_attn"
        tb.swap(model, where, {"type": "memory", "heads": 2, "chunk": 4}, "replace")
        for settings in ({}, {"num_beams": 3}):
            assert torch.equal(run(model, tokens, **settings), run(model, tokens, use_cache=False, **settings))


def test_layers_with_another_name_for_their_index(tokens: Tensor) -> None:
    config = GPTNeoConfig(
        vocab_size=64, hidden_size=16, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]]
    )
    torch.manual_seed(0)
    model = GPTNeoForCausalLM(config).eval()
    tb.swap(model, "transformer.h.*", {"type": "memory", "heads": 2, "chunk": 4}, "replace")
    with torch.no_grad():
        cache = model(tokens[:, :4], use_cache=True).past_key_values
        assert cache.get_seq_length() == 4
        assert_close(model(tokens[:, 4:], past_key_values=cache).logits, model(tokens).logits[:, 4:])


def test_a_model_that_goes_on_from_a_state_of_its_own(tokens: Tensor) -> None:
    torch.manual_seed(0)
    model = RwkvForCausalLM(RwkvConfig(vocab_size=64, hidden_size=16, num_hidden_layers=2, attention_hidden_size=16))
    tb.swap(model.eval(), "rwkv.blocks.*", {"type": "memory", "heads": 2, "chunk": 4}, "beside", gate=0.5)
    with torch.no_grad():
        whole = model(tokens, use_cache=False).logits
        first = model(tokens[:, :4])
        with pytest.raises(
            SwapError, match=r"RwkvForCausalLM: state \(list\) is no cache .* use_cache=False, or tb.memory"
        ):
            model(tokens[:, 4:], state=first.state)
        with tb.memory(model):
            first = model(tokens[:, :4])
            rest = model(tokens[:, 4:], state=first.state)
    assert_close(torch.cat([first.logits, rest.logits], dim=1), whole)


def test_models_that_initialize_every_norm_by_its_weight(tokens: Tensor, tmp_path: Path) -> None:
    """Gemma does. Its layers return a tensor, and are annotated with a tuple."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "head_dim": 4}
    config = Gemma3TextConfig(**sizes, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    model = Gemma3ForCausalLM(config).eval()
    tb.swap(model, "model.layers.0", "memory", "replace")
    tb.swap(model, "model.layers.1.self_attn", "memory", "beside", gate=0.5)
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        assert_close(from_pretrained(tmp_path).eval()(tokens).logits, model(tokens).logits)


def test_a_part_of_a_swapped_model_is_saved_with_its_memories(llama: Any, tokens: Tensor, tmp_path: Path) -> None:
    model = llama.swapped("beside")
    model.model.save_pretrained(tmp_path / "part")
    with torch.no_grad():
        expected = model.model(tokens).last_hidden_state
        part = AutoModel.from_pretrained(tmp_path / "part").to(expected.dtype).eval()
        assert_close(part(tokens).last_hidden_state, expected)
    assert "quantization_config" not in model.config.to_dict()
    tb.swap(model.model, "layers.*.mlp", "memory", "beside", gate=0.5)
    model.save_pretrained(tmp_path / "both")
    with torch.no_grad():
        assert_close(from_pretrained(tmp_path / "both").eval()(tokens).logits, model(tokens).logits)
    tb.unswap(model)
    model.model.save_pretrained(tmp_path / "plain")
    assert not any("titans" in name for name in AutoModel.from_pretrained(tmp_path / "plain").state_dict())


@pytest.mark.parametrize("asked_before", [False, True])
def test_hidden_states_and_attentions(llama: Any, tokens: Tensor, asked_before: bool) -> None:
    ask = {"output_hidden_states": True, "output_attentions": True}
    for where, how in ((llama.layer, "beside"), (llama.layer, "after"), (llama.attention, "beside")):
        model = llama.plain(attn_implementation="eager")
        if asked_before:
            model(tokens, **ask)
        tb.swap(model, where, "memory", how, gate=0.5)
        read: list[Tensor] = []
        for layer in model.model.layers:
            layer.register_forward_pre_hook(lambda _, args, read=read: read.append(args[0]))
        out = model(tokens, **ask)
        assert len(out.attentions) == 2 and len(out.hidden_states) == 3
        for got, expected in zip(out.hidden_states, read):
            assert torch.equal(got, expected)
    for where, name in ((llama.layer, "hidden_states"), (llama.attention, "attentions")):
        model = llama.plain(attn_implementation="eager")
        tb.swap(model, where, "memory", "replace", start=1)
        with pytest.raises(SwapError, match=rf"output_{name}: transformers recorded \d of \d, without model.layers.1"):
            model(tokens, **{f"output_{name}": True})


def test_continuous_batching_is_refused(llama: Any, tokens: Tensor) -> None:
    model = llama.swapped("beside")
    with pytest.raises(SwapError, match=r"continuous batching \(generate_batch\) .* use generate"):
        model.generate_batch(tokens.tolist(), GenerationConfig(max_new_tokens=2))


@pytest.mark.parametrize("how", ["beside", "replace"])
def test_offloaded_models(llama: Any, tokens: Tensor, how: str, tmp_path: Path) -> None:
    expected = llama.swapped(how)(tokens).logits
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    places |= {"model.layers.0": "cpu", "model.layers.1": "disk"}
    llama.swapped(how).save_pretrained(tmp_path / "saved")
    cpu = torch.device("cpu")
    for model in (
        cpu_offload(llama.swapped(how), execution_device=cpu),
        disk_offload(llama.swapped(how), tmp_path / "offloaded", execution_device=cpu),
        from_pretrained(tmp_path / "saved", device_map=places, offload_folder=tmp_path / "loaded"),
    ):
        assert any(parameter.is_meta for parameter in model.parameters())
        with torch.no_grad():
            assert_close(model(tokens).logits, expected)
            with tb.memory(model):
                parts = [model(tokens[:, :4]).logits, model(tokens[:, 4:]).logits]
        assert torch.equal(run(model, tokens), run(model, tokens, use_cache=False))
        assert parts[0].shape[1] + parts[1].shape[1] == tokens.shape[1]


def test_a_refused_swap_leaves_the_model_unchanged(llama: Any, tokens: Tensor) -> None:
    model = llama.plain()
    with torch.no_grad():
        before = model(tokens).logits
        kinds = [type(module) for module in model.modules()]
        for where, message in (
            ("model.rotary_emb", "position_ids"),
            ("model.layers", "ModuleList has no forward"),
            ("model.layers.*.mlp.up_proj", "Linear does not return the width 16"),
            ("model.layers.*.self_atn", "self_attn"),
        ):
            with pytest.raises(SwapError, match=message):
                tb.swap(model, where, "memory")
        for how in ("beside", "after"):
            with pytest.raises(SwapError, match="LlamaRotaryEmbedding has no parameters and returns 2 values"):
                tb.swap(model, "model.rotary_emb", "memory", how)
        assert [type(module) for module in model.modules()] == kinds
        assert torch.equal(model(tokens).logits, before)
