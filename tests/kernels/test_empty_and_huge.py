"""No rows, no tokens, and finite inputs whose products overflow: the same results from every backend."""

import pytest
import torch

from titans_build.kernels.attention import Prefix, attention
from titans_build.kernels.attention.decode import Cache, cached_attention
from titans_build.kernels.dispatch import OPERATIONS, BackendError
from titans_build.kernels.linear import linear_of, project
from titans_build.kernels.norm_gate import gate, gated_norm, l2_norm, rms_norm, swiglu
from titans_build.kernels.norm_gate.decode import feed_forward
from titans_build.kernels.rotary import rotate
from titans_build.kernels.scan import linear_scan
from titans_build.kernels.short_conv import causal_convolution, query, query_key_value
from titans_build.kernels.short_conv.decode import Layers, memory_inputs

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")


def layer_with(weight):
    layer = torch.nn.Linear(*weight.shape[::-1], bias=False)
    del layer.weight
    layer.weight = weight
    return layer


# the operation, and the shapes of its tensors
CALLS = {
    "attention": (
        lambda b, t, q, k, v, **options: attention(q, k, v, window=3, start=torch.zeros(b).long(), **options),
        lambda b, t: [(b, t, 2, 4), (b, t + 1, 1, 4), (b, t + 1, 1, 4)],
    ),
    "attention, prefix": (
        lambda b, t, q, k, v, *prefix, **options: attention(q, k, v, prefix=Prefix(*prefix), **options),
        lambda b, t: [(b, t, 2, 4)] * 4 + [(b, 2, 2, 4)] * 2,
    ),
    "attention, step": (
        lambda b, t, q, k, v, **options: attention(q, k, v, step=2, **options),
        lambda b, t: [(b, t, 2, 4), (b, 2 * t, 2, 4), (b, 2 * t, 2, 4)],
    ),
    "convolution": (
        lambda b, t, x, weight, history, **options: causal_convolution(x, weight, history, **options),
        lambda b, t: [(b, t, 4), (4, 3), (b, 2, 4)],
    ),
    "rms_norm": (
        lambda b, t, x, gain, **options: rms_norm(x, gain, **options),
        lambda b, t: [(b, t, 2, 4), (2, 4)],
    ),
    "l2_norm": (lambda b, t, x, **options: l2_norm(x, **options), lambda b, t: [(b, t, 4)]),
    "gate": (lambda b, t, *x, **options: gate(*x, **options), lambda b, t: [(b, t, 4), (b, t, 4), (4,), (4,)]),
    "gated_norm": (
        lambda b, t, *x, **options: gated_norm(*x, **options),
        lambda b, t: [(b, t, 2, 4), (2, 4), (b, t, 8)],
    ),
    "swiglu": (lambda b, t, x, **options: swiglu(x, **options), lambda b, t: [(b, t, 8)]),
    "rotary": (
        lambda b, t, x, **options: rotate(x, torch.arange(b * t).view(b, t), **options),
        lambda b, t: [(b, t, 2, 4)],
    ),
    "linear": (lambda b, t, *x, **options: project(*x, **options), lambda b, t: [(b, t, 4), (6, 4), (6,)]),
    "linear, recomputed": (
        lambda b, t, x, weight, backend: linear_of(layer_with(weight), swiglu, x),
        lambda b, t: [(b, t, 8), (6, 4)],
    ),
    "linear_scan": (
        lambda b, t, *x, **options: linear_scan(*x, **options),
        lambda b, t: [(b, t, 1), (b, t, 4), (b, 4)],
    ),
    "query": (
        lambda b, t, *x, **options: query(*x, 2, **options),
        lambda b, t: [(b, t, 8), (24, 3), (b, 2, 24)],
    ),
    "query_key_value": (
        lambda b, t, *x, **options: query_key_value(*x, 2, torch.full((b,), t), **options),
        lambda b, t: [(b, t, 24), (24, 3), (b, 2, 24)],
    ),
}
DECODING = {
    "projection": (lambda b, t, *x, **options: project(*x, **options), lambda b, t: [(b, t, 16), (32, 16)]),
    "gated_projection": (
        lambda b, t, *x, **options: feed_forward(*x, **options),
        lambda b, t: [(b, t, 16), (64, 16), (16, 32)],
    ),
    "cached_attention": (
        lambda b, t, x, k, v, **options: cached_attention(
            x, None, Cache(k, v, torch.full((b,), 3), torch.full((b,), 3), None, None), heads=2, base=1e4, **options
        ),
        lambda b, t: [(b, t, 6, 4), (b, 3, 2, 4), (b, 3, 2, 4)],
    ),
    "memory_inputs": (
        lambda b, t, x, history, weight, taps, controls, **options: memory_inputs(
            x, history, Layers(weight, taps, 2, controls), **options
        ),
        lambda b, t: [(b, 1, 16), (b, 2, 48), (48, 16), (48, 3), (6, 16)],
    ),
}
EMPTY = [(0, 5), (0, 1), (2, 0), (0, 0)]


def leaves(found):
    if isinstance(found, torch.Tensor):
        return [found]
    return [x for each in found or () for x in leaves(each)]


@pytest.mark.parametrize("rows, time", EMPTY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [*CALLS, *DECODING])
def test_no_rows_or_no_tokens(name, rows, time, dtype):
    """Every backend returns the shapes of the reference, in the graph, and finite gradients."""
    if name == "memory_inputs":
        time = 1
    call, shapes = {**CALLS, **DECODING}[name]
    results = {}
    for backend in ["auto", *(OPERATIONS[name].backends if name in OPERATIONS else OPERATIONS["attention"].backends)]:
        given = [torch.randn(shape, dtype=dtype) for shape in shapes(rows, time)]
        with torch.set_grad_enabled(name in CALLS):
            given = [x.requires_grad_(name in CALLS) for x in given]
            try:
                found = leaves(call(rows, time, *given, backend=backend))
            except BackendError:
                continue
        results[backend] = [(x.shape, x.dtype, x.requires_grad) for x in found]
        if name in CALLS:
            assert all(x.requires_grad for x in found)
            gradients = torch.autograd.grad([x.sum() for x in found], given, allow_unused=True)
            assert all(x is None or x.isfinite().all() for x in gradients)
            assert gradients[0] is not None or name == "linear_scan"
    assert "auto" in results and all(result == results["reference"] for result in results.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", ["rms_norm", "l2_norm", "gate", "gated_norm"])
@pytest.mark.parametrize("needs_grad", [True, False])
def test_norms_of_finite_numbers_are_finite(name, dtype, needs_grad):
    """One vector has numbers whose squares overflow. It becomes zero; the others are as they were."""
    call, shapes = CALLS[name]
    for backend in OPERATIONS[name].backends:
        given = [1 + torch.rand(shape).to(dtype) for shape in shapes(2, 3)]
        try:
            expected = call(2, 3, *given, backend=backend)
        except BackendError:
            continue
        given[0] = given[0].clone()
        given[0][0, 1] = 4 * torch.finfo(dtype).max ** 0.5
        found = call(2, 3, *[x.requires_grad_(needs_grad) for x in given], backend=backend)
        assert torch.equal(found[0, 1], torch.zeros_like(found[0, 1]))
        torch.testing.assert_close(found[1], expected[1])
        torch.testing.assert_close(found[0, 2], expected[0, 2])
        if needs_grad:
            assert all(x.isfinite().all() for x in torch.autograd.grad(found.sum(), given))
