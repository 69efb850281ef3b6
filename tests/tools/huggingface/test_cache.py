"""StateCache: reordered, repeated, copied and reset rows give what reading those tokens gives."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import titans_build as tb
from titans_build.huggingface import StateCache, TitansBuildForCausalLM


@torch.no_grad()
def read(model: TitansBuildForCausalLM, tokens: Tensor, cache: StateCache | None = None) -> tuple[Tensor, StateCache]:
    out = model(tokens, past_key_values=cache)
    return out.logits, out.past_key_values


@pytest.mark.parametrize(
    ("change", "rows"),
    [
        (lambda cache: cache.reorder_cache(torch.tensor([2, 0, 0])), [2, 0, 0]),
        (lambda cache: cache.batch_select_indices(torch.tensor([1])), [1]),
        (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
    ],
    ids=["reorder", "select", "repeat"],
)
def test_rows_continue_from_their_state(
    model: TitansBuildForCausalLM, tokens: Tensor, change: Callable[[StateCache], None], rows: list[int]
) -> None:
    _, cache = read(model, tokens)
    change(cache)
    assert cache.batch_size == len(rows)
    more = torch.arange(1, 1 + 3 * len(rows)).view(-1, 3)
    logits, _ = read(model, more, cache)
    whole, _ = read(model, torch.cat([tokens[rows], more], dim=1))
    assert_close(logits, whole[:, 11:])


def test_deepcopy_is_a_fork(model: TitansBuildForCausalLM, tokens: Tensor) -> None:
    _, cache = read(model, tokens[:, :5])
    fork = copy.deepcopy(cache)
    assert fork.state is cache.state
    read(model, tokens[:, :3], fork)
    assert (fork.length, cache.length) == (8, 5)
    logits, _ = read(model, tokens[:, 5:], cache)
    assert_close(logits, read(model, tokens)[0][:, 5:])


def test_the_state_is_that_of_the_language_model(small: Callable[..., TitansBuildForCausalLM], tokens: Tensor) -> None:
    model = small()
    logits, cache = read(model, tokens)
    inner = model.model(tokens)
    assert_close(logits, inner.logits)
    for (name, mine), (_, other) in zip(
        tb.state.named_tensors(cache.state), tb.state.named_tensors(inner.state), strict=True
    ):
        assert_close(mine, other, msg=name)
    # and one that was kept elsewhere goes on from here
    assert_close(read(model, tokens, StateCache(inner.state, 11))[0], read(model, tokens, cache)[0])


def test_padding_is_counted_but_not_read(model: TitansBuildForCausalLM, tokens: Tensor) -> None:
    mask = torch.ones(3, 14, dtype=torch.long)
    mask[:, :3] = 0
    padded = torch.cat([torch.zeros(3, 3, dtype=torch.long), tokens], dim=1)
    with torch.no_grad():
        out = model(padded, attention_mask=mask)
        assert out.past_key_values.length == 14
        assert_close(out.logits[:, 3:], read(model, tokens)[0])
        # afterwards the mask may cover all tokens, or those at hand
        for given in (torch.cat([mask, mask[:, -2:]], dim=1), mask[:, -2:], None):
            more = model(tokens[:, :2], attention_mask=given, past_key_values=copy.deepcopy(out.past_key_values))
            whole = read(model, torch.cat([tokens, tokens[:, :2]], dim=1))[0]
            assert_close(more.logits, whole[:, -2:])


def test_an_empty_cache(model: TitansBuildForCausalLM) -> None:
    cache = StateCache()
    assert cache
    assert (cache.get_seq_length(), cache.batch_size, cache.get_max_length()) == (0, -1, -1)
    cache.reorder_cache(torch.tensor([0]))
    assert cache.state is None and not cache.has_previous_state()
    assert repr(cache) == "StateCache(nothing read)"


def test_a_cropped_cache_is_that_of_the_first_tokens(model: TitansBuildForCausalLM, tokens: Tensor) -> None:
    mask = torch.ones_like(tokens)
    mask[1, :2] = mask[2, 5] = 0
    embeddings = model.get_input_embeddings()(tokens)

    def call(cache: StateCache, start: int, end: int, vectors: bool = False) -> Tensor:
        given = {"inputs_embeds": embeddings} if vectors else {"input_ids": tokens}
        given = {name: x[:, start:end] for name, x in given.items()}
        return model(**given, attention_mask=mask[:, :end], cache=cache).logits

    with torch.no_grad():
        whole = call(StateCache(), 0, 11)
        for crop in range(9):
            cache = StateCache()
            call(cache, 0, 3, vectors=crop % 2 == 0)
            for start in range(3, 8):
                call(cache, start, start + 1, vectors=crop % 2 == 0)
            cache = copy.deepcopy(cache)
            cache.crop(-crop)
            assert cache.length == cache.get_seq_length() == 8 - crop
            assert_close(call(cache, 8 - crop, 11), whole[:, 8 - crop :], atol=1e-10, rtol=1e-10)
            cache.crop(-3)
            assert_close(call(cache, 8, 11), whole[:, 8:], atol=1e-10, rtol=1e-10)


def test_crop(model: TitansBuildForCausalLM, tokens: Tensor) -> None:
    _, cache = read(model, tokens)
    assert repr(cache) == "StateCache(3 x 11 tokens read)"
    assert cache.get_mask_sizes(2, 0) == (13, 0)
    before = cache.state
    cache.crop(0)
    with pytest.raises(ValueError, match=r"crop\(-12\): expected 0 to -11"):
        cache.crop(-12)
    assert cache.state is before
    cache.crop(-11)
    assert (cache.state, cache.length) == (None, 0)
    cache.state = before  # of unknown tokens
    cache = StateCache(before, 11)
    with pytest.raises(ValueError, match=r"can forget the last 0 of the 11 tokens"):
        cache.crop(-2)


def test_the_cache_of_another_model_is_refused(small: Callable[..., TitansBuildForCausalLM], tokens: Tensor) -> None:
    model, other = small(), small("mac", layers={"mac": ["ffn"]})
    _, cache = read(other, tokens)
    with pytest.raises(ValueError, match="the state is of another recipe"):
        read(model, tokens, cache)
    assert cache.length == 11
    _, cache = read(model, tokens[:2])
    with pytest.raises(ValueError, match=r"the state has 2 rows .* the inputs have 3"):
        read(model, tokens, cache)
    with pytest.raises(TypeError, match="it is of another model"):
        cache.update(torch.zeros(1), torch.zeros(1), 0)
