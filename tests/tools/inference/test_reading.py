"""Reading a text in pieces gives the state and the loss of one pass, however the text is split."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch.nn.functional import cross_entropy

import titans_build as tb
from titans_build.blocks.language_model import LanguageModel
from titans_build.tools.inference import Perplexity, perplexity, position
from titans_build.tools.inference.reading import PIECE, split


def tokens(count: int, rows: int = 1) -> torch.Tensor:
    return torch.randint(256, (rows, count), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-4)], ids=str)
def test_pieces_give_the_state_of_one_pass(model: LanguageModel, dtype: torch.dtype, tolerance: float) -> None:
    model, text = copy.deepcopy(model).to(dtype), tokens(300, rows=2)
    with torch.no_grad():
        whole = model(text)
    for pieces in (text, iter(text.split([1, 7, 0, 64, 3, 200, 25], dim=1))):
        state = perplexity(model, pieces).state
        following = [model.generate(text[:, :1], 1, state=before).logits for before in (state, whole.state)]
        torch.testing.assert_close(*following, atol=tolerance, rtol=tolerance)
        if dtype is torch.float64:  # an untrained memory multiplies the rounding of float32 in its keys
            for (name, a), (_, b) in zip(tb.state.named_tensors(state), tb.state.named_tensors(whole.state)):
                torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance, msg=name)


def test_a_long_tensor_is_split() -> None:
    assert [piece.shape[1] for piece in split(tokens(2 * PIECE + 5))] == [PIECE, PIECE, 5]


def test_ids_outside_of_the_vocabulary_are_refused(model: LanguageModel) -> None:
    with pytest.raises(ValueError, match="id 256 is outside the vocabulary of 256"):
        perplexity(model, [tokens(4), torch.tensor([[256]])])


def test_a_text_that_is_not_encoded_is_refused(model: LanguageModel) -> None:
    with pytest.raises(TypeError, match=r"expected an int64 tensor .* got a text"):
        perplexity(model, "a text")


@pytest.mark.parametrize("name", ["mac", "mag", "mal", "lmm", "transformer"])
def test_position_counts_tokens(name: str) -> None:
    model = tb.build(tb.load_recipe(name, overrides={"dim": 32, "stack.0.repeat": 1}))
    for count in (1, 10, 150):
        with torch.no_grad():
            assert position(model, model(tokens(count)).state) == count
    assert position(model, model.init_state(1)) == 0


def test_position_is_none_without_a_counting_block() -> None:
    model = tb.build(
        tb.load_recipe({"version": 1, "dim": 8, "vocab": 9, "layers": {"a": ["ffn"]}, "stack": ["a"]}), seed=0
    )
    assert position(model, model.init_state(1)) is None


def whole_losses(model: LanguageModel, text: torch.Tensor, state: object = None) -> torch.Tensor:
    """``[batch, time - 1]``: of the tokens at positions 1, 2, ..."""
    with torch.no_grad():
        logits = model(text, state).logits[:, :-1]
    return cross_entropy(logits.flatten(0, 1), text[:, 1:].flatten(), reduction="none").view(len(text), -1)


@pytest.mark.parametrize("cuts", [[700], [1, 1, 5, 0, 300, 393], [127, 1, 1, 127, 444]], ids=str)
def test_buckets_are_those_of_one_pass(model: LanguageModel, cuts: list[int]) -> None:
    text = tokens(700, rows=2)
    losses = whole_losses(model, text)
    calls: list[int] = []
    found = perplexity(model, iter(text.split(cuts, dim=1)), on_piece=calls.append)
    assert calls[-1] == 700
    assert found.tokens == 2 * 699
    assert found.loss == pytest.approx(float(losses.mean()), abs=1e-4)
    assert found.perplexity == pytest.approx(math.exp(found.loss))
    spans = [(0, 128), (128, 256), (256, 512), (512, 1024)]
    assert [(bucket.start, bucket.stop) for bucket in found.buckets] == spans
    for bucket, (start, stop) in zip(found.buckets, spans):
        here = losses[:, max(start - 1, 0) : stop - 1]
        assert bucket.tokens == here.numel()
        assert bucket.loss == pytest.approx(float(here.mean()), abs=1e-4)


def test_given_edges(model: LanguageModel) -> None:
    text = tokens(40)
    found = perplexity(model, text, edges=[1, 10, 39])
    losses = whole_losses(model, text)[0]
    # the first bucket holds the first token alone, which is not predicted
    assert [(b.start, b.stop, b.tokens) for b in found.buckets] == [(1, 10, 9), (10, 39, 29), (39, None, 1)]
    assert found.buckets[2].loss == pytest.approx(float(losses[38]), abs=1e-4)
    for edges in ([0, 3], [5, 5], [7, 3]):
        with pytest.raises(ValueError, match="increasing positions"):
            perplexity(model, text, edges=edges)


def test_perplexity_continues_from_a_state_and_does_not_change_it(model: LanguageModel) -> None:
    text = tokens(60)
    with torch.no_grad():
        state = model(text[:, :20]).state
    before = [tensor.clone() for _, tensor in tb.state.named_tensors(state)]
    found = perplexity(model, text[:, 20:], state)
    assert all(torch.equal(a, b) for a, (_, b) in zip(before, tb.state.named_tensors(state)))
    assert found.loss == pytest.approx(float(whole_losses(model, text[:, 20:], state).mean()), abs=1e-4)
    assert perplexity(model, text[:, 20:]).loss != pytest.approx(found.loss, abs=1e-6)


def test_a_frozen_memory_has_another_loss_and_keeps_its_weights(model: LanguageModel) -> None:
    text = tokens(200)
    live = perplexity(model, text)
    with model.freeze_memory():
        frozen = perplexity(model, text)
    assert live.loss != frozen.loss

    def weights(found: Perplexity) -> list[torch.Tensor]:
        return [tensor for name, tensor in tb.state.named_tensors(found.state) if ".memory.weights" in name]

    fresh = [tensor for name, tensor in tb.state.named_tensors(model.init_state(1)) if ".memory.weights" in name]
    assert all(torch.equal(a, b) for a, b in zip(weights(frozen), fresh)) and fresh
    assert not any(torch.equal(a, b) for a, b in zip(weights(live), fresh))


def test_perplexity_of_at_most_one_token(model: LanguageModel) -> None:
    for count in (0, 1):
        found = perplexity(model, tokens(count))
        assert found.tokens == 0 and math.isnan(found.loss) and found.buckets == []


def test_perplexity_of_a_large_loss_is_infinite() -> None:
    assert Perplexity(1, 1e4, [], None).perplexity == math.inf
