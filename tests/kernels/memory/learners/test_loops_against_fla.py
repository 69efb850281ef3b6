"""The loops of published rules against the references of flash-linear-attention, which compute in float32.

Its states are keys by values, the transpose of the loops'.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F


@pytest.fixture
def given(make: Any) -> Any:
    return make(time=17)


def same(got: tuple[Tensor, Tensor], outputs: Tensor, state: Tensor | None = None) -> None:
    close = dict(rtol=2e-5, atol=2e-5, check_dtype=False)
    torch.testing.assert_close(got[0], outputs, **close)
    if state is not None:
        torch.testing.assert_close(got[1].mT, state, **close)


def heads_first(*tensors: Tensor) -> list[Tensor]:
    return [x.transpose(1, 2) for x in tensors]


def test_linear_attention(given, published, fla_reference):
    (start,) = given.weights(4, 4)
    expected = fla_reference("linear_attn").naive_recurrent_linear_attn(
        given.q, given.k, given.v, 1.0, start.mT.float(), output_final_state=True
    )
    same(published.linear_attention(given.q, given.k, given.v, start), *expected)


def test_retention(given, published, fla_reference):
    """The decays of its heads are ``1 - 2^-5`` and ``1 - 2^-6``; its queries are scaled."""
    decay = 1 - torch.tensor([2.0, 2.0], dtype=torch.float64) ** torch.tensor([-5, -6])
    expected = fla_reference("retention").naive_retention(*heads_first(2 * given.q, given.k, given.v))
    start = torch.zeros(2, 2, 4, 4, dtype=torch.float64)
    same(published.retnet(given.q, given.k, given.v, decay, start), expected.transpose(1, 2))


def test_gla(given, published, fla_reference):
    (start,), keep = given.weights(4, 4), 0.5 + 0.5 * given.uniform(*given.k.shape)
    expected = fla_reference("gla").naive_recurrent_gla(
        2 * given.q, given.k, given.v, keep.log(), start.mT, output_final_state=True
    )
    same(published.gla(given.q, given.k, given.v, keep, start), *expected)


def test_delta_rule(given, published, fla_reference):
    (start,) = given.weights(4, 4)
    y, state = fla_reference("delta_rule").delta_rule_recurrence(
        *heads_first(2 * given.q, given.k, given.v, given.theta), start.mT
    )
    same(published.delta_net(given.q, given.k, given.v, given.theta, start), y.transpose(1, 2), state)


def test_gated_delta_rule(given, published, fla_reference):
    (start,) = given.weights(4, 4)
    expected = fla_reference("gated_delta_rule").naive_recurrent_gated_delta_rule(
        given.q, given.k, given.v, given.theta, given.keep.log(), 1.0, start.mT, output_final_state=True
    )
    same(published.gated_delta_net(given.q, given.k, given.v, given.theta, given.keep, start), *expected)


def test_kda(given, published, fla_reference):
    (start,), keep = given.weights(4, 4), 0.5 + 0.5 * given.uniform(*given.k.shape)
    expected = fla_reference("kda").naive_recurrent_kda(
        given.q, given.k, given.v, keep.log(), given.theta, 1.0, start.mT, output_final_state=True
    )
    same(published.kda(given.q, given.k, given.v, given.theta, keep, start), *expected)


def test_gated_delta_product(given, published, fla_reference):
    (start,), shape = given.weights(4, 4), (2, given.time, 3, 2)
    k, v, beta = F.normalize(given.normal(*shape, 4), dim=-1), given.normal(*shape, 4), given.uniform(*shape)
    expected = fla_reference("gated_delta_product").naive_recurrent_gated_delta_product(
        given.q, k.flatten(1, 2), v.flatten(1, 2), given.keep.log(), beta.flatten(1, 2), 1.0, num_householder=3,
        initial_state=start.mT.float(),
    )  # fmt: skip
    same(published.delta_product(given.q, k, v, beta, given.keep, start), *expected)


def test_momentum_delta_rule(given, published, fla_reference):
    (start,), keep, mu = given.weights(4, 4), given.keep, given.eta
    y, (state, momentum) = fla_reference("momentum_delta_rule").recurrent_momentum_delta_rule_ref(
        given.q, given.k, given.v, keep.log(), mu.log(), p=keep.unsqueeze(-1) * given.k, beta=given.gamma,
        eta=given.theta, scale=1.0, initial_S=start.mT, output_final_state=True,
    )  # fmt: skip
    got, (s, m) = published.momentum_delta(given.q, given.k, given.v, keep, mu, given.theta, given.gamma, start)
    same((got, s), y, state)
    same((got, m), y, momentum)


def test_ttt_linear(make, published, fla_reference):
    """What its mini-batches write, the fast bias included.

    In its outputs, the residual is the product with the query where the paper has the query, and the rates of a
    mini-batch are those of its readers, so all rates are equal here.
    """
    given = make(time=16)
    (start,), rate = given.weights(4, 4), torch.full((2, 16, 2, 1), 0.1)
    _, state, bias = fla_reference("ttt").chunk_ttt_linear_ref(
        given.q.clone(), given.k, given.v, given.gain, torch.zeros(2, 4), rate, scale=1.0, eps=1e-6, mini_batch_size=4,
        initial_state=start.mT.float(), output_final_state=True,
    )  # fmt: skip
    zeros = torch.zeros(2, 2, 4, dtype=torch.float64)
    _, (s, b) = published.ttt(given.q, given.k, given.v, rate.squeeze(-1).double(), [start], given.gain, 4, bias=zeros)
    same((b.unsqueeze(-2), s), bias, state)
