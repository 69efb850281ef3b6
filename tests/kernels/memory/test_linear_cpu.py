"""The C kernel for one matrix and chunks of one token: decays of channels, decays before the gradient."""

import itertools

import pytest
import torch

from titans_build.kernels.cpu_runtime import library
from titans_build.kernels.dispatch import BackendError
from titans_build.kernels.memory import MEMORY, MemoryState, Objective, Options, Tokens, run_memory
from titans_build.kernels.memory.operation import has_fast_backend

UNBUILT = library.refuse(device="cpu", dtype=torch.float32)
pytestmark = pytest.mark.skipif(UNBUILT is not None, reason=f"C kernels: {UNBUILT}")


def inputs(case, decay, dtype=torch.float64):
    """The leaves of a case, with decays for each channel where these are wanted."""
    alpha = None if decay == "none" else case.alpha
    if decay == "channel":
        random = torch.Generator().manual_seed(0)
        alpha = 0.2 * torch.rand(case.q.shape, generator=random, dtype=torch.float64)
        alpha[:, ::5, :, 0], alpha[:, 1::5, :, 1] = 0, 1
    leaves = [case.q, case.k, case.v, case.theta, case.eta, alpha, *case.state.weights, *case.state.momentum]
    return [None if x is None else x.detach().to(dtype).requires_grad_() for x in leaves]


def run(leaves, backend, *, cuts=(), mask=None, grad=True, **options):
    """Outputs, final state, and the gradients of all leaves; the sequence is read in pieces cut at ``cuts``."""
    *given, weights = leaves[:7]
    state = MemoryState.fresh((weights,), tuple(leaves[7:]))
    options = Options(1, "gelu", None, **{"read": "after", **options})
    outputs, edges = [], (0, *cuts, leaves[0].shape[1])
    for start, stop in itertools.pairwise(edges):
        tokens = Tokens(*given).at(slice(start, stop))
        y, state = run_memory(tokens, state, None, None if mask is None else mask[:, start:stop], options, backend)
        outputs.append(y)
    found = [torch.cat(outputs, 1), *state.weights, *state.momentum, *state.anchor]
    if not grad:
        return found
    random = torch.Generator().manual_seed(1)
    total = sum((x * torch.randn(x.shape, generator=random, dtype=torch.float64).to(x)).sum() for x in found)
    wanted = [x for x in leaves if x is not None]
    return found + list(torch.autograd.grad(total, wanted, allow_unused=True, materialize_grads=True))


@pytest.mark.parametrize(
    "objective, momentum, decay, first, read, d_in, d_out, masked",
    [
        (Objective("l2"), False, "channel", True, "after", 8, 8, False),
        (Objective("l2_half"), True, "matrix", False, "before", 3, 21, True),
        (Objective("dot"), False, "channel", False, "after", 37, 5, False),
        (Objective("dot"), True, "none", False, "anchor", 5, 40, False),
        (Objective("lp", p=3), True, "channel", True, "before", 4, 16, True),
        (Objective("huber", delta=0.8), False, "matrix", True, "after", 4, 9, False),
    ],
)
def test_against_the_reference(memory_case, objective, momentum, decay, first, read, d_in, d_out, masked):
    mask = torch.rand(2, 35, generator=torch.Generator().manual_seed(0)) > 0.3 if masked else None
    case = memory_case(
        time=35, d_in=d_in, d_out=d_out, depth=1, norm=False, momentum=momentum, step=0.05, scale=0.4, forget=0.2
    )  # fmt: skip
    leaves, options = inputs(case, decay), dict(objective=objective, decay_first=first, read=read, mask=mask)
    expected = run(leaves, "reference", **options)
    case.assert_equal(run(leaves, "native_linear", **options), expected)
    case.assert_equal(run(leaves, "native_linear", cuts=(1, 18), keep=5, **options), expected)
    with torch.no_grad():
        case.assert_equal(run(leaves, "auto", grad=False, **options), expected[: 4 if momentum else 3])


def test_second_derivatives(memory_case):
    case = memory_case(batch=1, heads=1, time=4, d_in=2, d_out=2, depth=1, norm=False, step=0.05)
    leaves, found = inputs(case, "channel"), []
    for backend in ("native_linear", "reference"):
        tokens, state = Tokens(*leaves[:6]), MemoryState.fresh((leaves[6],), (leaves[7],))
        options = Options(1, "gelu", None, "after", decay_first=True)
        y, state = run_memory(tokens, state, None, None, options, backend)
        grads = torch.autograd.grad((y.square().sum() + state.weights[0].square().sum()), leaves, create_graph=True)
        found.append(torch.autograd.grad(sum(g.square().sum() for g in grads), leaves, allow_unused=True))
    case.assert_equal(*found)


def test_float32_is_as_close_as_float32_can_be(memory_case):
    case = memory_case(time=100, d_in=64, d_out=64, depth=1, norm=False, step=0.02, scale=0.1, forget=0.05)
    options = dict(objective=Objective("l2_half"), decay_first=True)
    exact = run(inputs(case, "channel"), "reference", **options)
    narrow, found = (run(inputs(case, "channel", torch.float32), b, **options) for b in ("reference", "native_linear"))
    for a, b, c in zip(found, narrow, exact, strict=True):
        assert (a - c).norm() <= 2 * (b - c).norm() + 1e-6 * c.norm()


@torch.no_grad()
def test_a_token_that_is_not_finite_reaches_its_memory_from_its_token_on(memory_case):
    case = memory_case(batch=1, time=20, depth=1, norm=False, step=0.05)
    leaves = inputs(case, "channel")
    before = run(leaves, "native_linear", grad=False)[0]
    leaves[1][0, 7, 0, 1], leaves[0][0, 3, 1, 0] = float("inf"), float("nan")
    y = run(leaves, "native_linear", grad=False)[0]
    assert y[0, 7:, 0].isnan().any(-1).all() and y[0, 3, 1].isnan().all()
    y[0, 7:, 0], y[0, 3, 1] = before[0, 7:, 0], before[0, 3, 1]
    torch.testing.assert_close(y, before)


def test_which_memories_it_takes(memory_case):
    linear, deep = (memory_case(depth=depth, norm=False) for depth in (1, 2))
    facts = dict(device="cpu", dtype=torch.float32, plain=True, time=14)
    for layers, chunk, plainly, taken in ((1, 1, True, True), (2, 1, True, False), (1, 4, True, False),
                                          (1, 1, False, False)):  # fmt: skip
        chosen = MEMORY.choose(layers=layers, chunk=chunk, plainly=plainly, **facts)
        assert (chosen is MEMORY.backends["native_linear"].run) == taken
    tokens, state = Tokens(*inputs(linear, "channel")[:6]), linear.state
    for first, chunk, taken in ((True, 1, True), (True, 4, False), (False, 4, True)):
        options = Options(chunk, "gelu", None, "after", decay_first=first)
        assert has_fast_backend(tokens, state, None, None, options) == taken
    for case, options in ((deep, {}), (linear, {"chunk": 4}), (linear, {"clip": 1.0}), (linear, {"threshold": 1.0})):
        with pytest.raises(BackendError, match="takes one matrix and chunks of one token"):
            case.run(backend="native_linear", **{"chunk": 1, **options})
    with pytest.raises(BackendError, match="does not know decays before the gradient"):
        run(inputs(linear, "channel"), "triton", decay_first=True)
