"""Known linear and deep test-time learners are settings of the memory; each against its own recurrence, as published.

A step ``theta`` on ``|M(k) - v|^2`` moves a matrix by ``2 theta``, hence the halves.
"""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from titans_build.kernels.memory import MemoryState, titans_memory

BATCH, TIME, HEADS, WIDTH = 2, 13, 2, 6


@pytest.fixture
def given():
    """Unit queries and keys, values, and gates: ``beta``, ``gamma`` and ``eta``, all per token and head."""
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(3, BATCH, TIME, HEADS, WIDTH, generator=generator, dtype=torch.float64)
    (q, k), v = F.normalize(normal[:2], dim=-1), normal[2]
    beta, gamma, eta = torch.rand(3, BATCH, TIME, HEADS, generator=generator, dtype=torch.float64)
    return q, k, v, beta, 0.5 + 0.5 * gamma, eta


def matrix(seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(BATCH, HEADS, WIDTH, WIDTH, generator=generator, dtype=torch.float64)


def outer(a: Tensor, b: Tensor) -> Tensor:
    return a.unsqueeze(-1) * b.unsqueeze(-2)


def times(w: Tensor, x: Tensor) -> Tensor:
    return (w @ x.unsqueeze(-1)).squeeze(-1)


def over_time(start: Tensor, q: Tensor, step) -> tuple[Tensor, Tensor]:
    """``step(state, t) -> state`` from ``start``, and each token's query read after it."""
    s, outputs = start, []
    for t in range(TIME):
        s = step(s, t)
        outputs.append(times(s, q[:, t]))
    return torch.stack(outputs, dim=1), s


def same(got: tuple[Tensor, MemoryState], expected: tuple[Tensor, Tensor]) -> None:
    torch.testing.assert_close(got[0], expected[0], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(got[1].weights[0], expected[1], rtol=1e-10, atol=1e-10)


def gate(x: Tensor) -> Tensor:
    return x[..., None, None]


def test_delta_net(given):
    q, k, v, beta, _, _ = given
    memory = titans_memory(
        q, k, v, beta / 2, None, None, MemoryState.fresh((matrix(),)), chunk=1, activation="identity"
    )

    def step(s: Tensor, t: int) -> Tensor:
        return s - gate(beta[:, t]) * outer(times(s, k[:, t]) - v[:, t], k[:, t])

    same(memory, over_time(matrix(), q, step))


def test_gated_delta_net(given):
    """It forgets before it takes the error: with the decay drawn out of the error, the value is divided by it."""
    q, k, v, beta, gamma, _ = given
    state = MemoryState.fresh((matrix(),))
    scaled = v / gamma.unsqueeze(-1)
    memory = titans_memory(q, k, scaled, beta * gamma / 2, None, 1 - gamma, state, chunk=1, activation="identity")
    unit = torch.eye(WIDTH, dtype=torch.float64)

    def step(s: Tensor, t: int) -> Tensor:
        erase = unit - gate(beta[:, t]) * outer(k[:, t], k[:, t])
        return gate(gamma[:, t]) * s @ erase + gate(beta[:, t]) * outer(v[:, t], k[:, t])

    same(memory, over_time(matrix(), q, step))


def test_delta_rule_with_momentum(given):
    q, k, v, beta, gamma, eta = given
    memory = titans_memory(
        q, k, v, beta / 2, eta, 1 - gamma, MemoryState.fresh((matrix(),)), chunk=1, activation="identity"
    )
    momentum = torch.zeros_like(matrix())

    def step(s: Tensor, t: int) -> Tensor:
        nonlocal momentum
        error = outer(times(s, k[:, t]) - v[:, t], k[:, t])
        momentum = gate(eta[:, t]) * momentum - gate(beta[:, t]) * error
        return gate(gamma[:, t]) * s + momentum

    same(memory, over_time(matrix(), q, step))


@pytest.mark.parametrize("decay", ["none", "constant", "per token"])
def test_linear_attention(given, decay):
    """All gradients at a memory of zeros: linear attention, RetNet (constant decay), Mamba 2 (decay per token)."""
    q, k, v, _, gamma, _ = given
    gamma = {"none": torch.ones_like(gamma), "constant": torch.full_like(gamma, 0.9), "per token": gamma}[decay]
    half, zeros = torch.full_like(gamma, 0.5), torch.zeros_like(matrix())
    alpha = None if decay == "none" else 1 - gamma
    memory = titans_memory(
        q, k, v, half, None, alpha, MemoryState.fresh((zeros,)), chunk=TIME + 1, activation="identity"
    )
    same(memory, over_time(zeros, q, lambda s, t: gate(gamma[:, t]) * s + outer(v[:, t], k[:, t])))


@pytest.mark.parametrize("depth", [1, 2], ids=["linear", "mlp"])
def test_ttt(given, depth):
    """TTT-Linear and TTT-MLP: ``x + LN(net(x))``, mini-batches whose gradients are taken at their start."""
    q, k, v, beta, _, _ = given
    batch, hidden = 4, 3 * WIDTH
    widths = [WIDTH, *[hidden] * (depth - 1), WIDTH]
    generator = torch.Generator().manual_seed(2)
    weights = [
        torch.randn(BATCH, HEADS, o, i, generator=generator, dtype=torch.float64) / i**0.5 for i, o in pairwise(widths)
    ]
    gain = 1 + 0.1 * torch.randn(HEADS, WIDTH, generator=generator, dtype=torch.float64)

    def net(x: Tensor, layers: list[Tensor]) -> Tensor:
        h = x
        for layer, w in enumerate(layers):
            h = times(w, F.gelu(h) if layer else h)
        return x + F.layer_norm(h, (WIDTH,), eps=1e-6) * gain

    outputs: list[Tensor] = []
    current = start = weights
    for t in range(TIME):
        if t % batch == 0:
            start = [w.detach().requires_grad_() for w in current]
        loss = (net(k[:, t], start) - v[:, t]).square().sum()
        gradients = torch.autograd.grad(loss, start)
        current = [w - gate(0.05 * beta[:, t]) * g for w, g in zip(current, gradients)]
        outputs.append(net(q[:, t], current))

    y, state = titans_memory(
        q, k, v, 0.05 * beta, None, None, MemoryState.fresh(tuple(weights)), chunk=batch, activation="gelu", norm=gain
    )
    torch.testing.assert_close(y, torch.stack(outputs, dim=1).detach(), rtol=1e-9, atol=1e-9)
    for mine, theirs in zip(state.weights, current):
        torch.testing.assert_close(mine, theirs.detach(), rtol=1e-9, atol=1e-9)
