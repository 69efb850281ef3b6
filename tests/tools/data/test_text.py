from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch

from titans_build.tools.data.documents import Spans
from titans_build.tools.data.packing import PackedOrderedText, PackedText, pack_rows
from titans_build.tools.data.source import Batch, share_of
from titans_build.tools.data.windows import OrderedText, ShuffledText

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


@pytest.mark.parametrize("kind", [ShuffledText, OrderedText, PackedText, PackedOrderedText])
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
        assert [share.documents is None for share in shares] == [not whole.packed] * 3
        if whole.packed:
            assert (torch.cat([share.documents for share in shares]) == batch.documents).all()
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
    for kind in (OrderedText, PackedText, PackedOrderedText):
        check_targets(make(kind, 10**11, 5, length=1024, rows=2).batch(12345))


def pieces(batch: Any) -> list[list[int]]:
    """The tokens of each document of each row, and its last target."""
    found = []
    for row, (tokens, targets, ids) in enumerate(zip(batch.tokens, batch.targets, batch.documents)):
        real = torch.ones_like(ids, dtype=torch.bool) if batch.mask is None else batch.mask[row]
        assert (ids[real].diff() >= 0).all()
        for document in ids[real].unique():
            here = real & (ids == document)
            found.append([*tokens[here].tolist(), int(targets[here][-1])])
    return found


@pytest.mark.parametrize("rows", [1, 3])
def test_rows_hold_whole_documents(rows: int) -> None:
    lengths = (5, 2, 9, 3, 30, 4, 4, 17, 8, 2, 10)
    source = make(PackedText, *lengths, rows=rows, length=8)
    seen: Counter[int] = Counter()
    for index in range(source.batches):
        batch = source.batch(index)
        check_targets(batch)
        assert batch.fresh.all() and not source.carries and source.packed
        for piece in pieces(batch):
            document, first = divmod(piece[0], 1000)
            assert piece == [1000 * document + token for token in range(first, first + len(piece))]
            # longer documents are cut at multiples of the length
            assert first % 8 == 0 and (len(piece) == 9 or first + len(piece) == lengths[document])
        seen.update(targets_of(batch))
    assert set(seen) == set(all_targets(*lengths)) and source.cut == 3
    places = sum(lengths) - len(lengths)
    assert source.padded == source.windows * 8 - places and source.windows == 11
    if rows == 1:
        assert set(seen.values()) == {1}


def test_packing_is_first_fit_decreasing() -> None:
    random = np.random.default_rng(0)
    for room in (1, 7, 50):
        lengths = random.integers(1, room + 1, 300)
        sizes, counts = np.unique(lengths, return_counts=True)
        plans = pack_rows(sizes.tolist(), counts.tolist(), room)
        by_size = np.sort(lengths)
        rows: dict[int, list[int]] = {}
        for plan in plans:
            for row, (first, count) in itertools.product(range(plan.rows), plan.content):
                rows.setdefault(plan.first + row, []).extend(range(first + row * count, first + (row + 1) * count))
        assert sorted(itertools.chain(*rows.values())) == list(range(300))
        expected: list[list[int]] = []
        for size in by_size[::-1].tolist():
            fits = [row for row in expected if sum(row) + size <= room]
            fits[0].append(size) if fits else expected.append([size])
        assert sorted(by_size[rows[row]].tolist() for row in sorted(rows)) == sorted(expected)


def test_rows_are_reordered_each_epoch() -> None:
    source = make(PackedText, *[3] * 80, length=4)
    assert source.windows == 40 and source.padded == 0
    rounds = [[pieces(source.batch(index)) for index in range(first, first + 40)] for first in (0, 40)]
    assert sorted(rounds[0]) == sorted(rounds[1]) and rounds[0] != rounds[1]
    other = make(PackedText, *[3] * 80, length=4, seed=1)
    assert sorted(pieces(other.batch(index)) for index in range(40)) != sorted(rounds[0])


@pytest.mark.parametrize("rows", [1, 2, 7])
def test_packed_documents_continue_in_the_next_batch(rows: int) -> None:
    lengths = (30, 2, 17, 9, 41, 5)
    source = make(PackedOrderedText, *lengths, rows=rows)
    seen: Counter[int] = Counter()
    ends: list[tuple[int, int]] = []
    for index in range(source.batches):
        batch = source.batch(index)
        check_targets(batch)
        seen.update(targets_of(batch))
        assert batch.fresh.tolist() == [index == 0] * rows
        for row in range(rows):
            real = torch.ones(8, dtype=torch.bool) if batch.mask is None else batch.mask[row]
            if not real.any():
                continue
            first, ids = int(batch.tokens[row, 0]), batch.documents[row][real]
            if index and first % 1000:  # it goes on with the same id
                assert ends[row] == (first, int(ids[0]))
            elif index:
                assert ends[row][1] < int(ids[0])
            ends[row : row + 1] = [(int(batch.targets[row][real][-1]), int(ids[-1]))]
    assert seen == Counter(all_targets(*lengths))
    assert source.padded == source.windows * 8 - len(all_targets(*lengths)) < 9 * rows


def test_epochs_begin_from_a_fresh_state() -> None:
    source = make(PackedOrderedText, *[9] * 20)
    assert source.batches == 20 and source.padded == 0
    epochs = [[pieces(source.batch(index)) for index in range(first, first + 20)] for first in (0, 20, 0)]
    assert epochs[0] == epochs[2] != epochs[1] and sorted(epochs[0]) == sorted(epochs[1])
    assert [bool(source.batch(index).fresh) for index in (0, 1, 20, 21)] == [True, False, True, False]


@pytest.mark.parametrize("kind", [PackedText, PackedOrderedText])
@pytest.mark.parametrize("world", [1, 3])
def test_whole_documents_are_read_once(kind: Any, world: int) -> None:
    lengths = (30, 41, 9, 100, 2, 55, 3, 3, 4, 17)
    sources = [make(kind, *lengths, rows=6, part=(rank, world)) for rank in range(world)]
    read: dict[str, list[int]] = {}
    for groups in zip(*(source.read_whole(10**6) for source in sources)):
        counts = set()
        for group in groups:
            assert group.tokens.tolist() == [lengths[int(name)] - 1 for name in group.names]
            batches = list(group.batches)
            counts.add((len(batches), batches[0].tokens.shape))
            for number, batch in enumerate(batches):
                check_targets(batch)
                assert batch.documents is None and batch.fresh.tolist() == [number == 0] * len(batch.fresh)
                for row, targets in enumerate(batch.targets):
                    found = targets[targets != IGNORED].tolist()
                    if found:
                        read.setdefault(group.names[group.first + row], []).extend(found)
        assert len(counts) == 1  # processes wait for each other
    assert read == {str(i): [1000 * i + token for token in range(1, length)] for i, length in enumerate(lengths)}
    few = [name for group in sources[0].read_whole(120) for name in group.names]
    assert 1 <= len(few) < 10 and sum(lengths[int(name)] - 1 for name in few) <= 120
    assert len([name for group in sources[0].read_whole(0) for name in group.names]) == 1
