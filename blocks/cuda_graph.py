"""Calls of a block as CUDA graphs: one replay in place of hundreds of launches, and one more for backward.

Used with ``TITANS_BUILD_CUDA_GRAPHS=1``. A graph is captured where two calls in a row are alike; calls that differ, and
those of a block that cannot be captured, run as usual.
"""

from __future__ import annotations

import logging
import os
import weakref
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from ..kernels.dispatch import integers, known
from .block import is_sharded
from .state import State, map_state, named_tensors

VARIABLE = "TITANS_BUILD_CUDA_GRAPHS"
WARM_UP = 2
"""Runs before the capture, in which libraries set themselves up and constants are made."""

_log = logging.getLogger(__name__)


def enabled(x: Tensor) -> bool:
    """Whether calls on inputs like ``x`` are to be captured."""
    return x.is_cuda and os.environ.get(VARIABLE) == "1" and not torch.compiler.is_compiling()


def capture(function: Callable[[], None], warm_up: Callable[[], None] | None = None) -> Callable[[], None]:
    """Run ``warm_up``, by default ``function``, until it is warm, and capture ``function``. Returns what replays it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            (warm_up or function)()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    replay: Callable[[], None] = graph.replay
    return replay


def uses(module: nn.Module) -> tuple[Any, ...]:
    """What freezing changes."""
    return tuple([getattr(child, "use", None) for child in module.modules()])


Run: TypeAlias = Callable[[Tensor], tuple[Tensor, State]]
"""A block from a fresh state: outputs and the next state."""


def call(block: nn.Module, run: Run, x: Tensor) -> tuple[Tensor, State]:
    """``run(x)``, which launches what ``block`` does, as a graph if the last call was alike."""
    graph = _graphs.get(block)
    if graph is None:
        graph = _graphs[block] = CallGraph()
    return graph(block, run, x)


class _Pass:
    """One forward pass of a graph, for as long as something may go back through it."""

    went_back = False


class CallGraph:
    """Calls of one block from a fresh state as graphs of its last kind of call.

    Between a forward pass and its backward pass the graph holds what backward needs: a second forward pass in between
    runs as usual.
    """

    def __init__(self) -> None:
        self._key: Any = None
        self._captured = self._failed = False
        self._pending: Callable[[], _Pass | None] = lambda: None

    def __call__(self, block: nn.Module, run: Run, x: Tensor) -> tuple[Tensor, State]:
        parameters = [p for p in block.parameters() if p.requires_grad]
        learns = torch.is_grad_enabled() and (x.requires_grad or bool(parameters))
        autocast = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else None
        pending = self._pending()
        sharded = any(map(is_sharded, block.parameters()))
        if self._failed or sharded or (pending is not None and not pending.went_back):
            return run(x)
        places = tuple([p.data_ptr() for p in block.parameters()])
        key = (x.shape, x.dtype, x.requires_grad, learns, autocast, block.training, uses(block), places)
        if key != self._key:
            self._key, self._captured = key, False
            return run(x)
        if not self._captured:
            try:
                self._capture(run, x, parameters, learns, autocast)
            except RuntimeError as error:
                name = type(block).__name__
                _log.warning("%s runs without a CUDA graph, since it cannot be captured: %s", name, error)
                self._failed = True
                return run(x)
        y, *tensors = _Replay.apply(self, x, *parameters) if learns else self.forward(x)
        parts = iter(tensors)
        state = map_state(lambda like: next(parts), self._state)
        for (_, new), values in zip(named_tensors(state), self._integers):
            if values is not None:
                known(new, values)
        return y, state

    def _capture(
        self, run: Run, x: Tensor, parameters: list[nn.Parameter], learns: bool, autocast: torch.dtype | None
    ) -> None:
        with torch.inference_mode(False):  # written to in any mode
            self._x = torch.empty_like(x, requires_grad=x.requires_grad)
        _, example = run(x)
        # of a fresh state they are the same at every call
        self._integers = [None if t.is_floating_point() else integers(t, wait=False) for _, t in named_tensors(example)]

        def forward() -> None:
            # a cast that autocast keeps would not be made again by a replay
            keep = torch.autocast("cuda", autocast, enabled=autocast is not None, cache_enabled=False)
            with keep, torch.set_grad_enabled(learns):
                y, self._state = run(self._x)
            self._outputs = [y, *(t for _, t in named_tensors(self._state))]

        def backward() -> None:
            ends = [t for t in self._outputs if t.requires_grad]
            # retained: a replay of a stub goes through it again
            self._grads = torch.autograd.grad(ends, self._learned, self._pushed, retain_graph=True, allow_unused=True)

        def both() -> None:
            forward()
            self._pushed = [torch.zeros_like(t) for t in self._outputs if t.requires_grad]
            backward()

        self._learned = [*([self._x] if x.requires_grad else []), *parameters]
        with torch.no_grad():
            self._x.copy_(x)
        self._forward = capture(forward, both if learns else None)
        if learns:
            self._pushed = [torch.zeros_like(t) for t in self._outputs if t.requires_grad]
            self._backward = capture(backward, lambda: None)
        self._captured = True

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Replay the forward pass. Returns copies, since the next replay writes over what it made."""
        with torch.no_grad():
            self._x.copy_(x)
            self._forward()
            return tuple([t.detach().clone() for t in self._outputs])

    def backward(self, grads: list[Tensor | None]) -> list[Tensor | None]:
        """Replay the backward pass, from the gradients of the outputs that have one."""
        for static, grad in zip(self._pushed, grads):
            if grad is None:
                static.zero_()
            else:
                static.copy_(grad)
        self._backward()
        return [None if g is None else g.clone() for g in self._grads]


_graphs: weakref.WeakKeyDictionary[nn.Module, CallGraph] = weakref.WeakKeyDictionary()
"""By block, outside of it, so that modules can be copied and saved."""


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, graph: CallGraph, x: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
        ctx.graph, ctx.passed = graph, _Pass()
        graph._pending = weakref.ref(ctx.passed)
        outputs = graph.forward(x)
        ctx.differentiable = [t.requires_grad for t in graph._outputs]
        ctx.mark_non_differentiable(*(t for t, yes in zip(outputs, ctx.differentiable) if not yes))
        ctx.set_materialize_grads(False)
        ctx.takes_x = x.requires_grad
        return outputs

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if ctx.graph._pending() is not ctx.passed:
            raise RuntimeError(
                f"backward after a later forward pass of the same CUDA graph, which holds what the later one needs: go "
                f"back first, or unset {VARIABLE}"
            )
        ctx.passed.went_back = True
        found = ctx.graph.backward([g for g, yes in zip(grads, ctx.differentiable) if yes])
        return None, *([] if ctx.takes_x else [None]), *found
