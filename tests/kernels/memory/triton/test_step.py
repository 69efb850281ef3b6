"""One token on the Triton kernel, in Triton's interpreter: the recurrence of both references, whatever the options."""

import itertools

import pytest
import torch

from titans_build.kernels.dispatch import BackendError
from titans_build.kernels.memory import MEMORY, MemoryState, titans_memory

pytest.importorskip("triton")
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
"""Largest error ratio, rms(out - reference in float64) / rms(reference)."""


class Walk:
    """A few tokens of random rows, gates of exactly 0 and 1 among them."""

    def __init__(self, batch=2, heads=2, d_in=8, d_out=8, hidden=20, depth=2, *, norm=True, momentum=True,
                 forgetting=True, phases=(0, 0), time=5, mask=None):  # fmt: skip
        g = torch.Generator().manual_seed(0)
        rand = lambda *shape: torch.rand(*shape, generator=g, dtype=torch.float64)  # noqa: E731
        randn = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
        self.q, self.k, self.v = (randn(batch, time, heads, d) for d in (d_in, d_in, d_out))
        self.k = self.k / self.k.norm(dim=-1, keepdim=True)
        self.theta, eta, alpha = (size * rand(batch, time, heads) for size in (0.1, 1, 0.2))
        self.theta[:, 1], eta[:, 2], eta[:, 3], alpha[:, 4], alpha[:, 0, 0] = 0, 0, 1, 0, 1
        self.eta, self.alpha = eta if momentum else None, alpha if forgetting else None
        self.norm, self.mask = randn(heads, d_out) if norm else None, mask
        widths = [d_in, *[hidden] * (depth - 1), d_out]
        part = lambda: tuple(  # noqa: E731
            randn(batch, heads, o, i) * i**-0.5 for i, o in itertools.pairwise(widths)
        )
        self.state = MemoryState(part(), part() if momentum else (), part(), torch.tensor(phases))

    def run(self, backend, dtype=torch.float64, state=None, **options):
        cast = lambda x: x.to(dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() else x  # noqa: E731
        state = state or self.state
        state = MemoryState(*(tuple(map(cast, part)) for part in state[:3]), state.position)
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
def assert_agrees(walk, dtype=torch.float64, oracles=("reference",), **options):
    found = walk.run("triton_step", dtype, **options)
    for oracle in oracles:
        for a, b in zip(found, walk.run(oracle, **options), strict=True):
            assert a.shape == b.shape
            if not a.is_floating_point():
                assert torch.equal(a, b)
                continue
            assert a.dtype == dtype
            assert (a.double() - b).norm() <= TOLERANCE[dtype] * b.norm()


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("activation", ["identity", "relu", "silu", "gelu"])
def test_against_both_oracles(depth, activation):
    walk = Walk(batch=1, phases=(0,), depth=depth)
    assert_agrees(walk, oracles=("reference", "closed_form"), chunk=3, activation=activation)


def test_float32():
    assert_agrees(Walk(1, phases=(0,)), torch.float32, chunk=3)


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("options", [dict(clip=0.5), dict(clip=0.5, norm=False), dict(norm=False, read="before")])
def test_options(depth, options):
    walk = Walk(1, depth=depth, norm=options.get("norm", True), phases=(0,))
    assert_agrees(walk, chunk=2, **{name: x for name, x in options.items() if name != "norm"})


@pytest.mark.parametrize("momentum, forgetting", [(False, True), (True, False), (False, False)])
@pytest.mark.parametrize("depth", [1, 2])
def test_gates_that_are_not_there(depth, momentum, forgetting):
    assert_agrees(Walk(1, depth=depth, momentum=momentum, forgetting=forgetting, phases=(0,)), chunk=2)


@pytest.mark.parametrize("chunk", [1, 4])
@pytest.mark.parametrize("masked", [False, True])
def test_rows_at_different_places_and_masked_tokens(chunk, masked):
    mask = torch.tensor([[True, False, True, True, True], [False, True, True, False, True]]) if masked else None
    assert_agrees(Walk(phases=(2**40 + 1, 3), mask=mask), chunk=chunk)


@pytest.mark.parametrize("d_in, d_out, hidden", [(16, 16, 40), (17, 5, 3), (3, 20, 64), (33, 33, 16)])
def test_widths(d_in, d_out, hidden):
    assert_agrees(Walk(1, 1, d_in, d_out, hidden, norm=d_in == d_out, phases=(0,)), chunk=2)


def test_what_lies_in_a_masked_tokens_place_does_not_matter():
    walk = Walk(1, phases=(0,), mask=torch.tensor([[True, False, True, True, True]]))
    expected = walk.run("triton_step", chunk=2)
    for x in (walk.q, walk.k, walk.v, walk.theta, walk.eta, walk.alpha):
        x[:, 1] = torch.nan
    for a, b in zip(walk.run("triton_step", chunk=2), expected):
        assert torch.equal(a, b)


def test_strides():
    walk = Walk(1, phases=(0,))
    expected = walk.run("triton_step", chunk=2)
    walk.q, walk.k, walk.v = torch.stack([walk.q, walk.k, walk.v], -1).unbind(-1)
    walk.theta, walk.eta, walk.alpha = torch.stack([walk.theta, walk.eta, walk.alpha], 1).unbind(1)
    ragged = lambda part: tuple(x.mT.contiguous().mT for x in part)  # noqa: E731
    state = MemoryState(*(ragged(part) for part in walk.state[:3]), torch.stack([walk.state.position] * 2, 1)[:, 0])
    before = [x.clone() for part in state[:3] for x in part]
    for a, b in zip(walk.run("triton_step", state=state, chunk=2), expected):
        assert torch.equal(a, b)
    for a, b in zip(before, [x for part in state[:3] for x in part]):
        assert torch.equal(a, b), "what was passed in has changed"


def test_a_token_that_is_not_finite_spoils_its_own_head_alone():
    walk = Walk(time=5)
    expected = walk.run("triton_step", chunk=2, clip=1.0)
    walk.k[0, 2, 1] = torch.nan
    spoiled = walk.run("triton_step", chunk=2, clip=1.0)
    for a, b in zip(spoiled[:5], expected[:5]):
        if a is spoiled[0]:
            assert torch.equal(a[:, :2], b[:, :2]) and a[0, 2:, 1].isnan().all()
            a, b = a.transpose(1, 2), b.transpose(1, 2)
        assert a[0, 1].isnan().any() and torch.equal(a[0, 0], b[0, 0]) and torch.equal(a[1], b[1])


def test_half_precision():
    walk = Walk(1, d_in=16, d_out=16, phases=(0,))
    for name in "qkv":
        setattr(walk, name, getattr(walk, name).bfloat16().double())
    expected = walk.run("reference", chunk=2)
    state = MemoryState(*(tuple(x.float() for x in part) for part in walk.state[:3]), walk.state.position)
    for t in range(5):
        now = [x[:, t : t + 1] for x in (walk.q, walk.k, walk.v, walk.theta, walk.eta, walk.alpha)]
        now = [x.bfloat16() for x in now[:3]] + [x.float() for x in now[3:]]
        y, state = titans_memory(*now, state, norm=walk.norm.float(), chunk=2, backend="triton_step")
    assert y.dtype == torch.bfloat16 and (y[:, 0].double() - expected[0][:, 4]).norm() <= 2**-8 * y.double().norm()
    assert state.weights[0].dtype == torch.float32
    for a, b in zip([*state.weights, *state.momentum, *state.anchor], expected[1:]):
        assert (a.double() - b).norm() <= 1e-5 * b.norm()


def test_it_says_what_it_does_not_take():
    facts = dict(device="cpu", dtype=torch.float32, time=1)
    for wrong, reason in (
        (dict(time=2), "one token, not 2"),
        (dict(grad=True), "no backward"),
        (dict(layers=3), "one or two layers, not 3"),
        (dict(width=256), "heads of up to 128 numbers, not 256"),
    ):
        with pytest.raises(BackendError, match=reason):
            MEMORY.choose("triton_step", **{**facts, **wrong})
    assert "asked for by name" in MEMORY.backends["triton_step"].refuse(**facts)
