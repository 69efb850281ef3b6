"""Objectives other than the squared error, and reads at the anchor, on every backend."""

import itertools

import pytest
import torch

from titans_build.kernels.cpu_runtime import library
from titans_build.kernels.dispatch import BackendError
from titans_build.kernels.memory import Objective, Options, run_memory
from titans_build.kernels.memory.measure import measure_memory
from titans_build.kernels.memory.network_torch import half_error, half_error_vjp

OBJECTIVES = [
    Objective("l2_half"), Objective("dot"), Objective("lp", p=3), Objective("lp", p=1.5),
    Objective("lp", p=1, smooth=5.0), Objective("lp", p=2.5, smooth=5.0), Objective("huber", delta=1.25),
    Objective("huber", delta=0.75, form="elementwise"),
]  # fmt: skip
NAMES = ["-".join(str(x) for x in objective if x is not None) for objective in OBJECTIVES]
every_objective = pytest.mark.parametrize("objective", OBJECTIVES, ids=NAMES)
BUILT = library.refuse(device="cpu", dtype=torch.float64) is None
READS = ("after", "before", "anchor")


def cases(memory_case, settings):
    """Memories for ``settings``, with the options of each."""
    for number, (depth, norm, chunk, read, clip) in enumerate(settings):
        case = memory_case(
            batch=1, heads=1, time=8, depth=depth, norm=norm, momentum=number % 3 > 0, forgetting=number % 4 > 0,
            phases=[chunk - 4] if chunk > 1 else None, scale=0.4, step=0.05, forget=0.05, seed=number,
        )  # fmt: skip
        yield case, dict(chunk=chunk, read=read, clip=clip)


