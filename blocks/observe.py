"""``observe``: records the surprise, gates and weight norms of a model's memories for every token."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..kernels.memory.learner import Rule, measure
from ..kernels.memory.measure import measure_memory
from ..kernels.padding import Layout
from .observers import Learned, Observer, recomputing


class MemoryRecord(NamedTuple):
    """The record of one memory: ``[batch, time, heads]`` float32 unless stated otherwise. NaN at masked tokens."""

    surprise: Tensor
    """The norm of each token's gradient at the weights at the start of its chunk, before clipping."""
    error: Tensor
    """``|M(k) - v|^2`` at the same weights."""
    step: Tensor
    """The step size theta; 0 for tokens below the threshold, and in a frozen memory."""
    momentum: Tensor
    """The momentum decay eta; 0 without momentum, and in a frozen memory."""
    forgetting: Tensor
    """The weight decay alpha; 0 without forgetting, for tokens below the threshold, and in a frozen memory."""
    wrote: Tensor
    """Bool: whether the gradient of the token was written, which requires a step above 0. False at masked tokens."""
    norms: Tensor
    """``[batch, calls, heads, layers]``: Frobenius norms of the weights after each call. A ``context`` block calls its
    memory once per segment."""
    start: Tensor
    """``[batch, heads, layers]``: Frobenius norms of the weights before the first call."""


class GateRecord(NamedTuple):
    """The record of one gate: ``[batch, time]`` float32. NaN at masked tokens."""

    gate: Tensor
    """The mean over features of the factor of the first branch; 1 if the branches are added."""
    first: Tensor
    """The norm of the output of the first branch; in a ``context``, that of attention."""
    second: Tensor
    """The norm of the output of the second branch, or of all after the first; in a ``context``, that of the memory."""


