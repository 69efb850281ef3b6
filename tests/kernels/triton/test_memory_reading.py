"""Reading at fixed weights on the Triton kernel, in Triton's interpreter, against the oracle."""

import itertools

import pytest
import torch
from torch.testing import assert_close

from titans_build.kernels.dispatch import BackendError
from titans_build.kernels.memory import read_memory
from titans_build.kernels.memory.reading import READING

pytest.importorskip("triton")
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")


def inputs(time=5, d_in=8, d_out=8, hidden=20, depth=2, batch=2, heads=2, dtype=torch.float64):
    g = torch.Generator().manual_seed(0)
    randn = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)  # noqa: E731
    widths = [d_in, *[hidden] * (depth - 1), d_out]
    weights = [randn(batch, heads, o, i) * i**-0.5 for i, o in itertools.pairwise(widths)]
    return [randn(batch, time, heads, d_in), randn(heads, d_out), *weights]


def results(leaves, backend, norm=True, **options):
    leaves = [x.detach().requires_grad_() for x in leaves]
    q, gain, *weights = leaves
    y = read_memory(q, tuple(weights), norm=gain if norm else None, backend=backend, **options)
    g = torch.Generator().manual_seed(1)
    loss = (y * torch.randn(y.shape, generator=g, dtype=torch.float64).to(y.dtype)).sum()
    with torch.no_grad():
        plain = read_memory(q, tuple(weights), norm=gain if norm else None, backend=backend, **options)
    assert_close(plain, y.detach())
    return [y.detach(), *(x for x in torch.autograd.grad(loss, leaves, allow_unused=True) if x is not None)]


def agree(leaves, tolerance=1e-10, **options):
    exact = results([x.double() for x in leaves], "reference", **options)
    for a, b in zip(results(leaves, "triton", **options), exact, strict=True):
        assert (a.double() - b).norm() <= tolerance * b.norm()


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("activation", ["identity", "relu", "silu", "gelu"])
def test_against_the_oracle(depth, norm, activation):
    agree(inputs(depth=depth), norm=norm, activation=activation)


@pytest.mark.parametrize("time", [1, 15, 63, 100])
def test_lengths(time):
    agree(inputs(time=time, batch=1))


@pytest.mark.parametrize("d_in, d_out, hidden", [(16, 16, 40), (17, 5, 3), (3, 20, 64), (33, 33, 16)])
def test_widths(d_in, d_out, hidden):
    agree(inputs(d_in=d_in, d_out=d_out, hidden=hidden), norm=d_in == d_out)


def test_strides():
    q, gain, *weights = inputs()
    expected = results([q, gain, *weights], "triton")
    for other in (torch.stack([q, q], -1)[..., 0], q.transpose(1, 2).contiguous().transpose(1, 2)):
        found = results([other, gain, *(w.mT.contiguous().mT for w in weights)], "triton")
        assert torch.equal(found[0], expected[0])
        for a, b in zip(found, expected):
            assert_close(a, b)


@pytest.mark.parametrize("given, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)])
def test_dtypes(given, tolerance):
    """Queries in half precision; the weights are float32 at least."""
    q, *rest = inputs(d_in=16, d_out=16, hidden=32, dtype=torch.float32)
    agree([q.to(given), *rest], tolerance)


def test_it_says_what_it_does_not_take():
    facts = dict(device="cpu", dtype=torch.float32)
    for wrong, reason in (
        (dict(layers=3), "one or two layers, not 3"),
        (dict(width=256), "heads of up to 128 numbers, not 256"),
    ):
        with pytest.raises(BackendError, match=reason):
            READING.choose("triton", **{**facts, **wrong})
    assert "asked for by name" in READING.backends["triton"].refuse(**facts)
