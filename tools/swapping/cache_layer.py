"""Layers of a transformers cache: one that holds memories' states, and ones that only count.

Whatever is done with a cache, beam search's reordering, copying, repeating rows, is done with each of its layers; so
the states go along by being in one. Imported only where transformers is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from ...blocks import state as tree
from ...blocks.state import State
from .error import SwapError
from .site import Site


class TokenCount(CacheLayerMixin):
    """In the place of the layer of attention that was replaced: how many tokens were read, and no keys."""

    is_sliding = False
    is_compileable = False
    is_croppable = False
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

    def get_max_cache_shape(self) -> int:
        """What ``get_max_length`` was called before."""
        return -1

    def reset(self) -> None:
        self.tokens = 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """There are no rows."""

    def batch_repeat_interleave(self, repeats: int) -> None:
        """There are no rows."""

    def batch_select_indices(self, indices: Tensor) -> None:
        """There are no rows."""

    def offload(self) -> None:
        """It takes no memory worth moving."""

    def prefetch(self) -> None:
        """It is where it was."""

    def crop(self, tokens_to_remove: int) -> None:
        """Nothing where nothing is to go. Raises ``SwapError`` else: a memory cannot unread."""
        # once the number was that of tokens which stay
        if tokens_to_remove < 0 or 0 < tokens_to_remove < self.tokens:
            raise SwapError(
                f"crop({tokens_to_remove}): a memory cannot unread what it has read; keep copy.deepcopy(cache) from "
                "before the tokens that may have to go (assisted generation, which crops, is not possible)"
            )


class MemoryLayer(TokenCount):
    """The states of all memories in a model, by their sites' keys."""

    def __init__(self) -> None:
        super().__init__()
        self.states: dict[str, State] = {}

    def of(self, site: Site) -> State:
        """The state of a site. Raises ``SwapError`` where the cache was filled by another model."""
        if site.key not in self.states:
            raise SwapError(
                f"{site.path}: the cache has read {self.tokens} tokens and holds no state of this memory: "
                "it is of another model, or of this one before the swap; start a new cache"
            )
        return self.states[site.key]

    def reset(self) -> None:
        super().reset()
        self.states = {}

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        self.states = {key: tree.select(state, indices) for key, state in self.states.items()}

    def batch_repeat_interleave(self, repeats: int) -> None:
        for state in self.states.values():
            rows = tree.batch_size(state)
            if rows is not None:
                self.batch_select_indices(torch.arange(rows).repeat_interleave(repeats))
                return
