"""A tokenizer of transformers whose tokens are bytes."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode


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
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=letters[pad],
        eos_token=letters[pad],
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )
