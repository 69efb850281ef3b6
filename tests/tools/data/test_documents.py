from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

import titans_build as tb
from titans_build.registry import RecipeError
from titans_build.tools.data import documents as tokens
from titans_build.tools.data import records
from titans_build.tools.data.documents import Bytes, Stored, fingerprint, spans_of, store
from titans_build.tools.data.files import TextFile, find
from titans_build.tools.data.source import SPLITS
from titans_build.tools.data.tokenizer import read_tokenizer
from titans_build.tools.terminal import UsageError

Write = Callable[..., None]


def documents(*sizes: int, prefix: str = "d") -> Bytes:
    return Bytes([TextFile(Path(f"/{i}"), f"{prefix}{i}", size, 0) for i, size in enumerate(sizes)])


def test_whole_documents_of_many_are_held_out():
    many = documents(*range(2, 502))
    spans = {split: spans_of(split, many, 0.1, 0.05)[0] for split in SPLITS}
    chosen = [set(span.documents.tolist()) for span in spans.values()]
    assert set.union(*chosen) == set(range(500)) and sum(map(len, chosen)) == 500
    assert 30 < len(spans["valid"].documents) < 70 and 10 < len(spans["test"].documents) < 40
    for span in spans.values():
        assert (span.starts == 0).all() and (span.stops == many.lengths[span.documents]).all()
    # documents that come later change nothing for those that were there
    more = documents(*range(2, 602))
    later = set(spans_of("valid", more, 0.1, 0.05)[0].documents.tolist())
    assert {document for document in later if document < 500} == chosen[1]
    assert spans_of("valid", many, 0.1, 0.05)[1] == "documents by the hash of their names"


def test_ends_of_few_documents_are_held_out():
    few = documents(1000, 100, 10)
    bounds = {}
    for split in SPLITS:
        spans, held = spans_of(split, few, 0.1, 0.05)
        assert held == "the ends of documents"
        bounds[split] = list(zip(spans.documents.tolist(), spans.starts.tolist(), spans.stops.tolist()))
    assert bounds["train"] == [(0, 0, 850), (1, 0, 85), (2, 0, 9)]
    # one token of the smallest document is held out, which is too little to be asked for
    assert bounds["valid"] == [(0, 850, 950), (1, 85, 95)]
    assert bounds["test"] == [(0, 950, 1000), (1, 95, 100)]


def test_nothing_held_out():
    spans, held = spans_of("train", documents(5, 7, 1), 0, 0)
    assert held == "nothing" and spans.stops.tolist() == [5, 7]
    with pytest.raises(RecipeError, match="valid: a share of 0 of 13 tokens leaves no text for this split"):
        spans_of("valid", documents(5, 7, 1), 0, 0)
    with pytest.raises(RecipeError, match=r"test: a share of 0\.05 of 12 tokens leaves no text"):
        spans_of("test", documents(5, 7), 0.05, 0.05)


def test_fingerprint(tmp_path: Path):
    def written(*texts: str, prefix: str = "d") -> str:
        for number, text in enumerate(texts):
            (tmp_path / str(number)).write_text(text, encoding="utf-8")
        files = [TextFile(tmp_path / str(i), f"{prefix}{i}", len(text), 0) for i, text in enumerate(texts)]
        return fingerprint(Bytes(files))

    long = "a" * 5000
    texts = [("hello", "goodbye"), ("hello", "goodbyes"), ("hello",), ("hallo", "goodbye"), ("hello", "goodbyf")]
    texts += [(long,), (long[:2500] + "b" + long[2501:],)]
    prints = [written(*each) for each in texts]
    assert len({*prints, written(*texts[0], prefix="e")}) == len(texts) + 1
    assert written(*texts[0]) == prints[0]


TEXT = "the cat sat on the mat; the mat sat on the cat, naïvely.\n" * 40


def tokenize(files: list[TextFile], tokenizer: str, cache: str | None) -> Stored:
    return store(files, read_tokenizer(tokenizer), "text", cache)


@pytest.fixture
def tokenizer(folder: Path) -> Tokenizer:
    """A byte-level tokenizer of 300 tokens, in ``tokenizer.json``."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator([TEXT], trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet))
    made.save(str(folder / "tokenizer.json"))
    return made


def test_tokens_of_documents(folder: Path, write: Write, tokenizer: Tokenizer):
    write({"text/a": TEXT, "text/b": "b" * 50, "text/c": "ü" * 10})
    made = tokenize(find(["text"]), "tokenizer.json", "cached")
    assert made.vocab == tokenizer.get_vocab_size() and made.vocab <= 300
    for document, content in enumerate((TEXT, "b" * 50, "ü" * 10)):
        wanted = tokenizer.encode(content).ids
        assert made.lengths[document] == len(wanted)
        assert made.read(document, 0, len(wanted)).tolist() == wanted
        assert made.read(document, 3, 5).tolist() == wanted[3:5]


@pytest.mark.parametrize("content", [TEXT, TEXT.replace("\n", " "), "ü" * 999, "x" + "ü漢🙂" * 300])
def test_large_file_is_tokenized_in_blocks(
    write: Write, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, content: str
):
    monkeypatch.setattr(records, "BLOCK", 100)
    write({"text": content})
    made = tokenize(find(["text"]), "tokenizer.json", None)
    assert made.lengths[0] > 20
    text = tokenizer.decode(made.read(0, 0, int(made.lengths[0])).tolist(), skip_special_tokens=False)
    raw = bytes({sign: byte for byte, sign in byte_signs().items()}[sign] for sign in text.replace(" ", ""))
    assert raw.decode() == content


def byte_signs() -> dict[int, str]:
    """The sign that a byte-level tokenizer writes for each byte."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return {**{byte: chr(byte) for byte in plain}, **{byte: chr(256 + i) for i, byte in enumerate(others)}}


