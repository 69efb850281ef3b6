"""The C kernels at the sizes they are made for, and at the edges of what they are given."""

import itertools

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from titans_build.kernels.cpu_runtime import library
from titans_build.kernels.dispatch import BackendError
from titans_build.kernels.memory import MemoryState, titans_memory

UNBUILT = library.refuse(device="cpu", dtype=torch.float32)
pytestmark = pytest.mark.skipif(UNBUILT is not None, reason=f"C kernels: {UNBUILT}")


def inputs(time, width=64, hidden=256, depth=2, batch=1, heads=2, d_out=None, dtype=torch.float32, seed=0):
    """``(q, k, v, theta, eta, alpha, gain, weights)`` of a memory that is well conditioned."""
    g = torch.Generator().manual_seed(seed)
    randn = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    rand = lambda *shape: torch.rand(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    d_out = d_out or width
    q, k = (torch.nn.functional.normalize(randn(batch, time, heads, width), dim=-1) for _ in "qk")
    v = randn(batch, time, heads, d_out)
    theta, eta, alpha = (scale * rand(batch, time, heads) for scale in (0.02, 0.9, 0.05))
    widths = [width, *[hidden] * (depth - 1), d_out]
    weights = [randn(batch, heads, out, in_) for in_, out in itertools.pairwise(widths)]
    return [x.to(dtype).requires_grad_() for x in (q, k, v, theta, eta, alpha, 1 + 0.1 * randn(heads, d_out), *weights)]


def results(leaves, dtype, **options):
    leaves = [x.detach().to(dtype).requires_grad_() for x in leaves]
    q, k, v, theta, eta, alpha, gain, *weights = leaves
    gain = gain if options.pop("norm", True) else None
    state = MemoryState.fresh(tuple(weights), tuple(0.1 * w.detach().flip(-1) for w in weights))
    y, state = titans_memory(q, k, v, theta, eta, alpha, state, norm=gain, **options)
    outputs = [y, *state.weights, *state.momentum]
    g = torch.Generator().manual_seed(1)
    loss = sum((x * torch.randn(x.shape, generator=g, dtype=torch.float64).to(dtype)).sum() for x in outputs)
    grads = torch.autograd.grad(loss, leaves, allow_unused=True)
    return [x.detach() for x in outputs] + [x for x in grads if x is not None]


def error_ratio(got, expected):
    return ((got.double() - expected).square().mean().sqrt() / expected.square().mean().sqrt()).item()


@pytest.mark.parametrize("time,chunk", [(1, 64), (15, 16), (63, 64), (100, 64), (130, 16), (129, 128)])
@pytest.mark.parametrize(
    "activation", ["gelu", *(pytest.param(name, marks=pytest.mark.slow) for name in ("silu", "relu"))]
)
def test_float32_is_as_close_as_float32_can_be(time, chunk, activation):
    leaves = inputs(time)
    options = dict(chunk=chunk, activation=activation, clip=1.0)
    exact, narrow, got = (
        results(leaves, dtype, backend=backend, **options)
        for dtype, backend in (
            (torch.float64, "reference"),
            (torch.float32, "reference"),
            (torch.float32, "native"),
        )
    )
    for x, oracle, expected in zip(got, narrow, exact, strict=True):
        assert x.dtype == torch.float32
        # the gradient of alpha is a sum that cancels: there the reference in float32 is off by up to 2e-5 itself
        assert error_ratio(x, expected) < max(1e-5, 2 * error_ratio(oracle, expected))


@pytest.mark.parametrize(
    "width,hidden,depth,d_out", [(5, 7, 2, 5), (20, 33, 3, 12), (17, 1, 2, 17), (1, 1, 1, 1), (48, 50, 4, 48)]
)
def test_widths_that_fill_no_register(width, hidden, depth, d_out):
    leaves = inputs(37, width, hidden, depth, batch=2, heads=3, d_out=d_out, dtype=torch.float64)
    options = dict(chunk=8, norm=width == d_out and width > 1, clip=0.5)
    if depth > 2:  # without LayerNorm and unscaled, a deep memory of such weights amplifies rounding itself
        leaves[7:] = [x.detach() / x.shape[-1] ** 0.5 for x in leaves[7:]]
    exact = results(leaves, torch.float64, backend="reference", **options)
    for got, expected in zip(results(leaves, torch.float64, backend="native", **options), exact, strict=True):
        assert error_ratio(got, expected) < 1e-10


def test_strided_and_expanded_tensors_need_no_copy_to_be_right():
    q, k, v, theta, eta, alpha, gain, *weights = (x.detach().double() for x in inputs(40, 16, 32, batch=2))
    options = dict(chunk=16, norm=gain, backend="native")
    shared = tuple(w[:1] for w in weights)
    dense = MemoryState.fresh(tuple(w.repeat(2, 1, 1, 1) for w in shared))
    expected, end = titans_memory(q, k, v, theta, eta, alpha, dense, **options)
    packed = torch.stack([q, k, v], 2)
    gates = torch.stack([theta, eta, alpha], 3)
    strided = [packed[:, :, i] for i in range(3)] + [gates[..., i] for i in range(3)]
    strided[2] = strided[2].transpose(2, 3).contiguous().transpose(2, 3)  # not even the last dimension is dense
    y, state = titans_memory(*strided, MemoryState.fresh(tuple(w.expand(2, -1, -1, -1) for w in shared)), **options)
    assert torch.equal(y, expected)
    assert all(torch.equal(a, b) for a, b in zip((*state.weights, *state.momentum), (*end.weights, *end.momentum)))


def test_the_same_to_the_last_bit_every_time_and_with_any_number_of_threads():
    leaves = inputs(200, batch=2)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = results(leaves, torch.float32, chunk=64, backend="native")
        torch.set_num_threads(2)
        two = [results(leaves, torch.float32, chunk=64, backend="native") for _ in range(2)]
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(one, *two, strict=True))


