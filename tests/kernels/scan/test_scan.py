"""The parallel scan is the recurrence, gradients included, and gates of exactly 0 and 1 are no special case."""

import pytest
import torch

from titans_build.kernels.scan import linear_scan


def given(time, *, seed=0):
    generator = torch.Generator().manual_seed(seed)
    b, start = (torch.randn(2, *more, 3, 4, generator=generator, dtype=torch.float64) for more in ((time,), ()))
    return torch.rand(2, time, 3, 1, generator=generator, dtype=torch.float64), b, start


@pytest.mark.parametrize("time", [1, 2, 3, 7, 8, 33])
def test_it_is_the_recurrence(time):
    tensors = [x.requires_grad_() for x in given(time)]
    with torch.no_grad():
        tensors[0][:, ::3], tensors[0][1, 1::4] = 0.0, 1.0
    results = []
    for backend in ("auto", "reference"):
        x = linear_scan(*tensors, backend=backend)
        results.append((x, *torch.autograd.grad((x * x.detach().cos()).sum(), tensors)))
    for mine, theirs in zip(*results):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


def test_cut_anywhere():
    a, b, start = given(13)
    whole = linear_scan(a, b, start)
    for cut in range(14):
        first = linear_scan(a[:, :cut], b[:, :cut], start)
        rest = linear_scan(a[:, cut:], b[:, cut:], first[:, -1] if cut else start)
        torch.testing.assert_close(torch.cat([first, rest], dim=1), whole)


def test_momentum_and_weights_of_a_chunk():
    """Two scans are the memory's own recurrence with gradients taken at the start of the chunk (equations 9-17)."""
    from titans_build.kernels.memory import MemoryState, titans_memory

    generator = torch.Generator().manual_seed(1)
    q, k, v = torch.randn(3, 2, 11, 2, 5, generator=generator, dtype=torch.float64)
    theta, eta, alpha = torch.rand(3, 2, 11, 2, generator=generator, dtype=torch.float64)
    w = torch.randn(2, 2, 5, 5, generator=generator, dtype=torch.float64)
    y, state = titans_memory(q, k, v, theta, eta, alpha, MemoryState.fresh((w,)), chunk=11, activation="identity")
    error = torch.einsum("bhoi,bthi->btho", w, k) - v
    steps = -2 * theta[..., None, None] * error.unsqueeze(-1) * k.unsqueeze(-2)
    momentum = linear_scan(eta[..., None, None], steps)
    weights = linear_scan(1 - alpha[..., None, None], momentum, w)
    torch.testing.assert_close(torch.einsum("bthoi,bthi->btho", weights, q), y)
    torch.testing.assert_close(momentum[:, -1], state.momentum[0])


@pytest.mark.parametrize(
    "shapes", [((2, 5), (2, 5, 3), None), ((2, 4, 3), (2, 5, 3), None), ((2, 5, 3), (2, 5, 3), (3,))]
)
def test_shapes_that_do_not_fit(shapes):
    gates, inputs, start = (None if shape is None else torch.zeros(shape) for shape in shapes)
    with pytest.raises(ValueError, match="expected"):
        linear_scan(gates, inputs, start)


def test_no_time_at_all():
    a, b, start = given(0)
    assert linear_scan(a, b, start).shape == (2, 0, 3, 4)
