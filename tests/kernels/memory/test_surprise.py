"""The surprise of a token is the norm of the gradient that autograd takes."""

import pytest
import torch

from titans_build.kernels.memory.reference import memory_network
from titans_build.kernels.memory.surprise import surprise_at


@pytest.mark.parametrize("depth", [1, 2, 4])
@pytest.mark.parametrize("activation", ["identity", "relu", "silu", "gelu"])
@pytest.mark.parametrize("norm", [True, False])
def test_it_is_the_norm_of_the_gradient(memory_case, depth, activation, norm):
    case = memory_case(time=5, heads=3, depth=depth, norm=norm)
    weights = tuple(w.detach().requires_grad_() for w in case.state.weights)
    with torch.no_grad():
        found = surprise_at(case.k, case.v, weights, activation, case.norm)
    for t in range(5):
        miss = memory_network(weights, case.k[:, t], activation, case.norm) - case.v[:, t]
        error = miss.square().sum(-1)
        torch.testing.assert_close(found.error[:, t], error.detach(), rtol=1e-12, atol=1e-12)
        # rows and heads have weights of their own: one gradient is that of each
        square = sum(g.square().sum((-2, -1)) for g in torch.autograd.grad(error.sum(), weights))
        torch.testing.assert_close(found.norm[:, t], square.sqrt(), rtol=1e-11, atol=1e-12)


def test_unequal_widths_and_no_tokens(memory_case):
    case = memory_case(d_in=3, d_out=5, norm=False)
    with torch.no_grad():
        assert surprise_at(case.k, case.v, case.state.weights, "gelu").norm.shape == (2, 14, 2)
        assert surprise_at(case.k[:, :0], case.v[:, :0], case.state.weights, "gelu").error.shape == (2, 0, 2)
