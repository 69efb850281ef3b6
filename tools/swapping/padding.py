"""Which tokens of a call are real, told from the masks that models are given."""

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
        """``[rows, time]`` bool, true at real tokens; ``None`` when all are. ``past``: tokens read before, if known.

        Raises ``SwapError`` for a mask of other tokens.
        """
        real = self._real()
        if real.shape[0] == 1 and rows > 1:
            real = real.expand(rows, -1)
        if real.shape[0] != rows or real.shape[1] < time:
            raise SwapError(
                f"{where}: reads {rows} rows of {time} tokens, and the mask of the call is {list(self.tensor.shape)}"
                + ("; where time comes first, say so: adapter='time_first'" if real.shape == (time, rows) else "")
            )
        # a mask of everything read so far ends with this call's tokens, unless it has room for later ones
        end = real.shape[1]
        if self.tensor.dim() == 4 and past is not None and past + time <= end:
            end = past + time
        real = real[:, end - time : end]
        return None if bool(real.all()) else real

    def _real(self) -> Tensor:
        mask = self.tensor
        if self.marks_padding:
            mask = ~mask if mask.dtype == torch.bool else mask == 0
            return mask.unsqueeze(0) if mask.dim() == 1 else mask
        if mask.dim() != 4:
            return mask != 0
        # every real token attends to itself at least, and nothing attends to padding
        attended = mask > torch.finfo(mask.dtype).min / 2 if mask.is_floating_point() else mask != 0
        return attended.flatten(1, 2).any(dim=1)


class Scope(NamedTuple):
    """What a running call says of the masks of the calls inside of it."""

    mask: Mask | None
    new_sequence: bool
    """Whether the masks of calls around it are of another sequence."""


def scope_of(module: nn.Module, named: Mapping[str, Any], inside_decoder: bool) -> Scope:
    """The mask among the arguments of a call, by the names that transformers and torch give it.

    ``attention_mask`` is ``[batch, time so far]``, or ``[batch, 1, time, time so far]`` as attention takes it;
    ``src_key_padding_mask`` and the like are ``[batch, time]``. In a model with an encoder, the outermost decoder
    begins a new sequence.
    """
    names = signature(module).names
    decodes = "tgt_key_padding_mask" in names and "src_key_padding_mask" not in names
    new = not inside_decoder and (decodes or isinstance(named.get("encoder_hidden_states"), Tensor))
    mask = named.get("attention_mask")
    if isinstance(mask, Mapping):  # one for each kind of layer
        mask = mask.get("full_attention", next(iter(mask.values()), None))
    if isinstance(mask, Tensor) and mask.dim() in (2, 4):
        return Scope(Mask(mask, marks_padding=False), new)
    wanted = ["tgt_key_padding_mask"] if decodes else ["src_key_padding_mask", "key_padding_mask"]
    for name in wanted if not isinstance(module, nn.MultiheadAttention) else ():
        mask = named.get(name)
        if isinstance(mask, Tensor):
            return Scope(Mask(mask, marks_padding=True), new)
    return Scope(None, new)


def innermost_mask(scopes: Iterable[Scope]) -> Mask | None:
    """The mask that counts, of ``scopes`` from the innermost outwards: the first of tokens, else one of scores."""
    scores = None
    for scope in scopes:
        if scope.mask is not None and scope.mask.tensor.dim() <= 2:
            return scope.mask
        scores = scores or scope.mask
        if scope.new_sequence:
            break
    return scores
