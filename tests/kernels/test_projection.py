"""A projection is ``linear``, however many tokens it is given and wherever it runs."""

import pytest
import torch
from torch.nn.functional import linear

from titans_build.kernels.dispatch import table
from titans_build.kernels.projection import project


@pytest.mark.parametrize("lead", [(1,), (2,), (1, 1), (1, 2), (2, 1), (3, 1), (2, 5), (0, 4)])
@pytest.mark.parametrize("out, width", [(6, 4), (7, 4), (512, 96)])
@pytest.mark.parametrize("biased", [False, True])
def test_is_linear(lead, out, width, biased):
    x, weight = torch.randn(*lead, width), torch.randn(out, width)
    bias = torch.randn(out) if biased else None
    y = project(x, weight, bias)
    assert y.shape == (*lead, out)
    torch.testing.assert_close(y, linear(x, weight, bias), rtol=1e-5, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("tokens", [1, 2, 3, 4])
@pytest.mark.parametrize("out", [12, 512])
@pytest.mark.parametrize("dtype, atol", [(torch.float64, 1e-10), (torch.float32, 1e-4)])
def test_every_backend(tokens, out, dtype, atol):
    x, weight, bias = (torch.randn(shape, dtype=dtype) for shape in ((1, tokens, 96), (out, 96), (out,)))
    backends = [row.backend for row in table("cpu", dtype) if row.operation == "projection" and row.available]
    assert {"torch", "reference"} <= set(backends)
    for backend in backends:
        y = project(x, weight, bias, backend=backend)
        torch.testing.assert_close(y, linear(x, weight, bias), rtol=1e-5, atol=atol)


@pytest.mark.parametrize("lead", [(1, 1), (1, 2)])
def test_views_of_larger_tensors(lead):
    x = torch.randn(*lead, 2, 8)[..., 1, :]
    weight = torch.randn(9, 8)[1:7]
    torch.testing.assert_close(project(x, weight), linear(x, weight))
    stream = torch.randn(1, 4, 8)[:, 1::2]
    torch.testing.assert_close(project(stream, weight), linear(stream, weight))
    torch.testing.assert_close(project(x, torch.randn(8, 6).t()).shape, linear(x, torch.randn(8, 6).t()).shape)


def test_inputs_are_left_alone():
    x, weight, bias = torch.randn(1, 1, 8), torch.randn(6, 8), torch.randn(6)
    before = [tensor.clone() for tensor in (x, weight, bias)]
    project(x, weight, bias)
    assert all(torch.equal(a, b) for a, b in zip(before, (x, weight, bias)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes(dtype):
    x, weight = torch.randn(1, 1, 8, dtype=dtype), torch.randn(6, 8, dtype=dtype)
    assert torch.equal(project(x, weight), linear(x, weight))


def test_gradients_and_autocast():
    x, weight, bias = (torch.randn(shape, requires_grad=True) for shape in ((1, 1, 8), (6, 8), (6,)))
    for given in ((x, weight, bias), (x.detach(), weight, bias), (x, weight.detach(), None)):
        assert project(*given).requires_grad
    only_bias = project(x.detach(), weight.detach(), bias)
    (gradient,) = torch.autograd.grad(only_bias.sum(), bias)
    assert torch.equal(gradient, torch.ones(6))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert project(x.detach(), weight.detach()).dtype == torch.bfloat16
