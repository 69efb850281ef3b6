"""What a model has read, as ``generate`` carries it from one call to the next: a state in place of keys and values."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from ...blocks.language_model import ModelState
from ...blocks.state import select


class StateCache(Cache):
    """A cache that holds the state of a titans-build model; the model's calls put the next one into it.

    ``cache.state`` is ``None`` before anything was read, and may be assigned: ``tb.state``, ``tb.save_state`` and
    ``tb.load_state`` work on it. States are never modified, so ``copy.deepcopy(cache)`` is a fork that copies nothing.
    """

    def __init__(self, state: ModelState | None = None, length: int = 0) -> None:
        """``length``: how many tokens ``state`` has been shown in each row, padding included."""
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
        return True  # there, whatever it has read

    def read(self, state: ModelState, tokens: int) -> None:
        """The model has read ``tokens`` more of each row, and this is its state now."""
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
        """Forget everything."""
        self.state, self.length = None, 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """The rows ``beam_idx``, in this order."""
        self._select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """The rows ``indices``, in this order."""
        self._select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row ``repeats`` times."""
        if self.state is not None:
            self._select(torch.arange(self.batch_size).repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last ``-tokens_to_remove`` tokens: none, or all of them. Raises ``ValueError`` for others."""
        if tokens_to_remove == 0:
            return
        if -tokens_to_remove != self.length:
            raise ValueError(
                f"crop({tokens_to_remove}): a memory cannot forget the last of the {self.length} tokens it has "
                "learned from; copy.deepcopy(cache) before reading them keeps what was"
            )
        self.reset()

    def _select(self, rows: Tensor) -> None:
        if self.state is not None:
            self.state = select(self.state, rows)
