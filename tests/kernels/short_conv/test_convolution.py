import pytest
import torch

from titans_build.kernels.short_conv import causal_convolution

BACKENDS = ["triton", "torch", "reference"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("time, width", [(1, 4), (2, 4), (7, 4), (5, 1)])
def test_against_the_definition(backend, time, width):
    x, weight, history = (
        torch.randn(shape, dtype=torch.float64) for shape in [(2, time, 3), (3, width), (2, width - 1, 3)]
    )
    inputs = torch.cat((history, x), dim=1)
    expected = torch.stack([sum(weight[:, i] * inputs[:, t + i] for i in range(width)) for t in range(time)], dim=1)
    torch.testing.assert_close(causal_convolution(x, weight, history, backend=backend), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("time", [1, 6])
def test_gradients(backend, time):
    x, weight, history = (
        torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in [(2, time, 3), (3, 4), (2, 3, 3)]
    )
    fast = backend == "triton"  # its interpreter is slow: along random directions
    run = lambda *given: causal_convolution(*given, backend=backend)  # noqa: E731
    assert torch.autograd.gradcheck(run, (x, weight, history), fast_mode=fast)


def test_no_history_is_zeros():
    x, weight = torch.randn(2, 5, 3), torch.randn(3, 4)
    torch.testing.assert_close(causal_convolution(x, weight), causal_convolution(x, weight, torch.zeros(2, 3, 3)))


def test_history_carries_on():
    x, weight = torch.randn(2, 9, 3, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)
    whole = causal_convolution(x, weight)
    for cut in range(3, 9):
        torch.testing.assert_close(causal_convolution(x[:, cut:], weight, x[:, cut - 3 : cut]), whole[:, cut:])


@pytest.mark.parametrize(
    "shapes, message",
    [
        ([(2, 5, 3), (4, 4), (2, 3, 3)], r"weight \[4, 4\]"),
        ([(2, 5, 3), (3, 4), (2, 4, 3)], r"history \[2, 4, 3\]: expected \[2, 3, 3\]"),
    ],
)
def test_wrong_shapes(shapes, message):
    with pytest.raises(ValueError, match=message):
        causal_convolution(*(torch.randn(shape) for shape in shapes))
