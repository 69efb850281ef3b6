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

With decays for each channel, ``A``, ``D``, ``m`` and ``C`` are those of each column of each matrix. With a window of
``c`` tokens, ``theta_s g_s a_s^T`` is ``theta_s sum_i gamma_i g_i a_i^T`` over ``s - c < i <= s``.

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
    """``[..., b] -> [..., b, b + 1]``: column 0 is the product over ``j <= t``, and column ``r + 1`` that over
    ``r < j <= t``: 1 for ``r = t``, and 0 for ``r > t``.
    """
    b = factors.shape[-1]
    shapes = ((b, (b, 1, 1)), (b + 1, (1, b + 1, 1)), (b, (1, 1, b)))
    t, column, j = (torch.arange(n, device=factors.device).view(shape) for n, shape in shapes)
    chosen = (column <= j) & (j <= t)
    full = torch.where(chosen, factors[..., None, None, :], torch.ones_like(factors[..., :1, None, None])).prod(-1)
    return full * (column <= t + 1).squeeze(-1).to(factors)


def _errors(
    weights: list[Tensor], keys: Tensor, values: Tensor, gain: Tensor | None, options: Options, delta: Tensor | None
) -> tuple[list[Tensor], list[Tensor]]:
    """The inputs ``a_l`` of every layer, and half the gradient of the loss with respect to its outputs.

    ``keys``, ``values``: ``[heads, b, d]``.
    """
    inputs: list[Tensor] = []
    slopes: list[Tensor] = []
    h = keys
    if options.gated:
        first, gate = keys @ weights[0].mT, keys @ weights[2].mT
        value, slope = _value_and_slope(first, options.activation)
        inputs = [keys, value * gate, keys]
        h = inputs[1] @ weights[1].mT
    for layer, weight in enumerate([] if options.gated else weights):
        if layer:
            h, slope = _value_and_slope(h, options.activation)
            slopes.append(slope)
        inputs.append(h)
        h = h @ weight.mT
    if gain is None:
        error = half_error(h, values, options.objective, delta)
    else:
        mean, var = h.mean(-1, keepdim=True), h.var(-1, keepdim=True, unbiased=False)
        sigma = (var + 1e-6).sqrt()
        n = (h - mean) / sigma
        g = half_error(keys + n * gain[:, None], values, options.objective, delta) * gain[:, None]
        error = (g - g.mean(-1, keepdim=True) - n * (g * n).mean(-1, keepdim=True)) / sigma
    if options.gated:
        back = error @ weights[1]
        return inputs, [back * slope * gate, error, back * value]
    errors = [error]
    for weight, slope in zip(reversed(weights[1:]), reversed(slopes)):
        error = (error @ weight) * slope
        errors.append(error)
    return inputs, errors[::-1]


