"""Memories that the Triton kernels do not take, in batched products of the model's dtype, against both references."""

import itertools

import pytest
import torch
from torch.nn import functional as F

from titans_build.kernels.dispatch import BackendError
from titans_build.kernels.memory import MEMORY, read_memory
from titans_build.kernels.memory.decay_torch import chunk_decay, end_decay
from titans_build.kernels.memory.network_torch import ACTIVATION_NUMBERS

pytest.importorskip("triton")
from titans_build.kernels.memory.triton.products import Products
from titans_build.kernels.memory.triton.schedule import operands

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")


LONG = dict(depth=1, time=140, batch=1, heads=1, forget=0.05, step=0.05), dict(chunk=135)


@pytest.mark.parametrize("oracle", ["reference", "closed_form"])
@pytest.mark.parametrize("sizes, options", [
    (dict(depth=3, time=7, batch=1), dict(chunk=5, clip=0.5)),
    (dict(depth=4, time=6, heads=1, norm=False, momentum=False, phases=[2, 0]), dict(chunk=4, read="before")),
    (dict(depth=3, time=8, heads=1, phases=[3, 1]), dict(chunk=6, read="anchor", clip=0.4)),
    (dict(depth=2, time=7, batch=1, phases=[2]), dict(chunk=4, clip=0.5, activation="silu")),
    (dict(depth=1, time=6, batch=1, forgetting=False), dict(chunk=4, clip=0.4, read="before")),
    pytest.param(*LONG, marks=pytest.mark.slow),
    pytest.param(
        dict(depth=2, d_in=130, d_out=130, expansion=1, batch=1, heads=1, time=6, scale=0.05), dict(chunk=4, clip=0.5),
        marks=pytest.mark.slow,
    ),
])  # fmt: skip
def test_float64(memory_case, sizes, options, oracle):
    case = memory_case(**sizes)
    found, expected = (case.tensors(case.run(backend=backend, **options)) for backend in ("triton_batched", oracle))
    case.assert_equal(found, expected)
    case.assert_equal(case.gradients(found), case.gradients(expected))


BFLOAT16, FLOAT16, FLOAT32 = (torch.bfloat16, 8, 1e-2), (torch.float16, 11, 2e-3), (torch.float32, 24, 1e-5)


@pytest.mark.parametrize("given, kept, tolerance, depth, read", [
    (*BFLOAT16, 3, "after"), (*BFLOAT16, 2, "before"), (*BFLOAT16, 3, "anchor"), (*FLOAT16, 2, "after"),
    pytest.param(*FLOAT16, 3, "after", marks=pytest.mark.slow), (*FLOAT16, 3, "anchor"), (*FLOAT32, 2, "after"),
])  # fmt: skip
def test_precision(memory_case, given, kept, tolerance, depth, read):
    """Outputs, states and gradients are as near as those of the exact recurrence with rounded inputs, times two."""
    case = memory_case(
        batch=1, time=9, heads=1, d_in=32, d_out=32, depth=depth, scale=0.15, step=0.05, forget=0.05, phases=[2]
    )

    clip = 0.5 if given == torch.float32 else None

    def results(backend, digits=None):
        for x in case.leaves:
            if digits and x.dim() == 4:  # no gate and no gain
                mantissa, exponent = torch.frexp(x.detach())
                x.data = torch.ldexp((mantissa * 2**digits).round(), exponent - digits)
        with torch.autocast("cpu", given, enabled=backend == "triton_batched" and given != torch.float32):
            outputs = case.tensors(case.run(backend=backend, chunk=5, read=read, clip=clip))
        return [x.detach() for x in outputs], case.gradients([x.double() for x in outputs])

    for x in case.leaves:
        x.data = x.data.float()
    found = results("triton_batched")
    for x in case.leaves:
        x.data = x.data.double()
    exact, nearby = results("reference"), results("reference", kept)
    ratio = lambda x, right: float((x.double() - right).norm() / right.norm())  # noqa: E731
    for got, near, right in zip(*(itertools.chain(*each) for each in (found, nearby, exact)), strict=True):
        assert got.dtype == torch.float32
        if right.norm() > 0:
            assert ratio(got, right) <= max(tolerance, 2 * ratio(near, right))
    assert (ratio(found[0][0], exact[0][0]) > 1e-5) == (given != torch.float32)


