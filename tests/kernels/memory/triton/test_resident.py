"""Writing with the state in registers, forward and backward, in Triton's interpreter, against both references."""

import itertools

import pytest
import torch

from titans_build.kernels.memory import MemoryState, titans_memory

pytest.importorskip("triton")

from titans_build.kernels.memory.triton import network as triton_network
from titans_build.kernels.memory.triton import schedule

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")


@pytest.fixture(autouse=True)
def launched(monkeypatch):
    """The resident schedule, whatever the size; the names of the kernels that ran."""
    monkeypatch.setenv(schedule.VARIABLE, "resident")
    names, run = set(), triton_network.TritonNetwork._run

    def noted(self, kernel, *arguments, **flags):
        names.add(kernel.__name__)
        run(self, kernel, *arguments, **flags)

    monkeypatch.setattr(triton_network.TritonNetwork, "_run", noted)
    yield names
    assert not names & set(schedule.RESIDENT)


def slow(*values):
    """Values of a parameter that only ``make test-slow`` runs: Triton's interpreter takes a second for each program."""
    return pytest.param(*values, marks=pytest.mark.slow)


def inputs(time=9, d_in=6, d_out=None, hidden=10, depth=2, batch=1, heads=1, edges=False):
    g = torch.Generator().manual_seed(0)
    randn = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    d_out = d_out or d_in
    q, k = (torch.nn.functional.normalize(randn(batch, time, heads, d_in), dim=-1) for _ in "qk")
    theta, eta, alpha = (
        size * torch.rand(batch, time, heads, generator=g, dtype=torch.float64) for size in (0.1, 0.9, 0.3)
    )
    if edges:
        for gate in (theta, eta, alpha):
            gate[:, ::3] = 0
        eta[:, 1::3], alpha[:, 2::5] = 1, 1
    widths = [d_in, *[hidden] * (depth - 1), d_out]
    weights = [randn(batch, heads, out, in_) * in_**-0.5 for in_, out in itertools.pairwise(widths)]
    return [q, k, randn(batch, time, heads, d_out), theta, eta, alpha, 1 + 0.1 * randn(heads, d_out), *weights]


def results(leaves, backend="triton", *, momentum=True, forgetting=True, norm=True, position=0, **options):
    """Outputs, final state, and the gradients of all that matters."""
    leaves = [x.detach().clone().requires_grad_() for x in leaves]
    q, k, v, theta, eta, alpha, gain, *weights = leaves
    state = MemoryState.fresh(tuple(weights), tuple(0.1 * w.flip(-1) for w in weights))
    state = state._replace(anchor=tuple(0.9 * w for w in weights), position=state.position + position)
    y, state = titans_memory(
        q, k, v, theta, eta if momentum else None, alpha if forgetting else None, state, norm=gain if norm else None,
        backend=backend, **options,
    )  # fmt: skip
    outputs = [y, *state.weights, *state.momentum, *state.anchor]
    g = torch.Generator().manual_seed(1)
    loss = sum((x * torch.randn(x.shape, generator=g, dtype=torch.float64).to(x.dtype)).sum() for x in outputs)
    grads = torch.autograd.grad(loss, leaves, allow_unused=True)
    return [x.detach() for x in (*outputs, *grads) if x is not None]


def agree(leaves, oracle="reference", **options):
    for a, b in zip(results(leaves, **options), results(leaves, oracle, **options), strict=True):
        assert (a - b).norm() <= 1e-10 * b.norm().clamp(min=1e-3)


def test_both_kernels_run(launched):
    results(inputs(depth=1), chunk=4)
    assert set(schedule.RESIDENT.values()) <= launched


@pytest.mark.parametrize("depth, activation, norm, clip, oracle", [
    (1, "identity", True, 0.5, "reference"), (2, "silu", False, None, "closed_form"),
    (2, "gelu", True, 0.5, "reference"),
    *(slow(2, activation, *rest) for activation in ("identity", "relu", "silu", "gelu")
      for rest in ((True, 0.5, "reference"), (False, None, "closed_form"))),
    slow(1, "identity", False, None, "closed_form"),
])  # fmt: skip
def test_against_the_oracles(depth, activation, norm, clip, oracle):
    agree(inputs(time=6, depth=depth), oracle, chunk=4, activation=activation, norm=norm, clip=clip)


