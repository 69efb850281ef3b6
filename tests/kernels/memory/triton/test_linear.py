"""A memory of one matrix, written and read in one launch, in Triton's interpreter, against both references."""

import math

import pytest
import torch

from titans_build.kernels.dispatch import BackendError
from titans_build.kernels.memory import Objective

pytest.importorskip("triton")

from titans_build.kernels.memory.triton import linear, network
from titans_build.kernels.memory.triton.schedule import FUSED_ROWS, VARIABLE, fused, operands

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")
slow = pytest.mark.slow
HALF, FULL = operands(torch.float32, torch.bfloat16), operands(torch.float32)


@pytest.fixture(autouse=True)
def launched(monkeypatch):
    """The fused schedule, whatever the size; the names of the kernels that ran."""
    monkeypatch.setenv(VARIABLE, "fused")
    names, launch = [], linear.launch
    monkeypatch.setattr(
        linear, "launch", lambda kernel, *args, **fixed: (names.append(kernel.__name__), launch(kernel, *args, **fixed))
    )
    monkeypatch.setattr(network.TritonNetwork, "_run", None)  # no other schedule
    return names


def agree(case, oracle="reference", **options):
    options = dict(chunk=4) | options
    found, expected = (case.tensors(case.run(backend=backend, **options)) for backend in ("triton", oracle))
    case.assert_equal(found, expected)
    case.assert_equal(case.gradients(found), case.gradients(expected))


@pytest.mark.parametrize("norm, clip, oracle", [
    (True, 0.5, "reference"), (False, None, "closed_form"), pytest.param(True, None, "closed_form", marks=slow),
    pytest.param(False, 0.5, "reference", marks=slow),
])  # fmt: skip
@pytest.mark.parametrize("momentum, forgetting", [
    (True, True), (False, True), pytest.param(True, False, marks=slow), pytest.param(False, False, marks=slow)
])  # fmt: skip
def test_against_both_references(memory_case, norm, clip, oracle, momentum, forgetting):
    """Gates include exact 0 and 1."""
    case = memory_case(time=6, batch=1, heads=1, depth=1, norm=norm, momentum=momentum, forgetting=forgetting)
    agree(case, oracle, clip=clip)


@pytest.mark.parametrize("read", ["after", "before"])
@pytest.mark.parametrize("momentum", [True, pytest.param(False, marks=slow)])
def test_rows_inside_chunks_and_masked_tokens(memory_case, read, momentum):
    mask = torch.rand(2, 11, generator=torch.Generator().manual_seed(0)) < 0.7
    agree(memory_case(time=11, heads=1, depth=1, momentum=momentum, phases=[3, 0], mask=mask), read=read, clip=1.0)


@pytest.mark.parametrize("time, chunk", [(1, 1), (3, 16), (37, 35), pytest.param(70, 64, marks=slow)])
def test_lengths(memory_case, time, chunk):
    """One row; the last chunk is not whole."""
    case = memory_case(time=time, batch=1, heads=1, depth=1, phases=[1] if chunk > 1 else None, forget=0.05, step=0.05)
    agree(case, "closed_form", chunk=chunk)


@pytest.mark.parametrize("d_in, d_out", [(17, 5), pytest.param(3, 20, marks=slow)])
def test_widths(memory_case, d_in, d_out):
    agree(memory_case(time=6, batch=1, heads=1, depth=1, norm=False, d_in=d_in, d_out=d_out, scale=0.2))


@pytest.mark.parametrize("keep, launches", [(1, 2 + 1), (3, 3 + 1 + 3)])
def test_states_are_kept_now_and_then(memory_case, launched, keep, launches):
    """Nine chunks and a half, of which 8 or ``keep`` are worked on together; backward writes what was not kept."""
    agree(memory_case(time=19, batch=1, heads=1, depth=1), "closed_form", chunk=2, keep=keep)
    assert launched.count("linear_kernel") == launches


@pytest.mark.parametrize("objective", [
    Objective("l2_half"), Objective("dot"), Objective("lp", p=3), Objective("huber", delta=1.25),
    Objective("huber", delta=0.75, form="elementwise"),
], ids=lambda objective: f"{objective.kind}-{objective.form}")  # fmt: skip
@pytest.mark.parametrize("norm", [True, pytest.param(False, marks=slow)])
def test_objectives(memory_case, objective, norm):
    case = memory_case(time=5, batch=1, heads=1, depth=1, norm=norm, scale=0.4, step=0.05, forget=0.05)
    agree(case, objective=objective, chunk=3, clip=0.4 if norm else None)


@pytest.mark.parametrize("name", ["v", pytest.param("theta", marks=slow), pytest.param("k", marks=slow)])
def test_numbers_that_are_not_finite_reach_outputs_from_their_token_on(memory_case, name):
    case = memory_case(time=7, batch=1, depth=1)
    with torch.no_grad():
        before = case.run(backend="triton", chunk=4)[0]
        getattr(case, name)[0, 5, 1] = math.inf
        y, state = case.run(backend="triton", chunk=4)
    assert torch.equal(y[:, :5], before[:, :5]) and torch.equal(y[:, :, 0], before[:, :, 0])
    assert not y[:, 5:, 1].isfinite().any() and not state.weights[0][:, 1].isfinite().all()


def test_tokens_with_any_strides(memory_case):
    case = memory_case(time=6, batch=1, heads=1, depth=1)
    packed = torch.stack([case.q, case.k, case.v], -1).detach()
    spread = [x.detach().requires_grad_() for x in packed.unbind(-1)]
    assert all(x.stride(3) == 3 for x in spread)
    expected = case.tensors(case.run(backend="reference", chunk=4))
    case.q, case.k, case.v = spread
    case.assert_equal(case.tensors(case.run(backend="triton", chunk=4)), expected)


def test_every_run_gives_the_same_bits(memory_case):
    runs = []
    for _ in range(2):
        case = memory_case(time=3, batch=1, heads=1, depth=1)
        found = case.tensors(case.run(backend="triton", chunk=2, clip=1.0))
        runs.append([*found, *case.gradients(found)])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_gradients_of_gradients(memory_case):
    second = []
    for backend in ("triton", "closed_form"):
        case = memory_case(time=3, batch=1, heads=1, depth=1)
        y, _ = case.run(backend=backend, chunk=2)
        grads = torch.autograd.grad(y.square().sum(), case.leaves[:3], create_graph=True)
        second.append(torch.autograd.grad(sum(x.square().sum() for x in grads), case.leaves[:3]))
    case.assert_equal(*second)


def test_what_it_takes(monkeypatch):
    facts = dict(rows=FUSED_ROWS, layers=1, chunk=64, d_in=64, d_out=64, plain=True, products=HALF)
    for wrong in (dict(layers=2), dict(chunk=128), dict(d_in=128), dict(d_out=96), dict(plain=False)):
        with pytest.raises(BackendError, match=r"SCHEDULE=fused: takes memories of one layer.*expected auto, resident"):
            fused(**facts | wrong)
        monkeypatch.setenv(VARIABLE, "auto")
        assert fused(**facts) and not fused(**facts | wrong)
        monkeypatch.setenv(VARIABLE, "fused")
    few = dict(rows=FUSED_ROWS - 1), dict(products=FULL), dict(products=HALF | dict(UNIT_ROWS=16))
    assert all(fused(**facts | each) for each in few)
    for name in ("auto", "resident", "streamed"):
        monkeypatch.setenv(VARIABLE, name)
        assert fused(**facts) == (name == "auto")
        assert not any(fused(**facts | each) for each in few)
