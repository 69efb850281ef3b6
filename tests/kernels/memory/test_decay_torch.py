"""Products of gates over intervals: exact at 0 and 1, gradients included."""

import torch

from titans_build.kernels.memory.decay_torch import chunk_decay, interval_products


def test_products_are_products():
    factors = torch.tensor([0.5, 0.0, 1.0, 0.25], dtype=torch.float64)
    products, start = interval_products(factors)
    for t in range(4):
        assert start[t] == factors[: t + 1].prod()
        for r in range(4):
            assert products[t, r] == (factors[r + 1 : t + 1].prod() if r <= t else 0)


def test_gradients_at_the_end_points():
    factors = torch.tensor([[0.5, 0.0, 1.0, 0.25, 0.0]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(interval_products, factors)


def test_an_empty_slot_changes_nothing():
    theta, eta, alpha = torch.tensor([[0.1, 0.0]]), torch.tensor([[0.5, 1.0]]), torch.tensor([[0.2, 0.0]])
    one = chunk_decay(theta[:, :1], eta[:, :1], alpha[:, :1], None, True)
    two = chunk_decay(theta, eta, alpha, torch.tensor([[1.0, 0.0]]), True)
    assert torch.equal(two.mix, one.mix) and torch.equal(two.write[:, :1], one.write) and not two.write[:, 1].any()
