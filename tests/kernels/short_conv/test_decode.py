"""One token on its way into a memory: every backend is the operations of it, one after the other."""

import pytest
import torch

from titans_build.kernels.short_conv.decode import Layers, memory_inputs, memory_query

BACKENDS = ["native", "torch"]


def tensors(asked, given, backend):
    if asked == "query":
        return [memory_query(*given, backend=backend)]
    q, k, v, gates, history = memory_inputs(*given, backend=backend)
    return [q, k, v, *gates, *([] if history is None else [history])]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype, atol", [(torch.float64, 1e-10), (torch.float32, 1e-4)])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("taps", [0, 1, 2, 4])
@pytest.mark.parametrize("gates", [1, 3])
@pytest.mark.parametrize("asked", ["all", "all, hard", "query"])
def test_equals_the_separate_operations(backend, dtype, atol, batch, taps, gates, asked):
    torch.manual_seed(0)
    randn = lambda *shape: torch.randn(*shape, dtype=dtype)  # noqa: E731
    heads, dim, width = 4, 12, 32
    channels = 3 * heads * dim
    x, weight = randn(batch, 1, width), randn(channels, width)
    convolution = randn(channels, taps) if taps else None
    history = randn(batch, taps - 1, channels) if taps else None
    if asked != "query":
        controls, bias = randn(gates * heads, width), randn(gates * heads)
        layers = Layers(weight, convolution, heads, controls, bias, 0.1, asked == "all, hard")
    else:
        layers = Layers(weight[: heads * dim], convolution, heads)
    given = x, history, layers
    watched = [t for t in (x, history, *layers) if isinstance(t, torch.Tensor)]
    before = [t.clone() for t in watched]
    found, expected = (tensors(asked, given, b) for b in (backend, "reference"))
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape
        torch.testing.assert_close(a, b, rtol=1e-5, atol=atol)
    assert all(torch.equal(a, b) for a, b in zip(before, watched))


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_hard_gates_are_lines_cut_off_at_exactly_0_and_1(backend, dtype):
    bias = torch.tensor([-1e9, -3.0, -2.9, 0.0, 2.9, 3.0, 1e9, float("nan")], dtype=dtype)
    x, weight = torch.randn(1, 1, 16, dtype=dtype), torch.randn(3 * 8 * 2, 16, dtype=dtype)
    layers = Layers(weight, None, 8, torch.zeros(8, 16, dtype=dtype), bias, 1.0, True)
    found = memory_inputs(x, None, layers, backend=backend).gates[0].flatten()
    assert found[:2].tolist() == [0.0, 0.0] and found[5:7].tolist() == [1.0, 1.0] and found[7].isnan()
    torch.testing.assert_close(found[2:5], bias[2:5] / 6 + 0.5)
