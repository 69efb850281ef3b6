from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch

from titans_build.tools.data.documents import Spans
from titans_build.tools.data.source import Batch, share_of
from titans_build.tools.data.text import OrderedText, ShuffledText

IGNORED = -100


class Numbers:
    """Documents whose tokens say where they are from: token ``t`` of document ``d`` is ``1000 * d + t``."""

    vocab = 100_000

    def __init__(self, *lengths: int) -> None:
        self.lengths = np.array(lengths)
        self.names = [str(i) for i in range(len(lengths))]

    def read(self, document: int, start: int, stop: int) -> np.ndarray:
        assert 0 <= start <= stop <= self.lengths[document]
        return 1000 * document + np.arange(start, stop)

    def describe(self) -> dict[str, Any]:
        return {}


def make(kind: Any, *lengths: int, length: int = 8, rows: int = 1, part: tuple[int, int] = (0, 1), **more: Any) -> Any:
    documents = Numbers(*lengths)
    spans = Spans(np.arange(len(lengths)), np.zeros(len(lengths), np.int64), documents.lengths)
    options = {"split": "train", "seed": 0, **more}
    return kind(documents, spans, length=length, share=share_of(rows, part), **options)


def targets_of(batch: Batch) -> list[int]:
    return batch.targets[batch.targets != IGNORED].tolist()


def all_targets(*lengths: int) -> list[int]:
    """Every token but the first of each document, which nothing comes before."""
    return [1000 * document + token for document, length in enumerate(lengths) for token in range(1, length)]


def check_targets(batch: Batch) -> None:
    real = batch.mask if batch.mask is not None else torch.ones_like(batch.tokens, dtype=torch.bool)
    counted = batch.targets != IGNORED
    assert (batch.targets[counted] == batch.tokens[counted] + 1).all()
    assert not counted[~real].any() and (batch.tokens[~real] == 0).all()


def test_shuffled_windows_cover_the_text():
    source = make(ShuffledText, 20, 3, 1, 40, 16, length=8)
    assert source.batches == 10
    batches = [source.batch(index) for index in range(10)]
    for batch in batches:
        check_targets(batch)
        assert batch.mask is None and batch.fresh.tolist() == [True]
    assert sorted(token for batch in batches for token in batch.tokens.ravel().tolist()) == sorted(
        1000 * document + token for document, length in enumerate((20, 3, 1, 40, 16)) for token in range(length)
    )
    assert sorted(itertools.chain(*map(targets_of, batches))) == all_targets(20, 3, 1, 40, 16)


def test_last_window_ends_with_the_text():
    source = make(ShuffledText, 19, length=8)
    starts = sorted(int(source.batch(index).tokens[0, 0]) for index in range(3))
    assert starts == [0, 8, 11] and source.batches == 3


def test_short_text_is_padded():
    batch = make(ShuffledText, 3, 2, length=8).batch(0)
    assert batch.tokens.tolist() == [[0, 1, 2, 1000, 1001, 0, 0, 0]]
    assert batch.targets.tolist() == [[1, 2, IGNORED, 1001, IGNORED, IGNORED, IGNORED, IGNORED]]
    assert batch.mask is not None and batch.mask.tolist() == [[True] * 5 + [False] * 3]


def test_every_epoch_has_its_own_order():
    def order(source: Any, first: int) -> list[int]:
        return [int(source.batch(index).tokens[0, 0]) for index in range(first, first + 25)]

    source = make(ShuffledText, 200)
    rounds = [order(source, 0), order(source, 25), order(make(ShuffledText, 200, seed=1), 0)]
    rounds.append(order(make(ShuffledText, 200, split="valid"), 0))
    assert all(sorted(turn) == list(range(0, 200, 8)) for turn in rounds)
    assert len(set(map(tuple, rounds))) == 4


def test_epochs_follow_without_a_gap():
    # 25 windows in batches of 4: the seventh batch ends with three of the next round
    wide, narrow = make(ShuffledText, 200, rows=4), make(ShuffledText, 200)
    rows = torch.cat([wide.batch(index).tokens for index in range(13)])
    assert (rows == torch.cat([narrow.batch(index).tokens for index in range(52)])).all()
    assert wide.batches == 7


@pytest.mark.parametrize("kind", [ShuffledText, OrderedText])
def test_shares_equal_the_batch_in_any_order(kind: Any):
    lengths = (30, 41, 9, 100, 2, 55)
    whole = make(kind, *lengths, rows=6)
    parts = [make(kind, *lengths, rows=6, part=(rank, 3)) for rank in range(3)]
    for index in (9, 0, 4, 9):
        batch = whole.batch(index)
        shares = [part.batch(index) for part in parts]
        assert (torch.cat([share.tokens for share in shares]) == batch.tokens).all()
        assert (torch.cat([share.targets for share in shares]) == batch.targets).all()
        assert (torch.cat([share.fresh for share in shares]) == batch.fresh).all()
    assert all(part.batches == whole.batches for part in parts)


@pytest.mark.parametrize("rows", [1, 2, 3, 7])
def test_ordered_rows_continue_in_the_next_batch(rows: int):
    lengths = (30, 2, 17, 9, 41, 5)
    source = make(OrderedText, *lengths, rows=rows)
    seen: Counter[int] = Counter()
    before: Batch | None = None
    for index in range(source.batches):
        batch = source.batch(index)
        check_targets(batch)
        seen.update(targets_of(batch))
        for row in range(rows):
            first = int(batch.tokens[row, 0])
            assert bool(batch.fresh[row]) == (index == 0 or first % 1000 == 0)
            if not batch.fresh[row]:
                # what was asked for last is what comes now
                assert before is not None and int(before.targets[row, -1]) == first
        before = batch
    assert set(seen) == set(all_targets(*lengths))
    # what comes twice is at most one window of each row
    assert sum(seen.values()) - len(seen) <= 8 * (rows - 1)
    if rows == 1:
        assert set(seen.values()) == {1}


def test_last_window_of_a_document_is_padded():
    source = make(OrderedText, 12, 4, split="valid")
    first, second, third = (source.batch(index) for index in range(3))
    assert first.mask is None and first.fresh.tolist() == [True]
    assert second.tokens.tolist() == [[8, 9, 10, 0, 0, 0, 0, 0]] and second.fresh.tolist() == [False]
    assert second.targets[0, :4].tolist() == [9, 10, 11, IGNORED]
    assert second.mask is not None and second.mask.tolist() == [[True] * 3 + [False] * 5]
    assert third.tokens[0, :3].tolist() == [1000, 1001, 1002] and third.fresh.tolist() == [True]


def test_documents_are_reordered_each_epoch():
    def order(source: Any, first: int) -> list[int]:
        return [int(source.batch(index).tokens[0, 0]) // 1000 for index in range(first, first + 20)]

    source = make(OrderedText, *[9] * 20)
    assert source.batches == 20
    rounds = [
        order(source, 0),
        order(source, 20),
        order(source, 0),
        order(make(OrderedText, *[9] * 20, split="test"), 0),
    ]
    assert all(sorted(turn) == list(range(20)) for turn in rounds)
    assert rounds[0] == rounds[2] != rounds[1] and rounds[3] == list(range(20))


def test_cost_does_not_grow_with_the_text():
    source = make(ShuffledText, 10**11, length=1024, rows=2)
    assert source.batches == 48_828_125
    check_targets(source.batch(12345))
    check_targets(make(OrderedText, 10**11, 5, length=1024, rows=2).batch(12345))
