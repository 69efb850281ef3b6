"""The states of memories in a cache of transformers, beside its keys and values.

Whatever is done with a cache, beam search's reordering, copying, repeating rows, is done with each of its layers; so
the states are in a layer of their own. Imported only where a call has a cache, which imports transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import CacheLayerMixin

from ...blocks import state as tree
from ...blocks.state import State
from .adapter import SwapError
from .site import Read, Replacement, Site


class TokenCount(CacheLayerMixin):
    """In the place of the layer of a replaced attention: the number of tokens that were read, and no keys."""

    is_sliding = False
    supports_early_init = False

    def __init__(self) -> None:
        super().__init__()
        self.tokens = 0

    def lazy_initialization(self, *states: Tensor) -> None:
        """There is nothing to initialise."""

    def update(self, *states: Any, **kwargs: Any) -> Any:
        raise SwapError("this layer of the cache is of attention that was replaced: the cache is of another model")

    def get_seq_length(self) -> int:
        return self.tokens

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        return self.tokens + (len(query_length) if isinstance(query_length, Tensor) else query_length), 0

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        self.tokens = 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """There are no rows."""

    def batch_repeat_interleave(self, repeats: int) -> None:
        """There are no rows."""

    def crop(self, tokens_to_remove: int) -> None:
        """Nothing for 0. Raises ``SwapError`` for others: a memory cannot unread."""
        if tokens_to_remove != 0:
            raise SwapError(
                f"crop({tokens_to_remove}): a memory cannot unread what it has read; keep copy.deepcopy(cache) from "
                "before the tokens that may have to go (assisted generation, which crops, is not possible)"
            )


class MemoryLayer(TokenCount):
    """The states of all memories in a model, by their sites' keys."""

    def __init__(self) -> None:
        super().__init__()
        self.states: dict[str, State] = {}

    def state_of(self, site: Site) -> State:
        """Raises ``SwapError`` where the cache was filled by another model."""
        if site.key not in self.states:
            raise SwapError(
                f"{site.path}: the cache has read {self.tokens} tokens and holds no state of this memory: "
                "it is of another model, or of this one before the swap; start a new cache"
            )
        return self.states[site.key]

    def reset(self) -> None:
        super().reset()
        self.states = {}

    def batch_select_indices(self, indices: Tensor) -> None:
        self.states = {key: tree.select(state, indices) for key, state in self.states.items()}

    def batch_repeat_interleave(self, repeats: int) -> None:
        rows = next((rows for rows in map(tree.batch_size, self.states.values()) if rows is not None), None)
        if rows is not None:
            self.batch_select_indices(torch.arange(rows).repeat_interleave(repeats))


def tokens_read(cache: Any) -> int:
    """Tokens that a cache says it has read."""
    try:
        return int(cache.get_seq_length())
    except ValueError:  # it has no layer that counts
        layer = _memory_layer(cache)
        return 0 if layer is None else layer.tokens


def stored_states(cache: Any, past: int | None, time: int) -> MemoryLayer | None:
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
    if tokens_read(cache) not in ((0, time) if not past else (0,)):
        had = tokens_read(cache) if past is None else past
        raise SwapError(
            f"the cache has read {had} tokens without the memory: it is of another model, or of this one "
            "before the swap; start a new cache"
        )
    return None


def store_states(cache: Any, after: Mapping[Site, State], read: Mapping[Site, Read], opener: nn.Module) -> None:
    """Put new states into a cache, and count tokens for attention that was replaced and stores no keys any more."""
    layer = _memory_layer(cache)
    if layer is None:
        layer = MemoryLayer()
        if cache.layer_class_to_replicate is not None:  # it makes layers as they are called: ours comes after them all
            count = 1 + max((getattr(module, "layer_idx", None) or 0 for module in opener.modules()), default=0)
            cache.layers.extend(cache.layer_class_to_replicate() for _ in range(count - len(cache.layers)))
        cache.layers.append(layer)
    for site in after:
        rows, time, device, dtype = read[site]
        for index in _emptied_layers(site):
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
    layer.tokens = tokens_read(cache) or layer.tokens + max(one.time for one in read.values())


def _memory_layer(cache: Any) -> MemoryLayer | None:
    last = cache.layers[-1] if cache.layers else None
    return last if isinstance(last, MemoryLayer) else None


def _emptied_layers(site: Site) -> set[int]:
    """Indices of the cache's layers that attention in a replaced module would fill."""
    if not isinstance(site, Replacement):
        return set()
    found = (getattr(module, "layer_idx", None) for module in site.original.modules())
    return {index for index in found if isinstance(index, int)}
