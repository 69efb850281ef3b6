"""Tokenizers of the ``tokenizers`` package: found on disk, read, and trained on texts."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from ...recipes.atomic_write import read_regular
from ...recipes.saved_format import TOKENIZER, saved_folder
from ...registry import Problem, RecipeError, nearest, show
from ..extras import from_extra

BYTES = "bytes"
"""In place of a tokenizer: every byte is a token."""


class TokenizerFile(NamedTuple):
    """A tokenizer and the text of its file."""

    text: str
    encoder: Any
    """``tokenizers.Tokenizer``, without truncation and padding."""
    size: int
    """The largest token id plus 1."""


def read_tokenizer(name: str) -> TokenizerFile:
    """The tokenizer of a file, of a folder with a ``tokenizer.json`` (a saved model, a run, a model of transformers),
    or of a name in the local cache of ``huggingface_hub``. Nothing is downloaded.

    Raises ``RecipeError``, and ``UsageError`` if the package is missing.
    """
    path = _find(name)
    try:
        return parse_tokenizer(read_regular(path).decode("utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise _problem(str(path), f"the tokenizer file cannot be read: {reason}") from None


def parse_tokenizer(text: str, name: str) -> TokenizerFile:
    """The tokenizer of the text of a file. ``name``: in messages. Raises ``RecipeError``."""
    package = from_extra("tokenizers", "train", "a tokenizer file")
    try:
        encoder = package.Tokenizer.from_str(text)
    except Exception as error:  # the package raises no narrower class
        raise _problem(name, f"not a file of the tokenizers package: {show(str(error), 100)}") from None
    encoder.no_truncation()
    encoder.no_padding()
    return TokenizerFile(text, encoder, max(encoder.get_vocab(with_added_tokens=True).values(), default=-1) + 1)


def train_tokenizer(texts: Iterable[str], vocab: int) -> Any:
    """A byte-level BPE tokenizer (``tokenizers.Tokenizer``) of at most ``vocab`` >= 256 tokens, trained on ``texts``.

    It encodes any text, and decoding gives the text back exactly.
    """
    package = from_extra("tokenizers", "train", "training a tokenizer")
    tokenizer = package.Tokenizer(package.models.BPE())
    tokenizer.pre_tokenizer = package.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = package.decoders.ByteLevel()
    trainer = package.trainers.BpeTrainer(
        vocab_size=vocab, initial_alphabet=package.pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _find(name: str) -> Path:
    path = Path(name).expanduser()
    for place in (path, saved_folder(path) / TOKENIZER):
        if place.is_file():
            return place
    if path.exists():
        what = f"there is no {TOKENIZER} in this folder" if path.is_dir() else "not a regular file"
        raise _problem(name, what)
    hub = from_extra("huggingface_hub", "train", "a tokenizer file")
    try:
        cached = hub.try_to_load_from_cache(name, TOKENIZER)
    except ValueError:  # not a possible name
        cached = None
    if isinstance(cached, str):
        return Path(cached)
    near = nearest(path.name, sorted(p.name for p in path.parent.iterdir())) if path.parent.is_dir() else ""
    raise _problem(name, f"no such file{near}; expected a {TOKENIZER}, or a folder or a cached name that has one")


def _problem(place: str, message: str) -> RecipeError:
    return RecipeError([Problem(show(place, 200).strip("'"), message)], "tokenizer")