def closed_form_memory(
    tokens: Tokens, state: MemoryState, norm: Tensor | None, mask: Tensor | None, options: Options
) -> tuple[Tensor, MemoryState]:
    """The closed form of a chunk, product by product as written."""
    chunk, (rows, time), v, past = options.chunk, tokens.q.shape[:2], tokens.v, options.window - 1
    results = []
    for row in range(rows):
        valid = torch.arange(time, device=v.device) if mask is None else mask[row].nonzero()[:, 0]
        writes = torch.cat([torch.arange(past, device=v.device), valid + past])
        # what is longer begins with the tokens before
        picked = tokens.map(lambda x: x[row, writes if x.shape[1] > time else valid].transpose(0, 1))  # noqa: B023
        at = int(state.position[row])
        weights, anchor = [w[row] for w in state.weights], [w[row] for w in state.anchor]
        momentum = [w[row] for w in state.momentum]
        done, outputs = 0, []
        while done < len(valid):
            if at % chunk == 0:
                anchor = weights
            stop = min(done + chunk - at % chunk, len(valid))
            part = picked.map(lambda x: x[:, done : stop + x.shape[1] - len(valid)])  # noqa: B023
            y, weights, momentum = _chunk(part, weights, momentum, anchor, norm, options)
            outputs.append(y)
            at, done = at + stop - done, stop
        if len(valid) and at % chunk == 0:
            anchor = weights
        y = v.new_zeros(time, *v.shape[2:])
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
    q, k, v, theta, eta, alpha, delta, gamma = tokens
    _, activation, clip, read, _, _, threshold, *_ = options
    inputs, errors = _errors(anchor, k, v, gain, options, None if delta is None else delta.unsqueeze(-1))
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
        scale = ((bound + 0 * unit) / square.clamp(min=bound**2).sqrt()).unsqueeze(-1)
        gradients = [scale * g for g in gradients]
    if threshold is not None:
        writes = ~(square.sqrt() * unit < threshold)
        theta = theta * writes
        alpha = None if alpha is None else alpha * (writes if alpha.dim() == 2 else writes.unsqueeze(-1))
    momentum_decay = _products(torch.zeros_like(theta) if eta is None else eta)
    E, H = momentum_decay[..., 0], momentum_decay[..., 1:]
    if gamma is None:
        H = H * theta.unsqueeze(-2)
    else:
        H = H @ (theta.unsqueeze(-1) * gamma.unsqueeze(-2)).tril(options.window - 1).triu()
    keep_momentum = momentum if eta is None or not momentum else None
    if not momentum:
        momentum = [torch.zeros_like(w) for w in weights]
    keep = torch.ones_like(theta) if alpha is None else 1 - alpha  # [heads, b], or [heads, b, channels]
    retentions = [keep.unsqueeze(1)] * len(weights)
    if keep.dim() == 3:
        retentions = [x.mT for x in keep.split([w.shape[-1] for w in weights], -1)]
    A, m, C = [], [], []  # of each matrix: [heads, channels or 1, b, ...]
    for retention in map(_products, retentions):
        A.append(retention[..., 0])
        m.append((retention[..., 1:] @ E[:, None, :, None]).squeeze(-1))
        C.append(retention[..., 1:] @ H.unsqueeze(1))

    def apply(l: int, x: Tensor) -> Tensor:
        if read == "anchor":
            return x @ anchor[l].mT
        Al, ml, Cl = A[l], m[l], C[l]
        if read == "before":
            Al = torch.cat([torch.ones_like(Al[..., :1]), Al[..., :-1]], -1)
            ml = torch.cat([torch.zeros_like(ml[..., :1]), ml[..., :-1]], -1)
            Cl = torch.cat([torch.zeros_like(Cl[..., :1, :]), Cl[..., :-1, :]], -2)
        if keep.dim() == 2:
            scores = (x @ inputs[l].mT) * Cl.squeeze(1)
        else:
            scores = torch.einsum("hti,hsi,hits->hts", x, inputs[l], Cl)
        return (Al.mT * x) @ weights[l].mT + (ml.mT * x) @ momentum[l].mT - scores @ gradients[l]

    x = q
    if options.gated:
        x = apply(1, _value_and_slope(apply(0, x), activation)[0] * apply(2, x))
    else:
        for l in range(len(weights)):
            x = apply(l, _value_and_slope(x, activation)[0] if l else x)
    if gain is not None:
        x = q + F.layer_norm(x, x.shape[-1:], eps=1e-6) * gain[:, None]
    final = [
        Al[..., -1].unsqueeze(1) * W + ml[..., -1].unsqueeze(1) * S - g.mT @ (Cl[..., -1, :].mT * a)
        for Al, ml, Cl, W, S, g, a in zip(A, m, C, weights, momentum, gradients, inputs)
    ]
    if keep_momentum is None:
        keep_momentum = [
            E[:, -1, None, None] * S - (H[:, -1].unsqueeze(-1) * g).mT @ a
            for S, g, a in zip(momentum, gradients, inputs)
        ]
    return x, final, keep_momentum
