"""The loss of a text by position is that of one pass, however the text is cut."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import cross_entropy

import titans_build as tb
from titans_build.blocks.language_model import LanguageModel
from titans_build.tools.inference import Perplexity, perplexity


def tokens(count: int, rows: int = 1) -> torch.Tensor:
    return torch.randint(256, (rows, count), generator=torch.Generator().manual_seed(0))


def whole_losses(model: LanguageModel, text: torch.Tensor, state: object = None) -> torch.Tensor:
    """``[batch, time - 1]``: of the tokens at positions 1, 2, ..."""
    with torch.no_grad():
        logits = model(text, state).logits[:, :-1]
    return cross_entropy(logits.flatten(0, 1), text[:, 1:].flatten(), reduction="none").view(len(text), -1)


@pytest.mark.parametrize("cuts", [[700], [1, 1, 5, 0, 300, 393], [127, 1, 1, 127, 444]], ids=str)
def test_buckets_are_those_of_one_pass(model: LanguageModel, cuts: list[int]) -> None:
    text = tokens(700, rows=2)
    losses = whole_losses(model, text)
    told: list[int] = []
    found = perplexity(model, iter(text.split(cuts, dim=1)), on_piece=told.append)
    assert told[-1] == 700
    assert found.tokens == 2 * 699
    assert found.loss == pytest.approx(float(losses.mean()), abs=1e-4)
    assert found.perplexity == pytest.approx(math.exp(found.loss))
    spans = [(0, 128), (128, 256), (256, 512), (512, 1024)]
    assert [(bucket.start, bucket.stop) for bucket in found.buckets] == spans
    for bucket, (start, stop) in zip(found.buckets, spans):
        here = losses[:, max(start - 1, 0) : stop - 1]
        assert bucket.tokens == here.numel()
        assert bucket.loss == pytest.approx(float(here.mean()), abs=1e-4)


def test_edges_of_ones_own(model: LanguageModel) -> None:
    text = tokens(40)
    found = perplexity(model, text, edges=[1, 10, 39])
    losses = whole_losses(model, text)[0]
    # in the first bucket is the first token alone, which nothing predicts
    assert [(b.start, b.stop, b.tokens) for b in found.buckets] == [(1, 10, 9), (10, 39, 29), (39, None, 1)]
    assert found.buckets[2].loss == pytest.approx(float(losses[38]), abs=1e-4)
    for edges in ([0, 3], [5, 5], [7, 3]):
        with pytest.raises(ValueError, match="increasing positions"):
            perplexity(model, text, edges=edges)


def test_a_state_is_what_was_read_before(model: LanguageModel) -> None:
    text = tokens(60)
    with torch.no_grad():
        state = model(text[:, :20]).state
    found = perplexity(model, text[:, 20:], state)
    assert found.loss == pytest.approx(float(whole_losses(model, text[:, 20:], state).mean()), abs=1e-4)
    assert perplexity(model, text[:, 20:]).loss != pytest.approx(found.loss, abs=1e-6)


def test_frozen_is_another_loss_and_the_memory_goes_unchanged(model: LanguageModel) -> None:
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


def test_a_text_without_anything_to_predict(model: LanguageModel) -> None:
    for count in (0, 1):
        found = perplexity(model, tokens(count))
        assert found.tokens == 0 and math.isnan(found.loss) and found.buckets == []


def test_a_large_loss_has_an_infinite_perplexity() -> None:
    assert Perplexity(1, 1e4, [], None).perplexity == math.inf
