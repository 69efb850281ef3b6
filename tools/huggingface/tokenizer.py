"""Tokenizers of transformers for recipe models: that of a model, and one whose tokens are bytes."""

from __future__ import annotations

import os
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from ...recipes.saved_format import TOKENIZER

ENDS = ("<pad>", "[PAD]", "<|endoftext|>", "</s>")
"""Usual names of tokens that pad a batch or end a text."""


def tokenizer_of(model: Any) -> Any:
    """The tokenizer of a model of transformers: that of the folder it was read from, or of the recipe model inside.

    Without one, ``byte_tokenizer()`` for a recipe model of 256 token ids, and ``ValueError`` for others. A tokenizer of
    the recipe model pads on the left with a token of a usual name or the byte 0, which also ends a text.
    """
    folder = model.name_or_path
    if folder and os.path.isfile(os.path.join(folder, "tokenizer_config.json")):
        return AutoTokenizer.from_pretrained(folder)
    text = getattr(model.base_model.model, "tokenizer", None) if model.config.model_type == "titans_build" else None
    if text is not None:
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_str(text)
        ends = (name for name in (*ENDS, bytes_to_unicode()[0]) if tokenizer.token_to_id(name) is not None)
        return _fast(tokenizer, next(ends, None))
    if model.config.model_type == "titans_build" and model.config.vocab_size == 256:
        return byte_tokenizer()
    raise ValueError(
        f"{folder or type(model).__name__}: no tokenizer was saved with this model of {model.config.vocab_size} token "
        f"ids; save one beside it (tokenizer.save_pretrained(folder)), or put its {TOKENIZER} there"
    )


def byte_tokenizer(pad: int = 0) -> Any:
    """A tokenizer in which each byte of a text's UTF-8 is a token, and its value the id. It pads on the left.

    ``pad``: the byte that pads a batch and ends a text. There is no id besides the bytes, so it is left out of decoded
    text, unless ``skip_special_tokens=False``.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = bytes_to_unicode()
    tokenizer = Tokenizer(models.BPE(vocab={letter: byte for byte, letter in letters.items()}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return _fast(tokenizer, letters[pad])


def _fast(tokenizer: Any, end: str | None) -> Any:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=end,
        eos_token=end,
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )
