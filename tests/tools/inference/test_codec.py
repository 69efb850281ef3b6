"""Text to token ids and back, both in any parts."""

from __future__ import annotations

from pathlib import Path

import pytest
import tokenizers
import torch

from titans_build.tools.inference.codec import Bytes, Codec, Numbers, Tokenizer, open_codec
from titans_build.tools.terminal import UsageError

TEXT = "Grüße, 世界 🙂!\nA second line of words, and a third\nwithout an end"


def ids(codec: Codec, *blocks: bytes) -> list[int]:
    return [int(token) for piece in codec.encode(blocks) for token in piece]


def text(codec: Codec, tokens: list[int]) -> str:
    decoder = codec.decoder()
    return "".join(decoder.feed(token) for token in tokens) + decoder.finish()


def test_bytes_are_tokens_whatever_they_are() -> None:
    every = bytes(range(256))
    assert ids(Bytes(), every[:100], b"", every[100:]) == list(every)


def test_letters_wait_for_their_last_byte() -> None:
    decoder = Bytes().decoder()
    assert [decoder.feed(byte) for byte in "é🙂".encode()] == ["", "é", "", "", "", "🙂"]
    assert decoder.feed(0xC3) == "" and decoder.finish() == "\ufffd" and decoder.finish() == ""


def test_bytes_that_are_no_letters_are_shown_as_such() -> None:
    assert text(Bytes(), [0xFF, 65, 0xC3, 65, 300, 0xC3, 300, 66]) == "\ufffdA\ufffdA\ufffd\ufffd\ufffdB"


def test_numbers() -> None:
    assert ids(Numbers(), b"1 22", b"3\n4", b"5 ", b" 6") == [1, 223, 45, 6]
    assert ids(Numbers(), b"  \n") == []
    assert text(Numbers(), [7, 0, 12]) == "7 0 12"
    for wrong in (b"-1", b"a", b"1.5", b"9" * 19, b"\xff"):
        with pytest.raises(UsageError, match="--tokenizer ids: expected token ids >= 0, got"):
            ids(Numbers(), b"1 ", wrong)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=280, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator([TEXT] * 3, trainer)
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    made.save(str(path))
    return path


def test_a_tokenizer_reads_and_writes(tokenizer: Path) -> None:
    codec = Tokenizer(tokenizer)
    whole = ids(codec, TEXT.encode())
    assert len(whole) < len(TEXT.encode())
    assert text(codec, whole) == TEXT
    # cut anywhere, in the middle of letters, too
    raw = TEXT.encode()
    assert ids(codec, *(raw[at : at + 5] for at in range(0, len(raw), 5)))[-1:] == whole[-1:]
    assert text(codec, ids(codec, *(raw[at : at + 5] for at in range(0, len(raw), 5)))) == TEXT


def test_lines_are_tokenised_as_if_alone(tokenizer: Path) -> None:
    codec = Tokenizer(tokenizer)
    lines = TEXT.encode().splitlines(keepends=True)
    assert ids(codec, *lines) == [token for line in lines for token in ids(codec, line)]


def test_a_letter_of_several_tokens_waits_for_its_last(tokenizer: Path) -> None:
    codec = Tokenizer(tokenizer)
    decoder = codec.decoder()
    parts = [decoder.feed(token) for token in ids(codec, "é🐸".encode())]
    assert "".join(parts) + decoder.finish() == "é🐸" and "" in parts


def test_what_is_no_letter_does_not_hold_everything_back(tokenizer: Path) -> None:
    codec = Tokenizer(tokenizer)
    broken = ids(codec, "é".encode())[:1]
    decoder = codec.decoder()
    if decoder.feed(broken[0]) == "é":
        pytest.skip("the tokenizer made one token of it")
    assert "".join(decoder.feed(broken[0]) for _ in range(200)) != ""


def test_opening(tokenizer: Path, tmp_path: Path) -> None:
    assert isinstance(open_codec("bytes", 256), Bytes)
    assert isinstance(open_codec("ids", 10), Numbers)
    assert isinstance(open_codec(str(tokenizer), 280), Tokenizer)
    (tmp_path / "junk.json").write_text("{}", encoding="utf-8")
    for name, vocab, fragment in (
        ("bytes", 10, "256 token ids are more than the model's vocabulary of 10; --tokenizer ids"),
        (str(tokenizer), 279, "280 token ids are more than the model's vocabulary of 279"),
        (str(tmp_path / "none.json"), 280, "none.json: No such file"),
        (str(tmp_path / "junk.json"), 280, "junk.json: expected a file of the tokenizers package"),
        (str(tmp_path), 280, "Is a directory"),
    ):
        with pytest.raises(UsageError, match=fragment):
            open_codec(name, vocab)


def test_ids_are_int64() -> None:
    for codec in (Bytes(), Numbers()):
        assert all(piece.dtype == torch.int64 and piece.dim() == 1 for piece in codec.encode([b"1 2", b""]))
