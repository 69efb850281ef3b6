"""Each published learner, by its own equations, is a setting of the general one.

``run`` is the operation, and the plain loop that it is compared with elsewhere.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

pytestmark = pytest.mark.parametrize("run", ["general loop", "learn"], indirect=True)

LINEAR: dict[str, Any] = dict(network="linear", chunk=1)


def same(got: Any, expected: Any) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


def same_matrix(got: Any, expected: Any) -> None:
    y, weights, _ = got
    same(y, expected[0])
    same(weights[0], expected[1])


def same_weights(got: Any, outputs: Tensor, weights: Any) -> None:
    y, mine, _ = got
    same(y, outputs)
    for a, b in zip(mine, weights, strict=True):
        same(a, b)


def mlp(given: Any, features: Any = lambda x: x, norm: bool = True) -> Any:
    """``x + LN(W2 gelu(W1 phi(x))) * gain``, or without residual and norm."""

    def net(x: Tensor, weights: list[Tensor]) -> Tensor:
        h = features(x).unsqueeze(-1)
        for l, w in enumerate(weights):
            h = w @ (F.gelu(h) if l else h)
        h = h.squeeze(-1)
        return x + F.layer_norm(h, h.shape[-1:], eps=1e-6) * given.gain if norm else h

    return net


# -- matrices ----------------------------------------------------------------------------------------------------------


def test_linear_attention(run, given, published):
    (start,) = given.weights(4, 4)
    step = torch.ones_like(given.theta)
    got = run(given.q, given.k, given.v, step, None, None, (start,), objective="dot", retention="none", **LINEAR)
    same_matrix(got, published.linear_attention(given.q, given.k, given.v, start))


def test_retnet(run, given, published):
    (start,), decay = given.weights(4, 4), torch.tensor([0.9, 0.7], dtype=torch.float64)
    step = torch.ones_like(given.theta)
    forget = (1 - decay).expand_as(step)
    got = run(given.q, given.k, given.v, step, None, forget, (start,), network="linear", objective="dot", chunk=5)
    same_matrix(got, published.retnet(given.q, given.k, given.v, decay, start))


def test_gla(run, given, published):
    (start,), keep = given.weights(4, 4), given.uniform(*given.k.shape)
    step = torch.ones_like(given.theta)
    got = run(given.q, given.k, given.v, step, None, 1 - keep, (start,), objective="dot", retention="channel", **LINEAR)
    same_matrix(got, published.gla(given.q, given.k, given.v, keep, start))


def test_delta_net(run, given, published):
    (start,) = given.weights(4, 4)
    got = run(
        given.q, given.k, given.v, given.theta, None, None, (start,), objective="l2_half", retention="none", **LINEAR
    )
    same_matrix(got, published.delta_net(given.q, given.k, given.v, given.theta, start))


def test_gated_delta_net(run, given, published):
    (start,) = given.weights(4, 4)
    got = run(
        given.q, given.k, given.v, given.theta, None, 1 - given.keep, (start,), objective="l2_half",
        retention={"type": "scalar", "first": True}, **LINEAR,
    )  # fmt: skip
    same_matrix(got, published.gated_delta_net(given.q, given.k, given.v, given.theta, given.keep, start))


def test_kda(run, given, published):
    (start,), keep = given.weights(4, 4), given.uniform(*given.k.shape)
    got = run(
        given.q, given.k, given.v, given.theta, None, 1 - keep, (start,), objective="l2_half",
        retention={"type": "channel", "first": True}, **LINEAR,
    )  # fmt: skip
    same_matrix(got, published.kda(given.q, given.k, given.v, given.theta, keep, start))


def test_delta_product(run, given, published):
    (start,), shape = given.weights(4, 4), (2, given.time, 3, 2)
    k, v, beta = F.normalize(given.normal(*shape, 4), dim=-1), given.normal(*shape, 4), given.uniform(*shape)
    got = run(
        given.q, k, v, beta, None, 1 - given.keep, (start,), objective="l2_half", keys=3,
        retention={"type": "scalar", "first": True}, **LINEAR,
    )  # fmt: skip
    same_matrix(got, published.delta_product(given.q, k, v, beta, given.keep, start))


def test_momentum_delta(run, given, published):
    """Its momentum is added times a gate, which moves into the step and the decay of the momentum."""
    (start,), (beta, eta) = given.weights(4, 4), 0.2 + 0.5 * given.uniform(2, 2, given.time, 2)
    earlier = torch.cat([torch.ones_like(beta[:, :1]), beta[:, :-1]], 1)
    got = run(
        given.q, given.k, given.v, beta * eta, given.eta * beta / earlier, 1 - given.keep, (start,),
        objective="l2_half", retention={"type": "scalar", "first": True}, **LINEAR,
    )  # fmt: skip
    y, (s, m) = published.momentum_delta(given.q, given.k, given.v, given.keep, given.eta, eta, beta, start)
    same_matrix(got, (y, s))
    same(got[2][0], -beta[:, -1, :, None, None] * m)


# -- deep memories -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("widths", [(4, 4), (4, 16, 4)], ids=["linear", "mlp"])
def test_ttt(run, given, published, widths):
    """The residual branch learns ``v - k``, which is that all of ``f`` learns ``v``."""
    weights = given.weights(*widths)
    got = run(
        given.q, given.k, given.v, given.theta, None, None, weights, chunk=4, norm=given.gain,
        objective="l2_half", retention="none",
    )  # fmt: skip
    same_weights(got, *published.ttt(given.q, given.k, given.v, given.theta, list(weights), given.gain, 4))


def test_ttt_of_zeros_is_linear_attention(run, given, published):
    """Theorem 1 of the paper: weights of zero, one mini-batch, no norm, and a step of one half on the squared error."""
    zeros, step = torch.zeros(2, 2, 4, 4, dtype=torch.float64), torch.full_like(given.theta, 0.5)
    got = run(given.q, given.k, given.v, step, None, None, (zeros,), network="linear", chunk=given.time)
    same_matrix(got, published.linear_attention(given.q, given.k, given.v, zeros))


@pytest.mark.parametrize("channel", [False, True], ids=["titans", "titans_channel"])
def test_titans(run, given, published, channel):
    weights = given.weights(4, 8, 4)
    forget = given.uniform(2, given.time, 2, 12) if channel else 1 - given.keep
    parts = list(forget.split([4, 8], -1)) if channel else [forget.unsqueeze(-1)] * 2
    got = run(
        given.q, given.k, given.v, given.theta, given.eta, forget, weights, chunk=4, norm=given.gain,
        retention="channel" if channel else "scalar",
    )  # fmt: skip
    y, (last, momentum) = published.titans(
        given.q, given.k, given.v, given.theta, given.eta, parts, mlp(given), weights, 4
    )
    same_weights(got, y, last)
    same(list(got[2]), momentum)


def test_moneta(run, given, published):
    weights = given.weights(4, 8, 4)
    got = run(
        given.q, given.k, given.v, 0.1 * given.theta, None, 1 - given.keep, weights, chunk=4, norm=given.gain,
        objective={"type": "lp", "p": 3}, optimizer="step", retention={"type": "lq", "q": 4},
    )  # fmt: skip
    same_weights(
        got, *published.moneta(given.q, given.k, given.v, 0.1 * given.theta, given.keep, mlp(given), weights, 4)
    )


def test_yaad(run, given, published):
    weights, delta = given.weights(4, 8, 4), 1 + 2 * given.uniform(*given.theta.shape)
    got = run(
        given.q, given.k, given.v, given.theta, None, 1 - given.keep, weights, chunk=4, norm=given.gain,
        objective={"type": "huber", "delta": delta}, optimizer="step",
    )  # fmt: skip
    same_weights(
        got, *published.yaad(given.q, given.k, given.v, given.theta, delta, given.keep, mlp(given), weights, 4)
    )


def test_memora(run, given, published):
    weights = given.simplex(given.weights(4, 8, 4))
    got = run(
        given.q, given.k, given.v, given.theta, None, 1 - given.keep, weights, chunk=4, norm=given.gain,
        optimizer="step", retention="kl",
    )  # fmt: skip
    same_weights(got, *published.memora(given.q, given.k, given.v, given.theta, given.keep, mlp(given), weights, 4))


# -- Atlas -------------------------------------------------------------------------------------------------------------

TAYLOR = [1.0, 1.0, 0.5]


def squares(x: Tensor) -> Tensor:
    """The constant, the entries and all their products, weighted by the coefficients of exp."""
    products = torch.einsum("bhi,bhj->bhij", x, x).flatten(-2)
    return torch.cat([torch.ones_like(x[..., :1]), x, 0.5 * products], -1)


def powers(x: Tensor) -> Tensor:
    return x + 0.5 * x**2


POLYNOMIAL = {
    "elementwise": (dict(type="polynomial", degree=2), powers, 4),
    "tensor": (dict(type="polynomial", degree=2, form="tensor", coefficients=TAYLOR), squares, 21),
}


@pytest.mark.parametrize("norm", [True, False], ids=["residual and norm", "plain"])
@pytest.mark.parametrize("form", POLYNOMIAL)
def test_omega_net(run, given, published, form, norm):
    features, phi, width = POLYNOMIAL[form]
    weights = given.weights(width, 8, 4)
    got = run(
        given.q, given.k, given.v, given.theta, None, 1 - given.keep, weights, chunk=4, features=features, window=3,
        gamma=given.gamma, norm=given.gain if norm else None,
    )  # fmt: skip
    net = mlp(given, phi, norm)
    y, (last, _) = published.omega(given.q, given.k, given.v, given.theta, given.gamma, given.keep, net, weights, 4, 3)
    same_weights(got, y, last)


@pytest.mark.parametrize("window", [1, 3, 6], ids=["dla", "swla", "a window longer than the chunk"])
def test_deep_linear_attention(run, given, published, window):
    features, phi, _ = POLYNOMIAL["elementwise"]
    weights, ones = given.weights(4, 8, 4), torch.ones_like(given.gamma)
    got = run(
        given.q, given.k, given.v, given.theta, None, 1 - given.keep, weights, chunk=4, features=features,
        objective="dot", window=window,
    )  # fmt: skip
    y, (last, _) = published.omega(
        given.q, given.k, given.v, given.theta, ones, given.keep, mlp(given, phi, norm=False), weights, 4, window, "dot"
    )
    same_weights(got, y, last)


def test_atlas(run, given, published):
    features, phi, _ = POLYNOMIAL["elementwise"]
    weights = given.weights(4, 8, 4)
    got = run(
        given.q, given.k, given.v, given.theta, given.eta, 1 - given.keep, weights, chunk=4, features=features,
        window=3, gamma=given.gamma, norm=given.gain, optimizer={"type": "muon", "steps": 5, "scale": "update"},
    )  # fmt: skip
    y, (last, momentum) = published.omega(
        given.q, given.k, given.v, given.theta, given.gamma, given.keep, mlp(given, phi), weights, 4, 3,
        theta=given.eta, newton_schulz=5,
    )  # fmt: skip
    same_weights(got, y, last)
    same([-s for s in got[2]], momentum)  # it has the sign of the gradient


# -- large chunks ------------------------------------------------------------------------------------------------------


def test_tnt_global_memory(run, given, published):
    weights = given.weights(4, 8, 4)
    got = run(
        given.q, given.k, given.v, given.theta, None, None, weights, chunk=4, norm=given.gain, read="anchor",
        retention="none", optimizer="step",
    )  # fmt: skip
    same_weights(got, *published.tnt_global(given.q, given.k, given.v, given.theta, mlp(given), weights, 4))


def test_tnt_local_memory(run, given, published):
    weights = given.weights(4, 8, 4)
    got = run(
        given.q, given.k, given.v, given.theta, None, None, weights, chunk=2, norm=given.gain, reset=6,
        query="projected", retention="none", optimizer="step",
    )  # fmt: skip
    same_weights(got, *published.tnt_local(given.q, given.k, given.v, given.theta, mlp(given), weights, 2, 6))