def test_backward_twice_and_under_activation_checkpointing():
    leaves = inputs(50, 16, 32)
    q, k, v, theta, eta, alpha, gain, *weights = leaves

    def run(q, k, v):
        state = MemoryState.fresh(tuple(weights))
        return titans_memory(q, k, v, theta, eta, alpha, state, chunk=16, norm=gain, backend="native")[0]

    y = run(q, k, v)
    first = torch.autograd.grad(y.square().sum(), leaves, retain_graph=True)
    second = torch.autograd.grad(y.square().sum(), leaves)
    y = checkpoint(run, q, k, v, use_reentrant=False)
    third = torch.autograd.grad(y.square().sum(), leaves)
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(first, second, third))


def test_not_a_number_comes_out_and_never_in_an_earlier_chunk():
    q, k, v, theta, eta, alpha, gain, *weights = (x.detach() for x in inputs(48, 16, 32))
    state = MemoryState.fresh(tuple(weights))
    clean = titans_memory(q, k, v, theta, eta, alpha, state, chunk=16, norm=gain, backend="native")[0]
    v = v.clone()
    v[:, 20] = float("nan")
    y, end = titans_memory(q, k, v, theta, eta, alpha, state, chunk=16, norm=gain, backend="native")
    assert torch.equal(y[:, :16], clean[:, :16])
    assert y[:, 20:].isnan().all() and end.weights[0].isnan().any()


def test_refusals_say_why():
    q, k, v, theta, eta, alpha, gain, *weights = (x.detach() for x in inputs(300, 4, 4))
    state = MemoryState.fresh(tuple(weights))
    with pytest.raises(BackendError, match="at most 256 tokens of a chunk at once, not 300"):
        titans_memory(q, k, v, theta, eta, alpha, state, chunk=512, norm=gain, backend="native")
    titans_memory(q, k, v, theta, eta, alpha, state, chunk=512, norm=gain)  # another path takes it
