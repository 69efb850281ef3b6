"""The cache of a model of a recipe: its state, in place of keys and values."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from ...blocks.language_model import ModelState
from ...blocks.state import select


class StateCache(Cache):
    """A cache that holds the state of a titans-build model. Each call of the model puts the next state into it.

    ``cache.state`` is ``None`` before anything was read, and may be assigned: ``tb.state``, ``tb.save_state`` and
    ``tb.load_state`` work on it. States are never modified, so ``copy.deepcopy(cache)`` is a fork that copies nothing.
    """

    def __init__(self, state: ModelState | None = None, length: int = 0) -> None:
        """``length``: how many tokens ``state`` has read in each row, padding included."""
        super().__init__(layers=[])
        self.state = state
        self.length = length

    def __repr__(self) -> str:
        rows = "nothing" if self.state is None else f"{self.batch_size} x {self.length} tokens"
        return f"{type(self).__name__}({rows} read)"

    def __deepcopy__(self, memo: dict[int, Any]) -> StateCache:
        return type(self)(self.state, self.length)

    def __len__(self) -> int:
        return 0 if self.state is None else len(self.state.layers)

    def __bool__(self) -> bool:
        return True  # also before it has read anything

    def read(self, state: ModelState, tokens: int) -> None:
        """Set the state of the model after ``tokens`` more of each row."""
        self.state, self.length = state, self.length + tokens

    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        raise TypeError(
            "this cache holds the state of a titans-build model, and no keys and values: it is of another model"
        )

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.length

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        return self.state is not None

    @property
    def batch_size(self) -> int:
        return -1 if self.state is None else len(self.state.recipe)

    @property
    def is_croppable(self) -> bool:
        return False

    def reset(self) -> None:
        """Discard the state."""
        self.state, self.length = None, 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows ``indices``, in this order."""
        if self.state is not None:
            self.state = select(self.state, indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row ``repeats`` times."""
        if self.state is not None:
            self.batch_select_indices(torch.arange(self.batch_size).repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last ``-tokens_to_remove`` tokens: none, or all of them. Raises ``ValueError`` for others."""
        if tokens_to_remove not in (0, -self.length):
            raise ValueError(
                f"crop({tokens_to_remove}): a memory cannot forget the last of the {self.length} tokens it has "
                "learned from; copy.deepcopy(cache) before reading them keeps what was"
            )
        if tokens_to_remove:
            self.reset()