def normal(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def test_products_with_what_comes_before_and_after_them():
    torch.manual_seed(0)
    product = Products(operands(torch.float64))
    x, parts, weights, onto = normal(3, 35, 40), normal(3, 2, 40, 70), normal(3, 35, 2), normal(2, 3, 35, 70)[1]
    each, of_parts = normal(3, 35, 2, 70), torch.einsum("zmk,zpkn->zmpn", x, parts)
    expected = onto + (of_parts * weights.unsqueeze(-1)).sum(2)
    product(x, parts, onto, onto=onto, weights=weights, each=each)
    torch.testing.assert_close(each, of_parts)
    torch.testing.assert_close(onto, expected)
    # strides, and zeros for later columns, whatever is there
    scores, right = normal(3, 35, 70), normal(3, 70, 40)
    expected = -(x @ right.mT * scores).tril(30)
    scores[:, 0, 40] = torch.nan
    torch.testing.assert_close(product(x, right.mT, times=scores, last=30, sign=-1), expected)
    # what follows at a hidden layer
    also, z, through = normal(3, 35, 70), normal(3, 35, 70), normal(3, 35, 70)
    y = product(x, right.mT, also=also, activation=ACTIVATION_NUMBERS["silu"])
    torch.testing.assert_close(also, F.silu(y))
    y = product(x, right.mT, also=also, z=z, through=through, activation=ACTIVATION_NUMBERS["relu"])
    torch.testing.assert_close(also, y * (z > 0) + through)


@pytest.mark.parametrize("parts", [1, 2])
def test_the_update_of_a_state_and_its_gradient(parts):
    torch.manual_seed(0)
    product = Products(operands(torch.float64))
    errors, inputs, weights = normal(2, 9, 35), normal(2, 9, 40), normal(2, 9, parts)
    mix, stack, to = normal(2, parts, parts), normal(2, parts, 35, 40), normal(2, parts, 35, 40)
    changes = torch.einsum("zkp,zkm,zkn->zpmn", weights, errors, inputs)
    product.update(errors, inputs, weights, to, mix=mix, stack=stack, sign=-1)
    torch.testing.assert_close(to, torch.einsum("zpq,zqmn->zpmn", mix, stack) - changes)
    product.update(errors, inputs, weights, to)
    torch.testing.assert_close(to, changes)
    for anchored in (False, True):
        grad, anchor = normal(2, parts, 35, 40), normal(2, 35, 40)
        expected, of_anchor = grad + torch.einsum("zqp,zqmn->zpmn", mix, stack), anchor.clone()
        added = of_anchor if anchored else expected[:, 0]
        added += errors.mT @ inputs + 2 * errors.mT @ inputs
        pairs = [(errors, inputs), (2 * errors, inputs)]
        product.state_backward(pairs, grad, anchor if anchored else None, mix, stack)
        torch.testing.assert_close(grad, expected)
        torch.testing.assert_close(anchor, of_anchor)


@pytest.mark.parametrize("momentum, forgetting", [(True, True), (True, False), (False, True), (False, False)])
def test_decays_at_the_end_of_a_chunk(momentum, forgetting):
    """Without the matrices for each pair of tokens, which are empty; gates of 0 and 1 and empty slots among them."""
    g = torch.Generator().manual_seed(0)
    theta, eta, alpha = (torch.rand(3, 2, 9, generator=g, dtype=torch.float64) for _ in range(3))
    eta[..., 2], eta[..., 5], alpha[..., 3], alpha[..., 6] = 0, 1, 0, 1
    valid = (torch.rand(3, 2, 9, generator=g) < 0.7).double()
    theta, eta, alpha = theta * valid, 1 - (1 - eta) * valid, alpha * valid
    gates = [x.requires_grad_() for x in (theta, eta, alpha)]
    given = theta, eta if momentum else None, alpha if forgetting else None, valid, True
    found, expected = end_decay(*given), chunk_decay(*given)
    assert not found.read.numel() and not found.carry.numel()
    for a, b in zip(found[2:], expected[2:], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
        pulled = [torch.autograd.grad(x.sin().sum() + 0 * theta.sum(), gates, allow_unused=True, retain_graph=True,
                                      materialize_grads=True) for x in (a, b)]  # fmt: skip
        torch.testing.assert_close(*pulled, rtol=1e-12, atol=1e-12)


def test_reading_without_writing(memory_case):
    case = memory_case(depth=3)
    weights = tuple(w.detach().requires_grad_() for w in case.state.weights)
    results = []
    for backend in ("triton_batched", "reference"):
        y = read_memory(case.q, weights, "silu", case.norm, backend=backend)
        results.append([y.detach(), *torch.autograd.grad(y.sin().sum(), [case.q, case.norm, *weights])])
    case.assert_equal(*results)


def test_what_a_gpu_takes():
    """Kernels where there are some; these products for every other size."""
    facts = dict(dtype=torch.float32, named=False)
    for name, wrong in (("width", 256), ("layers", 3), ("chunk", 512)):
        assert "not " + str(wrong) in MEMORY.backends["triton"].refuse(device="cuda", **facts, **{name: wrong})
        assert MEMORY.backends["triton_batched"].refuse(device="cuda", **facts, **{name: wrong}) is None
    order = list(MEMORY.backends)
    assert order.index("triton") < order.index("triton_batched") < order.index("torch")
    with pytest.raises(BackendError, match="on a GPU, not on meta"):
        MEMORY.choose("triton_batched", device="meta", dtype=torch.float32)
