"""Reading at fixed weights on the Triton kernel, in Triton's interpreter, against the reference."""

import itertools

import pytest
import torch
from torch.testing import assert_close

from titans_build.kernels.dispatch import BackendError
from titans_build.kernels.memory import READ, read_memory
from titans_build.kernels.memory.triton import read as triton_read

pytest.importorskip("triton")
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")


def inputs(time=5, d_in=8, d_out=8, hidden=20, depth=2, batch=2, heads=2, dtype=torch.float64):
    g = torch.Generator().manual_seed(0)
    randn = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)  # noqa: E731
    widths = [d_in, *[hidden] * (depth - 1), d_out]
    weights = [randn(batch, heads, o, i) * i**-0.5 for i, o in itertools.pairwise(widths)]
    return [randn(batch, time, heads, d_in), randn(heads, d_out), *weights]


def results(leaves, backend, norm=True, **options):
    leaves = [x.detach().requires_grad_() for x in leaves]
    q, gain, *weights = leaves
    y = read_memory(q, tuple(weights), norm=gain if norm else None, backend=backend, **options)
    g = torch.Generator().manual_seed(1)
    loss = (y * torch.randn(y.shape, generator=g, dtype=torch.float64).to(y.dtype)).sum()
    with torch.no_grad():
        plain = read_memory(q, tuple(weights), norm=gain if norm else None, backend=backend, **options)
    assert_close(plain, y.detach())
    return [y.detach(), *(x for x in torch.autograd.grad(loss, leaves, allow_unused=True) if x is not None)]


def agree(leaves, tolerance=1e-10, **options):
    exact = results([x.double() for x in leaves], "reference", **options)
    for a, b in zip(results(leaves, "triton", **options), exact, strict=True):
        assert (a.double() - b).norm() <= tolerance * b.norm()


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("activation", ["identity", "relu", "silu", "gelu"])
def test_against_the_oracle(depth, norm, activation):
    agree(inputs(depth=depth), norm=norm, activation=activation)


@pytest.mark.parametrize("time", [1, 15, 63, 100])
def test_lengths(time):
    agree(inputs(time=time, batch=1))


@pytest.mark.parametrize("d_in, d_out, hidden", [(16, 16, 40), (17, 5, 3), (3, 20, 64), (33, 33, 16)])
def test_widths(d_in, d_out, hidden):
    agree(inputs(d_in=d_in, d_out=d_out, hidden=hidden), norm=d_in == d_out)


def test_strides():
    q, gain, *weights = inputs()
    expected = results([q, gain, *weights], "triton")
    for other in (torch.stack([q, q], -1)[..., 0], q.transpose(1, 2).contiguous().transpose(1, 2)):
        found = results([other, gain, *(w.mT.contiguous().mT for w in weights)], "triton")
        assert torch.equal(found[0], expected[0])
        for a, b in zip(found, expected):
            assert_close(a, b)


