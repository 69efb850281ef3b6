"""One token for decoding: the recurrence itself, in as few passes over the state as there are."""

from __future__ import annotations

import torch
from torch import Tensor

from .activation import ACTIVATIONS
from .chunkwise import EPS, layer_norm_pull, square_sum
from .state import MemoryState


def step_memory(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    theta: Tensor,
    eta: Tensor | None,
    alpha: Tensor | None,
    state: MemoryState,
    *,
    chunk: int,
    activation: str,
    norm: Tensor | None,
    mask: Tensor | None,
    clip: float | None,
    read: str,
) -> tuple[Tensor, MemoryState]:
    """``titans_memory`` for ``time = 1`` without gradients. Rows may be at different positions."""
    batch, _, heads, _ = q.shape
    act = ACTIVATIONS[activation]
    rows = lambda x: x.reshape(batch * heads, 1, -1)  # noqa: E731
    gain = None if norm is None else norm.repeat(batch, 1).unsqueeze(1)
    weights = [w.reshape(batch * heads, *w.shape[2:]) for w in state.weights]
    starts = [position % chunk == 0 for position in state.position.tolist()]
    if all(starts):
        anchor = weights
    else:
        anchor = [a.reshape(w.shape) for a, w in zip(state.anchor, weights)]
        if any(starts):
            at_start = torch.tensor(starts, device=q.device).repeat_interleave(heads).view(-1, 1, 1)
            anchor = [torch.where(at_start, w, a) for w, a in zip(weights, anchor)]

    # keys forward through the anchor, half errors back
    key, value = rows(k), rows(v)
    inputs, hidden = [key], []
    for layer, weight in enumerate(anchor):
        if layer:
            inputs.append(act.value(hidden[-1]))
        hidden.append(torch.bmm(inputs[-1], weight.mT))
    if gain is None:
        error = hidden[-1] - value
    else:
        n, _, inverse = torch.native_layer_norm(hidden[-1], hidden[-1].shape[-1:], None, None, EPS)
        error = layer_norm_pull(torch.addcmul(key, n, gain).sub_(value).mul_(gain), n, inverse)
    errors = [error]
    for layer in range(len(anchor) - 2, -1, -1):
        errors.append(act.pull(torch.bmm(errors[-1], anchor[layer + 1]), hidden[layer]))
    errors.reverse()

    size = rows(theta) * -2
    if clip is not None:
        squares = sum(square_sum(d) * square_sum(a) for d, a in zip(errors, inputs)) * 4
        size = size * (clip / squares.sqrt().clamp_(min=clip)).unsqueeze(-1)
    lasting = None if eta is None else rows(eta)
    retain = None if alpha is None else 1 - rows(alpha)
    momentum, after = [], []
    for layer, weight in enumerate(weights):
        push = (errors[layer] * size).mT
        if lasting is None:
            surprise = push * inputs[layer]
        else:
            surprise = state.momentum[layer].reshape(weight.shape) * lasting
            surprise.addcmul_(push, inputs[layer])
            momentum.append(surprise)
        after.append(surprise + weight if retain is None else torch.addcmul(surprise, weight, retain))

    query = rows(q)
    x = query
    for layer, weight in enumerate(after if read == "after" else weights):
        x = torch.bmm(act.value(x) if layer else x, weight.mT)
    if gain is not None:
        x = torch.addcmul(query, torch.native_layer_norm(x, x.shape[-1:], None, None, EPS)[0], gain)
    y = x.view(batch, 1, heads, -1)

    unflatten = lambda parts: tuple(x.view(batch, heads, *x.shape[1:]) for x in parts)  # noqa: E731
    new_weights = unflatten(after)
    new_momentum = unflatten(momentum) if lasting is not None else state.momentum
    ends = [(position + 1) % chunk == 0 for position in state.position.tolist()]
    new_anchor = new_weights if all(ends) else unflatten(anchor)
    if any(ends) and not all(ends):
        at_end = torch.tensor(ends, device=q.device).view(-1, 1, 1, 1)
        new_anchor = tuple(torch.where(at_end, w, a) for w, a in zip(new_weights, new_anchor))
    if mask is None:
        return y, MemoryState(new_weights, new_momentum, new_anchor, state.position + 1)
    real = mask.view(batch, 1, 1, 1)
    keep = lambda new, old: tuple(torch.where(real, a, b) for a, b in zip(new, old))  # noqa: E731
    return torch.where(real, y, torch.zeros_like(y)), MemoryState(
        keep(new_weights, state.weights),
        keep(new_momentum, state.momentum),
        keep(new_anchor, state.anchor),
        state.position + mask.view(-1),
    )
