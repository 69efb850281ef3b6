"""Which tokens of a call are real, told from the masks that models are given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .calling import parameters
from .error import SwapError


class Mask(NamedTuple):
    """A mask as it came."""

    tensor: Tensor
    hides: bool
    """True, or minus infinity, is padding; else true, 1, or 0 added to scores, is a real token."""

    def real(self, rows: int, time: int, past: int | None, where: str) -> Tensor | None:
        """``[rows, time]`` bool, true at real tokens; ``None`` when all are. ``past``: tokens read before, if known.

        Raises ``SwapError`` for a mask of other tokens.
        """
        seen = self._seen()
        if seen.shape[0] == 1 and rows > 1:
            seen = seen.expand(rows, -1)
        if seen.shape[0] != rows or seen.shape[1] < time:
            raise SwapError(
                f"{where}: reads {rows} rows of {time} tokens, and the mask of the call is {list(self.tensor.shape)}"
                + ("; where time comes first, say so: adapter='time_first'" if seen.shape == (time, rows) else "")
            )
        # a mask over everything read so far ends with this call's tokens, unless it has room for later ones
        end = seen.shape[1]
        if self.tensor.dim() == 4 and past is not None and past + time <= end:
            end = past + time
        real = seen[:, end - time : end]
        return None if bool(real.all()) else real

    def _seen(self) -> Tensor:
        mask = self.tensor
        if self.hides:
            mask = ~mask if mask.dtype == torch.bool else mask == 0
            return mask.unsqueeze(0) if mask.dim() == 1 else mask
        if mask.dim() != 4:
            return mask != 0
        # every real token attends to itself at least, and nothing attends to padding
        allowed = mask > torch.finfo(mask.dtype).min / 2 if mask.is_floating_point() else mask != 0
        return allowed.flatten(1, 2).any(dim=1)


class Scope(NamedTuple):
    """What a call says of the masks of the calls inside of it."""

    mask: Mask | None
    ends: bool
    """Whether masks of calls around it are of another sequence."""


def scope_of(module: nn.Module, named: Mapping[str, Any], inside_decoder: bool) -> Scope:
    """The mask among the arguments of a call, by the names that transformers and torch give it.

    ``attention_mask`` is ``[batch, time so far]``, or ``[batch, 1, time, time so far]`` where a model was given it
    ready for its attention; ``src_key_padding_mask`` and its like are ``[batch, time]``. The outermost decoder of a
    model that has an encoder, too, begins a sequence of its own.
    """
    names = parameters(module).names
    decodes = "tgt_key_padding_mask" in names and "src_key_padding_mask" not in names
    ends = not inside_decoder and (decodes or isinstance(named.get("encoder_hidden_states"), Tensor))
    mask = named.get("attention_mask")
    if isinstance(mask, Mapping):  # one for each kind of layer
        mask = mask.get("full_attention", next(iter(mask.values()), None))
    if isinstance(mask, Tensor) and mask.dim() in (2, 4):
        return Scope(Mask(mask, hides=False), ends)
    wanted = ["tgt_key_padding_mask"] if decodes else ["src_key_padding_mask", "key_padding_mask"]
    for name in wanted if not isinstance(module, nn.MultiheadAttention) else ():
        mask = named.get(name)
        if isinstance(mask, Tensor):
            return Scope(Mask(mask, hides=True), ends)
    return Scope(None, ends)


def innermost(scopes: Sequence[Scope]) -> Mask | None:
    """The mask that counts: of the nearest call that has one of tokens; one of scores only where there is no other."""
    scores = None
    for scope in reversed(scopes):
        if scope.mask is not None and scope.mask.tensor.dim() <= 2:
            return scope.mask
        scores = scores or scope.mask
        if scope.ends:
            break
    return scores
