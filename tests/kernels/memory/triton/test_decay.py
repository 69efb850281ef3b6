"""The decay matrices on the Triton kernels, in Triton's interpreter, against literal products in float64."""

import pytest
import torch

from titans_build.kernels.memory.decay_torch import ChunkDecay, chunk_decay
from titans_build.kernels.memory.triton.decay import triton_decay

pytest.importorskip("triton")


def products(factors):
    """``P[t, r] = prod_{r < j <= t} f_j`` and ``prod_{j <= t} f_j``, each taken on its own: autograd differentiates."""
    b = factors.shape[-1]
    t, r, j = torch.arange(b).view(-1, 1, 1), torch.arange(b).view(1, -1, 1), torch.arange(b)
    pick = lambda chosen: torch.where(chosen, factors[..., None, None, :], 1.0).prod(-1)  # noqa: E731
    return pick((r < j) & (j <= t)) * (r <= t)[..., 0], pick(j <= t)[..., 0]


def on_paper(theta, eta, alpha, real, read_after):
    """``C = D H`` and the rest, as they stand there."""
    step = (2 * theta).unsqueeze(-2)
    D, A = products(1 - alpha if alpha is not None else torch.ones_like(theta))
    if eta is None:
        weighs, carry, ends, mix = D, A[..., None], D[..., -1:, :], A[..., -1:, None]
    else:
        H, E = products(eta)
        added = D if real is None else D * real.unsqueeze(-2)
        weighs, m = added @ H, (added @ E.unsqueeze(-1)).squeeze(-1)
        carry, ends = torch.stack([A, m], -1), torch.stack([weighs[..., -1, :], H[..., -1, :]], -2)
        rows = torch.stack([A[..., -1], m[..., -1]], -1), torch.stack([torch.zeros_like(A[..., -1]), E[..., -1]], -1)
        mix = torch.stack(rows, -2)
    if not read_after:
        weighs = torch.nn.functional.pad(weighs, (0, 0, 1, -1))
        start = torch.eye(carry.shape[-1], dtype=carry.dtype)[0].expand_as(carry[..., :1, :])
        carry = torch.cat([start, carry[..., :-1, :]], -2)
    return ChunkDecay(weighs * step, carry, (ends * step).mT, mix)


def gates(b, momentum=True, forgetting=True, masked=False, edges=False, dtype=torch.float64, shape=(2, 3)):
    g = torch.Generator().manual_seed(b)
    theta, eta, alpha = (scale * torch.rand(*shape, b, generator=g, dtype=torch.float64) for scale in (0.1, 0.9, 0.3))
    if edges:
        for gate in (theta, eta, alpha):
            gate[..., ::3] = 0
        eta[..., 1::3] = 1
        alpha[..., 2::5] = 1
    real = None
    if masked:
        real = (torch.rand(*shape, b, generator=g) < 0.6).to(torch.float64)
        theta, eta, alpha = theta * real, 1 - (1 - eta) * real, alpha * real
    given = theta, eta if momentum else None, alpha if forgetting else None, real
    return [x if x is None else x.to(dtype) for x in given]


def results(make, given, read_after):
    """The matrices, and the gradients of the gates."""
    theta, eta, alpha, real = given
    leaves = [x if x is None else x.detach().requires_grad_() for x in (theta, eta, alpha)]
    made = make(*leaves, real, read_after)
    g = torch.Generator().manual_seed(1)
    cotangents = [torch.randn(x.shape, generator=g, dtype=torch.float64).to(x.dtype) for x in made]
    pairs = [(x, c) for x, c in zip(made, cotangents) if x.requires_grad]
    wanted = [x for x in leaves if x is not None]
    return [x.detach() for x in made], torch.autograd.grad([x for x, _ in pairs], wanted, [c for _, c in pairs])


def agree(found, expected, tolerance):
    for got, right in zip(found, expected):
        for a, b in zip(got, right, strict=True):
            assert a.shape == b.shape and a.isfinite().all()
            assert (a.double() - b).norm() <= tolerance * b.norm()


@pytest.mark.parametrize("read_after", [True, False])
@pytest.mark.parametrize("edges, masked", [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("momentum, forgetting", [(True, True), (True, False), (False, True), (False, False)])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-13), (torch.float32, 1e-6)])
def test_against_the_products_on_paper(read_after, edges, masked, momentum, forgetting, dtype, tolerance):
    given = gates(7, momentum, forgetting, masked, edges, dtype)
    exact = results(on_paper, [x if x is None else x.double() for x in given], read_after)
    agree(results(triton_decay, given, read_after), exact, tolerance)
    agree(results(chunk_decay, given, read_after), exact, tolerance)


@pytest.mark.parametrize("b", [1, 2, 15, 16, 33, 63])
def test_lengths(b):
    given = gates(b, edges=True, shape=(3 if b < 33 else 1,))
    agree(results(triton_decay, given, True), results(on_paper, given, True), 1e-13)


@pytest.mark.parametrize("b", [pytest.param(100, marks=pytest.mark.slow), 128])
def test_long_chunks(b):
    given = gates(b, edges=True, shape=(1,))
    agree(results(triton_decay, given, True), results(chunk_decay, given, True), 1e-12)


def test_many_chunks_a_program():
    """One more than fit into the last of them."""
    given = gates(3, shape=(65,))
    agree(results(triton_decay, given, False), results(on_paper, given, False), 1e-13)


def test_a_wiped_memory_holds_nothing_of_before():
    theta, eta, alpha = torch.full((3, 4), 0.1), torch.full((3, 4), 1.0), torch.zeros(3, 4)
    alpha[:, 2], eta[:, 2] = 1, 0
    decay = triton_decay(theta, eta, alpha, None, True)
    assert not decay.read[:, 2:, :2].any() and not decay.carry[:, 2:].any() and not decay.write[:, :2].any()
    assert not decay.mix.any()


def test_what_comes_before_a_token_that_is_not_finite_hears_nothing_of_it():
    theta, eta, alpha, _ = gates(5, shape=(1,))
    eta[0, 3] = alpha[0, 3] = float("nan")
    spoiled, right = triton_decay(theta, eta, alpha, None, True), triton_decay(*gates(5, shape=(1,)), True)
    assert torch.equal(spoiled.read[:, :3], right.read[:, :3]) and torch.equal(spoiled.carry[:, :3], right.carry[:, :3])


def test_strides_and_every_run_the_same_bits():
    given = gates(9, masked=True, dtype=torch.float32)
    first = results(triton_decay, given, True)
    strided = [torch.stack([x, x], -1)[..., 0] for x in given]
    for again in (results(triton_decay, given, True), results(triton_decay, strided, True)):
        for got, expected in zip(again, first):
            assert all(map(torch.equal, got, expected))


def test_no_chunk_at_all():
    decay = triton_decay(*[torch.empty(0, 2, 4)] * 3, None, True)
    assert [tuple(x.shape) for x in decay] == [(0, 2, 4, 4), (0, 2, 4, 2), (0, 2, 4, 2), (0, 2, 2, 2)]
