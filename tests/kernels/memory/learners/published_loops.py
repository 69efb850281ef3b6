"""Published learners, each as a loop of its own, written from the equations of its paper in the paper's letters.

A matrix memory ``S`` is ``[batch, heads, d_v, d_k]``, so ``o = S q``; papers that write ``q S`` hold its transpose.
Deep memories are a function ``net(x, weights)`` and a list of weights. Gates are ``[batch, time, heads]``. Each loop
returns the outputs ``[batch, time, heads, d_v]`` and the last state.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

Weights = list[Tensor]
Net = Callable[[Tensor, Weights], Tensor]


def outer(a: Tensor, b: Tensor) -> Tensor:
    return a.unsqueeze(-1) * b.unsqueeze(-2)


def times(s: Tensor, x: Tensor) -> Tensor:
    return (s @ x.unsqueeze(-1)).squeeze(-1)


def g(x: Tensor) -> Tensor:
    """A gate ``[batch, heads]`` beside matrices."""
    return x[..., None, None]


def gradients(loss: Tensor, weights: Weights) -> Weights:
    return list(torch.autograd.grad(loss, weights, create_graph=True))


def held(weights: Weights) -> Weights:
    """The same weights, which an inner gradient can be taken of."""
    return [w if w.requires_grad else w.detach().requires_grad_() for w in weights]


# -- matrices ----------------------------------------------------------------------------------------------------------


def linear_attention(q: Tensor, k: Tensor, v: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """arXiv 2006.16236 without its normalizer: ``S_t = S_{t-1} + v_t k_t'``."""
    outputs = []
    for t in range(q.shape[1]):
        s = s + outer(v[:, t], k[:, t])
        outputs.append(times(s, q[:, t]))
    return torch.stack(outputs, 1), s


