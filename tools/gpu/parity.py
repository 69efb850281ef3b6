"""Parity: every backend on a device against the reference in float64, outputs and gradients."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ...kernels import dispatch
from . import cases as gpu_cases
from .cases import Case, Inputs

TOLERANCE = {"float64": 1e-10, "float32": 1e-5, "tf32": 2e-3, "bfloat16": 1e-2, "float16": 1e-2}
"""Largest ``rms(out - ref) / rms(ref)``, with the reference in float64 on the same rounded inputs."""
DIGITS = {"tf32": 11, "bfloat16": 8, "float16": 11}
"""Binary digits of an operand."""
REFERENCE = "reference"
SCHEDULE = "TITANS_BUILD_SCHEDULE"
"""``kernels.memory.triton.schedule.VARIABLE``, copied because that module imports Triton."""


class Task(NamedTuple):
    """One backend on one case."""

    case: str
    operation: str
    backend: str
    precision: str


class Outcome(NamedTuple):
    """The result of a task."""

    operation: str
    backend: str
    case: str
    precision: str
    error: float
    """The largest error of all outputs and gradients, relative to their tolerances; NaN if there is a NaN."""
    tolerance: float
    refused: str = ""
    failed: str = ""
    """The exception, if it raised one."""
    where: str = ""
    """The output or gradient with the largest error."""

    @property
    def task(self) -> Task:
        return Task(self.case, self.operation, self.backend, self.precision)

    @property
    def passed(self) -> bool:
        return bool(self.refused) or self.error <= self.tolerance


def tasks(device: torch.device) -> list[Task]:
    """Every case with every backend except the reference, at its precisions; float32 first."""
    gpu = device.type == "cuda"
    found = []
    for precision in ("float32", "bfloat16", "float16", *(["tf32"] if gpu else [])):
        for case in gpu_cases.cases(small=not gpu):
            if case.all_precisions or precision == "float32" or (gpu and precision == "bfloat16"):
                backends = [name for name in dispatch.OPERATIONS[case.operation].backends if name != REFERENCE]
                if case.schedule != "auto":
                    backends = ["triton"]
                found += [Task(case.name, case.operation, name, precision) for name in backends]
    return found


def no_outcome(task: Task, failed: str = "") -> Outcome:
    """The outcome of a task without a result."""
    return Outcome(
        task.operation, task.backend, task.case, task.precision, math.nan, TOLERANCE[task.precision], "", failed
    )


def outcome(task: Task, device: torch.device) -> Outcome:
    """Run a task. An exception that a backend raises is returned as the outcome."""
    case = next(
        case
        for case in gpu_cases.cases(small=device.type != "cuda")
        if (case.name, case.operation) == (task.case, task.operation)
    )
    dtype = torch.float32 if task.precision == "tf32" else getattr(torch, task.precision)
    nothing = no_outcome(task)
    given = {name: _given(name, x, dtype) for name, x in case.make(torch.Generator().manual_seed(0)).items()}
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if task.precision == "tf32" else "highest")
    try:
        with scheduled(case.schedule):
            found = _pass(case, task.backend, {name: x.to(device) for name, x in given.items()})
        found = {name: x.detach().to("cpu", torch.float64) for name, x in found.items()}
    except dispatch.BackendError as error:
        return nothing._replace(refused=str(error).rpartition("cannot run: ")[2])
    except Exception as error:  # a kernel that does not compile, an illegal address: the other tasks still run
        return nothing._replace(failed=f"{type(error).__name__}: {str(error).strip() or 'no message'}".splitlines()[0])
    finally:
        torch.set_float32_matmul_precision(before)
    exact = {name: x.double() if x.is_floating_point() else x for name, x in given.items()}
    expected = _pass(case, REFERENCE, exact)
    most = bounds(case, exact, expected, task.precision)
    ratios = {name: ratio(x, expected[name]) for name, x in found.items()}
    worst = max(ratios, key=lambda name: (math.isnan(ratios[name]), ratios[name] / most[name]))
    return nothing._replace(error=ratios[worst], tolerance=most[worst], where=worst)


@contextlib.contextmanager
def scheduled(schedule: str) -> Iterator[None]:
    """Use the kernels of a schedule; ``"auto"`` changes nothing."""
    before = os.environ.get(SCHEDULE)
    if schedule != "auto":
        os.environ[SCHEDULE] = schedule
    try:
        yield
    finally:
        if schedule != "auto":
            os.environ.pop(SCHEDULE)
            os.environ.update({} if before is None else {SCHEDULE: before})


def bounds(case: Case, exact: Inputs, expected: dict[str, Tensor], precision: str) -> dict[str, float]:
    """The largest error that each output and gradient may have.

    A LayerNorm amplifies rounding errors by a factor that depends on the data. With one, the bound is twice the error
    that rounding the operands causes in the exact recurrence, if that is larger than the tolerance.
    """
    most = dict.fromkeys(expected, TOLERANCE[precision])
    if not case.layer_norm or precision not in DIGITS:
        return most
    near = _pass(case, REFERENCE, {name: _rounded(name, x, DIGITS[precision]) for name, x in exact.items()})
    return {name: max(most[name], 2 * ratio(near[name].detach(), right)) for name, right in expected.items()}


def _given(name: str, x: Tensor, dtype: torch.dtype) -> Tensor:
    if not x.is_floating_point():
        return x
    # the state of a memory is float32 at least
    wide = name.startswith("state") and dtype.itemsize < 4
    return x.to(torch.float32 if wide else dtype)


def _rounded(name: str, x: Tensor, digits: int) -> Tensor:
    """An operand rounded to ``digits``; gates and the gain are not operands."""
    if not x.is_floating_point() or not (name in ("q", "k", "v") or name.startswith("state")):
        return x
    mantissa, exponent = torch.frexp(x)
    return torch.ldexp((mantissa * 2**digits).round(), exponent - digits)


def _pass(case: Case, backend: str, inputs: Inputs) -> dict[str, Tensor]:
    """Outputs, and gradients of every floating-point input, from a fixed cotangent."""
    if not case.backward:
        with torch.no_grad():
            return {f"output {i}": y for i, y in enumerate(case.run(backend, **inputs))}
    leaves = {name: x.detach().clone().requires_grad_() if x.is_floating_point() else x for name, x in inputs.items()}
    made = list(case.run(backend, **leaves))
    random = torch.Generator().manual_seed(1)
    cotangents = [torch.randn(y.shape, generator=random, dtype=torch.float64).to(y) for y in made]
    inputs_with_grad = {name: x for name, x in leaves.items() if x.requires_grad}
    grads = torch.autograd.grad(made, list(inputs_with_grad.values()), cotangents, allow_unused=True)
    gradients = {
        f"gradient of {name}": torch.zeros_like(x) if grad is None else grad
        for (name, x), grad in zip(inputs_with_grad.items(), grads)
    }
    return {f"output {i}": y for i, y in enumerate(made)} | gradients


def ratio(found: Tensor, expected: Tensor) -> float:
    """``rms(found - expected) / rms(expected)``, of tensors in float64 on the CPU."""
    scale = expected.detach().square().mean().sqrt().item()
    error = (found - expected.detach()).square().mean().sqrt().item()
    return error / scale if scale else error


def failed_backends(outcomes: Sequence[Outcome]) -> dict[str, set[str]]:
    """By operation, the backends that failed any task."""
    found: dict[str, set[str]] = {}
    for each in outcomes:
        if not each.passed:
            found.setdefault(each.operation, set()).add(each.backend)
    return found
