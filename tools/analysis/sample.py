"""The text that is analyzed: its tokens, their targets, and how each token reads."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...blocks.memory_ablation import SHORTEST, next_tokens
from ...registry import show
from ..data import open_source
from ..data.open_source import as_mapping
from ..inference.session import Text
from ..inference.tokenizer import ByteTokenizer, IdTokenizer, Tokenizer, check_ids, open_tokenizer
from ..terminal import UsageError

ROWS = 32
"""Rows of a generated task or of shuffled windows: the first is shown, all count for the losses."""
LEAD = 16
"""Tokens that are decoded before others, as a character may begin in them."""


class Sample(NamedTuple):
    """Rows of tokens; the first is the one that is shown."""

    name: str
    tokens: Tensor
    """``[rows, time]`` int64."""
    targets: Tensor
    """``[rows, time]`` int64: the target of each token; -100 where there is none."""
    mask: Tensor | None
    """``[rows, time]`` bool: which tokens are real; ``None`` where all are."""
    words: Callable[[int, int], list[str]]
    """``words(start, stop)``: the text that each real token of the first row adds, one string for each."""
    unit: str
    """``byte`` or ``token``."""
    truncated: bool
    """The text is longer than the sample."""

    def to(self, device: str) -> Sample:
        """The sample on another device."""
        mask = None if self.mask is None else self.mask.to(device)
        return self._replace(tokens=self.tokens.to(device), targets=self.targets.to(device), mask=mask)


def from_file(path: str, tokenizer: Tokenizer, vocab: int, max_tokens: int) -> Sample:
    """The first tokens of a file. Raises ``UsageError`` where it is unreadable, short, or not in the vocabulary."""
    parts, count = [torch.empty(0, dtype=torch.int64)], 0
    for part in tokenizer.encode(Text([path], [], "TEXTFILE")):
        parts.append(part)
        count += len(part)
        if count > max_tokens:
            break
    tokens = torch.cat(parts)[:max_tokens].unsqueeze(0)
    check_ids(tokens[0], vocab, path)
    return _sample(
        path, tokenizer, tokens, next_tokens(tokens), torch.ones_like(tokens, dtype=torch.bool), count > max_tokens
    )


def from_data(
    spec: str | Sequence[str] | Mapping[str, Any], vocab: int, max_tokens: int, length: int | None = None
) -> Sample:
    """The first ``max_tokens`` tokens of held-out rows of training data. ``length``: of a row, if not the data's own.

    Raises ``RecipeError`` or ``UsageError``.
    """
    source = open_source(spec, rows=ROWS, length=length, split="valid", vocab=vocab)
    if source.packed:  # a row of several documents is no text that can be shown
        spec = {**as_mapping(spec), "pack": None, "documents": "ordered"}
    if source.packed or source.carries:
        source = open_source(spec, rows=1, length=length, split="valid", vocab=vocab)
    batches, time, truncated = [source.batch(0)], source.length, source.length > max_tokens
    while source.carries and time < max_tokens:
        following = source.batch(len(batches))
        if bool(following.fresh.any()):
            break  # the document ends
        batches.append(following)
        time += source.length
        truncated = time >= max_tokens
    masks = [batch.tokens >= 0 if batch.mask is None else batch.mask for batch in batches]
    tokens, targets, mask = (
        torch.cat(parts, dim=1)[:, :max_tokens]
        for parts in ([batch.tokens for batch in batches], [batch.targets for batch in batches], masks)
    )
    description = source.describe()
    tokenizer: Tokenizer = IdTokenizer()
    if "text" in description:
        tokenizer = open_tokenizer(description.get("tokenizer") or "bytes", vocab)
    return _sample(show(spec, 100).strip("'"), tokenizer, tokens, targets, mask, truncated)


def _sample(name: str, tokenizer: Tokenizer, tokens: Tensor, targets: Tensor, mask: Tensor, truncated: bool) -> Sample:
    unit = "byte" if isinstance(tokenizer, ByteTokenizer) else "token"
    real = tokens[0][mask[0]].tolist()
    if len(real) < SHORTEST:
        raise UsageError(f"{name}: {len(real)} {unit}s: expected at least {SHORTEST}, to analyse a memory")

    def words(start: int, stop: int) -> list[str]:
        if isinstance(tokenizer, IdTokenizer):
            return [f"{token} " for token in real[start:stop]]
        decoder, lead = tokenizer.decoder(), max(start - LEAD, 0)
        return [decoder.feed(token) for token in real[lead:stop]][start - lead :]

    return Sample(name, tokens, targets, None if bool(mask.all()) else mask, words, unit, truncated)
