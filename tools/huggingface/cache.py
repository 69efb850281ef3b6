"""The cache of a recipe model: its state, in place of keys and values."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from torch import Tensor
from transformers import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast

from ...blocks.language_model import ModelState
from ..swapping.cache import StateLayer
from ..swapping.replay import UNKNOWN, Record, Replay

CACHE = next(field.name for field in fields(BaseModelOutputWithPast) if field.name in ("cache", "past_key_values"))
"""The name of the cache in outputs and in ``generate``: ``cache`` from transformers 5.24 on."""


class StateCache(Cache):
    """A cache that holds the state of a titans-build model. Each call of the model puts the next state into it.

    ``cache.state`` is ``None`` before anything was read, and may be assigned: ``tb.state``, ``tb.save_state`` and
    ``tb.load_state`` work on it. States are never modified, so ``copy.deepcopy(cache)`` is a fork that copies nothing.
    ``cache.crop(-n)`` removes the last ``n`` tokens, as assisted generation does.
    """

    def __init__(self, state: ModelState | None = None, length: int = 0) -> None:
        """``length``: how many tokens ``state`` has read in each row, padding included."""
        self._layer = StateLayer({} if state is None else {"model": state}, length)
        super().__init__(layers=[self._layer])

    def __repr__(self) -> str:
        rows = "nothing" if self.state is None else f"{self.batch_size} x {self.length} tokens"
        return f"{type(self).__name__}({rows} read)"

    @property
    def state(self) -> ModelState | None:
        return self._layer.states.get("model")

    @state.setter
    def state(self, state: ModelState | None) -> None:
        self._layer.states, self._layer.records = {} if state is None else {"model": state}, ()

    @property
    def length(self) -> int:
        """Tokens of each row that were read, padding included."""
        return self._layer.tokens

    def read(self, state: ModelState, tokens: int, replay: Replay = UNKNOWN) -> None:
        """Set the state of the model after ``tokens`` more of each row. ``replay``: what was read, for ``crop``."""
        self._layer.advance({"model": state}, [Record(tokens, {"model": replay})])

    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        raise TypeError("this cache holds the state of a titans-build model, and no keys: it is of another model")

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        return self.state is not None

    @property
    def batch_size(self) -> int:
        return -1 if self.state is None else len(self.state.recipe)