def test_invalid_utf8_is_read(write: Write, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(records, "BLOCK", 16)
    write({"bytes": bytes(range(128, 256)) * 3})
    assert tokenize(find(["bytes"]), "tokenizer.json", None).lengths[0] > 100


def test_tokens_are_cached(folder: Path, write: Write, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch):
    write({"text": TEXT})
    first = tokenize(find(["text"]), "tokenizer.json", "cached")
    (kept,) = os.listdir("cached")
    assert kept.endswith(".tokens")
    with monkeypatch.context() as patch:
        patch.setattr(tokens, "_write_tokens", lambda *_: pytest.fail("made again"))
        again = tokenize(find(["text"]), "tokenizer.json", "cached")
    assert (again.read(0, 0, 20) == first.read(0, 0, 20)).all()
    # another text, and another tokenizer, are another file
    write({"text": TEXT + "more"})
    assert tokenize(find(["text"]), "tokenizer.json", "cached").lengths[0] > first.lengths[0]
    assert len(os.listdir("cached")) == 2
    content = json.loads((folder / "tokenizer.json").read_text())
    write({"tokenizer.json": json.dumps(content)})
    tokenize(find(["text"]), "tokenizer.json", "cached")
    assert len(os.listdir("cached")) == 3


def test_default_cache_folder(folder: Path, write: Write, tokenizer: Tokenizer):
    write({"text": TEXT})
    tokenize(find(["text"]), "tokenizer.json", None)
    assert len(list((folder.parent / "cache" / "tokens").iterdir())) == 1
    assert sorted(os.listdir()) == ["text", "tokenizer.json"]


@pytest.mark.parametrize("kept", [0, 1, 31, 32, 100, -1])
def test_truncated_cache_is_rebuilt(folder: Path, write: Write, tokenizer: Tokenizer, kept: int):
    write({"text": TEXT})
    whole = tokenize(find(["text"]), "tokenizer.json", "cached").lengths[0]
    (path,) = (folder / "cached").iterdir()
    path.write_bytes(path.read_bytes()[:kept])
    assert tokenize(find(["text"]), "tokenizer.json", "cached").lengths[0] == whole


def test_failed_write_leaves_no_file(folder: Path, write: Write, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch):
    write({"text": TEXT})

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tokens, "documents_in", full)
    with pytest.raises(RecipeError, match=r"cached: tokens cannot be cached there: No space.*another folder"):
        tokenize(find(["text"]), "tokenizer.json", "cached")
    assert os.listdir("cached") == []


def test_source_of_tokenized_text(write: Write, tokenizer: Tokenizer):
    write({"text": TEXT})
    spec = {"text": "text", "tokenizer": "tokenizer.json", "cache": "cached"}
    source = tb.open_source(spec, rows=2, length=16)
    batch = source.batch(0)
    assert source.vocab == tokenizer.get_vocab_size() and batch.tokens.shape == (2, 16)
    assert (batch.targets[:, :-1] == batch.tokens[:, 1:]).all()
    with pytest.raises(RecipeError, match=r"vocab: the data has 2\d\d tokens, the model only 256: give the recipe"):
        tb.open_source(spec, rows=2, vocab=256)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tokenzier.json", "no such file; did you mean 'tokenizer.json'.*expected a tokenizer.json, or a folder"),
        ("some/model", "some/model: no such file; expected a tokenizer.json, or a folder or a cached name"),
        ("text", "text: not a file of the tokenizers package: "),
        ("empty", r"empty: there is no tokenizer.json in this folder"),
        ("pipe", "pipe: not a regular file"),
    ],
)
def test_invalid_tokenizer(write: Write, tokenizer: Tokenizer, name: str, message: str):
    write({"text": TEXT})
    os.mkdir("empty")
    os.mkfifo("pipe")
    with pytest.raises(RecipeError, match=message):
        read_tokenizer(name)


def test_missing_package(write: Write, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch):
    write({"text": TEXT})
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(UsageError, match=r"a tokenizer file needs tokenizers.*pip install 'titans-build\[train\]'"):
        tokenize(find(["text"]), "tokenizer.json", None)
