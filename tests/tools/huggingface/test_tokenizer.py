"""The tokenizers of models, and that of bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

import titans_build as tb
from titans_build.huggingface import byte_tokenizer, from_pretrained, tokenizer_of
from titans_build.tools.data.tokenizer import train_tokenizer


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


def test_a_tokenizer_stays_with_its_model(small: Any, tmp_path: Path) -> None:
    trained = train_tokenizer(["once upon a time there was a time"] * 4, 270)
    inner = small("mag", vocab=300).model
    inner.tokenizer = trained.to_str()
    tb.save(inner, tmp_path / "run" / "model")
    ids = trained.encode("once upon").ids
    model = from_pretrained(tmp_path / "run")  # a run, or the model in it
    model.save_pretrained(tmp_path / "first")
    from_pretrained(tmp_path / "first").save_pretrained(tmp_path / "second")
    tb.save(from_pretrained(tmp_path / "second").model, tmp_path / "third")
    for place in ("run/model", "first", "second", "third"):
        kept = AutoTokenizer.from_pretrained(tmp_path / place)
        assert (
            kept("once upon")["input_ids"]
            == tokenizer_of(from_pretrained(tmp_path / place))("once upon")["input_ids"]
            == ids
        )
        assert kept.decode(ids) == "once upon"
    for place in ("first", "second"):
        kept = AutoTokenizer.from_pretrained(tmp_path / place)
        assert (kept.padding_side, kept.pad_token_id) == ("left", trained.token_to_id("\u0100"))  # the byte 0
    # what was added to the tokenizer of a folder goes with it
    kept.add_special_tokens({"eos_token": "\u0101"})
    kept.save_pretrained(tmp_path / "second")
    from_pretrained(tmp_path / "second").save_pretrained(tmp_path / "fourth")
    assert AutoTokenizer.from_pretrained(tmp_path / "fourth").eos_token == "\u0101"
