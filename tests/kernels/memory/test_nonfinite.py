"""NaN, infinity and overflow: what comes before them, and beside them, is as if they had not come."""

import math

import pytest
import torch

from titans_build.kernels.memory import MemoryState, titans_memory
from titans_build.kernels.memory.measure import measure_memory

TIME = 13
NAMES = ("q", "k", "v", "theta", "eta", "alpha")
CHUNKWISE = ("native", "torch", "triton", "triton_batched", "closed_form", "reference")
slow = pytest.mark.slow
VALUES = {"nan": math.nan, "infinity": math.inf, "overflow": 0.9}
"""``overflow``: times the largest number of the dtype."""


def inputs(dtype=torch.float64, heads=3, rows=2):
    torch.manual_seed(0)
    token = lambda *shape: torch.randn(rows, TIME, heads, *shape, dtype=torch.float64)  # noqa: E731
    given = dict(
        q=token(4), k=token(4), v=token(4), theta=0.02 * token().sigmoid(), eta=token().sigmoid(),
        alpha=0.1 * token().sigmoid(),
    )  # fmt: skip
    return {name: x.to(dtype) for name, x in given.items()}


def fresh(dtype=torch.float64, heads=3, rows=2):
    torch.manual_seed(1)
    weights = [0.3 * torch.randn(rows, heads, *shape, dtype=torch.float64) for shape in ((8, 4), (4, 8))]
    position = torch.arange(rows) % 2 * 2
    return MemoryState.fresh(tuple(w.to(dtype) for w in weights))._replace(position=position)


def heads_of(backend):
    return 1 if "triton" in backend else 3  # the interpreter of Triton is slow


CASES = [
    *((backend, torch.float64, dict(chunk=5)) for backend in CHUNKWISE),
    *((backend, torch.float32, dict(chunk=64, read="before")) for backend in CHUNKWISE),
    *((backend, torch.float32, dict(chunk=1, clip=1.0)) for backend in ("native", "torch", "closed_form")),
    *((backend, torch.float32, dict(chunk=16, threshold=1e-3)) for backend in ("native", "torch")),
    ("torch", torch.float32, dict(chunk=5, read="anchor")),
    ("torch", torch.float32, dict(chunk=13, momentum=False)),
]


@pytest.mark.parametrize(
    "backend, dtype, options",
    # the interpreter of Triton is slow
    [
        pytest.param(*case, id=f"{case[0]}-{case[1]}-{case[2]}", marks=slow if "triton" in case[0] else ())
        for case in CASES
    ],
)
def test_earlier_outputs_and_other_heads_are_as_without_it(backend, dtype, options):
    """Each row has another number that is not finite, or overflows, in one head."""
    named, heads = [(name, value) for name in NAMES for value in VALUES], heads_of(backend)
    options, rows = dict(options), len(named)
    given, state = inputs(dtype, heads, rows), fresh(dtype, heads, rows)
    if not options.pop("momentum", True):
        given["eta"] = None

    def run():
        return titans_memory(**given, state=state, backend=backend, **options)

    expected, _ = run()
    places = [((6, 0, 9, 12)[row % 4], row % heads) for row in range(rows)]
    for row, ((name, value), (token, head)) in enumerate(zip(named, places)):
        if given[name] is not None:
            given[name][row, token, head] = VALUES[value] * (torch.finfo(dtype).max if value == "overflow" else 1)
    y, after = run()
    tolerance = dict(rtol=1e-10, atol=1e-12) if dtype == torch.float64 else dict(rtol=1e-4, atol=1e-5)
    anchored = options.get("read") == "anchor"
    for row, ((name, value), (token, bad)) in enumerate(zip(named, places)):
        if given[name] is None:
            continue
        for head in range(heads):
            until = token if head == bad else TIME
            at = min(until + (options.get("read") == "before" and name != "q"), TIME)
            torch.testing.assert_close(y[row, :at, head], expected[row, :at, head], **tolerance, msg=str(named[row]))
            if at < TIME and value != "overflow" and not (anchored and name != "q"):
                assert not bool(y[row, at, head].isfinite().all()), named[row]
        if name != "q" and value != "overflow":
            assert not all(bool(w[row, bad].isfinite().all()) for w in after.weights), named[row]
    assert after.position.tolist() == [TIME + n for n in state.position.tolist()]