class Observed(Observer):
    """The records so far. Consecutive calls, such as the parts of a stream, are concatenated along time."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self._tokens: dict[nn.Module, list[tuple[Tensor, ...]]] = {}
        self._norms: dict[nn.Module, list[Tensor]] = {}
        self._gates: dict[nn.Module, list[tuple[Tensor, ...]]] = {}

    @property
    def memories(self) -> dict[str, MemoryRecord]:
        """Records of memories by module path. Raises ``ValueError`` if calls had different numbers of rows."""
        records = {}
        for memory, name in self._names.items():
            if memory in self._tokens:
                start, *norms = self._norms[memory]
                surprise, error, step, momentum, forgetting, wrote = _joined(name, self._tokens[memory])
                records[name] = MemoryRecord(
                    surprise, error, step, momentum, forgetting, wrote, torch.stack(norms, 1), start
                )
        return records

    @property
    def gates(self) -> dict[str, GateRecord]:
        """Records of ``gate`` and ``context`` blocks by module path. Raises ``ValueError`` as ``memories`` does."""
        named = [(name, self._gates[block]) for block, name in self._names.items() if block in self._gates]
        return {name: GateRecord(*_joined(name, calls)) for name, calls in named}

    @torch.no_grad()
    def learned(self, memory: nn.Module, learned: Learned) -> None:
        tokens, layout = learned.tokens, learned.layout
        if recomputing() or (layout is not None and not bool(layout.mask.any())):
            return
        mask = None if layout is None else layout.filled
        written = learned.after is not None
        if isinstance(learned.options, Rule):
            rule: Any = learned.options
            surprise, error, suppressed = measure(rule, tokens, learned.before, learned.norm, mask, written=written)
        else:
            surprise, error, suppressed = measure_memory(
                tokens, learned.before, learned.norm, mask, learned.options, written=written
            )
        # of several keys or matrices the mean step, and of several channels the mean forgetting
        of_matrices = isinstance(learned.options, Rule) and learned.options.steps == "each"
        theta = tokens.theta if tokens.theta.dim() == 3 else tokens.theta.mean(3 if of_matrices else 2)
        eta, alpha = (torch.zeros_like(theta) if gate is None else gate for gate in (tokens.eta, tokens.alpha))
        alpha = alpha if alpha.dim() == 3 else alpha.mean(3)
        theta, alpha = theta.masked_fill(suppressed, 0.0), alpha.masked_fill(suppressed, 0.0)
        record = (surprise, error, theta, eta, alpha, theta > 0)
        norms = self._norms.setdefault(memory, [])
        if not norms:
            norms.append(_norms(learned.before.weights))
        norms.append(_norms((learned.after or learned.before).weights))
        self._tokens.setdefault(memory, []).append(
            tuple(_put_back(x, layout) for x in record) if layout is not None else tuple(map(_kept, record))
        )

    @torch.no_grad()
    def gated(self, block: nn.Module, gate: Tensor, a: Tensor, b: Tensor, mask: Tensor | None) -> None:
        if recomputing() or not a.shape[1] or (mask is not None and not bool(mask.any())):
            return
        record: tuple[Tensor, ...] = gate.float().mean(-1), a.float().norm(dim=-1), b.float().norm(dim=-1)
        if mask is not None:
            record = tuple(x.masked_fill(~mask, torch.nan) for x in record)
        self._gates.setdefault(block, []).append(record)

    @contextlib.contextmanager
    def moved(self, block: nn.Module, layout: Layout) -> Iterator[None]:
        inside = set(block.modules())
        before = {(id(kind), child): len(kind.get(child, ())) for kind in self._kinds for child in inside}
        yield
        for kind in self._kinds:
            for child in inside & kind.keys():
                calls = kind[child]
                new = calls[before[id(kind), child] :]
                if new:
                    joined = _joined(self._names[child], new)
                    calls[len(calls) - len(new) :] = [tuple(_put_back(x, layout) for x in joined)]

    @property
    def _kinds(self) -> tuple[dict[nn.Module, list[tuple[Tensor, ...]]], ...]:
        return self._tokens, self._gates


def observe(model: nn.Module) -> Observed:
    """Record what the memories and gates of ``model`` compute inside a ``with`` block.

    Example::

        with tb.observe(model) as seen:
            out = model(tokens)
        seen.memories["layers.0.blocks.0.memory"].surprise      # [batch, time, heads]

    Outputs, states and gradients do not change. Records are detached. Those of consecutive calls are concatenated along
    time, so a stream may be processed in parts or token by token. A call without valid tokens is not recorded.
    Persistent tokens and blocks inside the ``attend`` of a ``context`` are not recorded, because they are not part of
    the sequence. Forward passes that activation checkpointing repeats are recorded once. Recording takes at least the
    time of another forward pass. A compiled model runs uncompiled.
    """
    return Observed(model)


def _norms(weights: tuple[Tensor, ...]) -> Tensor:
    """``[batch, heads, layers]``."""
    return torch.stack([torch.linalg.vector_norm(w.flatten(2), dim=-1) for w in weights], dim=-1).float()


def _kept(x: Tensor) -> Tensor:
    """Return a copy, in float32 unless bool."""
    return x.clone() if x.dtype == torch.bool else x.to(torch.float32, copy=True)


def _put_back(x: Tensor, layout: Layout) -> Tensor:
    """Return the original order of tokens that ``layout`` has moved, with NaN, or false, at masked ones."""
    y = layout.collect(x)
    if y.dtype == torch.bool:
        return y
    return y.float().masked_fill(~layout.mask.view(*layout.mask.shape, *[1] * (y.dim() - 2)), torch.nan)


def _joined(name: str, calls: list[tuple[Tensor, ...]]) -> list[Tensor]:
    rows = sorted({call[0].shape[0] for call in calls})
    if len(rows) > 1:
        raise ValueError(f"{name or 'the model'}: calls with different numbers of rows: {', '.join(map(str, rows))}")
    return [torch.cat(parts, dim=1) if len(parts) > 1 else parts[0] for parts in zip(*calls)]
