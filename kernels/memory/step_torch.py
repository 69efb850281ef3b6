"""One token for decoding in PyTorch: the recurrence itself, in as few operators and passes over the state as possible.

At this size starting an operator takes longer than running it, and reading the state longer than computing with it. The
norm of a gradient is a product of norms, and constant factors are given to operators that take one anyway.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..dispatch import advanced, integers
from .network_torch import ACTIVATIONS, EPS, for_few, gradient_norm, half_error, layers_one, read_one, repeat_gain
from .state import MemoryState, Options, Tokens, where_rows


def torch_step(
    tokens: Tokens, state: MemoryState, norm: Tensor | None, mask: Tensor | None, options: Options
) -> tuple[Tensor, MemoryState]:
    """``titans_memory`` for ``time = 1`` without gradients. Rows may be at different positions."""
    q, k, v, theta, eta, alpha, *_ = tokens
    chunk, activation, clip, read, _, _, threshold, objective, *_ = options
    batch, _, heads, _ = q.shape
    vjp = for_few(ACTIVATIONS[activation].vjp)
    gain = None if norm is None else repeat_gain(norm, batch)
    weights = [w.flatten(0, 1) for w in state.weights]
    phases = [position % chunk for position in integers(state.position)]
    anchor, next_anchor = weights, state.weights
    if any(phases):
        anchor, next_anchor = [a.flatten(0, 1) for a in state.anchor], state.anchor
        if not all(phases):
            starts = torch.tensor([phase == 0 for phase in phases], device=q.device)
            next_anchor = where_rows(starts, state.weights, state.anchor)
            anchor = [a.flatten(0, 1) for a in next_anchor]

    # keys forward through the anchor, half errors back
    key, value = (x.reshape(batch * heads, 1, x.shape[3]) for x in (k, v))
    inputs, hidden = layers_one(key, anchor, activation)
    out = hidden[-1]
    if gain is None:
        error = half_error(out, value, objective)
    else:
        shape = out.shape[-1:]
        n, mean, inverse = torch.native_layer_norm(out, shape, None, None, EPS)
        predicted = torch.addcmul(key, n, gain)
        error = half_error(predicted, value, objective, out=predicted).mul_(gain)
        error = torch.ops.aten.native_layer_norm_backward(
            error, out, shape, mean, inverse, None, None, [True, False, False]
        )[0]
    errors = [error]
    for layer in range(len(anchor) - 2, -1, -1):
        error = torch.bmm(error, anchor[layer + 1])
        if activation != "identity":
            error = vjp(error, hidden[layer])
        errors.append(error)
    errors.reverse()

    # the step is -2 theta, or -2 clip theta / max(|gradient|, clip); addcmul takes the constant factor
    size, factor = theta.reshape(batch * heads, 1, 1), -2.0
    grad_norm = None if clip is threshold is None else gradient_norm(errors, inputs).unsqueeze(-1)
    suppressed = None if grad_norm is None or threshold is None else grad_norm < threshold
    if grad_norm is not None and clip is not None:
        # a norm that is not finite makes the step NaN
        size, factor = torch.addcmul(size / grad_norm.clamp(min=clip), size, grad_norm, value=0), -2 * clip
    momentum_decay = None if eta is None else eta.reshape(batch * heads, 1, 1)
    retention = None if alpha is None else torch.rsub(alpha, 1).reshape(batch * heads, 1, 1)
    if suppressed is not None:
        size = size.masked_fill(suppressed, 0.0)
        retention = None if retention is None else retention.masked_fill(suppressed, 1.0)
    momentum, after = [], []
    for layer, weight in enumerate(weights):
        push = (errors[layer] * size).mT
        if momentum_decay is None:
            moved = torch.mul(push, inputs[layer]).mul_(factor)
        else:
            moved = state.momentum[layer].flatten(0, 1) * momentum_decay
            moved.addcmul_(push, inputs[layer], value=factor)
            momentum.append(moved)
        after.append(moved + weight if retention is None else torch.addcmul(moved, weight, retention))

    query = q.reshape(batch * heads, 1, q.shape[3])
    at = {"after": after, "before": weights, "anchor": anchor}[read]
    y = read_one(query, at, activation, gain).view(batch, 1, heads, v.shape[3])

    per_head = lambda parts: tuple([x.view(w.shape) for x, w in zip(parts, state.weights)])  # noqa: E731
    new_weights = per_head(after)
    new_momentum = per_head(momentum) if momentum_decay is not None else state.momentum
    ends = [phase + 1 == chunk for phase in phases]
    if all(ends):
        next_anchor = new_weights
    elif any(ends):
        next_anchor = where_rows(torch.tensor(ends, device=q.device), new_weights, next_anchor)
    if mask is None:
        return y, MemoryState(new_weights, new_momentum, next_anchor, advanced(state.position, 1))
    return y.masked_fill(~mask.view(batch, 1, 1, 1), 0.0), MemoryState(
        where_rows(mask, new_weights, state.weights),
        where_rows(mask, new_momentum, state.momentum),
        where_rows(mask, next_anchor, state.anchor),
        state.position + mask.view(-1),
    )
