"""The parity cases cover every backend that runs on a GPU."""

from __future__ import annotations

import pytest
import torch

from titans_build.kernels import dispatch
from titans_build.kernels import triton_runtime as availability
from titans_build.kernels.attention.trial import Trial
from titans_build.kernels.dispatch import OPERATIONS, Operation
from titans_build.tools.gpu import cases as gpu_cases

DTYPES = (torch.float32, torch.bfloat16)


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch):
    """Triton, xFormers and FlashAttention are available."""
    monkeypatch.setattr(availability, "_MISSING", None)
    monkeypatch.setattr(Trial, "refuse", lambda self, dtype, width: None)


def facts_of(cases, monkeypatch):
    """The facts that the cases give the dispatcher, by operation."""
    asked = {}
    choose = Operation.choose

    def spy(self, backend="auto", *tensors, **facts):
        dtypes = {x.dtype for x in tensors if x is not None}
        of_tensors = {"same": len(dtypes) == 1, "plain": True} if tensors else {}
        asked.setdefault(self.name, []).append({**of_tensors, **facts})
        return choose(self, backend, *tensors, **facts)

    monkeypatch.setattr(Operation, "choose", spy)
    for case in cases:
        inputs = case.make(torch.Generator().manual_seed(0))
        for x in inputs.values():
            x.requires_grad_(case.backward and x.is_floating_point())
        with torch.set_grad_enabled(case.backward):
            case.run("reference", **inputs)
    return asked


def runs(backend, **facts):
    return any(backend.refuse(named=True, **{**facts, "device": "cuda", "dtype": dtype}) is None for dtype in DTYPES)


def left_out(cases, monkeypatch):
    asked = facts_of(cases, monkeypatch)
    return [
        (operation.name, backend.name)
        for operation in OPERATIONS.values()
        for backend in operation.backends.values()
        if backend.name != "reference" and runs(backend)
        and not any(runs(backend, **facts) for facts in asked.get(operation.name, ()))
    ]  # fmt: skip


def test_every_backend_that_runs_on_a_gpu_has_a_case(monkeypatch):
    cases = gpu_cases.cases(small=True)
    assert {case.operation for case in cases} == OPERATIONS.keys()
    assert left_out(cases, monkeypatch) == []


def test_a_backend_without_a_case_is_found(monkeypatch):
    fewer = [case for case in gpu_cases.cases(small=True) if case.backward and case.operation != "gate"]
    found = left_out(fewer, monkeypatch)
    assert ("memory", "triton_step") in found and ("gate", "triton") in found and ("memory", "triton") not in found
    monkeypatch.setitem(OPERATIONS, "new", None)  # removed after the test; an operation registers itself
    Operation("new", [dispatch.Backend("fast", lambda x: x)])
    assert ("new", "fast") in left_out(fewer, monkeypatch)


def test_cases_have_distinct_names_and_are_deterministic():
    for small in (False, True):
        cases = gpu_cases.cases(small)
        assert len({(case.name, case.operation) for case in cases}) == len(cases)
        for case in cases:
            one, other = (case.make(torch.Generator().manual_seed(0)) for _ in range(2))
            assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
            assert all(x.dtype == torch.float64 for x in one.values() if x.is_floating_point())


def test_small_cases_are_smaller():
    large, small = gpu_cases.cases(), gpu_cases.cases(small=True)
    assert [case.name for case in large] == [case.name for case in small]
    numbers = lambda case: sum(x.numel() for x in case.make(torch.Generator().manual_seed(0)).values())  # noqa: E731
    assert all(numbers(one) <= numbers(other) for one, other in zip(small, large))
    assert sum(map(numbers, small)) < 0.6 * sum(map(numbers, large))
