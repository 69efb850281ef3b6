"""The arguments of transformers models that a recipe model checks: its cache, masks, positions and documents."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ...blocks.documents import expect_documents
from ...blocks.language_model import LanguageModel
from ...kernels.documents import Documents
from ...registry import show
from ..swapping.adapter import SwapError
from ..swapping.documents import CARRIERS, ONE_DOCUMENT, find_documents
from ..swapping.padding import Mask, attended, mask_tensor
from .cache import StateCache


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


def real_tokens(attention_mask: Tensor | None, rows: int, time: int, before: int) -> Tensor | None:
    """``[rows, time]`` bool, true at real tokens, from ``[rows, time]`` or ``[rows, before + time]``, 0 at padding.

    Raises ``ValueError`` for other shapes and values.
    """
    if attention_mask is None:
        return None
    mask = attention_mask[:, attention_mask.shape[1] - time :] != 0
    shapes = {(rows, time), (rows, before + time)}
    if tuple(attention_mask.shape) not in shapes:
        expected = " or ".join(str(list(shape)) for shape in sorted(shapes))
        raise ValueError(
            f"attention_mask: expected {expected}, 0 at padding, or [batch, 1, time, time], got "
            f"{list(attention_mask.shape)}"
        )
    if attention_mask.dtype != torch.bool and not bool((mask == attention_mask[:, -time:]).all()):
        raise ValueError(
            "attention_mask: expected 1 at tokens and 0 at padding, got other values; numbers of documents are given "
            "as seq_idx"
        )
    return mask


def read_rows(
    model: LanguageModel, given: Mapping[str, Any], x: Tensor, before: int
) -> tuple[Tensor | None, Documents | None]:
    """The real tokens of ``x`` [rows, time, dim], bool ``[rows, time]``, and the documents of rows that hold several.

    ``given``: ``attention_mask``, ``position_ids`` and further arguments, by name. ``before``: the number of tokens
    read before. Raises ``ValueError`` for masks that are not causal in each document, and for documents that contradict
    each other, and ``TypeError`` for unknown arguments.
    """
    rows, time, _ = x.shape
    known = (*CARRIERS, "cu_seq_lens_k", "max_length_q", "max_length_k")
    unknown = [name for name, value in given.items() if value is not None and name not in known]
    if unknown:
        raise TypeError(f"a recipe model takes no argument {', '.join(map(show, unknown))}")
    pairs = mask_tensor(given)
    in_pairs = pairs is not None and pairs.dim() == 4 and pairs.shape[2:] == (time, time)
    try:
        if pairs is not None and in_pairs:
            mask = Mask(pairs, marks_padding=False).real_tokens(rows, time, before, "attention_mask")
        else:
            mask = real_tokens(given.get("attention_mask"), rows, time, before)
        ids = find_documents({**given, "inputs_embeds": x}, before, "a recipe model")
    except SwapError as error:
        raise ValueError(str(error)) from None
    if pairs is not None and in_pairs:
        found = torch.zeros(1, time, device=x.device) if ids is None else ids
        wanted = (found.unsqueeze(2) == found.unsqueeze(1)).tril().unsqueeze(1)
        both = wanted.new_ones(()) if mask is None else (mask.unsqueeze(2) & mask.unsqueeze(1)).unsqueeze(1)
        if before or bool(((attended(pairs) != wanted) & both).any()):
            raise ValueError(
                f"attention_mask {list(pairs.shape)}: expected [batch, 1, time, time], without a cache, with each "
                f"token attending to itself and all tokens before it in its document. {ONE_DOCUMENT}"
            )
    return mask, None if ids is None else expect_documents(
        model, ids.expand(rows, time).to(x.device), None, x, mask, None
    )
