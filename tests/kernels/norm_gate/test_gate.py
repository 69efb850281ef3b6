import pytest
import torch
from torch.nn import functional as F

from titans_build.kernels.norm_gate import gate, gated_norm, swiglu
from titans_build.kernels.norm_gate.torch_backend import silu_gate

BACKENDS = ["native", "triton", "torch", "reference"]
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
OPERATIONS = {
    gate: lambda time, heads, dim: [(2, time, dim), (2, time, dim), (dim,), (dim,)],
    gated_norm: lambda time, heads, dim: [(2, time, heads, dim), (heads, dim), (2, time, heads * dim)],
    swiglu: lambda time, heads, dim: [(2, time, 2 * dim)],
}
each = pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.__name__)


def inputs(operation=gate, time=3, heads=2, dim=4, **options):
    return [torch.randn(shape, dtype=torch.float64, **options) for shape in OPERATIONS[operation](time, heads, dim)]


def gradients(operation, given, **options):
    leaves = [x.detach().requires_grad_() for x in given]
    y = operation(*leaves, **options)
    torch.manual_seed(1)
    return [y, *torch.autograd.grad(y, leaves, torch.randn(y.shape, dtype=torch.float64).to(y.dtype))]


def error(a, b):
    return float(((a.double() - b).norm() / b.norm().clamp(min=1e-30)).detach())


def rms(x, gain):
    return x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * gain


@pytest.mark.parametrize("backend", BACKENDS)
def test_against_the_definition(backend):
    a, b, gain_a, gain_b = inputs()
    torch.testing.assert_close(
        gate(a, b, gain_a, gain_b, backend=backend),
        rms(a, gain_a) / (1 + torch.exp(-rms(b, gain_b))),
        rtol=0,
        atol=1e-12,
    )
    y, gain, g = inputs(gated_norm)
    expected = rms(y, gain).flatten(-2) * g / (1 + torch.exp(-g))
    torch.testing.assert_close(gated_norm(y, gain, g, backend=backend), expected, rtol=0, atol=1e-12)
    (x,) = inputs(swiglu)
    torch.testing.assert_close(swiglu(x, backend=backend), F.silu(x[..., :4]) * x[..., 4:], rtol=0, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@each
def test_gradients(operation, backend):
    given = inputs(operation, requires_grad=True)
    fast = backend == "triton"  # its interpreter is slow: along random directions
    assert torch.autograd.gradcheck(lambda *a: operation(*a, backend=backend), given, fast_mode=fast)


@pytest.mark.c_kernels
@each
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("time, heads, dim", [(0, 2, 8), (1, 1, 64), (15, 3, 17), (63, 2, 5), (3000, 2, 16)])
def test_native_equals_the_reference(operation, time, heads, dim, dtype):
    torch.manual_seed(0)
    given = inputs(operation, time, heads, dim)
    expected = gradients(operation, given, backend="reference")
    found = gradients(operation, [x.to(dtype) for x in given], backend="native")
    assert max(error(a, b) for a, b in zip(found, expected)) < TOLERANCE[dtype]


@pytest.mark.parametrize("backend", BACKENDS)
@each
def test_any_strides_and_zeros(operation, backend):
    given = inputs(operation)
    wide = [torch.cat((x, x), -1)[..., : x.shape[-1]] for x in given]
    tall = [x[:1].expand_as(x) for x in given]
    turned = [x.mT.contiguous().mT if x.dim() > 1 else x for x in given]
    for strided, dense in ((wide, given), (tall, [x.clone() for x in tall]), (turned, given)):
        expected = gradients(operation, dense, backend="reference")
        assert all(
            error(a, b) < 1e-10 for a, b in zip(gradients(operation, strided, backend=backend), expected, strict=True)
        )
    assert all(x.isfinite().all() for x in gradients(operation, [x * 0 for x in given], backend=backend))


@pytest.mark.c_kernels
@each
def test_the_result_does_not_depend_on_the_threads(operation):
    given, threads = [x.float() for x in inputs(operation, 3000, 2, 16)], torch.get_num_threads()
    found = []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            found.append(gradients(operation, given, backend="native"))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*found))


def test_wrong_shapes():
    a, b, gain_a, gain_b = inputs()
    with pytest.raises(ValueError, match=r"a \[2, 3, 4\] and b \[2, 2, 4\]"):
        gate(a, b[:, 1:], gain_a, gain_b)
    with pytest.raises(ValueError, match=r"gain_b \[3\]: expected \[4\]"):
        gate(a, b, gain_a, gain_b[1:])
    y, gain, g = inputs(gated_norm)
    with pytest.raises(ValueError, match=r"gain \[1, 4\]: expected \[2, 4\]"):
        gated_norm(y, gain[1:], g)
    with pytest.raises(ValueError, match=r"g \[2, 2, 8\]: expected \[2, 3, 8\]"):
        gated_norm(y, gain, g[:, 1:])
    with pytest.raises(ValueError, match=r"x \[2, 3, 7\]: expected"):
        swiglu(torch.zeros(2, 3, 7))


def test_silu_gate_and_its_gradient() -> None:
    torch.manual_seed(0)
    y, g = (torch.randn(3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.allclose(silu_gate(y, g), y * torch.nn.functional.silu(g))
    assert torch.autograd.gradcheck(silu_gate, (y, g))
    mixed = silu_gate(y.detach().float(), g.detach().bfloat16())
    assert mixed.dtype == torch.float32


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize(
    "operation, narrow, result", [(gate, (0, 1), torch.bfloat16), (gate, (1,), None), (gated_norm, (2,), None)]
)
def test_mixed_dtypes_as_under_autocast(operation, narrow, result, backend):
    """Gains are float32, and so are the outputs of a memory; what a linear layer returns is bfloat16."""
    given = [x.to(torch.bfloat16 if i in narrow else torch.float32) for i, x in enumerate(inputs(operation))]
    found, expected = (
        gradients(operation, x, backend=name)
        for x, name in ((given, backend), ([x.double() for x in given], "reference"))
    )
    assert [x.dtype for x in found] == [result or torch.float32, *(x.dtype for x in given)]
    assert max(error(a, b) for a, b in zip(found, expected)) < 0.02
