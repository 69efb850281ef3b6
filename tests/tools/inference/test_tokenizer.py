"""Text to token ids and back, in blocks of any sizes."""

from __future__ import annotations

from pathlib import Path

import pytest
import tokenizers
import torch

from titans_build.registry import RecipeError
from titans_build.tools.inference.tokenizer import (
    ByteTokenizer,
    FileTokenizer,
    IdTokenizer,
    Tokenizer,
    open_tokenizer,
)
from titans_build.tools.terminal import UsageError

TEXT = "Grüße, 世界 🙂!\nA second line of words, and a third\nwithout an end"


def encode(tokenizer: Tokenizer, *blocks: bytes) -> list[int]:
    return [int(token) for piece in tokenizer.encode(blocks) for token in piece]


def decode(tokenizer: Tokenizer, tokens: list[int]) -> str:
    decoder = tokenizer.decoder()
    return "".join(decoder.feed(token) for token in tokens) + decoder.finish()


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=280, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator([TEXT] * 3, trainer)
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    made.save(str(path))
    return path


def test_any_byte_is_a_token() -> None:
    every = bytes(range(256))
    assert encode(ByteTokenizer(), every[:100], b"", every[100:]) == list(every)


def test_a_character_is_decoded_at_its_last_byte() -> None:
    decoder = ByteTokenizer().decoder()
    assert [decoder.feed(byte) for byte in "é🙂".encode()] == ["", "é", "", "", "", "🙂"]
    assert decoder.feed(0xC3) == "" and decoder.finish() == "\ufffd" and decoder.finish() == ""


def test_invalid_utf8_becomes_replacement_characters() -> None:
    assert decode(ByteTokenizer(), [0xFF, 65, 0xC3, 65, 300, 0xC3, 300, 66]) == "\ufffdA\ufffdA\ufffd\ufffd\ufffdB"


def test_ids_as_numbers() -> None:
    assert encode(IdTokenizer(), b"1 22", b"3\n4", b"5 ", b" 6") == [1, 223, 45, 6]
    assert encode(IdTokenizer(), b"  \n") == []
    assert decode(IdTokenizer(), [7, 0, 12]) == "7 0 12"
    for wrong in (b"-1", b"a", b"1.5", b"9" * 19, b"\xff"):
        with pytest.raises(UsageError, match="--tokenizer ids"):
            encode(IdTokenizer(), b"1 ", wrong)


def test_a_tokenizer_file_encodes_and_decodes(file: Path) -> None:
    tokenizer = open_tokenizer(str(file), 280)
    whole = encode(tokenizer, TEXT.encode())
    assert len(whole) < len(TEXT.encode())
    assert decode(tokenizer, whole) == TEXT
    # blocks may end anywhere, also inside of a character
    raw = TEXT.encode()
    blocks = encode(tokenizer, *(raw[at : at + 5] for at in range(0, len(raw), 5)))
    assert blocks[-1:] == whole[-1:]
    assert decode(tokenizer, blocks) == TEXT


def test_each_line_is_tokenized_on_its_own(file: Path) -> None:
    tokenizer = open_tokenizer(str(file), 280)
    lines = TEXT.encode().splitlines(keepends=True)
    assert encode(tokenizer, *lines) == [token for line in lines for token in encode(tokenizer, line)]


def test_a_character_of_several_tokens_is_decoded_at_its_last(file: Path) -> None:
    tokenizer = open_tokenizer(str(file), 280)
    decoder = tokenizer.decoder()
    parts = [decoder.feed(token) for token in encode(tokenizer, "é🐸".encode())]
    assert "".join(parts) + decoder.finish() == "é🐸" and "" in parts


def test_an_incomplete_character_is_held_back_for_a_bounded_time(file: Path) -> None:
    tokenizer = open_tokenizer(str(file), 280)
    first = encode(tokenizer, "🐸".encode())[0]
    decoder = tokenizer.decoder()
    assert decoder.feed(first) == ""
    assert "".join(decoder.feed(first) for _ in range(200)) != ""


def test_opening(file: Path, tmp_path: Path) -> None:
    assert isinstance(open_tokenizer("bytes", 256), ByteTokenizer)
    assert isinstance(open_tokenizer("ids", 10), IdTokenizer)
    assert isinstance(open_tokenizer(str(file), 280), FileTokenizer)
    (tmp_path / "junk.json").write_text("{}", encoding="utf-8")
    for name, vocab, fragment in (
        ("bytes", 10, "256 token ids are more than the model's vocabulary of 10; --tokenizer ids"),
        (str(file), 279, "280 token ids are more than the model's vocabulary of 279"),
        (str(tmp_path / "none.json"), 280, "none.json: no such file"),
        (str(tmp_path / "junk.json"), 280, "junk.json: not a file of the tokenizers package"),
        (str(tmp_path), 280, "there is no tokenizer.json in this folder"),
    ):
        with pytest.raises((UsageError, RecipeError), match=fragment):
            open_tokenizer(name, vocab)


def test_ids_are_int64() -> None:
    for tokenizer in (ByteTokenizer(), IdTokenizer()):
        assert all(piece.dtype == torch.int64 and piece.dim() == 1 for piece in tokenizer.encode([b"1 2", b""]))
