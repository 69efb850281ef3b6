"""States in the cache of a transformers model, where they stay with its keys and values.

transformers is not imported here: what is no cache of it needs none of this, and what is one has imported it.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from ...blocks.state import State
from .error import SwapError
from .site import Replacement, Site

if TYPE_CHECKING:
    from .cache_layer import MemoryLayer


class Read(NamedTuple):
    """What a site read in one call."""

    rows: int
    time: int
    device: torch.device
    dtype: torch.dtype


def as_cache(value: Any) -> Any:
    """``value`` if it is a cache of transformers (of an encoder and a decoder: the decoder's own); else ``None``."""
    known: Any = sys.modules.get("transformers.cache_utils")
    if known is None or value is None:
        return None
    if isinstance(value, known.EncoderDecoderCache):
        value = value.self_attention_cache
    return value if isinstance(value, known.Cache) else None


def tokens_in(cache: Any) -> int:
    """Tokens that a cache says it has read."""
    try:
        return int(cache.get_seq_length())
    except ValueError:  # it has no layer that counts
        layer = _memory_layer(cache)
        return 0 if layer is None else layer.tokens


def kept_in(cache: Any, past: int | None, time: int) -> MemoryLayer | None:
    """The states in a cache; ``None`` for one that has read nothing.

    Raises ``SwapError`` for a cache that has read tokens which the memory has not.
    """
    layer = _memory_layer(cache)
    if layer is not None and layer.tokens:
        if past is not None and past != layer.tokens:
            raise SwapError(
                f"the cache holds {past} tokens, and the memory's states in it have read {layer.tokens}: it was "
                "cropped, or a call failed half-way. A memory cannot unread: start a new cache, or copy one beforehand"
            )
        return layer
    # where the first layers have been called already, their keys of this call are in it
    if tokens_in(cache) not in ((0, time) if not past else (0,)):
        had = tokens_in(cache) if past is None else past
        raise SwapError(
            f"the cache has read {had} tokens without the memory: it is of another model, or of this one "
            "before the swap; start a new cache"
        )
    return None


def leave_in(cache: Any, after: Mapping[Site, State], read: Mapping[Site, Read], opener: nn.Module) -> None:
    """Put new states into a cache, and count for attention that was replaced and fills no keys in any more."""
    from .cache_layer import MemoryLayer, TokenCount

    layer = _memory_layer(cache)
    if layer is None:
        layer = MemoryLayer()
        if cache.layer_class_to_replicate is not None:  # it makes layers as they are called: ours comes after them all
            count = 1 + max((getattr(module, "layer_idx", None) or 0 for module in opener.modules()), default=0)
            cache.layers.extend(cache.layer_class_to_replicate() for _ in range(count - len(cache.layers)))
        cache.layers.append(layer)
    for site in after:
        rows, time, device, dtype = read[site]
        for index in _emptied(site):
            if index >= len(cache.layers):
                continue
            if hasattr(cache.layers[index], "max_cache_len"):  # a fixed size, which masks are made for
                nothing = torch.zeros(rows, 1, time, 1, device=device, dtype=dtype)
                cache.layers[index].update(nothing, nothing)
                continue
            if not isinstance(cache.layers[index], TokenCount):
                cache.layers[index] = TokenCount()
            cache.layers[index].tokens += time
    layer.states = {**layer.states, **{site.key: state for site, state in after.items()}}
    layer.tokens = tokens_in(cache) or layer.tokens + max(one.time for one in read.values())


def _memory_layer(cache: Any) -> MemoryLayer | None:
    last = cache.layers[-1] if cache.layers else None
    return last if type(last).__name__ == "MemoryLayer" and hasattr(last, "states") else None


def _emptied(site: Site) -> set[int]:
    """Layers of the cache that attention in a replaced module would fill."""
    if not isinstance(site, Replacement):
        return set()
    found = (getattr(module, "layer_idx", None) for module in site.original.modules())
    return {index for index in found if isinstance(index, int)}
