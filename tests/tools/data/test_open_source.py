from __future__ import annotations

import itertools
import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import titans_build as tb
from titans_build.registry import RecipeError
from titans_build.tools.data import SPLITS

Write = Callable[..., None]


@pytest.mark.parametrize(
    "spec", ["mqar:pairs=8,length=128,power=0.5", {"task": "mqar", "pairs": 8, "length": 128, "power": 0.5}]
)
def test_task_and_its_fields(spec: Any):
    source = tb.open_source(spec, rows=2)
    said = source.describe()
    assert said["fields"] == {"vocab": 256, "length": 128, "pairs": 8, "power": 0.5}
    if isinstance(spec, dict):
        assert spec == {"task": "mqar", "pairs": 8, "length": 128, "power": 0.5}


@pytest.mark.parametrize(
    "spec", ["note.txt", "./note.txt", "*.txt", ["note.txt"], {"text": "note.txt"}, "folder/", "folder"]
)
def test_text(write: Write, spec: Any):
    write({"note.txt": "ab" * 500, "folder/note.txt": "ab" * 500})
    source = tb.open_source(spec, rows=3, length=10)
    batch = source.batch(0)
    assert (source.vocab, source.length, source.carries, source.batches) == (256, 10, False, 30)
    assert batch.tokens.dtype == torch.int64 and batch.tokens.shape == (3, 10)
    assert bytes(batch.tokens[0].tolist()) in (b"ab" * 5, b"ba" * 5)
    assert (batch.targets[:, :-1] == batch.tokens[:, 1:]).all()


def test_path_object(folder: Path, write: Write):
    write({"mqar": "text of this name " * 30})
    assert tb.open_source("mqar", rows=1).vocab == 256 and "task" in tb.open_source("mqar", rows=1).describe()
    for spec in ("./mqar", folder / "mqar"):
        assert "text" in tb.open_source(spec, rows=1, length=8).describe()


def test_file_name_with_a_colon(write: Write):
    write({"notes:1.txt": "some text " * 50})
    assert tb.open_source("notes:1.txt", rows=1, length=8).describe()["files"] == 1


def test_standard_library_as_text():
    sources = {split: tb.open_source("stdlib", rows=2, length=64, split=split) for split in SPLITS}
    said = [source.describe() for source in sources.values()]
    assert sum(each["files_of_this_split"] for each in said) == said[0]["files"] > 300
    assert all(each["files_of_this_split"] > 5 and each["tokens"] > 100_000 for each in said)
    assert said[0]["tokens"] > 5 * (said[1]["tokens"] + said[2]["tokens"])
    ordered = tb.open_source("stdlib:documents=ordered,length=32", rows=2)
    assert ordered.carries and ordered.length == 32
    assert (ordered.batch(0).targets[:, -1] == ordered.batch(1).tokens[:, 0]).all()


def test_splits_share_no_text(write: Write):
    write({f"text/{name}": f"{name:05d}" * 20 for name in range(200)})
    seen: list[set[str]] = []
    for split in SPLITS:
        source = tb.open_source("text", rows=1, length=5, split=split)
        rows = {bytes(source.batch(index).tokens[0].tolist()).decode() for index in range(source.batches or 0)}
        seen.append(rows)
    assert set.union(*seen) == {f"{name:05d}" for name in range(200)}
    assert sum(map(len, seen)) == 200 and min(map(len, seen)) > 2


def test_description_of_text(write: Write):
    write({"text/a": "x" * 400, "text/b": "y" * 600})
    source = tb.open_source({"text": "text", "documents": "ordered"}, rows=2, length=32, seed=9)
    said = json.loads(json.dumps(source.describe()))
    assert (said["documents"], said["held_out"], said["files"], said["seed"]) == (
        "ordered",
        "the ends of documents",
        2,
        9,
    )
    assert said["tokens"] == 360 + 540
    write({"text/b": "y" * 601})
    assert tb.open_source("text", rows=2, length=32).describe()["fingerprint"] != said["fingerprint"]


def test_vocabulary_larger_than_the_models():
    assert tb.open_source("copy", rows=1, vocab=10).vocab == 10
    with pytest.raises(
        RecipeError, match="vocab: the data has 10 tokens, the model only 8: give the recipe `vocab: 10`"
    ):
        tb.open_source("copy", rows=1, vocab=8)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("mqra", "'mqra' is no task and no file; did you mean 'mqar'"),
        ("stdlb", "'stdlb' is no task and no file; did you mean 'stdlib'"),
        ("note.tx", "'note.tx' is no task and no file; did you mean 'note.txt'"),
        ("sub/note.tx", "there is no folder .*/sub"),
        ("mqar:pairs", "expected NAME=VALUE, as in mqar:pairs=8, got 'pairs'"),
        ("mqar:pairs=2,pairs=3", "pairs: given twice"),
        ("mqar:examples=0", "examples: expected integer >= 1 or null, got 0"),
        ("stdlib:length=0", "length: expected integer from 1 to 2147483648, got 0"),
        ({"task": "mqar", "text": "note.txt"}, "expected either a task or a text, got {[^}]*}$"),
        ({"tsak": "mqar"}, "expected either a task or a text, got {'tsak': 'mqar'}; did you mean 'task'"),
        ({"task": 3}, "task: expected a name, got 3"),
        ({"text": "note.txt", "tokeniser": "x"}, "tokeniser: unknown field of text; did you mean 'tokenizer'"),
        ({"text": "note.txt", "valid": 0.6, "test": 0.4}, "valid: 0.6 for valid and 0.4 for test leave nothing"),
        (
            {"text": "note.txt", "pack": "document"},
            "expected 'documents', got 'document'; did you mean 'documents'",
        ),
        ({"text": "note.txt", "pack": True}, "pack: expected 'documents', got true"),
        ({"text": "note.txt", "packs": "documents"}, "packs: unknown field of text; did you mean 'pack'"),
        ({"text": "x.md", "pack": "documents"}, "text: there is nothing to predict: no document has two tokens"),
        ({"task": "copy", "pack": "documents"}, "pack: unknown field"),
        ({"text": 3}, "text: expected text .* or list of text"),
        ([], "text: expected at least 1 items, got 0"),
        (3, "expected a task, a path or a mapping, got 3"),
    ],
)
def test_invalid_specifications(write: Write, spec: Any, message: str):
    write({"note.txt": "x" * 100, "x.md": "x"})
    with pytest.raises(RecipeError, match=message):
        tb.open_source(spec, rows=1)


def test_invalid_split():
    with pytest.raises(
        RecipeError, match="split: expected one of train, valid, test, got 'vaild'; did you mean 'valid'"
    ):
        tb.open_source("copy", rows=1, split="vaild")  # type: ignore[arg-type]


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
