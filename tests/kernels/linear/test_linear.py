"""A projection is ``linear``, however many tokens it is given and wherever it runs."""

import pytest
import torch
from torch.nn.functional import linear

from titans_build.kernels.dispatch import BackendError, table
from titans_build.kernels.linear import project


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


@pytest.mark.c_kernels
@pytest.mark.parametrize("lead, width, out", [((128,), 128, 128), ((2, 150), 200, 131)])
@pytest.mark.parametrize("biased", [False, True])
def test_large_float32_products_are_the_c_kernel_s(lead, width, out, biased):
    torch.manual_seed(0)
    exact = [torch.randn(shape, dtype=torch.float64) for shape in ((*lead, width), (out, width), (out,))][: 2 + biased]
    given, wide = ([x.to(dtype).requires_grad_() for x in exact] for dtype in (torch.float32, torch.float64))
    y, expected = project(*given), linear(*wide)
    assert torch.equal(y, project(*given, *[None] * (not biased), backend="native"))
    along = torch.randn(y.shape, dtype=torch.float64)
    pairs = [(y, expected)]
    first = [
        torch.autograd.grad(z, of, along.to(z.dtype), create_graph=True) for z, of in ((y, given), (expected, wide))
    ]
    pairs += zip(*first)
    # of gradients' gradients: those of x and weight depend on the other
    second = [torch.autograd.grad(g[0].sin().sum() + g[1].sin().sum(), of[:2]) for g, of in zip(first, (given, wide))]
    pairs += zip(*second)
    for found, true in pairs:
        assert float((found.double() - true).detach().norm() / true.detach().norm()) < 1e-5


def test_small_products_are_not_the_c_kernel_s():
    with pytest.raises(BackendError, match="at least 128 tokens"):
        project(torch.randn(127, 128), torch.randn(128, 128), backend="native")