@pytest.mark.parametrize("given, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)])
def test_dtypes(given, tolerance):
    """Queries in half precision; the weights are float32 at least."""
    q, *rest = inputs(d_in=16, d_out=16, hidden=32, dtype=torch.float32)
    agree([q.to(given), *rest], tolerance)


def test_it_says_what_it_does_not_take():
    facts = dict(device="cpu", dtype=torch.float32)
    for wrong, reason in (
        (dict(layers=3), "one or two layers, not 3"),
        (dict(width=256), "heads of up to 128 numbers, not 256"),
    ):
        with pytest.raises(BackendError, match=reason):
            READ.choose("triton", **{**facts, **wrong})
    assert "asked for by name" in READ.backends["triton"].refuse(**facts)


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("activation", ["identity", "relu", "silu", "gelu"])
def test_its_backward_in_half_precision(depth, activation):
    q, *rest = inputs(depth=depth, d_in=16, d_out=16, hidden=32, dtype=torch.float32)
    agree([q.to(torch.bfloat16), *rest], 1e-2, activation=activation)


def test_sums_of_several_stretches(monkeypatch):
    """And every run gives the same bits."""
    monkeypatch.setattr(triton_read, "SHORTEST", 32)
    monkeypatch.setattr(triton_read, "STRETCHES", 2)
    assert triton_read.stretches(100) == (64, 2)
    leaves = inputs(time=100, batch=1)
    agree(leaves)
    assert all(map(torch.equal, results(leaves, "triton"), results(leaves, "triton")))


@pytest.mark.parametrize("time, expected", [(1, (512, 1)), (8192, (512, 16)), (8193, (1024, 9)), (2**20, (2**16, 16))])
def test_stretches(time, expected):
    assert triton_read.stretches(time) == expected


def test_a_grid_that_a_gpu_takes(monkeypatch):
    """Of any length: along all axes of a grid but the first, a GPU takes 65,535 programs."""
    grids = []
    monkeypatch.setattr(triton_read, "launch", lambda kernel, grid, *tensors, **fixed: grids.append(grid))
    q = torch.zeros(1, 2**22, 1, 1, requires_grad=True)
    weights = torch.zeros(1, 1, 1, 1, requires_grad=True)
    read_memory(q, (weights,), norm=torch.ones(1, 1), backend="triton").sum().backward()
    assert len(grids) == 3
    for first, *others in grids:
        assert first < 2**31 and all(n <= 65535 for n in others)


def test_only_what_is_asked_for():
    q, gain, *weights = inputs(time=3)
    wanted = results([q, gain, *weights], "triton")[1:]
    g = torch.Generator().manual_seed(1)
    for i, leaf in enumerate((q, gain, *weights)):
        x = leaf.clone().requires_grad_()
        given = [x if leaf is each else each for each in (q, gain, *weights)]
        y = read_memory(given[0], tuple(given[2:]), norm=given[1], backend="triton")
        cotangent = torch.randn(y.shape, generator=g.manual_seed(1), dtype=torch.float64)
        assert torch.equal(torch.autograd.grad(y, x, cotangent)[0], wanted[i])


def test_gradients_that_are_laid_out_otherwise():
    leaves = [x.requires_grad_() for x in inputs(time=4)]
    y = read_memory(leaves[0], tuple(leaves[2:]), norm=leaves[1], backend="triton")
    g = torch.randn(y.shape[::-1], dtype=torch.float64).permute(3, 2, 1, 0)
    pulled = [torch.autograd.grad(y, leaves, each, retain_graph=True) for each in (g, g.contiguous())]
    assert all(map(torch.equal, *pulled))
    none = torch.autograd.grad(y, leaves, torch.zeros(1, dtype=torch.float64).expand(y.shape))
    assert not any(x.any() for x in none)


def test_it_keeps_no_hidden_value():
    leaves = [x.requires_grad_() for x in inputs()]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        read_memory(leaves[0], tuple(leaves[2:]), norm=leaves[1], backend="triton")
    assert sum(kept) == sum(x.numel() for x in leaves)


@pytest.mark.parametrize("given", [torch.bfloat16, torch.float16])
def test_compiled_it_multiplies_in_the_same_precision(given):
    """What rounds is not float32, bit by bit: a compiler may not widen the queries before the kernel sees them."""
    q, gain, *weights = inputs(d_in=16, d_out=16, hidden=32, dtype=torch.float32)
    leaves = [x.requires_grad_() for x in (q.to(given), gain, *weights)]
    read = lambda q, gain, *weights: read_memory(q, weights, norm=gain, backend="triton")  # noqa: E731
    made = []
    for run in (read, torch.compile(read, backend="aot_eager", fullgraph=True)):
        y = run(*leaves)
        made.append([y, *torch.autograd.grad(y.float().square().sum(), leaves)])
    assert made[0][0].dtype == given
    assert all(map(torch.equal, *made))


@pytest.mark.parametrize("given", [torch.bfloat16, torch.float16])
def test_autocast_is_half_precision_too(given):
    """float32 queries, as a model has them there: products as those of queries in half precision, compiled or not."""
    q, gain, *weights = inputs(d_in=16, d_out=16, hidden=32, dtype=torch.float32)
    q = q.to(given).float()
    read = lambda q: read_memory(q, tuple(weights), norm=gain, backend="triton")  # noqa: E731
    exact, narrow = read(q), read(q.to(given)).float()
    with torch.autocast("cpu", given):
        y, compiled = read(q), torch.compile(read, backend="aot_eager", fullgraph=True)(q)
    assert y.dtype == torch.float32 and torch.equal(y, compiled)
    # the same but for the answers, which only those to queries in half precision are rounded to
    assert (y - narrow).norm() <= torch.finfo(given).eps * y.norm() < (y - exact).norm() * 8
    assert not torch.equal(y, exact)
