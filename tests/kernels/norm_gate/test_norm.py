import pytest
import torch

from titans_build.kernels.norm_gate import l2_norm, rms_norm

BACKENDS = ["native", "triton", "torch", "reference"]


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
    fast = backend == "triton"  # its interpreter is slow: along random directions
    assert torch.autograd.gradcheck(lambda x, g: rms_norm(x, g, backend=backend), (x, gain), fast_mode=fast)
    assert torch.autograd.gradcheck(lambda x: l2_norm(x, backend=backend), (x,), fast_mode=fast)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("backend", ["auto", "triton", "torch", "reference"])
@pytest.mark.parametrize(
    "kinds", [(torch.bfloat16, torch.float32), (torch.half, torch.double), (torch.float, torch.half)]
)
def test_a_gain_of_another_dtype(backend, kinds):
    x, gain = (torch.randn(shape).to(kind) for shape, kind in zip([(3, 6), (6,)], kinds))
    always = torch.is_warn_always_enabled()
    torch.set_warn_always(True)  # PyTorch warns of this once in a process
    try:
        y = rms_norm(x, gain, backend=backend)
    finally:
        torch.set_warn_always(always)
    exact = rms_norm(x.double(), gain.double(), backend="reference")
    torch.testing.assert_close(y, exact.to(x.dtype))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("norm", [rms_norm, l2_norm])
def test_zero_is_finite(norm, backend):
    x = torch.zeros(2, 4, requires_grad=True)
    y = norm(x, backend=backend)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(y, torch.zeros(2, 4)) and gradient.isfinite().all()


@pytest.mark.parametrize("backend", ["auto", "torch", "reference"])
@pytest.mark.parametrize("norm", [rms_norm, l2_norm])
def test_half_precision_is_normalized_wide(norm, backend):
    # the sum of squares of 300 * 64 values overflows float16 and drowns in bfloat16
    for dtype in (torch.float16, torch.bfloat16):
        x = (torch.randn(3, 64) * 300).to(dtype)
        y = norm(x, backend=backend)
        assert y.dtype == dtype
        torch.testing.assert_close(y.float(), norm(x.float()), rtol=1e-2, atol=1e-3)


def gradients(norm, given, **options):
    leaves = [x.detach().requires_grad_() for x in given]
    y = norm(*leaves, **options)
    torch.manual_seed(1)
    return [y, *torch.autograd.grad(y, leaves, torch.randn(y.shape, dtype=torch.float64).to(y.dtype))]


def error(a, b):
    return float(((a.double() - b).norm() / b.norm().clamp(min=1e-30)).detach())


@pytest.mark.c_kernels
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize("time, heads, dim", [(0, 2, 8), (1, 1, 64), (15, 3, 17), (63, 2, 5), (3000, 2, 16)])
def test_native_equals_the_reference(time, heads, dim, dtype, tolerance):
    torch.manual_seed(0)
    x, gain = torch.randn(2, time, heads, dim, dtype=torch.float64), torch.randn(heads, dim, dtype=torch.float64)
    for norm, given in ((rms_norm, (x, gain)), (rms_norm, (x, gain[0])), (rms_norm, (x,)), (l2_norm, (x,))):
        expected = gradients(norm, given, backend="reference")
        found = gradients(norm, [part.to(dtype) for part in given], backend="native")
        assert max(error(a, b) for a, b in zip(found, expected)) < tolerance


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_strides_and_gains(backend):
    x = torch.randn(2, 5, 3, 6, dtype=torch.float64)
    layouts = [x.transpose(1, 2).contiguous().transpose(1, 2), x.mT.contiguous().mT, torch.cat((x, x), -1)[..., :6]]
    for gain in (torch.randn(3, 6), torch.randn(6), torch.randn(1, 6), torch.randn(3, 1), torch.randn(5, 1, 6)):
        expected = gradients(rms_norm, (x, gain.double()), backend="reference")
        for layout in [x, *layouts]:
            found = gradients(rms_norm, (layout, gain.double()), backend=backend)
            assert all(error(a, b) < 1e-10 for a, b in zip(found, expected))
    row = torch.randn(1, 5, 6, dtype=torch.float64).expand(4, 5, 6)
    assert error(l2_norm(row, backend=backend), l2_norm(row.clone(), backend="reference")) < 1e-12
    wide = rms_norm(row[0, 0], torch.randn(3, 6, dtype=torch.float64), backend=backend)  # the gain has more dimensions
    assert wide.shape == (3, 6)
