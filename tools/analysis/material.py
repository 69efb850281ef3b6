"""What is analysed: tokens, what is to be predicted at each, and how a token reads."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...blocks.live_or_frozen import SHORTEST, next_tokens
from ...registry import show
from ..data import open_source
from ..inference.tokenizer import ByteTokenizer, IdTokenizer, Tokenizer, open_tokenizer
from ..terminal import UsageError

EXAMPLES = 32
"""Rows of a generated task or of shuffled windows: the first is shown, all count for the losses."""
LEAD = 16
"""Tokens before others that are decoded with them: a letter may have begun there."""
BLOCK = 1 << 16
"""ByteTokenizer that are read from a file at once."""


class Material(NamedTuple):
    """Rows of tokens; the first is the one that is shown."""

    name: str
    tokens: Tensor
    """``[rows, time]`` int64."""
    targets: Tensor
    """The same: what is to be predicted at each; -100 where nothing counts."""
    mask: Tensor | None
    """The same in bool: which tokens are real; ``None`` where all are."""
    words: Callable[[int, int], list[str]]
    """What each real token of the first row from one position to another adds to the text, one string for each."""
    unit: str
    """``byte`` or ``token``."""
    goes_on: bool
    """There is more than was taken."""

    def to(self, device: str) -> Material:
        """The same on another device."""
        mask = None if self.mask is None else self.mask.to(device)
        return self._replace(tokens=self.tokens.to(device), targets=self.targets.to(device), mask=mask)


def from_file(path: str, tokenizer: Tokenizer, vocab: int, most: int) -> Material:
    """The first ``most`` tokens of a file. Raises ``UsageError`` for what is no file, too short, or out of vocab."""
    parts, count = [], 0
    try:
        for part in tokenizer.encode(_blocks(path)):
            parts.append(part)
            count += len(part)
            if count > most:
                break
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: {getattr(error, 'strerror', None) or error}") from None
    tokens = torch.cat([*parts, torch.empty(0, dtype=torch.int64)])[:most].unsqueeze(0)
    unit = "byte" if isinstance(tokenizer, ByteTokenizer) else "token"
    _expect_enough(path, tokens.shape[1], unit)
    if int(tokens.max()) >= vocab:
        at = int((tokens[0] >= vocab).nonzero()[0])
        raise UsageError(
            f"{path}: {unit} {at:,} is {int(tokens[0, at])}, outside the model's vocabulary of {vocab} "
            f"(0 to {vocab - 1}): expected a text as the model was trained on (--tokenizer, or --data SPEC)"
        )
    return Material(path, tokens, next_tokens(tokens), None, _words(tokenizer, tokens[0].tolist()), unit, count > most)


def from_data(
    spec: str | Sequence[str] | Mapping[str, Any], vocab: int, most: int, length: int | None = None
) -> Material:
    """Held-out rows of training data, ``most`` tokens of each. ``length``: of a row, where it is not the data's own.

    Raises ``RecipeError`` or ``UsageError``.
    """
    source = open_source(spec, rows=EXAMPLES, length=length, split="valid", vocab=vocab)
    if source.carries:
        source = open_source(spec, rows=1, length=length, split="valid", vocab=vocab)
    batches, time, goes_on = [source.batch(0)], source.length, source.length > most
    while source.carries and time < most:
        following = source.batch(len(batches))
        if bool(following.fresh.any()):
            break  # the document ends
        batches.append(following)
        time += source.length
        goes_on = time >= most
    tokens = torch.cat([batch.tokens for batch in batches], dim=1)[:, :most]
    targets = torch.cat([batch.targets for batch in batches], dim=1)[:, :most]
    masks = [batch.tokens >= 0 if batch.mask is None else batch.mask for batch in batches]
    mask = torch.cat(masks, dim=1)[:, :most]
    said = source.describe()
    tokenizer: Tokenizer = open_tokenizer(said.get("tokenizer") or "bytes", vocab) if "text" in said else IdTokenizer()
    real = tokens[0][mask[0]]
    name = show(spec, 100).strip("'")
    unit = "byte" if isinstance(tokenizer, ByteTokenizer) else "token"
    _expect_enough(name, len(real), unit)
    words = _words(tokenizer, real.tolist())
    return Material(name, tokens, targets, None if bool(mask.all()) else mask, words, unit, goes_on)


def _blocks(path: str) -> Iterator[bytes]:
    with open(path, "rb") as file:
        while block := file.read(BLOCK):
            yield block


def _words(tokenizer: Tokenizer, tokens: list[int]) -> Callable[[int, int], list[str]]:
    def words(start: int, stop: int) -> list[str]:
        if isinstance(tokenizer, IdTokenizer):
            return [f"{token} " for token in tokens[start:stop]]
        decoder, before = tokenizer.decoder(), max(start - LEAD, 0)
        return [decoder.feed(token) for token in tokens[before:stop]][start - before :]

    return words


def _expect_enough(name: str, count: int, unit: str) -> None:
    if count < SHORTEST:
        raise UsageError(f"{name}: {count} {unit}s: expected at least {SHORTEST}, to see anything of a memory")
