"""Gradients of gradients, batches of gradients, torch.func and forward mode: every operation, every backend."""

import pytest
import torch
from torch.autograd import forward_ad

from titans_build.kernels.attention import Prefix, attention
from titans_build.kernels.dispatch import OPERATIONS, BackendError
from titans_build.kernels.linear import linear_of, project
from titans_build.kernels.memory import MemoryState, read_memory, titans_memory
from titans_build.kernels.norm_gate import gate, gated_norm, l2_norm, rms_norm, swiglu
from titans_build.kernels.rotary import rotate
from titans_build.kernels.scan import linear_scan
from titans_build.kernels.short_conv import causal_convolution, query, query_key_value

LAYER = torch.nn.Linear(4, 3, bias=False, dtype=torch.float64)
LENGTH = torch.tensor([5, 3])


def memory(**options):
    def call(q, k, v, theta, eta, alpha, *parts, **chosen):
        gates, state = (x.sigmoid() for x in (theta, eta, alpha)), MemoryState.fresh(parts[:2], parts[2:])
        y, after = titans_memory(q, k, v, *gates, state, 4, **options, **chosen)
        return y, *after.weights, *after.momentum

    tokens = [(2, 7, 1, 3)] * 3 + [(2, 7, 1)] * 3 + [(2, 1, 4, 3), (2, 1, 3, 4)] * 2
    return call, tokens


CALLS = {
    "attention": (lambda *x, **b: attention(*x, **b), [(2, 20, 2, 4)] * 3),
    "attention, window": (
        lambda *x, **b: attention(*x[:3], window=3, start=LENGTH, prefix=Prefix(*x[3:]), **b),
        [(2, 20, 2, 4), (2, 20, 1, 4), (2, 20, 1, 4), (2, 20, 2, 4), (2, 2, 1, 4), (2, 2, 1, 4)],
    ),
    "attention, prefix": (
        lambda *x, **b: attention(*x[:3], prefix=Prefix(*x[3:]), **b),
        [(2, 20, 2, 4), (2, 20, 1, 4), (2, 20, 1, 4), (2, 20, 2, 4), (2, 2, 1, 4), (2, 2, 1, 4)],
    ),
    "convolution": (causal_convolution, [(2, 5, 4), (4, 3), (2, 2, 4)]),
    "rms_norm": (rms_norm, [(5, 2, 4), (2, 4)]),
    "l2_norm": (l2_norm, [(5, 4)]),
    "gate": (gate, [(5, 4), (5, 4), (4,), (4,)]),
    "gated_norm": (gated_norm, [(5, 2, 4), (2, 4), (5, 8)]),
    "swiglu": (swiglu, [(5, 8)]),
    "rotary": (lambda x, **b: rotate(x, torch.tensor([[3, 4]]), **b), [(1, 2, 2, 4)]),
    "linear": (project, [(9, 4), (3, 4), (3,)]),
    "linear of a function": (lambda x: linear_of(LAYER, swiglu, x), [(9, 8)]),
    "query": (lambda p, w, h, **b: query(p, w, h, 2, **b), [(2, 4, 8), (24, 3), (2, 2, 24)]),
    "query_key_value": (
        lambda p, w, h, **b: query_key_value(p, w, h, 2, LENGTH, **b),
        [(2, 5, 24), (24, 3), (2, 2, 24)],
    ),
    "linear_scan": (linear_scan, [(2, 5, 4)] * 2),
    "memory_read": (
        lambda q, norm, *w, **b: read_memory(q, w, norm=norm, **b),
        [(2, 3, 1, 4), (1, 4), (2, 1, 6, 4), (2, 1, 4, 6)],
    ),
    "memory": memory(clip=0.5, mask=torch.arange(7) < LENGTH[:, None]),
    "memory, aligned": memory(read="before"),
}
# what PyTorch itself cannot differentiate twice, or not at all, says so
REFUSED = {("attention", "sdpa"), ("attention, window", "sdpa"), ("attention", "flex")}


def backends():
    for name in CALLS:
        operation = OPERATIONS.get(name.partition(",")[0])
        for backend in operation.backends if operation else [None]:
            yield pytest.param(name, backend, id=f"{name}-{backend}")


def inputs(name):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_() for shape in CALLS[name][1]]


def run(name, backend, given):
    chosen = {} if backend is None else {"backend": backend}
    outputs = CALLS[name][0](*given, **chosen)
    return [x for x in (outputs if isinstance(outputs, tuple) else (outputs,)) if x is not None]


def penalty(name, backend, given):
    """A gradient penalty: a loss that contains the gradients of all inputs."""
    outputs = run(name, backend, given)
    grads = torch.autograd.grad(total(outputs), given, create_graph=True)
    loss = sum(y.square().mean() for y in outputs) + sum(g.square().sum() for g in grads)
    return torch.autograd.grad(loss, given)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("name, backend", list(backends()))
def test_a_gradient_can_be_differentiated(name, backend):
    given = inputs(name)
    expected = penalty(name, None if backend is None else "reference", inputs(name))
    try:
        found = penalty(name, backend, given)
    except BackendError:
        return
    except RuntimeError as error:
        assert (name, backend) in REFUSED, error
        return
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)


def total(outputs):
    """A number that depends on every output."""
    return sum((y * torch.linspace(0.5, 1, y.numel(), dtype=y.dtype).view(y.shape)).sum() for y in outputs)


@pytest.mark.parametrize("name", CALLS)
def test_transforms_of_functions(name):
    leaves = inputs(name)
    given, vectors = [x.detach() for x in leaves], [torch.ones_like(x) for x in leaves]
    f, places = lambda *given: total(run(name, None, given)), tuple(range(len(given)))
    expected = torch.autograd.grad(f(*leaves), leaves)
    slope = sum((g * v).sum() for g, v in zip(expected, vectors))

    torch.testing.assert_close(torch.func.grad(f, places)(*given), expected)
    torch.testing.assert_close(torch.func.jacrev(f, places)(*given), expected)
    torch.testing.assert_close(torch.func.jvp(f, tuple(given), tuple(vectors))[1], slope)
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(x, v) for x, v in zip(given, vectors)]
        torch.testing.assert_close(forward_ad.unpack_dual(f(*duals)).tangent, slope)
    each = torch.func.vmap(torch.func.grad(f, places))(*[torch.stack((x, 2 * x)) for x in given])
    for found, expected_of in zip(each, expected):
        torch.testing.assert_close(found[0], expected_of)


@pytest.mark.parametrize("name", CALLS)
def test_batches_of_gradients(name):
    given = inputs(name)
    outputs = run(name, None, given)
    vectors = [torch.stack((torch.ones_like(y), 2 * torch.ones_like(y))) for y in outputs]
    once = torch.autograd.grad(outputs, given, [v[0] for v in vectors], retain_graph=True)
    both = torch.autograd.grad(outputs, given, vectors, is_grads_batched=True)
    for found, expected in zip(both, once):
        torch.testing.assert_close(found, torch.stack((expected, 2 * expected)))


def test_nothing_made_inside_of_a_transform_is_kept_after_it():
    x, position = torch.randn(1, 3, 1, 6, dtype=torch.float64), torch.arange(7, 10)[None]
    base = 4321.0  # of no other test: its tables are made here first

    def loss(x):
        return rotate(x, position, base).pow(3).sum()

    inside = torch.func.hessian(loss)(x)
    assert torch.equal(torch.func.hessian(loss)(x), inside)
    torch.testing.assert_close(torch.autograd.functional.hessian(loss, x), inside)