def retnet(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """arXiv 2307.08621: ``S_t = gamma S_{t-1} + v_t k_t'``, a constant decay ``[heads]``."""
    outputs = []
    for t in range(q.shape[1]):
        s = g(decay) * s + outer(v[:, t], k[:, t])
        outputs.append(times(s, q[:, t]))
    return torch.stack(outputs, 1), s


def gla(q: Tensor, k: Tensor, v: Tensor, a: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """arXiv 2312.06635: ``S_t = S_{t-1} Diag(a_t) + v_t k_t'``, a decay ``[batch, time, heads, d_k]``."""
    outputs = []
    for t in range(q.shape[1]):
        s = s * a[:, t].unsqueeze(-2) + outer(v[:, t], k[:, t])
        outputs.append(times(s, q[:, t]))
    return torch.stack(outputs, 1), s


def delta_net(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """arXiv 2406.06484: ``S_t = S_{t-1} (I - beta_t k_t k_t') + beta_t v_t k_t'``."""
    outputs, unit = [], torch.eye(k.shape[-1], dtype=k.dtype)
    for t in range(q.shape[1]):
        kt, b = k[:, t], g(beta[:, t])
        s = s @ (unit - b * outer(kt, kt)) + b * outer(v[:, t], kt)
        outputs.append(times(s, q[:, t]))
    return torch.stack(outputs, 1), s


def gated_delta_net(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, a: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """arXiv 2412.06464: ``S_t = S_{t-1} (a_t (I - beta_t k_t k_t')) + beta_t v_t k_t'``."""
    outputs, unit = [], torch.eye(k.shape[-1], dtype=k.dtype)
    for t in range(q.shape[1]):
        kt, b = k[:, t], g(beta[:, t])
        s = s @ (g(a[:, t]) * (unit - b * outer(kt, kt))) + b * outer(v[:, t], kt)
        outputs.append(times(s, q[:, t]))
    return torch.stack(outputs, 1), s


def kda(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, a: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """arXiv 2510.26692: ``S_t = S_{t-1} Diag(a_t) (I - beta_t k_t k_t') + beta_t v_t k_t'``, ``a`` for each channel."""
    outputs, unit = [], torch.eye(k.shape[-1], dtype=k.dtype)
    for t in range(q.shape[1]):
        kt, b = k[:, t], g(beta[:, t])
        s = s @ torch.diag_embed(a[:, t]) @ (unit - b * outer(kt, kt)) + b * outer(v[:, t], kt)
        outputs.append(times(s, q[:, t]))
    return torch.stack(outputs, 1), s


def delta_product(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, a: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """arXiv 2502.10297: one decay, then a delta step for each of a token's keys ``[batch, time, n, heads, d_k]``."""
    outputs = []
    for t in range(q.shape[1]):
        s = g(a[:, t]) * s
        for j in range(k.shape[2]):
            kj, b = k[:, t, j], g(beta[:, t, j])
            s = s - b * outer(times(s, kj), kj) + b * outer(v[:, t, j], kj)
        outputs.append(times(s, q[:, t]))
    return torch.stack(outputs, 1), s


def momentum_delta(
    q: Tensor, k: Tensor, v: Tensor, a: Tensor, mu: Tensor, eta: Tensor, beta: Tensor, s: Tensor
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """arXiv 2605.05838: momentum ``M_t = mu_t M_{t-1} + eta_t (a_t S_{t-1} k_t - v_t) k_t'``, ``S_t = a_t S_{t-1} -
    beta_t M_t``."""
    outputs, m = [], torch.zeros_like(s)
    for t in range(q.shape[1]):
        error = g(a[:, t])[..., 0] * times(s, k[:, t]) - v[:, t]
        m = g(mu[:, t]) * m + g(eta[:, t]) * outer(error, k[:, t])
        s = g(a[:, t]) * s - g(beta[:, t]) * m
        outputs.append(times(s, q[:, t]))
    return torch.stack(outputs, 1), (s, m)


# -- test-time training and Titans ------------------------------------------------------------------------------------


def ttt(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    eta: Tensor,
    weights: Weights,
    gain: Tensor,
    batch: int,
    bias: Tensor | None = None,
) -> tuple[Tensor, Weights]:
    """arXiv 2407.04620: TTT-Linear and TTT-MLP. The published code learns ``v - k`` with half the squared error.

    ``f(x) = x + LN(f_res(x))``; gradients of a mini-batch are taken at its start. ``bias`` is the fast bias after the
    last matrix that published code has.
    """

    def residual(x: Tensor, weights: Weights) -> Tensor:
        matrices, last = (weights, 0.0) if bias is None else (weights[:-1], weights[-1])
        h = times(matrices[0], x)
        if len(matrices) == 2:
            h = times(matrices[1], F.gelu(h))
        return F.layer_norm(h + last, h.shape[-1:], eps=1e-6) * gain

    now = [*weights] if bias is None else [*weights, bias]
    outputs = []
    for t in range(q.shape[1]):
        if t % batch == 0:
            start, total = held(now), [torch.zeros_like(w) for w in now]
            begin = now
        loss = 0.5 * (residual(k[:, t], start) - (v[:, t] - k[:, t])).square().sum()
        step = eta[:, t]
        total = [s + step.view(*step.shape, *[1] * (d.dim() - 2)) * d for s, d in zip(total, gradients(loss, start))]
        now = [w - s for w, s in zip(begin, total)]
        outputs.append(q[:, t] + residual(q[:, t], now))
    return torch.stack(outputs, 1), now


def titans(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    theta: Tensor,
    eta: Tensor,
    alpha: list[Tensor],
    net: Net,
    weights: Weights,
    chunk: int,
) -> tuple[Tensor, tuple[Weights, Weights]]:
    """arXiv 2501.00663, equations 12-15: ``S_t = eta_t S_{t-1} - theta_t grad |M(k_t) - v_t|^2``, ``M_t = (1 - alpha_t)
    M_{t-1} + S_t``; ``alpha`` for each matrix and input channel, ``[batch, time, heads, 1 or in]``."""
    s, outputs = [torch.zeros_like(w) for w in weights], []
    for t in range(q.shape[1]):
        if t % chunk == 0:
            start = held(weights)
        surprise = gradients((net(k[:, t], start) - v[:, t]).square().sum(), start)
        s = [g(eta[:, t]) * a - g(theta[:, t]) * b for a, b in zip(s, surprise)]
        weights = [(1 - a[:, t].unsqueeze(-2)) * w + b for a, w, b in zip(alpha, weights, s)]
        outputs.append(net(q[:, t], weights))
    return torch.stack(outputs, 1), (weights, s)


# -- Miras (arXiv 2504.13173) ------------------------------------------------------------------------------------------


def moneta(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    eta: Tensor,
    alpha: Tensor,
    net: Net,
    weights: Weights,
    chunk: int,
    p: int = 3,
    power: int = 4,
) -> tuple[Tensor, Weights]:
    """Equations 24-25: ``A_t = alpha_t A_{t-1} - eta_t grad |M(k_t) - v_t|_p^p``, ``W_t = A_t / |A_t|_q^(q-2)``."""

    def normed(a: Tensor) -> Tensor:
        return a / torch.linalg.vector_norm(a, ord=power, dim=(-2, -1), keepdim=True) ** (power - 2)

    accumulated, outputs = weights, []
    for t in range(q.shape[1]):
        if t % chunk == 0:
            start = held([normed(a) for a in accumulated])
        step = gradients((net(k[:, t], start) - v[:, t]).abs().pow(p).sum(), start)
        accumulated = [g(alpha[:, t]) * a - g(eta[:, t]) * d for a, d in zip(accumulated, step)]
        outputs.append(net(q[:, t], [normed(a) for a in accumulated]))
    return torch.stack(outputs, 1), accumulated


def yaad(
    q: Tensor, k: Tensor, v: Tensor, eta: Tensor, delta: Tensor, alpha: Tensor, net: Net, weights: Weights, chunk: int
) -> tuple[Tensor, Weights]:  # fmt: skip
    """Equation 26: the gradient of ``|r|_2^2`` where ``|r|_2 <= delta_t``, and ``delta_t`` times that of ``|r|_1``
    elsewhere."""
    outputs = []
    for t in range(q.shape[1]):
        if t % chunk == 0:
            start = held(weights)
        r = net(k[:, t], start) - v[:, t]
        inside = torch.linalg.vector_norm(r, dim=-1) <= delta[:, t]
        squared = gradients(r.square().sum(), start)
        absolute = gradients(r.abs().sum(), start)
        step = [torch.where(g(inside), a, g(delta[:, t]) * b) for a, b in zip(squared, absolute)]
        weights = [g(alpha[:, t]) * w - g(eta[:, t]) * d for w, d in zip(weights, step)]
        outputs.append(net(q[:, t], weights))
    return torch.stack(outputs, 1), weights


def memora(
    q: Tensor, k: Tensor, v: Tensor, eta: Tensor, alpha: Tensor, net: Net, weights: Weights, chunk: int
) -> tuple[Tensor, Weights]:
    """Equation 27: ``W_t = softmax(alpha_t log W_{t-1} - eta_t grad |M(k_t) - v_t|^2)``, one simplex for each row."""
    outputs = []
    for t in range(q.shape[1]):
        if t % chunk == 0:
            start = held(weights)
        step = gradients((net(k[:, t], start) - v[:, t]).square().sum(), start)
        grown = [torch.exp(g(alpha[:, t]) * w.log() - g(eta[:, t]) * d) for w, d in zip(weights, step)]
        weights = [w / w.sum(-1, keepdim=True) for w in grown]
        outputs.append(net(q[:, t], weights))
    return torch.stack(outputs, 1), weights


# -- Atlas (arXiv 2505.23735) ------------------------------------------------------------------------------------------


def omega(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    eta: Tensor,
    gamma: Tensor,
    alpha: Tensor,
    net: Net,
    weights: Weights,
    chunk: int,
    window: int,
    bias: str = "l2",
    theta: Tensor | None = None,
    newton_schulz: int | None = None,
) -> tuple[Tensor, tuple[Weights, Weights]]:
    """``M_t = alpha_t M_{t-1} - eta_t grad sum_i gamma_i l(M; k_i, v_i)`` over the last ``window`` tokens.

    Equation 10 (OmegaNet) with ``bias="l2"``; 19 (DLA, window 1) and 20 (SWLA) with ``"dot"``, descending ``-<M(k),
    v>``; 32-33 (Atlas) with ``theta`` and ``newton_schulz``. ``net`` has the feature map in it. All tokens of a window
    are taken at the last state of the chunk before (equation 16).
    """
    s, outputs = [torch.zeros_like(w) for w in weights], []
    for t in range(q.shape[1]):
        if t % chunk == 0:
            start = held(weights)
        loss = torch.zeros((), dtype=q.dtype)
        for i in range(max(0, t - window + 1), t + 1):
            out = net(k[:, i], start)
            each = (out - v[:, i]).square().sum(-1) if bias == "l2" else -(out * v[:, i]).sum(-1)
            loss = loss + (gamma[:, i] * each).sum()
        step = gradients(loss, start)
        if theta is not None:
            s = step = [g(theta[:, t]) * a + d for a, d in zip(s, step)]
        if newton_schulz is not None:
            step = [orthogonalized(d, newton_schulz) for d in step]
        weights = [g(alpha[:, t]) * w - g(eta[:, t]) * d for w, d in zip(weights, step)]
        outputs.append(net(q[:, t], weights))
    return torch.stack(outputs, 1), (weights, s)


JORDAN = [(3.4445, -4.7750, 2.0315)] * 5
LACT = [(4.0848, -6.8946, 2.9270), (3.9505, -6.3029, 2.6377), (3.7418, -5.5913, 2.3037), (2.8769, -3.1427, 1.2046),
        (2.8366, -3.0525, 1.2012)]  # fmt: skip
"""The coefficients of the five iterations in LaCT's code."""


def orthogonalized(matrix: Tensor, steps: int, coefficients: list[tuple[float, float, float]] = JORDAN) -> Tensor:
    """Newton-Schulz as in Muon: odd polynomials of the singular values, here on the singular values themselves."""
    u, sigma, vh = torch.linalg.svd(matrix, full_matrices=False)
    sigma = sigma / (matrix.norm(dim=(-2, -1)).unsqueeze(-1) + 1e-7)
    for a, b, c in coefficients[:steps]:
        sigma = a * sigma + b * sigma**3 + c * sigma**5
    return (u * sigma.unsqueeze(-2)) @ vh


# -- LaCT (arXiv 2505.23884) and TNT (arXiv 2511.07343) ----------------------------------------------------------------


def lact(
    q: Tensor, k: Tensor, v: Tensor, rates: Tensor, momentum: Tensor, weights: Weights, chunk: int
) -> tuple[Tensor, tuple[Weights, Weights]]:
    """A chunk is read with the weights before it, then written in one step; the last, incomplete one is not written.

    ``f(x) = W2 (silu(W1 x) * (W3 x))``, loss ``-<f(k), v>``. The step is the sum of the tokens' gradients, each times
    its rate for the matrix, ``rates [batch, time, heads, 3]``, plus the mean of the momentum gates times the step
    before, orthogonalized. Rows keep their first norms.
    """
    norms = [w.norm(dim=-1, keepdim=True) for w in weights]
    s, outputs = [torch.zeros_like(w) for w in weights], []

    def net(x: Tensor, weights: Weights) -> Tensor:
        """``x`` is ``[batch, time, heads, d]``."""
        w1, w2, w3 = weights
        hidden = F.silu(torch.einsum("bhoi,bthi->btho", w1, x)) * torch.einsum("bhoi,bthi->btho", w3, x)
        return torch.einsum("bhoi,bthi->btho", w2, hidden)

    for at in range(0, q.shape[1], chunk):
        span = slice(at, at + chunk)
        outputs.append(net(q[:, span], weights))
        if at + chunk > q.shape[1]:
            break
        start = held(weights)
        inner = (net(k[:, span], start) * v[:, span]).sum(-1)
        found = [gradients(-(rates[:, span, :, i] * inner).sum(), start)[i] for i in range(3)]
        s = [g(momentum[:, span].mean(1)) * a - d for a, d in zip(s, found)]
        moved = [w + orthogonalized(a, 5, LACT) for w, a in zip(weights, s)]
        weights = [w / w.norm(dim=-1, keepdim=True) * n for w, n in zip(moved, norms)]
    return torch.cat(outputs, 1), (weights, s)


def tnt_global(
    q: Tensor, k: Tensor, v: Tensor, eta: Tensor, net: Net, weights: Weights, chunk: int
) -> tuple[Tensor, Weights]:
    """Equations 5 and 7: gradients and reads at the chunk's start."""
    outputs, total = [], [torch.zeros_like(w) for w in weights]
    start = held(weights)
    for t in range(q.shape[1]):
        outputs.append(net(q[:, t], start))
        step = gradients((net(k[:, t], start) - v[:, t]).square().sum(), start)
        total = [s + g(eta[:, t]) * d for s, d in zip(total, step)]
        if (t + 1) % chunk == 0 or t + 1 == q.shape[1]:
            start, total = held([w - s for w, s in zip(start, total)]), [torch.zeros_like(w) for w in weights]
    return torch.stack(outputs, 1), start


def tnt_local(
    q: Tensor, k: Tensor, v: Tensor, eta: Tensor, net: Net, weights: Weights, chunk: int, reset: int
) -> tuple[Tensor, Weights]:
    """Equations 6 and 7 with appendix C: back to the initial weights every ``reset`` tokens; queries are projected on
    the keys since then. Equation 6 prints ``W_{t-1}`` under the sum over the chunk, and is read as equation 3."""
    outputs, now = [], weights
    for t in range(q.shape[1]):
        if t % reset == 0:
            now = weights
            projection = torch.zeros(*k.shape[:1], *k.shape[2:], k.shape[-1], dtype=k.dtype)
        if t % chunk == 0:
            start = held(now)
        step = gradients((net(k[:, t], start) - v[:, t]).square().sum(), start)
        now = [w - g(eta[:, t]) * d for w, d in zip(now, step)]
        projection = projection + outer(k[:, t], k[:, t]) / (g(k[:, t].square().sum(-1)) + 1e-6)
        outputs.append(net(times(projection, q[:, t]), now))
    return torch.stack(outputs, 1), now
