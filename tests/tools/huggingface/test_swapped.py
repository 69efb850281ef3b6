"""Memories in the models of transformers: zero gates, caches, padding, gradient checkpointing."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from transformers import DynamicCache, StaticCache

import titans_build as tb
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
        mine = model(tokens, use_cache=True).past_key_values
        with pytest.raises(SwapError, match="a memory cannot forget"):
            mine.crop(-2)
        # none that was refused has touched the model
        assert torch.equal(model(tokens, past_key_values=DynamicCache()).logits, model(tokens).logits)


def test_static_cache(llama: Any, tokens: Tensor) -> None:
    model = llama.swapped("beside")
    cache = StaticCache(config=model.config, max_cache_len=40)
    with torch.no_grad():
        first = model(tokens[:, :5], past_key_values=cache).logits
        rest = model(tokens[:, 5:], past_key_values=cache).logits
        assert_close(torch.cat([first, rest], dim=1), model(tokens).logits, atol=1e-6, rtol=1e-6)


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
        assert [type(module) for module in model.modules()] == kinds
        assert torch.equal(model(tokens).logits, before)