@pytest.mark.parametrize("momentum, forgetting", [slow(False, True), slow(True, False), (False, False)])
@pytest.mark.parametrize("depth, norm, clip", [(1, True, None), (2, False, 0.5)])
def test_gates_that_are_not_there(momentum, forgetting, depth, norm, clip):
    agree(inputs(time=6, depth=depth), chunk=4, momentum=momentum, forgetting=forgetting, norm=norm, clip=clip)


@pytest.mark.parametrize("read, oracle", [("after", "reference"), ("before", "closed_form")])
def test_gates_at_their_ends(read, oracle):
    agree(inputs(time=13, edges=True), oracle, chunk=5, read=read, clip=1.0)


@pytest.mark.parametrize("depth, momentum", [(1, False), (2, True), slow(1, True), slow(2, False)])
def test_rows_at_different_places_and_masked_tokens(depth, momentum):
    mask = torch.rand(2, 11, generator=torch.Generator().manual_seed(0)) < 0.7
    leaves, position = inputs(time=11, batch=2, depth=depth), torch.tensor([3, 0])
    agree(leaves, chunk=4, position=position, mask=mask, clip=1.0, momentum=momentum)


@pytest.mark.parametrize("time, chunk, oracle", [
    (1, 1, "reference"), slow(15, 16, "closed_form"), slow(20, 7, "reference"), (37, 35, "closed_form")
])  # fmt: skip
def test_lengths(time, chunk, oracle):
    """A chunk of 35 takes three rounds."""
    agree(inputs(time=time), oracle, chunk=chunk, clip=1.0)


@pytest.mark.parametrize("d_in, d_out, hidden", [slow(16, 16, 40), (17, 5, 3), slow(3, 20, 64), (33, 33, 16)])
def test_widths(d_in, d_out, hidden):
    agree(inputs(time=6, d_in=d_in, d_out=d_out, hidden=hidden), chunk=3, norm=d_in == d_out)


def test_states_kept_now_and_then():
    leaves = inputs(time=8)
    for a, b in zip(results(leaves, chunk=2, keep=3), results(leaves, chunk=2, keep=1)):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_every_run_gives_the_same_bits():
    leaves = [x.float() for x in inputs(time=6)]
    for a, b in zip(results(leaves, chunk=4, clip=1.0), results(leaves, chunk=4, clip=1.0), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("given, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 1e-2), slow(torch.float16, 2e-3)])
@pytest.mark.parametrize("kind, depth", [("resident", 1), ("resident", 2), ("fused", 1)])
def test_dtypes(monkeypatch, given, tolerance, kind, depth):
    """As good as the streamed schedule has to be: see ``test_network.py``."""
    monkeypatch.setenv(schedule.VARIABLE, kind)
    leaves = [x.float() for x in inputs(time=20, d_in=32, hidden=64, depth=depth)]
    leaves[:3] = [x.to(given) for x in leaves[:3]]
    exact = results([x.double() for x in leaves], "reference", chunk=16)
    kept = {torch.float32: 24, torch.bfloat16: 8, torch.float16: 11}[given]  # digits of an operand
    rounded = [x.double() for x in leaves]
    for place in (0, 1, 2, *range(7, len(leaves))):  # gates and gain are no operands
        mantissa, exponent = torch.frexp(rounded[place])
        rounded[place] = torch.ldexp((mantissa * 2**kept).round(), exponent - kept)
    nearby = results(rounded, "reference", chunk=16)
    ratio = lambda x, right: float((x.double() - right).norm() / right.norm())  # noqa: E731
    for got, near, right in zip(results(leaves, chunk=16), nearby, exact, strict=True):
        assert ratio(got, right) <= max(tolerance, 2 * ratio(near, right))