def few(objective):
    """Every depth; two neighboring objectives have every depth with and without a norm."""
    first = OBJECTIVES.index(objective)
    for number, depth in enumerate((1, 2, 3), first):
        yield depth, number % 2 == 0, (16, 1, 7)[number // 2 % 3], READS[number % 3], (None, 0.3)[number // 3 % 2]


@every_objective
def test_backends_agree(memory_case, objective):
    for case, options in cases(memory_case, few(objective)):
        case.assert_agrees(objective=objective, **options)


@pytest.mark.slow
@pytest.mark.parametrize("objective", [Objective(), *OBJECTIVES], ids=["l2", *NAMES])
@pytest.mark.parametrize("read", READS)
def test_backends_agree_in_every_setting(memory_case, objective, read):
    settings = itertools.product((1, 2, 3), (True, False), (1, 7, 16), (read,), (None, 0.3))
    for case, options in cases(memory_case, settings):
        case.assert_agrees(objective=objective, **options)


@pytest.mark.parametrize("masked, clip", [(False, 0.5), (True, None)])
def test_reads_at_the_anchor_of_rows_at_different_positions(memory_case, masked, clip):
    mask = torch.rand(3, 13, generator=torch.Generator().manual_seed(0)) > 0.4 if masked else None
    case = memory_case(batch=3, heads=1, time=13, phases=[3, 0, 5], mask=mask, step=0.05, scale=0.3)
    case.assert_agrees(chunk=4, read="anchor", clip=clip)


@pytest.mark.parametrize("form, norm, clip", [("norm", True, None), ("norm", False, 0.4), ("elementwise", True, 0.4)])
def test_a_delta_for_each_token(memory_case, form, norm, clip):
    mask = torch.rand(2, 9, generator=torch.Generator().manual_seed(0)) > 0.3
    case = memory_case(time=9, heads=1, norm=norm, deltas=True, phases=[0, 2], mask=mask, step=0.05, scale=0.4)
    case.assert_agrees(objective=Objective("huber", form=form), chunk=4, clip=clip)
    options = dict(objective=Objective("huber", form=form), chunk=4, threshold=1.0)
    case.assert_equal(case.tensors(case.run(**options)), case.tensors(case.run(backend="reference", **options)))
    with pytest.raises(BackendError, match="does not know thresholds for each token"):
        case.run(backend="native_linear", **options)


@every_objective
@torch.no_grad()
def test_steps_are_the_recurrence(memory_case, objective):
    for number, (case, options) in enumerate(cases(memory_case, few(objective))):
        options |= dict(objective=objective, threshold=(None, 0.8)[number % 2])
        whole = case.tensors(case.run(backend="reference", **options))
        for backend in ("step", *(["native_step"] if BUILT else [])):
            state, outputs = case.state, []
            for t in range(case.q.shape[1]):
                y, state = case.run(state, slice(t, t + 1), backend=backend, **options)
                outputs.append(y)
            case.assert_equal(case.tensors((torch.cat(outputs, 1), state)), whole)


@pytest.mark.parametrize("backend", ["native", "torch"])
@pytest.mark.parametrize("keep", [None, 2])
def test_any_split_is_the_whole_where_reads_are_at_the_anchor(memory_case, backend, keep):
    case = memory_case(step=0.05)
    options = dict(objective=Objective("huber"), chunk=5, read="anchor", backend=backend, keep=keep)
    whole = case.tensors(case.run(**options))
    state, outputs = None, []
    for start, stop in itertools.pairwise((0, 1, 4, 9, 14)):
        y, state = case.run(state, slice(start, stop), **options)
        outputs.append(y)
    pieces = case.tensors((torch.cat(outputs, 1), state))
    case.assert_equal(pieces, whole)
    case.assert_equal(case.gradients(pieces), case.gradients(whole))


@pytest.mark.parametrize("backend", ["native", "torch"])
def test_second_derivatives(memory_case, backend):
    case = memory_case(batch=1, heads=1, time=5, d_in=2, d_out=2, step=0.05, norm=False)
    options = dict(objective=Objective("lp", p=3), chunk=3, read="anchor")

    def of_gradients(backend):
        outputs = case.tensors(case.run(backend=backend, **options))
        grads = torch.autograd.grad(sum(x.square().sum() for x in outputs), case.leaves, create_graph=True)
        return case.gradients(grads)

    case.assert_equal(of_gradients(backend), of_gradients("reference"))


@pytest.mark.parametrize("objective", [OBJECTIVES[i] for i in (2, 4, 6)], ids=[NAMES[i] for i in (2, 4, 6)])
@torch.no_grad()
def test_narrow_inputs(memory_case, objective):
    case = memory_case(batch=1, heads=1, time=20, d_in=8, d_out=8, step=0.02, scale=0.3, forget=0.05)
    options = Options(8, "gelu", None, "after", objective=objective)

    def error(dtype, backend="auto"):
        """Relative to the exact result for the same inputs."""
        norm = None if case.norm is None else case.norm.to(dtype)
        tokens, state = case.tokens.map(lambda x: x.to(dtype)), case.state.to(torch.float32)
        y, _ = run_memory(tokens, state, norm, None, options, backend)
        assert y.dtype == dtype
        wide = tokens.map(torch.Tensor.double), state.to(torch.float64), None if norm is None else norm.double()
        exact, _ = run_memory(*wide, None, options, "reference")
        return (y - exact).norm() / exact.norm()

    assert error(torch.float32) <= 2 * error(torch.float32, "reference") + 1e-6
    assert error(torch.bfloat16) <= 1e-2


@pytest.mark.parametrize(
    "objective, expected",
    [
        (Objective("l2"), [3.0, -1.0, 0.0]),
        (Objective("l2_half"), [1.5, -0.5, 0.0]),
        (Objective("dot"), [-1.0, 0.5, -0.5]),  # of the values 2, -1 and 1
        (Objective("lp", p=3), [13.5, -1.5, 0.0]),
        (Objective("lp", p=1), [0.5, -0.5, 0.0]),
        (Objective("lp", p=1, smooth=0.5), [0.45257412682, -0.2310585786300049, 0.0]),
        (Objective("lp", p=3, smooth=0.5), [12.21950142424, -0.6931757358900146, 0.0]),
        (Objective("huber", delta=4.0), [3.0, -1.0, 0.0]),
        (Objective("huber", delta=2.0), [1.0, -1.0, 0.0]),
        (Objective("huber", delta=2.0, form="elementwise"), [1.0, -0.5, 0.0]),
    ],
)
def test_error_is_half_the_derivative(objective, expected):
    value = torch.tensor([2.0, -1.0, 1.0], dtype=torch.float64, requires_grad=True)
    p = (value + torch.tensor([3.0, -1.0, 0.0])).detach().requires_grad_()
    error = half_error(p, value, objective)
    torch.testing.assert_close(error.detach(), torch.tensor(expected, dtype=torch.float64))
    g = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    grads = torch.autograd.grad(error, (p, value), g, materialize_grads=True, allow_unused=True)
    torch.testing.assert_close(half_error_vjp(g, p.detach(), value.detach(), objective), grads)


@torch.no_grad()
def test_surprise_is_of_the_objective(memory_case):
    case = memory_case(time=1, depth=1, norm=False)
    options = Options(4, "gelu", None, "after", objective=Objective("dot"))
    found = measure_memory(case.tokens, case.state, None, None, options).surprise
    torch.testing.assert_close(found, case.v.norm(dim=-1) * case.k.norm(dim=-1))


@pytest.mark.parametrize("backend", ["native", "torch", "closed_form", "reference"])
@pytest.mark.parametrize("objective", [OBJECTIVES[i] for i in (4, 6)], ids=[NAMES[i] for i in (4, 6)])
@pytest.mark.parametrize("read", ["after", "anchor"])
@torch.no_grad()
def test_a_value_that_is_not_a_number_reaches_its_memory_from_its_token_on(memory_case, objective, backend, read):
    case = memory_case(batch=1, time=10, norm=False, step=0.05)
    options = dict(objective=objective, backend=backend, chunk=4, read=read)
    before, _ = case.run(**options)
    case.v[0, 5, 0] = float("nan")
    y, state = case.run(**options)
    start = 5 if read == "after" else 8
    assert y[0, start:, 0].isnan().all() and state.weights[0][0, 0].isnan().any()
    y[0, start:, 0] = before[0, start:, 0]
    torch.testing.assert_close(y, before)
