"""A gated hidden layer of a few tokens: every backend is the operations of it, one after the other."""

import pytest
import torch

from titans_build.kernels.dispatch import use_decode_kernel
from titans_build.kernels.norm_gate.decode import feed_forward, gated_output

BACKENDS = ["native", "torch"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype, atol", [(torch.float64, 1e-10), (torch.float32, 2e-3)])
@pytest.mark.parametrize("lead", [(1, 1), (1, 3), (2, 2)])
@pytest.mark.parametrize("width, hidden, out", [(16, 32, 16), (64, 176, 64)])
def test_equals_the_separate_operations(backend, dtype, atol, lead, width, hidden, out):
    torch.manual_seed(0)
    randn = lambda *shape: torch.randn(*shape, dtype=dtype)  # noqa: E731
    x, gate_up, down = randn(*lead, width), randn(2 * hidden, width), randn(out, hidden)
    with torch.no_grad():
        assert use_decode_kernel(x, gate_up, down)
    found, expected = (feed_forward(x, gate_up, down, backend=b) for b in (backend, "reference"))
    assert found.shape == (*lead, out)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=atol)
    answer, gain = randn(*lead, 4, hidden // 4), randn(4, hidden // 4)
    found, expected = (gated_output(answer, gain, x, gate_up[:hidden], down, backend=b) for b in (backend, "reference"))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=atol)


def test_when_the_decode_kernel_is_used():
    x, weight = torch.randn(1, 1, 16), torch.randn(32, 16)
    assert not use_decode_kernel(x, weight)
    with torch.no_grad():
        assert use_decode_kernel(x, weight) and use_decode_kernel(torch.randn(2, 2, 16), weight)
        assert not use_decode_kernel(torch.randn(1, 5, 16), weight) and not use_decode_kernel(x[:, :0], weight)
        assert not use_decode_kernel(x, torch.randn(32, 18)) and not use_decode_kernel(x, weight.double())
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert not use_decode_kernel(x, weight)
