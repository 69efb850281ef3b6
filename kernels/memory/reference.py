"""The reference implementation: the paper's recurrence, one token at a time, its inner gradient taken by autograd.

Slow and obvious on purpose, and independent of every other backend: nothing in it is derived by hand.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .state import MemoryState, Objective, Options, Tokens

_FUNCTIONS = {"identity": lambda z: z, "silu": F.silu, "gelu": F.gelu, "relu": F.relu}


def memory_network(
    weights: tuple[Tensor, ...], x: Tensor, activation: str, gain: Tensor | None, gated: bool = False
) -> Tensor:
    """``M(x)`` for one token: x ``[batch, heads, d_in]``, weights ``[batch, heads, out, in]``."""
    h = x
    if gated:
        first, last, gate = weights
        hidden, factor = (torch.einsum("bhoi,bhi->bho", weight, x) for weight in (first, gate))
        h = torch.einsum("bhoi,bhi->bho", last, _FUNCTIONS[activation](hidden) * factor)
    for layer, weight in enumerate(() if gated else weights):
        if layer:
            h = _FUNCTIONS[activation](h)
        h = torch.einsum("bhoi,bhi->bho", weight, h)
    return h if gain is None else x + F.layer_norm(h, h.shape[-1:], eps=1e-6) * gain


def _gradients(
    p: Tensor, v: Tensor, objective: Objective, delta: Tensor | None, weights: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    """Of the objective of one token of each row and head, ``p`` and ``v`` ``[batch, heads, d_out]``."""
    kind, power, fixed, smooth, form = objective
    delta = p.new_tensor(fixed) if delta is None else delta
    r, upstream = p - v, None
    zero = r == 0  # where powers have no derivative
    size = torch.where(zero, 1.0, r).abs()
    if kind == "l2" or (kind, power, smooth) == ("lp", 2, None):
        loss = r.square().sum()
    elif kind == "l2_half":
        loss = r.square().sum() / 2
    elif kind == "dot":
        loss = -(p * v).sum()
    elif kind == "lp" and smooth is not None:  # the derivative of no common function
        loss, upstream = p, power * (smooth * r).tanh()
        upstream = upstream if power == 1 else upstream * torch.where(zero, 0.0, size ** (power - 1))
    elif kind == "lp":
        loss = torch.where(zero, 0.0, size**power).sum()
    elif kind == "huber" and form == "elementwise":
        loss = torch.where(r.abs() <= delta, r.square() / 2, delta * (r.abs() - delta / 2)).sum()
    elif kind == "huber":
        inside = torch.linalg.vector_norm(r.detach(), dim=-1, keepdim=True) <= delta
        inside = inside | r.isnan()  # which has no sign
        loss = torch.where(inside, r.square(), delta * r.abs()).sum()
    else:
        raise ValueError(f"objective: expected l2, l2_half, dot, lp or huber, got {kind!r}")
    return torch.autograd.grad(loss, weights, upstream, create_graph=True)


def reference_read(q: Tensor, weights: tuple[Tensor, ...], activation: str, norm: Tensor | None) -> Tensor:
    """``read_memory`` query by query."""
    return torch.stack([memory_network(weights, x, activation, norm) for x in q.unbind(1)], dim=1)


def reference_memory(
    tokens: Tokens, state: MemoryState, norm: Tensor | None, mask: Tensor | None, options: Options
) -> tuple[Tensor, MemoryState]:
    """Equations 8-15 of the paper token by token."""
    if torch.is_inference_mode_enabled():
        # nothing can be differentiated in inference mode
        with torch.inference_mode(False), torch.no_grad():
            norm, mask = (None if x is None else x.clone() for x in (norm, mask))
            parts = [tuple(x.clone() for x in part) for part in (state.weights, state.momentum, state.anchor)]
            state = MemoryState(parts[0], parts[1], parts[2], state.position.clone())
            return reference_memory(tokens.map(torch.clone), state, norm, mask, options)
    (rows, time), past = tokens.q.shape[:2], options.window - 1
    if mask is None:
        mask = torch.ones(rows, time, dtype=torch.bool, device=tokens.q.device)
    else:  # zero times NaN is NaN, in gradients too
        hidden = F.pad(~mask, (past, 0))
        tokens = tokens.map(
            lambda x: x.masked_fill(hidden[:, -x.shape[1] :].view(*x.shape[:2], *[1] * (x.dim() - 2)), 0.0)
        )
    q, k, v, theta, eta, alpha, delta, gamma = tokens
    chunk, activation, clip, read, _, _, threshold, *_ = options
    weights, momentum, anchor, position = state

    def gradients_of(
        at: tuple[Tensor, ...], k: Tensor, v: Tensor, delta: Tensor | None, _: Tensor | None
    ) -> tuple[tuple[Tensor, ...], Tensor]:
        """Of one token of each row and head, and which are suppressed."""
        p = memory_network(at, k, activation, norm, options.gated)
        gradients = _gradients(p, v, options.objective, None if delta is None else delta.unsqueeze(-1), at)
        suppressed = torch.zeros(rows, q.shape[2], 1, 1, dtype=torch.bool, device=q.device)
        if threshold is not None:
            suppressed = torch.cat([g.flatten(2) for g in gradients], 2).norm(dim=2).view(suppressed.shape) < threshold
        if clip is not None:
            # in units of the largest number, whose square may overflow; a largest number that is not finite stays NaN
            unit = torch.stack([g.detach().abs().amax((-2, -1), keepdim=True) for g in gradients]).amax(0).clamp(min=1)
            squares = [(g / unit).square().sum((-2, -1), keepdim=True) for g in gradients]
            # clamped before the root, which has no derivative at a gradient of zero
            bound = torch.stack(squares).sum(0).clamp(min=(clip / unit) ** 2).sqrt()
            gradients = tuple(g / unit * (clip / bound) for g in gradients)
        return gradients, suppressed

    # what is written of each token, and of the tokens in its window before it
    def write(t: int) -> list[Any]:
        return [None if x is None else x[:, t] for x in (k, v, delta, gamma)]

    recent = [write(t) for t in range(past)]
    outputs = []
    for t in range(time):
        valid = mask[:, t].view(rows, 1, 1, 1)
        starts = (position % chunk == 0).view(rows, 1, 1, 1) & valid
        anchor = tuple(torch.where(starts, w, a) for w, a in zip(weights, anchor))

        def gate(values: Tensor | None, default: float, t: int = t) -> Tensor:
            if values is None:
                return torch.full((rows, q.shape[2], 1, 1), default, dtype=q.dtype, device=q.device)
            return values[:, t, :, None, None]

        forgets = [gate(alpha, 0)] * len(weights)
        if alpha is not None and alpha.dim() == 4:  # of the input channels of each layer
            forgets = [a.unsqueeze(-2) for a in alpha[:, t].split([w.shape[3] for w in weights], dim=-1)]
        with torch.enable_grad():
            at = tuple((1 - a) * w for a, w in zip(forgets, anchor)) if options.decay_first else anchor
            at = tuple(a if a.requires_grad else a.detach().requires_grad_() for a in at)
            window = [*recent, write(past + t)]
            found = [gradients_of(at, *each) for each in window]
            gradients, suppressed = found[-1]
            if gamma is not None:
                sizes = [each[3][..., None, None] for each in window]
                gradients = tuple(
                    sum(size * g for size, g in zip(sizes, layer)) for layer in zip(*(each for each, _ in found))
                )
        recent = [
            [x if x is None else torch.where(valid[..., 0] if x.dim() == 3 else valid[..., 0, 0], y, x)
             for x, y in zip(*each)] for each in itertools.pairwise(window)
        ]  # fmt: skip
        before = weights

        step = torch.where(suppressed, 0.0, gate(theta, 0))
        if eta is None:
            moved = tuple(-step * g for g in gradients)
        else:
            moved = tuple(gate(eta, 0) * s - step * g for s, g in zip(momentum, gradients))
            momentum = tuple(torch.where(valid, new, old) for new, old in zip(moved, momentum))
        kept = tuple((1 - torch.where(suppressed, 0.0, a)) * w for a, w in zip(forgets, weights))
        weights = tuple(torch.where(valid, w + s, old) for w, s, old in zip(kept, moved, weights))
        at = {"after": weights, "before": before, "anchor": anchor}[read]
        y = memory_network(at, q[:, t], activation, norm, options.gated)
        outputs.append(torch.where(valid[..., 0], y, torch.zeros_like(y)))
        position = position + mask[:, t]
        ended = (position % chunk == 0).view(rows, 1, 1, 1) & valid
        anchor = tuple(torch.where(ended, w, a) for w, a in zip(weights, anchor))
    return torch.stack(outputs, 1), MemoryState(weights, momentum, anchor, position)
