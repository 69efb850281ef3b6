"""The tokens of a call that are real, by the masks that models are given."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .adapter import SwapError, signature


class Mask(NamedTuple):
    """A mask as a model was given it."""

    tensor: Tensor
    marks_padding: bool
    """True, or minus infinity, is padding. Else true, 1, or 0 added to attention scores, is a real token."""

    def real_tokens(self, rows: int, time: int, past: int | None, where: str) -> Tensor | None:
        """``[rows, time]`` bool, true at real tokens; ``None`` if all are. ``past``: tokens read before, if known.

        Raises ``SwapError`` for a mask of other tokens.
        """
        mask = self.tensor
        if self.marks_padding:
            real = torch.atleast_2d(~mask if mask.dtype == torch.bool else mask == 0)
        elif mask.dim() != 4:
            real = mask != 0
        else:  # every real token attends to itself at least, and nothing attends to padding
            real = attended(mask).flatten(1, 2).any(dim=1)
        if real.shape[0] == 1:
            real = real.expand(rows, -1)
        if real.shape[0] != rows or real.shape[1] < time:
            hint = "; if time comes first, use adapter='time_first'" if real.shape == (time, rows) else ""
            raise SwapError(
                f"{where}: reads {rows} rows of {time} tokens, and the mask of the call is {list(mask.shape)}{hint}"
            )
        # a mask of all tokens so far ends with those of this call, unless it has space for later ones
        end = real.shape[1]
        if past is not None and past + time < end and (mask.dim() == 4 or not bool(real[:, past + time :].any())):
            end = past + time
        real = real[:, end - time : end]
        return None if bool(real.all()) else real


class Scope(NamedTuple):
    """The mask that a running call gives the calls inside it."""

    mask: Mask | None
    new_sequence: bool
    """Whether the masks of the calls around it are of another sequence."""


def scope_of(module: nn.Module, named: Mapping[str, Any], inside_decoder: bool) -> Scope:
    """The mask among the arguments of a call, by the names that transformers and torch give it.

    ``attention_mask`` is ``[batch, time so far]``, or ``[batch, 1, time, time so far]`` as attention takes it;
    ``src_key_padding_mask`` and the like are ``[batch, time]``. In a model with an encoder, the outermost decoder
    begins a new sequence.
    """
    names = signature(module).names
    decodes = "tgt_key_padding_mask" in names and "src_key_padding_mask" not in names
    new = not inside_decoder and (decodes or isinstance(named.get("encoder_hidden_states"), Tensor))
    mask = mask_tensor(named)
    if mask is not None:
        return Scope(Mask(mask, marks_padding=False), new)
    if not isinstance(module, nn.MultiheadAttention):  # whose mask is of the keys
        for name in ("tgt_key_padding_mask",) if decodes else ("src_key_padding_mask", "key_padding_mask"):
            if isinstance(named.get(name), Tensor):
                return Scope(Mask(named[name], marks_padding=True), new)
    return Scope(None, new)


def mask_tensor(named: Mapping[str, Any]) -> Tensor | None:
    """``attention_mask``, of tokens ``[batch, time]`` or of scores ``[batch, heads, time, time so far]``."""
    mask = named.get("attention_mask")
    if isinstance(mask, Mapping):  # one for each kind of layer
        mask = mask.get("full_attention", next(iter(mask.values()), None))
    if isinstance(mask, Tensor) and mask.dim() == 3:
        mask = mask.unsqueeze(1)
    return mask if isinstance(mask, Tensor) and mask.dim() in (2, 4) else None


def attended(mask: Tensor) -> Tensor:
    """Where a mask ``[batch, heads, time, time so far]`` lets a token attend."""
    # masks are made with minus infinity, the smallest number, or -10,000; less is a bias
    return mask > -9_000.0 if mask.is_floating_point() else mask != 0


def innermost_mask(scopes: Iterable[Scope]) -> Mask | None:
    """The mask that applies, of ``scopes`` from the innermost outwards: the first of tokens, else one of scores."""
    scores = None
    for scope in scopes:
        if scope.mask is not None and scope.mask.tensor.dim() <= 2:
            return scope.mask
        scores = scores or scope.mask
        if scope.new_sequence:
            break
    return scores
