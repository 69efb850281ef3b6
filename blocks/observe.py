"""``observe``: what the memories and gates of a model did with every token, while it runs as ever."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..kernels.memory import measure_memory
from ..kernels.padding import Layout
from .observers import Learned, Observer, recomputing


class MemoryRecord(NamedTuple):
    """What one memory computed: ``[batch, time, heads]`` float32 unless stated otherwise; NaN at masked tokens."""

    surprise: Tensor
    """The norm of each token's gradient at the weights its chunk began with, before any clipping."""
    error: Tensor
    """``|M(k) - v|^2`` at the same weights."""
    step: Tensor
    """The step size theta; 0 where a threshold suppressed the token, or in a frozen memory."""
    momentum: Tensor
    """The momentum's decay eta; 0 where there is none, or the memory frozen."""
    forgetting: Tensor
    """alpha; 0 without forgetting, where a threshold suppressed the token, or in a frozen memory."""
    wrote: Tensor
    """Bool: the token's gradient was written, which takes a step above 0. False at masked tokens."""
    norms: Tensor
    """``[batch, calls, heads, layers]``: Frobenius norms of the weights after each call (a context's segment, too)."""
    start: Tensor
    """``[batch, heads, layers]``: those before the first call."""


class GateRecord(NamedTuple):
    """What one gate computed: ``[batch, time]`` float32, NaN at masked tokens."""

    gate: Tensor
    """The mean over features of what the first branch is multiplied with; 1 where branches are added."""
    first: Tensor
    """The norm of the first branch's output; in a context, attention's."""
    second: Tensor
    """That of the second, which gates; in a context, the memory's."""


class Observed(Observer):
    """The records so far; calls one after the other, such as the pieces of a stream, are joined along time."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self._tokens: dict[nn.Module, list[tuple[Tensor, ...]]] = {}
        self._norms: dict[nn.Module, list[Tensor]] = {}
        self._gates: dict[nn.Module, list[tuple[Tensor, ...]]] = {}

    @property
    def memories(self) -> dict[str, MemoryRecord]:
        """By module path. Raises ``ValueError`` where calls had different numbers of rows."""
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
        """Of ``gate`` and ``context`` blocks, likewise."""
        named = [(name, self._gates[block]) for block, name in self._names.items() if block in self._gates]
        return {name: GateRecord(*_joined(name, calls)) for name, calls in named}

    @torch.no_grad()
    def learned(self, memory: nn.Module, learned: Learned) -> None:
        tokens, layout = learned.tokens, learned.layout
        if recomputing() or (layout is not None and not bool(layout.mask.any())):
            return
        mask = None if layout is None else layout.filled
        surprise, error, suppressed = measure_memory(
            tokens, learned.before, learned.norm, mask, learned.options, written=learned.after is not None
        )
        theta, eta, alpha = (torch.zeros_like(tokens.theta) if gate is None else gate for gate in tokens[3:])
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
    """Record what the memories and gates of ``model`` do inside a ``with`` block.

    Example::

        with tb.observe(model) as seen:
            out = model(tokens)
        seen.memories["layers.0.blocks.0.memory"].surprise      # [batch, time, heads]

    Outputs, states and gradients are what they are otherwise; the records are detached and belong to the caller. Calls
    one after the other are joined along time, so a stream can be read in pieces or token by token; one in which every
    token is masked leaves no record. Left out is what is no part of the sequence: persistent tokens, and blocks in a
    context's ``attend``, which read a stream of their own that begins anew at every segment. A forward pass that
    checkpointing repeats inside of a backward one is not recorded again. Costs about another forward pass and more;
    a compiled model runs uncompiled meanwhile.
    """
    return Observed(model)


def _norms(weights: tuple[Tensor, ...]) -> Tensor:
    """``[batch, heads, layers]``."""
    return torch.stack([torch.linalg.vector_norm(w, dim=(-2, -1)) for w in weights], dim=-1).float()


def _kept(x: Tensor) -> Tensor:
    """A copy, in float32 unless bool."""
    return x.clone() if x.dtype == torch.bool else x.to(torch.float32, copy=True)


def _put_back(x: Tensor, layout: Layout) -> Tensor:
    """Where the tokens stood before ``layout`` moved them; NaN, or false, at masked ones."""
    y = layout.collect(x)
    if y.dtype == torch.bool:
        return y
    return y.float().masked_fill(~layout.mask.view(*layout.mask.shape, *[1] * (y.dim() - 2)), torch.nan)


def _joined(name: str, calls: list[tuple[Tensor, ...]]) -> list[Tensor]:
    rows = sorted({call[0].shape[0] for call in calls})
    if len(rows) > 1:
        raise ValueError(
            f"{name or 'the model'}: calls of {' and '.join(map(str, rows))} rows do not continue each other"
        )
    return [torch.cat(parts, dim=1) if len(parts) > 1 else parts[0] for parts in zip(*calls)]
