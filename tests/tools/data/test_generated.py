from __future__ import annotations

import itertools
import json
import tracemalloc
from typing import Any

import pytest
import torch

import titans_build as tb
from titans_build.registry import RecipeError


def rows_of(spec: Any, batches: int, **options: Any) -> list[tuple[int, ...]]:
    source = tb.open_source(spec, **{"rows": 4, **options})
    return [tuple(row) for index in range(batches) for row in source.batch(index).tokens.tolist()]


def test_batch_is_a_function_of_its_index():
    source = tb.open_source("mqar", rows=4, seed=3)
    later = source.batch(17)
    source.batch(2)
    again = tb.open_source("mqar", rows=4, seed=3).batch(17)
    assert later.tokens.dtype == later.targets.dtype == torch.int64
    assert (later.tokens == again.tokens).all() and (later.targets == again.targets).all()
    assert later.mask is None and later.fresh.tolist() == [True] * 4
    assert (source.carries, source.batches, source.vocab, source.length) == (False, None, 256, 64)


def test_rows_do_not_depend_on_the_batch_size():
    assert rows_of("mqar", 6) == rows_of("mqar", 3, rows=8) == rows_of("mqar", 12, rows=2)


def test_shares_equal_the_batch():
    whole = tb.open_source("recall", rows=6).batch(5)
    parts = [tb.open_source("recall", rows=6, part=(rank, 3)).batch(5) for rank in range(3)]
    assert (torch.cat([part.tokens for part in parts]) == whole.tokens).all()
    assert (torch.cat([part.targets for part in parts]) == whole.targets).all()


def test_splits_and_seeds_share_no_row():
    kinds = [{"split": split, "seed": seed} for split in ("train", "valid", "test") for seed in (0, 1)]
    seen = [set(rows_of("copy", 50, **kind)) for kind in kinds]
    assert all(len(rows) == 200 for rows in seen)
    assert not any(one & other for one, other in itertools.combinations(seen, 2))


def test_examples_are_reordered_each_epoch():
    source = tb.open_source("mqar:examples=10", rows=4)
    assert source.batches == 3 and source.describe()["examples"] == 10
    rows = rows_of("mqar:examples=10", 10)
    rounds = [rows[start : start + 10] for start in range(0, 40, 10)]
    assert all(set(turn) == set(rounds[0]) and len(set(turn)) == 10 for turn in rounds)
    assert len({tuple(turn) for turn in rounds}) == 4
    # what is measured on is not used up
    assert tb.open_source("mqar:examples=10", rows=4, split="valid").batches is None
    assert len(set(rows_of("mqar:examples=10", 10, split="valid"))) == 40


def test_length_overrides_the_task():
    source = tb.open_source("needle:length=64", rows=2, length=300)
    assert source.length == 300 and source.batch(0).tokens.shape == (2, 300)
    assert source.describe()["fields"]["length"] == 300


@pytest.mark.parametrize("spec", ["copy", "recall", "needle:width=2", "needle_kv:queries=2"])
def test_stream_equals_the_batch(spec: str):
    source = tb.open_source(spec, rows=3)
    whole = source.batch(4)
    pieces = list(source.stream(4, 25))
    assert (torch.cat([piece.tokens for piece in pieces], 1) == whole.tokens).all()
    assert (torch.cat([piece.targets for piece in pieces], 1) == whole.targets).all()
    assert [piece.fresh.tolist() for piece in pieces] == [[True] * 3] + [[False] * 3] * (len(pieces) - 1)
    with pytest.raises(ValueError, match="piece: expected integer >= 1, got 0"):
        next(source.stream(4, 0))


@pytest.mark.parametrize("spec", ["needle", "needle_kv:pairs=8"])
def test_long_rows_need_the_memory_of_a_piece(spec: str):
    source = tb.open_source(spec, rows=1, length=2_000_000)
    tracemalloc.start()
    tokens = counted = 0
    for piece in source.stream(0, 8192):
        tokens += piece.tokens.numel()
        counted += int((piece.targets >= 0).sum())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (tokens, counted) == (2_000_000, 1)
    assert peak < 2 * 2**20


def test_description_is_json():
    source = tb.open_source("needle_kv:pairs=2", rows=3, seed=5, split="test")
    said = json.loads(json.dumps(source.describe()))
    assert (said["task"], said["fields"]["pairs"], said["seed"], said["split"]) == ("needle_kv", 2, 5, "test")
    assert said["references"]["any value"] == 1 / 16


def test_row_too_long():
    with pytest.raises(RecipeError, match="length: expected the task to have an integer from 1 to 2"):
        tb.open_source("needle", rows=1, length=2**40)
