"""Queries without learning: every backend against the definition, every shape the C kernel cuts differently."""

import pytest
import torch

from titans_build.kernels.short_conv import query, query_key_value

BACKENDS = ["native", "triton", "torch", "reference"]
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}


def inputs(batch=2, time=7, heads=2, dim=5, width=4):
    torch.manual_seed(0)
    channels = heads * dim
    # as they come: a stretch of a longer sequence
    projected = torch.randn(batch, time + 3, channels, dtype=torch.float64)[:, 2:-1]
    if not width:
        return [projected, None, None]
    weight = torch.randn(3 * channels, width, dtype=torch.float64)
    return [projected, weight, torch.randn(batch, width - 1, 3 * channels, dtype=torch.float64)]


def gradients(given, heads, backend):
    """The queries, and gradients of all inputs from a cotangent that depends on the shape alone."""
    leaves = [None if x is None else x.detach().requires_grad_() for x in given]
    y = query(*leaves, heads, backend=backend)
    torch.manual_seed(1)
    cotangent = torch.randn(y.shape, dtype=torch.float64).to(y.dtype)
    return [y, *torch.autograd.grad(y, [x for x in leaves if x is not None], cotangent)]


def error(a, b):
    return float(((a.double() - b).norm() / b.norm().clamp(min=1e-30)).detach())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("width", [0, 1, 4])
def test_each_token_comes_right_after_the_history(backend, width):
    projected, weight, history = inputs(width=width)
    got = query(projected, weight, history, 2, backend=backend)
    for t in range(projected.shape[1]):
        every = projected[:, t : t + 1].repeat(1, 1, 3)  # its key and value, which nobody looks at
        expected = query_key_value(every, weight, history, 2, backend="reference")[0]
        torch.testing.assert_close(got[:, t : t + 1], expected)


@pytest.mark.parametrize("backend", ["native", "torch", "reference"])
@pytest.mark.parametrize("time, width", [(1, 4), (6, 2), (5, 1), (4, 0)])
def test_gradients(backend, time, width):
    given = [x if x is None else x.requires_grad_() for x in inputs(1, time, 2, 3, width)]
    assert torch.autograd.gradcheck(lambda *given: query(*given, 2, backend=backend), given)


@pytest.mark.c_kernels
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("width", [0, 1, 2, 4, 64])
@pytest.mark.parametrize("time", [1, 63, 1500])
@pytest.mark.parametrize("heads, dim", [(1, 5), (3, 16), (2, 33)])
def test_native_equals_the_reference(time, width, heads, dim, dtype):
    given = inputs(2, time, heads, dim, width)
    expected = gradients(given, heads, "reference")
    found = gradients([None if x is None else x.to(dtype) for x in given], heads, "native")
    assert max(error(a, b) for a, b in zip(found, expected)) < TOLERANCE[dtype]


@pytest.mark.parametrize("time, heads, dim, width", [(2, 2, 33, 4), (3, 1, 6, 9), (70, 1, 16, 3)])
def test_triton_equals_the_reference(time, heads, dim, width):
    given = inputs(2, time, heads, dim, width)
    expected = gradients(given, heads, "reference")
    assert max(error(a, b) for a, b in zip(gradients(given, heads, "triton"), expected)) < 1e-10


@pytest.mark.c_kernels
def test_threads_change_no_bit():
    given, threads = inputs(1, 1500, 2, 33), torch.get_num_threads()
    found = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(gradients(given, 2, "native"))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other))


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda p, w, h: (p[..., :9], w, h), "projected [2, 7, 9]: expected [batch, time, 2 * dim]"),
        (lambda p, w, h: (p, w[:9], h), "weight [9, 4]: expected [at least 10, width >= 1]"),
        (lambda p, w, h: (p, w, h[:1]), "history [1, 3, 30]: expected [2, 3, 30]"),
        (lambda p, w, h: (p, w, None), "history None: expected [2, 3, 30]"),
    ],
)
def test_errors_name_the_argument(change, words):
    with pytest.raises(ValueError) as raised:
        query(*change(*inputs()), 2)
    assert words in str(raised.value)
