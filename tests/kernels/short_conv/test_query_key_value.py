"""Queries, keys and values: every backend against the definition, every shape the C kernel cuts differently."""

import pytest
import torch
from torch.nn import functional as F

from titans_build.kernels.norm_gate import l2_norm
from titans_build.kernels.short_conv import causal_convolution, query_key_value

BACKENDS = ["native", "triton", "torch", "reference"]
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}


def inputs(batch=2, time=7, heads=2, dim=5, width=4, dtype=torch.float64):
    torch.manual_seed(0)
    channels = 3 * heads * dim
    projected = torch.randn(batch, time, channels, dtype=dtype)
    if not width:
        return [projected, None, None]
    weight, history = torch.randn(channels, width, dtype=dtype), torch.randn(batch, width - 1, channels, dtype=dtype)
    return [projected, weight, history]


def gradients(given, heads, length=None, **options):
    """Outputs, and gradients of all inputs from cotangents that depend on the shapes alone."""
    leaves = [None if x is None else x.detach().requires_grad_() for x in given]
    outputs = [y for y in query_key_value(*leaves, heads, length, **options) if y is not None]
    torch.manual_seed(1)
    cotangents = [torch.randn(y.shape, dtype=torch.float64).to(y.dtype) for y in outputs]
    return outputs + list(torch.autograd.grad(outputs, [x for x in leaves if x is not None], cotangents))


def error(a, b):
    return float(((a.double() - b).norm() / b.norm().clamp(min=1e-30)).detach())


@pytest.mark.parametrize("backend", BACKENDS)
def test_against_the_definition(backend):
    projected, weight, history = inputs()
    q, k, v, after = query_key_value(projected, weight, history, 2, backend=backend)
    y = F.silu(causal_convolution(projected, weight, history, backend="reference")).unflatten(-1, (3, 2, 5))
    torch.testing.assert_close(torch.stack((q, k)), l2_norm(y[:, :, :2], backend="reference").movedim(2, 0))
    torch.testing.assert_close(v, y[:, :, 2])
    assert torch.equal(after, projected[:, -3:])


@pytest.mark.parametrize("backend", ["native", "torch", "reference"])
@pytest.mark.parametrize("time, width", [(1, 4), (2, 4), (6, 2), (5, 1), (4, 0)])
def test_gradients(backend, time, width):
    given = [x if x is None else x.requires_grad_() for x in inputs(1, time, 2, 3, width)]

    def run(*given):
        return [y for y in query_key_value(*given, 2, backend=backend) if y is not None]

    assert torch.autograd.gradcheck(run, given)


@pytest.mark.c_kernels
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("width", [0, 1, 2, 4, 7, 64])
@pytest.mark.parametrize("time", [1, 2, 15, 63, 100])
@pytest.mark.parametrize("heads, dim", [(1, 5), (3, 16), (2, 33)])
def test_native_equals_the_reference(time, width, heads, dim, dtype):
    given = inputs(2, time, heads, dim, width)
    expected = gradients(given, heads, backend="reference")
    found = gradients([None if x is None else x.to(dtype) for x in given], heads, backend="native")
    assert max(error(a, b) for a, b in zip(found, expected)) < TOLERANCE[dtype]


@pytest.mark.parametrize("time, heads, dim, width", [(2, 2, 33, 4), (3, 1, 6, 9), (70, 1, 16, 3)])
def test_triton_equals_the_reference(time, heads, dim, width):
    given = inputs(2, time, heads, dim, width)
    expected = gradients(given, heads, backend="reference")
    assert max(error(a, b) for a, b in zip(gradients(given, heads, backend="triton"), expected)) < 1e-10


def test_triton_takes_what_autocast_projected():
    """The results have the dtype of the weights, and the gradient that of what was projected."""
    projected, *others = inputs(2, 40, 2, 16)
    given = [projected.bfloat16(), *(x.float() for x in others)]
    expected = gradients([x.double() for x in given], 2, backend="reference")
    found = gradients(given, 2, backend="triton")
    assert [x.dtype for x in found] == [torch.float32] * 4 + [torch.bfloat16] + [torch.float32] * 2
    for i, (a, b) in enumerate(zip(found, expected)):
        assert error(a, b) < (4e-3 if i == 4 else 1e-6)


