"""The tokenizers of models, and that of bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from titans_build.huggingface import byte_tokenizer, from_pretrained, tokenizer_of


@pytest.mark.parametrize("text", ["a b\n", " naïve  café ", "日本語 🙂", "", "\t<pad>\x01"])
def test_ids_are_bytes(text: str) -> None:
    tokenizer = byte_tokenizer()
    ids = tokenizer(text)["input_ids"]
    assert ids == list(text.encode())
    assert tokenizer.decode(ids) == text


def test_every_byte_is_a_token() -> None:
    tokenizer = byte_tokenizer()
    assert len(tokenizer) == tokenizer.vocab_size == 256
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, 0)
    assert byte_tokenizer(pad=10).pad_token_id == 10


def test_left_padding() -> None:
    batch = byte_tokenizer()(["abc", "a"], padding=True)
    assert batch["input_ids"] == [[97, 98, 99], [0, 0, 97]]
    assert batch["attention_mask"] == [[1, 1, 1], [0, 0, 1]]
    assert set(batch) == {"input_ids", "attention_mask"}


def test_the_tokenizer_of_a_model(small: Any, llama: Any, tmp_path: Path) -> None:
    reader = small("mag", vocab=256)
    assert tokenizer_of(reader)("abc")["input_ids"] == [97, 98, 99]
    reader.save_pretrained(tmp_path / "model")
    byte_tokenizer(pad=10).save_pretrained(tmp_path / "model")
    assert tokenizer_of(from_pretrained(tmp_path / "model")).pad_token_id == 10
    for model in (small("mag"), llama.plain()):
        with pytest.raises(ValueError, match="no tokenizer was saved with this model of 40 token ids"):
            tokenizer_of(model)
