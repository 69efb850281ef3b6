"""Forward and backward passes over batches: gradients of a step, activation checkpointing."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ...blocks import memory_loss, write_cost
from ...blocks.language_model import IGNORED, LanguageModel, ModelOutput
from ...blocks.state import State, concatenate, detach, reset, select
from ..data import Batch
from .distributed import Processes
from .settings import Settings

AUXILIARY = {"memory_loss": memory_loss, "write_cost": write_cost}
"""Auxiliary losses, by the setting that is their weight."""


class StepResult(NamedTuple):
    """What a step has read, summed or averaged over all processes."""

    loss: float
    """Mean over the targets that count, in nats."""
    auxiliary: dict[str, float]
    """Unweighted auxiliary losses; only those whose weight is not 0."""
    state: State
    """The state after the step, of this process's rows, detached."""


class TrainStep:
    """Runs a model on batches."""

    def __init__(self, model: LanguageModel, settings: Settings, processes: Processes) -> None:
        self.model, self.settings, self.processes = model, settings, processes
        self.compiled = torch.compile(model) if settings.compile else model

    def gradients(self, windows: Sequence[Batch], state: State) -> StepResult:
        """Add the gradients of the mean loss over ``windows``, consecutive batches, to the parameters.

        Gradients flow through the state from window to window, but not into ``state``, the state after the previous
        step. The rows are read in ``accumulate`` parts. Each part is weighted by its targets that count (auxiliary
        losses by its tokens), so that the sum of the parts equals the whole batch.
        """
        counted, tokens = sum(map(count_targets, windows)), sum(map(_tokens, windows))
        counted, tokens = map(int, self.processes.sum_of_groups(counted, tokens))
        rows = windows[0].tokens.shape[0]
        size = rows // self.settings.accumulate
        weights = {name: getattr(self.settings, name) for name in AUXILIARY if getattr(self.settings, name)}
        sums, states = torch.zeros(1 + len(weights), dtype=torch.float64), []
        for start in range(0, rows, size):
            part = slice(start, start + size)
            batches = [
                Batch(*(None if field is None else field[part] for field in batch))  # type: ignore[arg-type]
                for batch in windows
            ]
            with contextlib.ExitStack() as stack:
                losses = [stack.enter_context(AUXILIARY[name](self.model)) for name in weights]
                loss, after = self._summed_loss(batches, None if state is None else select(state, part))
                auxiliary = [each.value() * sum(map(_tokens, batches)) for each in losses]
                objective = loss / max(counted, 1)
                for weight, each in zip(weights.values(), auxiliary):
                    objective = objective + weight * each / max(tokens, 1)
                # the gradients are averaged over the groups of processes, and the sum is needed
                (objective * self.processes.groups).backward()
            sums += torch.stack([x.detach().double() for x in (loss, *auxiliary)]).cpu()
            states.append(detach(after))
        total, *found = self.processes.sum_of_groups(*sums.tolist())
        return StepResult(
            total / max(counted, 1),
            {name: value / max(tokens, 1) for name, value in zip(weights, found)},
            concatenate(states) if len(states) > 1 else states[0],
        )

    def _summed_loss(self, windows: Sequence[Batch], state: State) -> tuple[Tensor, State]:
        losses = []
        for batch in windows:
            out = self.forward(batch, state, self.compiled)
            assert out.loss is not None
            losses.append(out.loss * count_targets(batch))
            state = out.state
        return torch.stack(losses).sum(), state

    def forward(self, batch: Batch, state: State, run: Callable[..., ModelOutput] | None = None) -> ModelOutput:
        """The output of the model, or of ``run``, for a batch. Rows that are ``fresh`` start from the initial state."""
        device = self.processes.device
        tokens, targets = batch.tokens.to(device), batch.targets.to(device)
        mask = None if batch.mask is None else batch.mask.to(device)
        if state is not None:
            state = self._reset_fresh(state, batch.fresh)
        precision: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
        if self.settings.autocast is not None:
            precision = torch.autocast(device.type, getattr(torch, self.settings.autocast))
        with precision:
            packed = {} if batch.documents is None else {"documents": batch.documents.to(device)}
            return (self.model if run is None else run)(tokens, state=state, mask=mask, targets=targets, **packed)

    def _reset_fresh(self, state: State, fresh: Tensor) -> State:
        (count,) = self.processes.sum(int(fresh.sum()))
        if not count:
            return state
        if self.processes.world == 1 and bool(fresh.all()):
            return None
        # init_state gathers parameters, so every process calls it, whichever of them has fresh rows
        return reset(state, fresh, self.model.init_state(len(fresh)))


def count_targets(batch: Batch) -> int:
    """Number of targets that count."""
    return int((batch.targets != IGNORED).sum())


def _tokens(batch: Batch) -> int:
    """Number of tokens without padding."""
    return batch.tokens.numel() if batch.mask is None else int(batch.mask.sum())


@contextlib.contextmanager
def activation_checkpointing(
    model: LanguageModel, by: Callable[..., Any] | None = None, every: int = 1
) -> Iterator[None]:
    """Within the ``with`` block, every ``every``-th layer stores only its inputs and is recomputed for the backward.

    ``by``: a function like ``torch.utils.checkpoint.checkpoint``, which is the default. The state is an ordinary input
    and output of a layer, so gradients through it are the same. No module is wrapped: parameters keep their names.
    """
    by = functools.partial(checkpoint, use_reentrant=False) if by is None else by
    layers: list[Any] = list(model.layers)[::every]
    before = [vars(layer).get("forward") for layer in layers]  # set by hooks of accelerate
    for layer in layers:
        layer.forward = functools.partial(by, layer.forward)
    try:
        yield
    finally:
        for layer, forward in zip(layers, before):
            del layer.forward
            if forward is not None:
                layer.forward = forward