@pytest.mark.parametrize("backend", CHUNKWISE)
def test_what_stands_at_masked_tokens_does_not_matter(backend):
    heads, time = heads_of(backend), 7 if backend == "triton" else TIME
    given = {name: x[:, :time] for name, x in inputs(heads=heads).items()}
    mask = torch.ones(2, time, dtype=torch.bool)
    mask[0, 3] = mask[1, 0] = False

    def run():
        leaves = {name: x.detach().clone().requires_grad_() for name, x in given.items()}
        y, state = titans_memory(**leaves, state=fresh(heads=heads), chunk=5, mask=mask, backend=backend)
        grads = torch.autograd.grad(y.sum() + state.weights[0].sum(), [*leaves.values()])
        return y, state.weights[0], *grads

    expected = run()
    for name in NAMES:
        given[name][~mask] = math.nan
    for got, x in zip(run(), expected):
        torch.testing.assert_close(got, x, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    "backend, dtype",
    [
        # the interpreter of Triton is slow, and float32 overflows first
        pytest.param(backend, dtype, marks=slow if "triton" in backend and dtype == torch.float64 else ())
        for backend in (*CHUNKWISE, "native_step", "step", "triton_step")
        for dtype in (torch.float32, torch.float64)
    ],
)
def test_a_huge_value_is_clipped(backend, dtype):
    """The square of its gradient's norm overflows, and the norm does not. The gradients are right, too."""
    heads = heads_of(backend)
    given, huge = inputs(dtype, heads), torch.finfo(dtype).max ** 0.8
    given["v"][0, 6, -1] = huge
    step = "step" in backend

    def run(backend, given, state):
        leaves = [x.detach().clone().requires_grad_(not step) for x in given.values()]
        if step:
            outputs = []
            for t in range(TIME):
                y, state = titans_memory(*(x[:, t : t + 1] for x in leaves), state, 5, clip=0.5, backend=backend)
                outputs.append(y)
            return [torch.cat(outputs, 1)]
        y, state = titans_memory(*leaves, state, 5, clip=0.5, backend=backend)
        return [y, *torch.autograd.grad(y.sum(), leaves)]

    with torch.set_grad_enabled(not step):
        found = run(backend, given, fresh(dtype, heads))
    # the direction of the gradient is that of a value far below
    given["v"][0, 6, -1] = torch.finfo(torch.float32).max ** 0.4 if dtype == torch.float32 else 1e30
    expected = run("reference", {name: x.double() for name, x in given.items()}, fresh(heads=heads)) if not step else [
        titans_memory(*(x.double() for x in given.values()), fresh(heads=heads), 5, clip=0.5, backend="reference")[0]
    ]  # fmt: skip
    for got, x in zip(found, expected):
        got, x = got.double(), x.double()
        scale = x.abs().max()
        assert bool(((got - x).abs() <= (1e-5 if dtype == torch.float32 else 1e-9) * scale).all())


@pytest.mark.parametrize("threshold", [None, 1e-3])
def test_the_surprise_of_a_huge_value(threshold):
    given = inputs(torch.float32)
    given["v"][0, 6, 1] = 1e30
    found = measure_memory_of(given, fresh(torch.float32), threshold)
    expected = measure_memory_of({name: x.double() for name, x in given.items()}, fresh(), threshold)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)


def measure_memory_of(given, state, threshold):
    from titans_build.kernels.memory import Options, Tokens

    options = Options(5, "gelu", 0.5, "after", threshold=threshold)
    return measure_memory(Tokens(**given), state, None, None, options).surprise


@pytest.mark.parametrize("read", ["after", "before"])
@pytest.mark.parametrize("rows, time, masked", [(0, 9, False), (2, 0, False), (2, 9, True)])
@pytest.mark.parametrize("backend", ["auto", *CHUNKWISE])
def test_no_token_at_all(backend, rows, time, masked, read):
    """No rows, no time, or every token masked: outputs in the graph, gradients of zero, and the state as it was."""
    for leaf in range(3):
        q = torch.randn(rows, time, 2, 5, requires_grad=leaf == 0)
        gate = torch.rand(rows, time, 2, requires_grad=leaf == 1)
        weights = [torch.randn(rows, 2, *shape, requires_grad=leaf == 2) for shape in ((7, 5), (5, 7))]
        state = MemoryState.fresh(tuple(weights))
        mask = torch.zeros(rows, time, dtype=torch.bool) if masked else None
        y, after = titans_memory(q, q, q, gate, gate, gate, state, 4, mask=mask, backend=backend, read=read)
        assert y.shape == q.shape and y.requires_grad and not y.detach().any()
        wanted = [[q], [gate], weights][leaf]
        for grad, x in zip(torch.autograd.grad(y.sum(), wanted, allow_unused=True), wanted):
            assert grad is None or (grad.shape == x.shape and not grad.any())
        for new, old in zip(after.weights, state.weights):
            assert torch.equal(new, old)
        assert torch.equal(after.position, state.position)
