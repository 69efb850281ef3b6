"""The arguments of transformers models that a recipe model checks: its cache, masks, positions and documents."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ...registry import show
from .cache import StateCache

ONE_DOCUMENT = (
    "a recipe model reads a row as one document, and its memory would carry each into the next; give one document a "
    "row, with padding (packing=False, padding_free=False in TRL)"
)


def given_cache(cache: Any, past_key_values: Any) -> StateCache | None:
    """The cache of a call, by either of its names. Raises ``TypeError`` for the cache of another model."""
    if cache is not None and past_key_values is not None:
        raise TypeError("cache and past_key_values are two names of one argument: give one")
    given = past_key_values if cache is None else cache
    if given is not None and not isinstance(given, StateCache):
        raise TypeError(
            f"past_key_values: expected the cache of a titans-build model (StateCache), got {type(given).__name__}: a "
            "recipe model has no keys and values to start from (of PEFT's methods, prompt tuning works in place of "
            "prefix tuning)"
        )
    return given


def chosen_states(states: Sequence[Tensor], which: bool | int | Sequence[int]) -> tuple[Tensor | None, ...]:
    """All hidden states, or those at the indices ``which``, and ``None`` for the others."""
    if isinstance(which, bool):
        return tuple(states)
    chosen = {index % len(states) for index in ([which] if isinstance(which, int) else which)}
    return tuple(state if index in chosen else None for index, state in enumerate(states))


def real_tokens(attention_mask: Tensor | None, rows: int, time: int, before: int | None = None) -> Tensor | None:
    """``[rows, time]`` bool, true at real tokens, from ``[rows, time]`` or ``[rows, before + time]``, 0 at padding.

    Raises ``ValueError`` for other shapes and values. Without ``before``, the mask was checked already.
    """
    if attention_mask is None:
        return None
    mask = attention_mask[:, attention_mask.shape[1] - time :] != 0
    if before is None:
        return mask
    shapes = {(rows, time), (rows, before + time)}
    if tuple(attention_mask.shape) not in shapes:
        expected = " or ".join(str(list(shape)) for shape in sorted(shapes))
        raise ValueError(
            f"attention_mask: expected {expected}, 0 at padding, got {list(attention_mask.shape)}; masks over pairs of "
            f"tokens are not supported: {ONE_DOCUMENT}"
        )
    if attention_mask.dtype != torch.bool and not bool((mask == attention_mask[:, -time:]).all()):
        raise ValueError(
            "attention_mask: expected 1 at tokens and 0 at padding, got other values; numbers of documents and "
            f"additive masks are not supported: {ONE_DOCUMENT}"
        )
    return mask


def expect_one_document(
    position_ids: Tensor | None,
    documents: Mapping[str, Any],
    mask: Tensor | None,
    shape: tuple[int, int],
    before: int,
) -> None:
    """Raise ``ValueError`` if a row holds several documents, and ``TypeError`` for unknown arguments.

    Positions must go up by one from token to token, counted with padding or without, and start at 0 unless ``before``
    tokens were read. A single position says nothing.
    """
    lengths = [name for name in documents if name.startswith("cu_seq_lens") and documents[name] is not None]
    numbers = documents.get("seq_idx")
    unknown = [
        name
        for name, value in documents.items()
        if value is not None and name not in ("seq_idx", "max_length_q", "max_length_k", *lengths)
    ]
    if unknown:
        raise TypeError(f"a recipe model takes no argument {', '.join(map(show, unknown))}")
    for name in lengths:
        if len(documents[name]) > 2:
            raise ValueError(f"{name}: {len(documents[name]) - 1} documents in a row, expected one: {ONE_DOCUMENT}")
    if numbers is not None and not bool((numbers == numbers[..., :1]).all()):
        raise ValueError(f"seq_idx: several documents in a row, expected one: {ONE_DOCUMENT}")
    if position_ids is None or shape[1] < 2:
        return
    if position_ids.shape not in (shape, (1, shape[1])):
        raise ValueError(f"position_ids: expected {list(shape)}, got {list(position_ids.shape)}")
    tokens = torch.ones(shape, dtype=torch.bool, device=position_ids.device) if mask is None else mask
    fits = []
    for counted in (tokens, torch.ones_like(tokens)):
        shift = position_ids - (counted.cumsum(-1) - 1)
        first = shift.gather(1, tokens.int().argmax(-1, keepdim=True)) if before else 0
        fits.append(bool(((shift == first) | ~tokens).all()))
    if not any(fits):
        raise ValueError(
            "position_ids: expected positions that go up by one from token to token, from 0 without a cache; they "
            f"start again in packed rows, which are not supported: {ONE_DOCUMENT}"
        )
