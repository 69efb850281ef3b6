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
from titans_build.tools.data.documents import tokenize
from titans_build.tools.data.files import find
from titans_build.tools.terminal import UsageError

Write = Callable[..., None]
TEXT = "the cat sat on the mat; the mat sat on the cat, naïvely.\n" * 40


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
    monkeypatch.setattr(tokens, "BLOCK", 100)
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
    monkeypatch.setattr(tokens, "BLOCK", 16)
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


@pytest.mark.parametrize("kept", [0, 1, 23, 24, 100, -1])
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

    monkeypatch.setattr(tokens, "_blocks", full)
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
        ("tokenzier.json", "tokenizer file cannot be read: No such file or directory; did you mean 'tokenizer.json'"),
        ("text", "text: not a file of the tokenizers package: "),
        (".", r"\.: the tokenizer file cannot be read: Is a directory"),
    ],
)
def test_invalid_tokenizer(write: Write, tokenizer: Tokenizer, name: str, message: str):
    write({"text": TEXT})
    with pytest.raises(RecipeError, match=message):
        tokenize(find(["text"]), name, None)


def test_missing_package(write: Write, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch):
    write({"text": TEXT})
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(UsageError, match=r"a tokenizer file needs tokenizers.*pip install 'titans-build\[train\]'"):
        tokenize(find(["text"]), "tokenizer.json", None)
