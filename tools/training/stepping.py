"""One step's gradients: windows of rows read one after the other, rows in parts, state carried from step to step."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...blocks import memory_loss, write_cost
from ...blocks.language_model import IGNORED, LanguageModel, ModelOutput
from ...blocks.state import State, concatenate, detach, reset, select
from ..data import Batch
from .distributed import Processes
from .settings import Settings

AUXILIARY = {"memory_loss": memory_loss, "write_cost": write_cost}
"""Losses beside the model's own, by the setting that weighs them."""


class Read(NamedTuple):
    """What a step has read, in all processes together."""

    loss: float
    """Mean over the targets that count, in nats."""
    auxiliary: dict[str, float]
    """The losses beside it, before their weights: those that have one."""
    counted: int
    """Targets that count."""
    state: State
    """Of this process's rows, to go on from."""


class Reader:
    """Reads batches with a model, and leaves gradients behind.

    ``run``: the model, or what ``torch.compile`` made of it.
    """

    def __init__(
        self,
        model: LanguageModel,
        settings: Settings,
        processes: Processes,
        run: Callable[..., ModelOutput] | None = None,
    ) -> None:
        self.model, self.settings, self.processes = model, settings, processes
        self.run = run if run is not None else model

    def gradients(self, windows: Sequence[Batch], state: State) -> Read:
        """Add the gradients of the mean loss over all ``windows``, which follow each other, to the parameters.

        Gradients flow through the state from window to window and not into ``state``, which is what an earlier step
        left. The rows are read in ``accumulate`` parts, each weighted by its targets that count (auxiliary losses by
        its tokens), so that the parts together are the whole batch.
        """
        counted, real = sum(map(_counted, windows)), sum(map(_real, windows))
        counted, real = map(int, self.processes.total(counted, real))
        rows = windows[0].tokens.shape[0]
        size = rows // self.settings.accumulate
        weights = {name: getattr(self.settings, name) for name in AUXILIARY if getattr(self.settings, name)}
        sums, states = torch.zeros(1 + len(weights), dtype=torch.float64), []
        for start in range(0, rows, size):
            part = slice(start, start + size)
            pieces = [_rows(batch, part) for batch in windows]
            with contextlib.ExitStack() as stack:
                losses = [stack.enter_context(AUXILIARY[name](self.model)) for name in weights]
                read, after = self._read(pieces, _select(state, part))
                beside = [loss.value() * sum(map(_real, pieces)) for loss in losses]
                objective = read / max(counted, 1)
                for weight, loss in zip(weights.values(), beside):
                    objective = objective + weight * loss / max(real, 1)
                # the processes' gradients are averaged, and are to be summed
                (objective * self.processes.world).backward()
            sums += torch.stack([x.detach().double() for x in (read, *beside)]).cpu()
            states.append(detach(after))
        loss, *found = self.processes.total(*sums.tolist())
        return Read(
            loss / max(counted, 1),
            {name: total / max(real, 1) for name, total in zip(weights, found)},
            counted,
            concatenate(states) if len(states) > 1 else states[0],
        )

    def _read(self, windows: Sequence[Batch], state: State) -> tuple[Tensor, State]:
        """The summed loss over windows of some rows, and the state behind them."""
        losses = []
        for batch in windows:
            out = self.outputs(batch, state)
            assert out.loss is not None
            losses.append(out.loss * _counted(batch))
            state = out.state
        return torch.stack(losses).sum(), state

    def outputs(self, batch: Batch, state: State) -> ModelOutput:
        """The model's outputs for a batch; rows that start anew do so from the model's fresh state."""
        device = self.processes.device
        tokens, targets = batch.tokens.to(device), batch.targets.to(device)
        mask = None if batch.mask is None else batch.mask.to(device)
        if state is not None:
            state = self._started(state, batch.fresh)
        with self.precision():
            return self.run(tokens, state=state, mask=mask, targets=targets)

    def _started(self, state: State, fresh: Tensor) -> State:
        """``state``, with the rows that start anew as the model starts them."""
        (starting,) = self.processes.total(int(fresh.sum()))
        if not starting:
            return state
        if self.processes.world == 1 and bool(fresh.all()):
            return None
        # where parameters are gathered for it, all processes have to make one, whichever of them has such rows
        return reset(state, fresh, self.model.init_state(len(fresh)))

    def precision(self) -> contextlib.AbstractContextManager[Any]:
        """Autocast, where it is asked for."""
        if self.settings.autocast is None:
            return contextlib.nullcontext()
        return torch.autocast(self.processes.device.type, getattr(torch, self.settings.autocast))


def _counted(batch: Batch) -> int:
    """Targets that count."""
    return int((batch.targets != IGNORED).sum())


def _real(batch: Batch) -> int:
    """Tokens that are no padding."""
    return batch.tokens.numel() if batch.mask is None else int(batch.mask.sum())


def _rows(batch: Batch, rows: slice) -> Batch:
    mask = None if batch.mask is None else batch.mask[rows]
    return Batch(batch.tokens[rows], batch.targets[rows], mask, batch.fresh[rows])


def _select(state: State, rows: slice) -> State:
    return None if state is None else select(state, rows)
