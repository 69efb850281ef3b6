import pytest
import torch

from titans_build.kernels.normalisation import l2_norm, rms_norm

BACKENDS = ["torch", "reference"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("gain", [None, (6,), (3, 6)])
def test_rms_norm_against_the_definition(backend, gain):
    x = torch.randn(2, 5, 3, 6, dtype=torch.float64)
    gain = None if gain is None else torch.randn(gain, dtype=torch.float64)
    expected = x / (x.pow(2).sum(-1, keepdim=True) / 6 + 1e-3).sqrt() * (1 if gain is None else gain)
    torch.testing.assert_close(rms_norm(x, gain, 1e-3, backend=backend), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_l2_norm_against_the_definition(backend):
    x = torch.randn(2, 5, 6, dtype=torch.float64)
    expected = x / (x.pow(2).sum(-1, keepdim=True) + 1e-3).sqrt()
    torch.testing.assert_close(l2_norm(x, 1e-3, backend=backend), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients(backend):
    x, gain = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in [(2, 3, 4), (3, 4)])
    assert torch.autograd.gradcheck(lambda x, g: rms_norm(x, g, backend=backend), (x, gain))
    assert torch.autograd.gradcheck(lambda x: l2_norm(x, backend=backend), (x,))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("norm", [rms_norm, l2_norm])
def test_zero_is_finite(norm, backend):
    x = torch.zeros(2, 4, requires_grad=True)
    y = norm(x, backend=backend)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(y, torch.zeros(2, 4)) and gradient.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("norm", [rms_norm, l2_norm])
def test_half_precision_is_normalised_wide(norm, backend):
    # the sum of squares of 300 * 64 values overflows float16 and drowns in bfloat16
    for dtype in (torch.float16, torch.bfloat16):
        x = (torch.randn(3, 64) * 300).to(dtype)
        y = norm(x, backend=backend)
        assert y.dtype == dtype
        torch.testing.assert_close(y.float(), norm(x.float()), rtol=1e-2, atol=1e-3)
