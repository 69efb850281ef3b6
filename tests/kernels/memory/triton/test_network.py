"""The Triton memory in Triton's interpreter, forward and backward, against the per-token reference."""

import itertools

import pytest
import torch
from torch.testing import assert_close

from titans_build.kernels.dispatch import BackendError
from titans_build.kernels.memory import MEMORY, MemoryState, titans_memory
from titans_build.kernels.memory.learner import LearnerState, learn

pytest.importorskip("triton")

from titans_build.kernels.memory.triton import network

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")


@pytest.fixture(autouse=True)
def streamed(monkeypatch):
    """Whatever the size; the schedule that keeps the state has tests of its own, ``test_resident.py``."""
    monkeypatch.setenv("TITANS_BUILD_SCHEDULE", "streamed")


def slow(*values):
    """Values of a parameter that only ``make test-slow`` runs: Triton's interpreter takes a second for each program."""
    return pytest.param(*values, marks=pytest.mark.slow)


def inputs(time=9, d_in=6, d_out=None, hidden=10, depth=2, batch=1, heads=2, seed=0, edges=False):
    g = torch.Generator().manual_seed(seed)
    randn = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    rand = lambda *shape: torch.rand(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    d_out = d_out or d_in
    q, k = (torch.nn.functional.normalize(randn(batch, time, heads, d_in), dim=-1) for _ in "qk")
    theta, eta, alpha = (scale * rand(batch, time, heads) for scale in (0.1, 0.9, 0.3))
    if edges:
        for gate in (theta, eta, alpha):
            gate[:, ::3] = 0
        eta[:, 1::3] = 1
        alpha[:, 2::5] = 1
    widths = [d_in, *[hidden] * (depth - 1), d_out]
    weights = [randn(batch, heads, out, in_) for in_, out in itertools.pairwise(widths)]
    v, gain = randn(batch, time, heads, d_out), 1 + 0.1 * randn(heads, d_out)
    return [q, k, v, theta, eta, alpha, gain, *weights]


def results(leaves, backend, *, momentum=True, forgetting=True, norm=True, position=0, cuts=(), mask=None, **options):
    """Outputs, final state, and the gradients of all leaves; the sequence is read in pieces cut at ``cuts``."""
    leaves = [x.detach().clone().requires_grad_() for x in leaves]
    q, k, v, theta, eta, alpha, gain, *weights = leaves
    state = MemoryState.fresh(tuple(weights), tuple(0.1 * w.flip(-1) for w in weights))
    state = state._replace(anchor=tuple(0.9 * w for w in weights), position=state.position + position)
    ys = []
    for start, stop in itertools.pairwise([0, *cuts, q.shape[1]]):
        piece = [x[:, start:stop] for x in (q, k, v, theta)]
        y, state = titans_memory(
            *piece, eta[:, start:stop] if momentum else None, alpha[:, start:stop] if forgetting else None, state,
            norm=gain if norm else None, mask=None if mask is None else mask[:, start:stop], backend=backend, **options,
        )  # fmt: skip
        ys.append(y)
    outputs = [torch.cat(ys, 1), *state.weights, *state.momentum, *state.anchor]
    g = torch.Generator().manual_seed(1)
    loss = sum((x * torch.randn(x.shape, generator=g, dtype=torch.float64).to(x.dtype)).sum() for x in outputs)
    return [x.detach() for x in outputs], torch.autograd.grad(loss, leaves, allow_unused=True)


def agree(leaves, tolerance=1e-10, oracle="reference", **options):
    for got, expected in zip(results(leaves, "triton", **options), results(leaves, oracle, **options)):
        for a, b in zip(got, expected, strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                assert (a - b).norm() <= tolerance * b.norm().clamp(min=1e-3)


@pytest.mark.parametrize("depth, activation, norm, clip", [
    (1, "identity", True, 0.5), (1, "identity", False, None), (2, "identity", False, 0.5), (2, "relu", True, None),
    (2, "silu", False, 0.5), (2, "gelu", True, 0.5),
    *(slow(2, activation, *rest) for activation in ("identity", "relu", "silu", "gelu")
      for rest in ((True, None), (False, 0.5), (True, 0.5), (False, None))),
])  # fmt: skip
def test_against_the_oracle(depth, activation, norm, clip):
    agree(inputs(time=6, depth=depth, heads=1), chunk=4, activation=activation, norm=norm, clip=clip)


@pytest.mark.parametrize("momentum, forgetting, depth", [
    (False, False, 2), (False, True, 1), (True, False, 2), slow(False, True, 2), slow(True, False, 1),
    slow(False, False, 1),
])  # fmt: skip
def test_gates_that_are_not_there(momentum, forgetting, depth):
    agree(inputs(time=6, depth=depth, heads=1), chunk=4, momentum=momentum, forgetting=forgetting)


@pytest.mark.parametrize("read", ["after", "before"])
def test_gates_at_their_ends(read):
    agree(inputs(time=13, heads=1, edges=True), chunk=5, read=read, clip=1.0)


@pytest.mark.parametrize("time, chunk", [(1, 1), slow(3, 1), slow(15, 16), (17, 16), slow(20, 7)])
def test_lengths(time, chunk):
    agree(inputs(time=time, heads=1), chunk=chunk)


@pytest.mark.parametrize("d_in, d_out, hidden", [slow(16, 16, 40), (17, 5, 3), (3, 20, 64), slow(33, 33, 16)])
def test_widths(d_in, d_out, hidden):
    leaves = inputs(time=6, d_in=d_in, d_out=d_out, hidden=hidden, batch=1, heads=1)
    agree(leaves, chunk=3, norm=d_in == d_out)


def test_rows_at_different_places_and_masked_tokens():
    mask = torch.rand(2, 11, generator=torch.Generator().manual_seed(0)) < 0.7
    agree(inputs(time=11, batch=2, heads=1), chunk=4, position=torch.tensor([3, 0]), mask=mask, clip=1.0)


@pytest.mark.slow
def test_split_anywhere():
    leaves = inputs(time=10, d_in=4, hidden=5, heads=1)
    whole = results(leaves, "closed_form", chunk=4)
    for cuts in ((1, 4, 6), (3, 8, 9)):
        for a, b in zip(results(leaves, "triton", chunk=4, cuts=cuts), whole):
            assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.slow
def test_states_kept_now_and_then():
    """Nine chunks: more than are worked on together."""
    agree(inputs(time=17, d_in=4, hidden=5, heads=1), oracle="closed_form", chunk=2, keep=3)


def test_float32():
    leaves = [x.float() for x in inputs(time=20, d_in=16, hidden=32, heads=1)]
    exact = results([x.double() for x in leaves], "reference", chunk=8)
    for got, expected in zip(results(leaves, "triton", chunk=8), exact):
        for a, b in zip(got, expected):
            assert a.dtype == torch.float32
            assert (a.double() - b).norm() <= 1e-5 * b.norm()


@pytest.mark.parametrize("given, setting, kept, tolerance", [
    (torch.bfloat16, "highest", 8, 1e-2), slow(torch.float16, "highest", 11, 2e-3),
    (torch.float32, "high", 11, 2e-3), slow(torch.float32, "medium", 8, 1e-2),
])  # fmt: skip
def test_operands_that_are_not_float32(given, setting, kept, tolerance):
    """Of a model in half precision, or as ``torch.set_float32_matmul_precision`` allows; the state is float32.

    ``kept``: the digits of an operand. A memory may amplify what its inputs are off by; how much it does is seen where
    they, and no products, are rounded.
    """
    leaves = [x.float() for x in inputs(time=20, d_in=32, hidden=64, batch=1, heads=1)]
    leaves[-2:] = [w * w.shape[-1] ** -0.5 for w in leaves[-2:]]
    leaves[:3] = [x.to(given) for x in leaves[:3]]
    exact = results([x.double() for x in leaves], "reference", chunk=16)
    mantissa, exponent = zip(*(torch.frexp(x.double()) for x in leaves))
    rounded = [torch.ldexp((m * 2**kept).round(), e - kept) for m, e in zip(mantissa, exponent)]
    rounded[3:7] = [x.double() for x in leaves[3:7]]  # gates and gain are no operands
    nearby = results(rounded, "reference", chunk=16)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(setting)
        found = results(leaves, "triton", chunk=16)
    finally:
        torch.set_float32_matmul_precision(before)
    assert [x.dtype for x in found[0]] == [given, *[torch.float32] * 6]
    ratio = lambda x, right: float((x.double() - right).norm() / right.norm())  # noqa: E731
    for got, near, right in zip(*(itertools.chain(*each) for each in (found, nearby, exact)), strict=True):
        assert 1e-5 < ratio(got, right) <= max(tolerance, 2 * ratio(near, right))


def test_autocast_is_half_precision_too():
    """float32 tensors, as a model has them there."""
    leaves = [x.float() for x in inputs(time=5, d_in=16, hidden=32, batch=1, heads=1)]
    leaves[-2:] = [w * w.shape[-1] ** -0.5 for w in leaves[-2:]]
    exact = results(leaves, "triton", chunk=4)[0]
    with torch.autocast("cpu", torch.bfloat16):
        found = results(leaves, "triton", chunk=4)[0]
    for a, b in zip(found, exact, strict=True):
        assert a.dtype == torch.float32
        assert 1e-5 * b.norm() < (a - b).norm() <= 1e-2 * b.norm()


def test_second_derivatives_of_tokens_in_half_precision():
    q, k, v, *others = (x.to(torch.bfloat16 if i < 3 else torch.float32) for i, x in enumerate(inputs(time=3)))

    def second(backend):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        state = MemoryState.fresh(tuple(others[4:]))
        y, _ = titans_memory(*leaves, *others[:3], state, 4, norm=others[3], backend=backend)
        grads = torch.autograd.grad(y.float().square().sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(x.float().square().sum() for x in grads), leaves)

    for got, expected in zip(second("triton"), second("closed_form"), strict=True):
        assert got.dtype == torch.bfloat16 and (got - expected).norm() <= 0.05 * expected.norm()


def test_longer_chunks_than_a_program_takes_at_once():
    agree(inputs(time=75, d_in=4, hidden=20, batch=1, heads=1), oracle="closed_form", chunk=70, clip=1.0)


@pytest.mark.parametrize("chunk, oracle", [slow(1, "closed_form"), (3, "reference"), slow(15, "closed_form")])
def test_chunks_shorter_than_a_tile(chunk, oracle):
    """Many of them: more than a group, whole and in part, with rows at different phases and tokens that are masked."""
    rows = 2 if chunk > 1 else 1  # every token ends a chunk of one, whatever its position
    mask = torch.ones(rows, 11, dtype=torch.bool)
    mask[-1, 4] = False
    leaves = inputs(time=11, d_in=4, hidden=5, batch=rows, heads=1, edges=True)
    agree(leaves, oracle=oracle, chunk=chunk, clip=1.0, position=torch.tensor([4, 0])[:rows], mask=mask)


def test_strides():
    q, k, v, *rest = inputs(time=5)
    packed = torch.stack([q, k, v], -1)
    agree([*packed.unbind(-1), *rest], chunk=4)


@pytest.mark.parametrize("heads", [1, 2])
def test_states_that_are_laid_out_otherwise(heads):
    """Weights and anchor column by column, and a gain that with one head is the same memory for both rows."""
    *others, first, last = inputs(time=5, batch=3 - heads, heads=heads)
    agree([*others, *(w.mT.contiguous().mT for w in (first, last))], chunk=4, position=1)


def test_tokens_below_a_threshold():
    agree(inputs(time=7, d_in=4, hidden=5, heads=1), chunk=4, threshold=4.0)


def test_stretches_between_resets_are_programs_of_their_own(monkeypatch):
    """Six stretches of one row and one head are written side by side, not one after the other."""
    grids, launch = {}, network.launch
    monkeypatch.setattr(network, "launch", lambda kernel, grid, *args, **fixed: (
        grids.setdefault(kernel.__name__, grid), launch(kernel, grid, *args, **fixed)))  # fmt: skip
    q, k, v, theta, eta, alpha, _, *weights = inputs(time=12, heads=1, d_in=4, hidden=5)
    given = (q, k, v, theta, eta, alpha)
    found, expected = (
        learn(*given, LearnerState.fresh(tuple(weights)), chunk=2, reset=2, backend=backend)[0]
        for backend in ("triton", "general")
    )
    assert grids["write_kernel"] == (6,)
    assert_close(found, expected)


def test_it_says_what_it_does_not_take():
    facts = dict(device="cpu", dtype=torch.float32)
    for wrong, reason in (
        (dict(layers=3), "one or two layers, not 3"),
        (dict(chunk=256), "chunks of up to 128 tokens, not 256"),
        (dict(width=256), "heads of up to 128 numbers, not 256"),
        (dict(device="meta"), "on a GPU, not on meta"),
    ):
        with pytest.raises(BackendError, match=reason):
            MEMORY.choose("triton", **{**facts, **wrong})
    assert "asked for by name" in MEMORY.backends["triton"].refuse(**facts)
