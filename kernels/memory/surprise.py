"""How surprising each token is, and writing only tokens whose surprise reaches a threshold.

The surprise of a token is the norm of its gradient at its anchor. It depends on the weights at the start of the token's
chunk, and so on what was written before: chunks are taken in order, each measured before it is written. The comparison
with the threshold is not differentiated. Where gradients are wanted, a first pass without them decides which tokens are
suppressed, and the operation then runs with these tokens' gates set to zero.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..dispatch import integers, needs_grad
from ..padding import Layout, align
from .network_torch import ACTIVATIONS, EPS, gradient_norm, half_error, layer_norm_vjp, torch_read
from .state import SQUARED, BackendFunction, MemoryState, Objective, Options, Tokens, where_rows


class Surprise(NamedTuple):
    """Of every token, ``[batch, time, heads]`` each."""

    norm: Tensor
    """Of the objective's gradient in all layers' weights together, before any clipping."""
    error: Tensor
    """``|M(k) - v|^2``."""


def surprise_at(
    k: Tensor,
    v: Tensor,
    weights: Sequence[Tensor],
    activation: str,
    norm: Tensor | None = None,
    objective: Objective = SQUARED,
    delta: Tensor | None = None,
) -> Surprise:
    """The surprise of every token at ``weights`` (per layer ``[batch, heads, out, in]``). Not to be differentiated.

    The gradient of layer l is ``2 d_l a_l^T``, from its input ``a_l`` and the error ``d_l`` that comes back to it.
    """
    act = ACTIVATIONS[activation]
    delta = None if delta is None else delta.transpose(1, 2).unsqueeze(-1)
    key, value = k.transpose(1, 2), v.transpose(1, 2)
    inputs, outputs = [key], [key @ weights[0].mT]
    for weight in weights[1:]:
        inputs.append(act.value(outputs[-1]))
        outputs.append(inputs[-1] @ weight.mT)
    if norm is None:
        predicted = outputs[-1]
        backs = [half_error(predicted, value, objective, delta)]
    else:
        gain = norm.unsqueeze(1)
        n, _, inverse = torch.native_layer_norm(outputs[-1], outputs[-1].shape[-1:], None, None, EPS)
        predicted = torch.addcmul(key, n, gain)
        backs = [layer_norm_vjp(half_error(predicted, value, objective, delta) * gain, n, inverse)]
    for layer in range(len(weights) - 2, -1, -1):
        backs.append(act.vjp(backs[-1] @ weights[layer + 1], outputs[layer]))
    norms, error = gradient_norm(backs[::-1], inputs), predicted - value
    return Surprise(norms.transpose(1, 2), torch.linalg.vecdot(error, error).transpose(1, 2))


class Part(NamedTuple):
    """One chunk of a :class:`ChunkWalk`, or a part of one."""

    surprise: Surprise
    suppressed: Tensor
    """``[batch, time, heads]`` bool: the token is below the threshold."""
    y: Tensor | None
    """Outputs; ``None`` for the last chunk where the state after it is not wanted."""
    state: MemoryState
    """The state afterwards, or before where there is no ``y``."""


class ChunkWalk:
    """Cuts the sequence at chunk starts. ``backend`` writes a span."""

    def __init__(
        self, tokens: Tokens, state: MemoryState, norm: Tensor | None, mask: Tensor | None, options: Options,
        backend: BackendFunction,
    ) -> None:  # fmt: skip
        self.tokens, self.valid, self.state, self.norm, self.backend = tokens, mask, state, norm, backend
        self.options, self.threshold = options._replace(threshold=None), options.threshold
        self.layout: Layout | None = None
        time, chunk = tokens.k.shape[1], options.chunk
        self.phases = [position % chunk for position in integers(state.position)]
        if mask is not None and bool(mask.all()):
            self.valid = mask = None
        counts = [time] * len(self.phases) if mask is None else mask.sum(1).tolist()
        if all(phase + count <= chunk for phase, count in zip(self.phases, counts)):
            edges = [0, time]
        elif mask is None and len(set(self.phases)) == 1:
            edges = [0, *range(-self.phases[0] % chunk, time, chunk), time]
        else:
            if mask is None:
                mask = torch.ones(len(counts), time, dtype=torch.bool, device=tokens.k.device)
            self.layout = align(mask, torch.tensor(self.phases, device=mask.device), multiple=chunk)
            self.tokens, self.valid = tokens.map(self.layout.spread), self.layout.filled
            edges = list(range(0, self.valid.shape[1] + 1, chunk))
        self.spans = [slice(start, stop) for start, stop in itertools.pairwise(edges) if start < stop]

    def parts(self, last: bool = True) -> Iterator[Part]:
        """Span by span. Without ``last``, the last one is only measured."""
        state, options = self.state, self.options
        for span in self.spans:
            tokens = self.tokens.at(span)
            anchor = state.weights
            if span.start == 0:  # rows may be inside their chunk; later, chunks begin where spans do
                inside = torch.tensor([phase > 0 for phase in self.phases], device=state.position.device)
                anchor = _pick(inside, state.anchor, state.weights)
            found = surprise_at(
                tokens.k, tokens.v, anchor, options.activation, self.norm, options.objective, tokens.delta
            )
            suppressed = found.norm < (self.threshold or 0.0)  # NaN is not suppressed, on any backend
            y = None
            if last or span is not self.spans[-1]:
                y, state = self.write(span, suppressed, state)
            yield Part(found, suppressed, y, state)

    def write(self, span: slice, suppressed: Tensor, state: MemoryState) -> tuple[Tensor, MemoryState]:
        """The operation on ``span``; a span of suppressed tokens costs no products unless momentum carries on."""
        tokens, valid = self.tokens.at(span), None if self.valid is None else self.valid[:, span]
        carries_on = tokens.eta is not None and (
            needs_grad(*state.momentum) or any(bool(x.any()) for x in state.momentum)
        )
        if carries_on or self.options.read == "anchor" or not self.all_suppressed(span, suppressed):
            if self.threshold is not None:
                alpha = (
                    None
                    if tokens.alpha is None
                    else tokens.alpha.masked_fill(
                        suppressed.view(*suppressed.shape, *[1] * (tokens.alpha.dim() - 3)), 0.0
                    )
                )
                tokens = tokens._replace(theta=tokens.theta.masked_fill(suppressed, 0.0), alpha=alpha)
            return self.backend(tokens, state, self.norm, valid, self.options)
        y = torch_read(tokens.q, state.weights, self.options.activation, self.norm)
        count = torch.full_like(state.position, y.shape[1]) if valid is None else valid.sum(1)
        phase = state.position % self.options.chunk
        began = (count > 0) & ((phase == 0) | (phase + count >= self.options.chunk))
        anchor, position = _pick(began, state.weights, state.anchor), state.position + count
        return y if valid is None else torch.where(valid[..., None, None], y, 0.0), state._replace(
            anchor=anchor, position=position
        )

    def all_suppressed(self, span: slice, suppressed: Tensor) -> bool:
        """Whether no token of ``span`` writes."""
        if self.valid is not None:
            suppressed = suppressed | ~self.valid[:, span].unsqueeze(-1)
        return bool(suppressed.all())

    def collect(self, x: list[Tensor]) -> Tensor:
        """The spans' results in the order the tokens came in."""
        joined = x[0] if len(x) == 1 else torch.cat(x, 1)
        return joined if self.layout is None else self.layout.collect(joined)


