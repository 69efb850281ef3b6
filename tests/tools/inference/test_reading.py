"""A text in pieces is the text in one pass, and its length is nothing to memory."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import titans_build as tb
from titans_build.blocks.language_model import LanguageModel
from titans_build.tools.inference import position, read_text, readings
from titans_build.tools.inference.reading import PIECE, cut


def tokens(count: int, rows: int = 1) -> torch.Tensor:
    return torch.randint(256, (rows, count), generator=torch.Generator().manual_seed(0))


def test_pieces_are_the_whole(model: LanguageModel) -> None:
    text = tokens(300, rows=2)
    with torch.no_grad():
        whole = model(text)
    for pieces in (text, iter(text.split([1, 7, 0, 64, 3, 200, 25], dim=1))):
        reading = read_text(model, pieces)
        assert reading.tokens == 300
        assert reading.logits is not None
        torch.testing.assert_close(reading.logits, whole.logits[:, -1], atol=1e-4, rtol=1e-4)
        for (name, a), (_, b) in zip(tb.state.named_tensors(reading.state), tb.state.named_tensors(whole.state)):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4, msg=name)


def test_a_state_is_gone_on_from_and_left_as_it_was(model: LanguageModel) -> None:
    text = tokens(50)
    first = read_text(model, text[:, :20])
    before = [tensor.clone() for _, tensor in tb.state.named_tensors(first.state)]
    rest = read_text(model, text[:, 20:], first.state)
    torch.testing.assert_close(rest.logits, read_text(model, text).logits, atol=1e-4, rtol=1e-4)
    assert rest.tokens == 30
    assert all(torch.equal(a, b) for a, (_, b) in zip(before, tb.state.named_tensors(first.state)))


def test_nothing_read_is_the_state_as_it_came(model: LanguageModel) -> None:
    state = model.init_state(1)
    assert read_text(model, [], state) == (state, None, 0)
    assert read_text(model, tokens(0)) == (None, None, 0)


def test_a_long_tensor_is_cut() -> None:
    assert [piece.shape[1] for piece in cut(tokens(2 * PIECE + 5))] == [PIECE, PIECE, 5]


def test_a_reader_may_stop_early(model: LanguageModel) -> None:
    taken = []

    def endless() -> Iterator[torch.Tensor]:
        while True:
            taken.append(10)
            yield tokens(10)

    for reading in readings(model, endless()):
        if reading.tokens >= 30:
            break
    assert len(taken) == 3


def test_ids_out_of_the_vocabulary_are_refused(model: LanguageModel) -> None:
    with pytest.raises(ValueError, match="id 256 is outside the vocabulary of 256"):
        read_text(model, [tokens(4), torch.tensor([[256]])])


@pytest.mark.parametrize("name", ["mac", "mag", "mal", "lmm", "transformer"])
def test_position_counts_tokens(name: str) -> None:
    model = tb.build(tb.load_recipe(name, overrides={"dim": 32, "stack.0.repeat": 1}))
    for count in (1, 10, 150):
        assert position(model, read_text(model, tokens(count)).state) == count
    assert position(model, model.init_state(1)) == 0


def test_position_is_none_where_nothing_counts() -> None:
    model = tb.build(
        tb.load_recipe({"version": 1, "dim": 8, "vocab": 9, "layers": {"a": ["ffn"]}, "stack": ["a"]}), seed=0
    )
    assert position(model, model.init_state(1)) is None
