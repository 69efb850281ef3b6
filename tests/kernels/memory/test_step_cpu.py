"""One token on the C kernels: the recurrence of the reference, whatever the options, widths and strides."""

import itertools

import pytest
import torch

from titans_build.kernels.cpu_runtime.library import refuse
from titans_build.kernels.dispatch import BackendError
from titans_build.kernels.memory import MemoryState, read_memory, titans_memory

UNBUILT = refuse(device="cpu", dtype=torch.float64)
pytestmark = pytest.mark.skipif(UNBUILT is not None, reason=f"C kernels: {UNBUILT}")

FLOAT64 = 1e-10
FLOAT32 = 1e-5
"""Largest error ratio, rms(out - reference in float64) / rms(reference)."""


class Walk:
    """A few tokens of random rows, gates of exactly 0 and 1 among them."""

    def __init__(self, batch=2, heads=2, d_in=8, d_out=8, depth=2, expansion=2, *, norm=True, momentum=True,
                 forgetting=True, phases=(0, 0), time=7, masked=False):  # fmt: skip
        torch.manual_seed(0)
        rand = lambda *shape: torch.rand(*shape, dtype=torch.float64)  # noqa: E731
        randn = lambda *shape: torch.randn(*shape, dtype=torch.float64)  # noqa: E731
        self.q, self.k, self.v = (randn(batch, time, heads, d) for d in (d_in, d_in, d_out))
        self.k = self.k / self.k.norm(dim=-1, keepdim=True)
        self.theta, eta, alpha = (size * rand(batch, time, heads) for size in (0.1, 1, 0.2))
        self.theta[:, 1], eta[:, 2], eta[:, 3], alpha[:, 4] = 0, 0, 1, 0
        self.eta, self.alpha = eta if momentum else None, alpha if forgetting else None
        self.norm = randn(heads, d_out) if norm else None
        self.mask = torch.rand(batch, time) < 0.6 if masked else None
        widths = [d_in, *[d_in * expansion] * (depth - 1), d_out]
        part = lambda: tuple(  # noqa: E731
            randn(batch, heads, o, i) * i**-0.5 for i, o in itertools.pairwise(widths)
        )
        self.state = MemoryState(part(), part() if momentum else (), part(), torch.tensor(phases))

    def run(self, backend, dtype=torch.float64, **options):
        cast = lambda x: x.to(dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() else x  # noqa: E731
        state = MemoryState(*(tuple(map(cast, part)) for part in self.state[:3]), self.state.position)
        outputs = []
        for t in range(self.q.shape[1]):
            now = lambda x: None if x is None else cast(x[:, t : t + 1])  # noqa: B023, E731
            y, state = titans_memory(
                *map(now, (self.q, self.k, self.v, self.theta, self.eta, self.alpha)),
                state, norm=cast(self.norm), mask=now(self.mask), backend=backend, **options,
            )  # fmt: skip
            outputs.append(y)
        return [torch.cat(outputs, 1), *state.weights, *state.momentum, *state.anchor, state.position]


@torch.no_grad()
def assert_agrees(walk, **options):
    expected = walk.run("reference", **options)
    for dtype, tolerance in ((torch.float64, FLOAT64), (torch.float32, FLOAT32)):
        for a, b in zip(walk.run("native_step", dtype, **options), expected, strict=True):
            assert a.shape == b.shape
            assert (a.double() - b).norm() <= tolerance * b.double().norm()


@pytest.mark.parametrize("depth", [1, 2, 3, 16])
@pytest.mark.parametrize("activation", ["identity", "silu", "gelu", "relu"])
@pytest.mark.parametrize("norm", [True, False])
def test_depths_and_activations(depth, activation, norm):
    if depth == 16 and not norm:
        pytest.skip("sixteen layers without a norm explode in the oracle too")
    assert_agrees(Walk(depth=depth, norm=norm), chunk=3, activation=activation, clip=1.0)


@pytest.mark.parametrize("momentum, forgetting", list(itertools.product([True, False], repeat=2)))
@pytest.mark.parametrize("read", ["after", "before"])
@pytest.mark.parametrize("clip", [None, 0.5])
def test_gates_reading_and_clipping(momentum, forgetting, read, clip):
    assert_agrees(Walk(momentum=momentum, forgetting=forgetting), chunk=4, read=read, clip=clip)


@pytest.mark.parametrize("d_in, d_out, norm", [(1, 1, False), (3, 5, False), (17, 17, True), (64, 64, True)])
def test_widths(d_in, d_out, norm):
    assert_agrees(Walk(d_in=d_in, d_out=d_out, norm=norm, expansion=3), chunk=4, clip=1.0)


@pytest.mark.parametrize("chunk", [1, 3, 64])
@pytest.mark.parametrize("phases", [(0, 0), (1, 2), (0, 2)])
@pytest.mark.parametrize("masked", [True, False])
def test_rows_at_phases_of_their_own(chunk, phases, masked):
    assert_agrees(Walk(phases=phases, masked=masked), chunk=chunk)


@torch.no_grad()
def test_strides_and_what_is_given():
    """Expanded rows, transposed matrices, slices of one projection: read where they lie, and left as they are."""
    torch.manual_seed(0)
    rows, heads, d = 3, 2, 8
    randn = lambda *shape: torch.randn(*shape, dtype=torch.float64)  # noqa: E731
    shared = (randn(1, heads, 2 * d, d), randn(1, heads, 2 * d, d).mT)
    weights, anchor = (tuple((w + i).expand(rows, -1, -1, -1) for w in shared) for i in (0, 1))
    momentum = tuple(randn(rows, *w.shape[2:], heads).movedim(3, 1) for w in shared)
    state = MemoryState(weights, momentum, anchor, torch.tensor([0, 1, 3]))
    q, k, v = randn(rows, 1, 3, heads, d).unbind(2)
    gates = torch.rand(rows, 1, 3 * heads, dtype=torch.float64).mul(0.3).split(heads, -1)
    given = [q, k, v, *gates, *weights, *momentum, *anchor]
    before = [x.clone() for x in given]
    gain = randn(d, heads).t()
    (y, after), (expected, there) = (
        titans_memory(q, k, v, *gates, state, 4, "silu", gain, backend=b) for b in ("native_step", "reference")
    )
    for a, b in zip([y, *after.weights, *after.momentum, *after.anchor],
                    [expected, *there.weights, *there.momentum, *there.anchor]):  # fmt: skip
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    assert all(torch.equal(a, b) for a, b in zip(given, before))


@torch.no_grad()
def test_an_anchor_is_handed_on_and_not_copied():
    walk = Walk(phases=(1, 1))
    one = [x[:, :1] for x in (walk.q, walk.k, walk.v, walk.theta, walk.eta, walk.alpha)]
    within = titans_memory(*one, walk.state, 4, backend="native_step")[1]
    assert all(a is b for a, b in zip(within.anchor, walk.state.anchor))
    at_the_end = titans_memory(*one, walk.state, 2, backend="native_step")[1]
    assert all(a is b for a, b in zip(at_the_end.anchor, at_the_end.weights))


def test_refusals():
    walk = Walk()
    walk.q.requires_grad_()
    with pytest.raises(BackendError, match="no backward"):
        walk.run("native_step")
    with torch.no_grad(), pytest.raises(BackendError, match="one token, not 7"):
        titans_memory(walk.q, walk.k, walk.v, walk.theta, None, None, walk.state, backend="native_step")


@torch.no_grad()
@pytest.mark.parametrize("depth", [1, 2, 4])
@pytest.mark.parametrize("activation", ["identity", "silu", "gelu", "relu"])
@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("width", [5, 16])
def test_reading(depth, activation, norm, width):
    walk = Walk(depth=depth, norm=norm, d_in=width, d_out=width)
    expected = read_memory(walk.q[:, :1], walk.state.weights, activation, walk.norm, backend="reference")
    for dtype, tolerance in ((torch.float64, FLOAT64), (torch.float32, FLOAT32)):
        weights = tuple(w.to(dtype) for w in walk.state.weights)
        gain = None if walk.norm is None else walk.norm.to(dtype)
        y = read_memory(walk.q[:, :1].to(dtype), weights, activation, gain, backend="native_step")
        assert (y.double() - expected).norm() <= tolerance * expected.norm()