def thresholded_memory(
    backend: BackendFunction,
    tokens: Tokens,
    state: MemoryState,
    norm: Tensor | None,
    mask: Tensor | None,
    options: Options,
) -> tuple[Tensor, MemoryState]:
    """Apply ``options.threshold`` with a ``backend`` that does not apply it itself."""
    walk = ChunkWalk(tokens, state, norm, mask, options, backend)
    outputs: list[Tensor] = []
    if not needs_grad(*tokens, norm, *state.weights, *state.momentum, *state.anchor):
        for part in walk.parts():
            state = part.state
            assert part.y is not None
            outputs.append(part.y)
        return walk.collect(outputs), state
    with torch.no_grad():
        suppressed = [part.suppressed for part in walk.parts(last=False)]
    # neighboring spans are written as one, unless they differ in whether anything is written at all
    quiet = map(walk.all_suppressed, walk.spans, suppressed)
    for _, group in itertools.groupby(zip(quiet, walk.spans, suppressed), key=lambda each: each[0]):
        _, spans, which = zip(*group)
        y, state = walk.write(slice(spans[0].start, spans[-1].stop), torch.cat(which, 1), state)
        outputs.append(y)
    return walk.collect(outputs), state


def _pick(rows: Tensor, new: tuple[Tensor, ...], old: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """``new`` in the given rows, without a copy where all agree."""
    if bool(rows.all()):
        return new
    if not bool(rows.any()):
        return old
    return where_rows(rows, new, old)