@pytest.mark.c_kernels
def test_a_long_sequence_in_parts():
    given = inputs(2, 1500, 2, 16)
    expected = gradients(given, 2, backend="reference")
    found = gradients(given, 2, backend="native")
    assert max(error(a, b) for a, b in zip(found, expected)) < 1e-10


@pytest.mark.c_kernels
def test_the_result_does_not_depend_on_the_threads():
    given, threads = inputs(2, 1500, 2, 16, dtype=torch.float32), torch.get_num_threads()
    found = []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            found.append(gradients(given, 2, backend="native"))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*found))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("width", [1, 4, 7])
def test_a_history_ends_with_its_row(backend, width):
    given, length = inputs(3, 6, width=width), torch.tensor([0, 2, 6])
    *_, after = query_key_value(*given, 2, length, backend=backend)
    for row, count in enumerate(length.tolist()):
        past = torch.cat((given[2][row], given[0][row, :count]))
        assert torch.equal(after[row], past[len(past) - width + 1 :])
    expected = gradients(given, 2, length, backend="reference")
    assert all(error(a, b) < 1e-10 for a, b in zip(gradients(given, 2, length, backend=backend), expected))


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_strides(backend):
    projected, weight, history = inputs()
    projected, history = projected[:1].expand(2, -1, -1), history[:, :1].expand(2, 3, -1)
    expected = gradients([projected, weight, history], 2, backend="reference")
    wide = torch.zeros(2, 7, 64, dtype=torch.float64)
    wide[..., 3:33] = projected
    strided = [wide[..., 3:33], weight.t().contiguous().t(), history]
    assert all(error(a, b) < 1e-10 for a, b in zip(gradients(strided, 2, backend=backend), expected))
    turned = [projected.mT.contiguous().mT, weight, history.mT.contiguous().mT]
    assert all(error(a, b) < 1e-10 for a, b in zip(gradients(turned, 2, backend=backend), expected))


@pytest.mark.parametrize("backend", BACKENDS)
def test_zeros_are_finite_and_no_tokens_are_none(backend):
    given = [torch.zeros_like(x) for x in inputs()]
    assert all(x.isfinite().all() for x in gradients(given, 2, backend=backend))
    empty = [given[0][:, :0], *inputs()[1:]]
    q, _, _, after = query_key_value(*empty, 2, backend=backend)
    assert q.shape == (2, 0, 2, 5) and torch.equal(after, empty[2])


@pytest.mark.c_kernels
def test_unused_outputs_have_no_gradient():
    given = [x.requires_grad_() for x in inputs()]
    found, expected = [
        torch.autograd.grad(query_key_value(*given, 2, backend=backend)[1].sum(), given)
        for backend in ("native", "reference")
    ]
    assert all(error(a, b) < 1e-10 for a, b in zip(found, expected))


def test_the_history_is_no_view():
    given = inputs(time=50)
    for backend in ("auto", "torch"):
        *_, after = query_key_value(*given, 2, backend=backend)
        assert after.untyped_storage().nbytes() == after.nbytes


def test_half_precision_takes_another_path():
    given = [x.bfloat16() for x in inputs()]
    assert query_key_value(*given, 2)[0].dtype == torch.bfloat16


def test_wrong_shapes():
    projected, weight, history = inputs()
    with pytest.raises(ValueError, match=r"projected \[2, 7, 30\]: expected \[batch, time, 3 \* 4 \* dim\]"):
        query_key_value(projected, weight, history, 4)
    with pytest.raises(ValueError, match=r"weight \[29, 4\]: expected \[30, width\]"):
        query_key_value(projected, weight[1:], history, 2)
    with pytest.raises(ValueError, match=r"history \[2, 2, 30\]: expected \[2, 3, 30\]"):
        query_key_value(projected, weight, history[:, 1:], 2)
    with pytest.raises(ValueError, match="history None"):
        query_key_value(projected, weight, None, 2)
