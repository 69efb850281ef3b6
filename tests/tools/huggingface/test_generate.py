"""``generate`` gives the same with a cache, without one, and by the language model itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from transformers import DynamicCache

from titans_build.huggingface import StateCache, TitansBuildForCausalLM, byte_tokenizer

HOW = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "temperature": 0.7, "top_k": 20},
    "beams": {"do_sample": False, "num_beams": 3, "num_return_sequences": 2},
    "sampled beams": {"do_sample": True, "num_beams": 3},
}
NEW = 8


def run(model: TitansBuildForCausalLM, tokens: Tensor, **settings: Any) -> Any:
    torch.manual_seed(3)
    return model.generate(tokens, max_new_tokens=NEW, pad_token_id=0, **settings)


@pytest.mark.parametrize("how", HOW)
def test_generate_with_and_without_a_cache(model: TitansBuildForCausalLM, tokens: Tensor, how: str) -> None:
    cached = run(model, tokens, **HOW[how])
    assert cached.shape == (3 * HOW[how].get("num_return_sequences", 1), 11 + NEW)
    assert torch.equal(cached, run(model, tokens, use_cache=False, **HOW[how]))


def test_greedy_search_takes_the_likeliest_token(model: TitansBuildForCausalLM, tokens: Tensor) -> None:
    grown = tokens
    for _ in range(NEW):
        grown = torch.cat([grown, model.model(grown).logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(run(model, tokens, do_sample=False), grown)
    assert torch.equal(model.model.generate(tokens, NEW).tokens, grown)


@pytest.mark.parametrize("how", ["greedy", "beams"])
def test_left_padded_rows_equal_single_rows(model: TitansBuildForCausalLM, tokens: Tensor, how: str) -> None:
    lengths = [11, 6, 1]
    padded, mask = torch.zeros_like(tokens), torch.zeros_like(tokens)
    for row, length in enumerate(lengths):
        padded[row, 11 - length :], mask[row, 11 - length :] = tokens[row, :length], 1
    together = run(model, padded, attention_mask=mask, **HOW[how]).view(3, -1, 11 + NEW)
    for row, length in enumerate(lengths):
        alone = run(model, tokens[row : row + 1, :length], **HOW[how])
        assert torch.equal(together[row, :, 11:], alone[:, length:])


def test_chunked_prefill(model: TitansBuildForCausalLM, tokens: Tensor) -> None:
    assert torch.equal(run(model, tokens, prefill_chunk_size=4), run(model, tokens))


def test_generate_continues_from_the_returned_cache(model: TitansBuildForCausalLM, tokens: Tensor) -> None:
    first = run(model, tokens, return_dict_in_generate=True)
    assert isinstance(first.past_key_values, StateCache)
    assert first.past_key_values.get_seq_length() == 11 + NEW - 1  # the last token has not been read
    longer = torch.cat([first.sequences, tokens[:, :4]], dim=1)
    real = torch.ones_like(longer)  # else what looks like padding in the middle is taken for it
    went_on = run(model, longer, attention_mask=real, past_key_values=first.past_key_values)
    assert torch.equal(went_on, run(model, longer, attention_mask=real))


def test_generate_from_embeddings(model: TitansBuildForCausalLM, tokens: Tensor) -> None:
    vectors = model.get_input_embeddings()(tokens)
    assert torch.equal(run(model, None, inputs_embeds=vectors), run(model, tokens)[:, 11:])


def test_stop_strings(small: Callable[..., TitansBuildForCausalLM], tokens: Tensor) -> None:
    model = small(vocab=256)
    plain = run(model, tokens[:1])
    end = next(place for place in range(11, 11 + NEW) if plain[0, place] < 128)  # a character of one byte
    out = run(model, tokens[:1], stop_strings=[chr(int(plain[0, end]))], tokenizer=byte_tokenizer())
    assert torch.equal(out, plain[:, : end + 1])


def test_generate_leaves_no_gradients_in_the_cache(model: TitansBuildForCausalLM, tokens: Tensor) -> None:
    state = run(model, tokens, return_dict_in_generate=True).past_key_values.state
    assert not any(tensor.requires_grad for tensor in state.layers[0] if isinstance(tensor, Tensor))


def test_unsupported_arguments_are_refused(small: Callable[..., TitansBuildForCausalLM], tokens: Tensor) -> None:
    model = small()
    with pytest.raises(TypeError, match=r"expected the cache of a titans-build model \(StateCache\), got DynamicCache"):
        run(model, tokens, past_key_values=DynamicCache())
    with pytest.raises(ValueError, match="cache_implementation='static': a titans-build model carries a state"):
        run(model, tokens, cache_implementation="static")
    for batch in (model.generate_batch, model.init_continuous_batching):
        with pytest.raises(NotImplementedError, match="use generate with a padded batch and attention_mask"):
            batch(tokens.tolist())
    with pytest.raises(ValueError, match="returns no attention weights"):
        run(model, tokens, output_attentions=True, return_dict_in_generate=True)


def test_guidance_and_hidden_states(small: Callable[..., TitansBuildForCausalLM], tokens: Tensor) -> None:
    model = small()
    negative = {"guidance_scale": 1.5, "negative_prompt_ids": tokens[:, :4]}
    assert torch.equal(run(model, tokens, **negative), run(model, tokens, use_cache=False, **negative))
    out = run(model, tokens, return_dict_in_generate=True, output_hidden_states=True, output_logits=True)
    assert len(out.hidden_states) == len(out.logits) == NEW
    with torch.no_grad():
        assert_close(model.lm_head(out.hidden_states[0][-1])[:, -1].float(), out.logits[0])
