"""A second, independent reference: the chunkwise equations term by term, differentiated by autograd.

Independent of ``reference`` (errors are back-propagated by hand, not by autograd) and of the fast backends (no kept
states, no hand-written backward, products of gates as literal products). One row at a time.

With weights ``W`` and momentum ``S`` before the first token, for ``s <= r <= t``::

    A_t  = prod_{j <= t} (1 - alpha_j)         E_t  = prod_{j <= t} eta_j
    D_tr = prod_{r < j <= t} (1 - alpha_j)     H_rs = prod_{s < j <= r} eta_j
    C    = D H                                 m    = D E

``D`` and ``H`` are lower triangular with ones on the diagonal. Let ``a_s`` be the input of a layer at key ``s``,
``g_s`` the gradient of the loss with respect to its output, and ``theta_s`` the step size after clipping. After token
``t``::

    weights   A_t W + m_t S - sum_s C_ts theta_s g_s a_s^T
    momentum  E_t S - sum_s H_ts theta_s g_s a_s^T

``Ar``, ``mr`` and ``Cr`` are ``A``, ``m`` and ``C`` for the weights that are read at each token: after token ``t``, or
after token ``t - 1`` with ``read="before"``. Without momentum, ``H`` is the identity, and ``E`` and ``m`` are zero.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .network_torch import half_error
from .state import MemoryState, Options, Tokens

_SQRT_HALF = 0.5**0.5


def _value_and_slope(z: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    if activation == "identity":
        return z, torch.ones_like(z)
    if activation == "relu":
        return F.relu(z), (z > 0).to(z.dtype)
    if activation == "silu":
        s = torch.sigmoid(z)
        return z * s, s + z * s * (1 - s)
    if activation == "gelu":
        normal = 0.5 * (1 + torch.erf(z * _SQRT_HALF))
        return z * normal, normal + z * torch.exp(-z * z / 2) / (2 * torch.pi) ** 0.5
    raise ValueError(f"activation: expected identity, silu, gelu or relu, got {activation!r}")


def _products(factors: Tensor) -> Tensor:
    """``[heads, b] -> [heads, b, b + 1]``: column 0 is the product over ``j <= t``, and column ``r + 1`` that over
    ``r < j <= t``: 1 for ``r = t``, and 0 for ``r > t``.
    """
    b = factors.shape[-1]
    shapes = ((b, (b, 1, 1)), (b + 1, (1, b + 1, 1)), (b, (1, 1, b)))
    t, column, j = (torch.arange(n, device=factors.device).view(shape) for n, shape in shapes)
    chosen = (column <= j) & (j <= t)
    full = torch.where(chosen, factors[:, None, None, :], torch.ones_like(factors[:, :1, None, None])).prod(-1)
    return full * (column <= t + 1).squeeze(-1).to(factors)


def _errors(
    weights: list[Tensor], keys: Tensor, values: Tensor, gain: Tensor | None, options: Options
) -> tuple[list[Tensor], list[Tensor]]:
    """The inputs ``a_l`` of every layer, and half the gradient of the loss with respect to its outputs.

    ``keys``, ``values``: ``[heads, b, d]``.
    """
    inputs: list[Tensor] = []
    slopes: list[Tensor] = []
    h = keys
    for layer, weight in enumerate(weights):
        if layer:
            h, slope = _value_and_slope(h, options.activation)
            slopes.append(slope)
        inputs.append(h)
        h = h @ weight.mT
    if gain is None:
        error = half_error(h, values, options.objective)
    else:
        mean, var = h.mean(-1, keepdim=True), h.var(-1, keepdim=True, unbiased=False)
        sigma = (var + 1e-6).sqrt()
        n = (h - mean) / sigma
        g = half_error(keys + n * gain[:, None], values, options.objective) * gain[:, None]
        error = (g - g.mean(-1, keepdim=True) - n * (g * n).mean(-1, keepdim=True)) / sigma
    errors = [error]
    for weight, slope in zip(reversed(weights[1:]), reversed(slopes)):
        error = (error @ weight) * slope
        errors.append(error)
    return inputs, errors[::-1]


def closed_form_memory(
    tokens: Tokens, state: MemoryState, norm: Tensor | None, mask: Tensor | None, options: Options
) -> tuple[Tensor, MemoryState]:
    """The closed form of a chunk, product by product as written."""
    chunk, (rows, time), v = options.chunk, tokens.q.shape[:2], tokens.v
    results = []
    for row in range(rows):
        valid = torch.arange(time, device=v.device) if mask is None else mask[row].nonzero()[:, 0]
        picked = tokens.map(lambda x: x[row, valid].transpose(0, 1))  # noqa: B023
        at = int(state.position[row])
        weights, anchor = [w[row] for w in state.weights], [w[row] for w in state.anchor]
        momentum = [w[row] for w in state.momentum]
        done, outputs = 0, []
        while done < len(valid):
            if at % chunk == 0:
                anchor = weights
            stop = min(done + chunk - at % chunk, len(valid))
            y, weights, momentum = _chunk(picked.at(slice(done, stop)), weights, momentum, anchor, norm, options)
            outputs.append(y)
            at, done = at + stop - done, stop
        if len(valid) and at % chunk == 0:
            anchor = weights
        y = v.new_zeros(v.shape[1:])
        if outputs:
            y = y.index_copy(0, valid, torch.cat(outputs, 1).transpose(0, 1))
        results.append((y, weights, momentum, anchor))
    ys, *parts = zip(*results)
    count = torch.full_like(state.position, time) if mask is None else mask.sum(1)
    new = [tuple(torch.stack(layer) for layer in zip(*part)) for part in parts]
    return torch.stack(ys), MemoryState(new[0], new[1], new[2], state.position + count)


def _chunk(
    tokens: Tokens,
    weights: list[Tensor],
    momentum: list[Tensor],
    anchor: list[Tensor],
    gain: Tensor | None,
    options: Options,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """One chunk, or a part of one, of a single row: tokens ``[heads, time, ...]``, the state ``[heads, out, in]``."""
    q, k, v, theta, eta, alpha = tokens
    _, activation, clip, read, _, _, threshold, *_ = options
    inputs, errors = _errors(anchor, k, v, gain, options)
    gradients = [2 * error for error in errors]
    # in units of the largest numbers, whose squares may overflow
    units = [
        torch.stack([x.detach().abs().amax(-1) for x in part]).amax(0).clamp(min=1) for part in (gradients, inputs)
    ]
    scaled = [[x / unit.unsqueeze(-1) for x in part] for unit, part in zip(units, (gradients, inputs))]
    square = torch.stack([g.square().sum(-1) * a.square().sum(-1) for g, a in zip(*scaled)]).sum(0)
    unit = units[0] * units[1]
    if clip is not None:
        # clamped before the root, which has no derivative at 0; a gradient that is not finite stays NaN
        bound = clip / unit
        theta = theta * (bound + 0 * unit) / square.clamp(min=bound**2).sqrt()
    if threshold is not None:
        writes = ~(square.sqrt() * unit < threshold)
        theta, alpha = theta * writes, None if alpha is None else alpha * writes
    retention = _products(torch.ones_like(theta) if alpha is None else 1 - alpha)
    momentum_decay = _products(torch.zeros_like(theta) if eta is None else eta)
    A, D, E, H = retention[..., 0], retention[..., 1:], momentum_decay[..., 0], momentum_decay[..., 1:]
    C, m = D @ H, (D @ E.unsqueeze(-1)).squeeze(-1)
    keep_momentum = momentum if eta is None or not momentum else None
    if not momentum:
        momentum = [torch.zeros_like(w) for w in weights]
    if read == "after":
        Ar, mr, Cr = A, m, C
    else:
        Ar = torch.cat([torch.ones_like(A[:, :1]), A[:, :-1]], 1)
        mr = torch.cat([torch.zeros_like(m[:, :1]), m[:, :-1]], 1)
        Cr = torch.cat([torch.zeros_like(C[:, :1]), C[:, :-1]], 1)
    written = [theta.unsqueeze(-1) * g for g in gradients]
    x = q
    for layer, (W, S) in enumerate(zip(weights, momentum)):
        if layer:
            x = _value_and_slope(x, activation)[0]
        if read == "anchor":
            x = x @ anchor[layer].mT
            continue
        x = (
            Ar.unsqueeze(-1) * (x @ W.mT)
            + mr.unsqueeze(-1) * (x @ S.mT)
            - ((x @ inputs[layer].mT) * Cr) @ written[layer]
        )
    if gain is not None:
        x = q + F.layer_norm(x, x.shape[-1:], eps=1e-6) * gain[:, None]
    last = lambda g: g[:, -1, None, None]  # noqa: E731
    final = [
        last(A) * W + last(m) * S - (C[:, -1].unsqueeze(-1) * u).mT @ a
        for W, S, u, a in zip(weights, momentum, written, inputs)
    ]
    if keep_momentum is None:
        keep_momentum = [
            last(E) * S - (H[:, -1].unsqueeze(-1) * u).mT @ a for S, u, a in zip(momentum, written, inputs)
        ]
    return x, final, keep_momentum
