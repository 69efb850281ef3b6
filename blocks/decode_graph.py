"""Decoding a token as one CUDA graph: a replay in place of the launches of every layer.

With ``TITANS_BUILD_CUDA_GRAPHS=1``, ``model_decoder`` captures the step of a model whose state does not grow. The
states of all layers lie in one piece of memory. A token costs a copy of it into the graph's own, the replay, and a copy
of what the graph made, because states that were returned are not written to.

Some tokens run as usual: those at which a segment of ``context`` begins, all tokens while an observer is active, and
all tokens of a model that cannot be captured, which is logged as a warning.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels.dispatch import integers, known
from . import cuda_graph
from .context import Context, ContextState
from .observers import active
from .state import State, map_state, named_tensors

ALIGNMENT = 64

_log = logging.getLogger(__name__)


def wanted(model: Any, x: Tensor) -> bool:
    """Whether steps of ``model`` on inputs like ``x`` are to be captured."""
    return cuda_graph.enabled(x) and not model.grows


class StateLayout:
    """Places of the tensors of states like ``state`` in one piece of memory."""

    def __init__(self, state: State) -> None:
        self._like = state
        self._places: list[tuple[slice, torch.dtype, torch.Size]] = []
        end = 0
        for _, x in named_tensors(state):
            place = slice(end, end + x.numel() * x.element_size())
            self._places.append((place, x.dtype, x.shape))
            end += math.ceil((place.stop - end) / ALIGNMENT) * ALIGNMENT
        self.size = end

    def views(self, memory: Tensor) -> State:
        """The state in ``memory`` (uint8), without copies."""
        parts = iter([memory[place].view(dtype).view(shape) for place, dtype, shape in self._places])
        return map_state(lambda x: next(parts), self._like)

    def write(self, state: State, memory: Tensor) -> None:
        """Copy ``state`` to ``memory``."""
        map_state(lambda view, x: view.copy_(x), self.views(memory), state)


class DecodeGraph:
    """``step(x, layers)``, one token after states of the layers, as a graph.

    A token runs as ``step`` itself where a graph would not do the same.
    """

    def __init__(self, model: nn.Module, step: Callable[[Tensor, State], tuple[Tensor, State]]) -> None:
        self._model, self._step = model, step
        self._segments = {block.segment for block in model.modules() if isinstance(block, Context)}
        self._uses: tuple[Any, ...] | None = None
        """When the graph was captured."""
        self._replay: Callable[[], None] | None = None
        self._failed = False
        self._last: tuple[State, Tensor] | None = None
        """The states that were returned last, and the memory that they are in."""

    def __call__(self, x: Tensor, layers: State) -> tuple[Tensor, State]:
        contexts = list(_contexts(layers))
        if self._failed or active or self._begins_segment(contexts):
            return self._step(x, layers)
        uses = cuda_graph.uses(self._model)
        if self._replay is None or uses != self._uses:
            self._uses = uses
            try:
                self._capture(x, layers)
            except RuntimeError as error:
                _log.warning("decoding runs without a CUDA graph, since the step cannot be captured: %s", error)
                self._failed = True
                return self._step(x, layers)
        if self._last is not None and layers is self._last[0]:
            self._before.copy_(self._last[1])
        else:
            self._layout.write(layers, self._before)
        self._x.copy_(x)
        assert self._replay is not None
        self._replay()
        memory = self._after.clone()
        after = self._layout.views(memory)
        for context, old in zip(_contexts(after), contexts):
            known(context.position, [place + 1 for place in integers(old.position)])
        self._last = after, memory
        return self._y, after

    def _capture(self, x: Tensor, layers: State) -> None:
        self._layout, self._last = StateLayout(layers), None
        with torch.inference_mode(False):  # written to in any mode
            self._before, self._after = (x.new_empty(self._layout.size, dtype=torch.uint8) for _ in range(2))
            self._x = torch.empty_like(x)
        self._layout.write(layers, self._before)
        self._x.copy_(x)

        def run() -> None:
            # new tensors: the host must not know positions of an earlier run, apart from that no segment begins
            before = self._layout.views(self._before)
            for context in _contexts(before):
                known(context.position, [1] * len(context.position))
            self._y, after = self._step(self._x, before)
            self._layout.write(after, self._after)

        self._replay = cuda_graph.capture(run)

    def _begins_segment(self, contexts: list[ContextState]) -> bool:
        places = {place for context in contexts for place in integers(context.position)}
        return any(place > 0 and place % segment == 0 for place in places for segment in self._segments)


def _contexts(state: State) -> Iterator[ContextState]:
    if isinstance(state, ContextState):
        yield state
    if isinstance(state, tuple):
        for part in state:
            yield from _contexts(part)
