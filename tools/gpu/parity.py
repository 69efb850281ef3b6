"""Parity: every backend on a device against the reference in float64, outputs and gradients."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

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

Answer = dict[str, dict[str, Any]]
"""``inputs`` in the dtypes of the case; ``expected`` outputs and gradients; the ``most`` error that each may have."""


def answer(case: Case) -> Answer:
    """The reference of a case. What is compared with bfloat16 is kept in float32."""
    inputs = inputs_of(case)
    exact = {name: x.double() if x.is_floating_point() else x for name, x in inputs.items()}
    expected = _pass(case, REFERENCE, exact)
    kept = torch.float64 if case.precision == "float64" else torch.float32
    return {
        "inputs": inputs,
        "expected": {name: x.detach().to(kept) for name, x in expected.items()},
        "most": bounds(case, exact, expected),
    }


def write_answers(file: Path, small: bool = False) -> None:
    """The references of all cases, for a machine whose time is short."""
    torch.save({case.name: answer(case) for case in gpu_cases.cases(small)}, file)


def check(name: str, device: str, small: bool = False, answers: str | None = None) -> Iterator[dict[str, Any]]:
    """A row for each backend of a case. ``answers``: a file of :func:`write_answers`."""
    case = gpu_cases.named(name, small)
    known: Answer = answer(case) if answers is None else torch.load(answers, weights_only=True, mmap=True)[name]
    if case.precision == "tf32":
        torch.set_float32_matmul_precision("high")
    if case.schedule != "auto":
        os.environ[SCHEDULE] = case.schedule
    backends = [name for name in dispatch.OPERATIONS[case.operation].backends if name != REFERENCE]
    for backend in ["triton"] if case.schedule != "auto" else backends:
        # fills the memory of torch.empty with NaN, which shows what a kernel does not write; xFormers has no gradients
        # that are the same in every run
        torch.use_deterministic_algorithms(case.operation != "attention", warn_only=True)
        yield compare(case, backend, known, device)


def compare(case: Case, backend: str, known: Answer, device: str) -> dict[str, Any]:
    """The row of one backend: its largest error relative to what it may be, or why it was refused."""
    row = {"operation": case.operation, "backend": backend, "precision": case.precision}
    try:
        found = _pass(case, backend, {name: x.to(device) for name, x in known["inputs"].items()})
        errors = {
            n: ratio(x.detach().to("cpu", torch.float64), known["expected"][n].double()) for n, x in found.items()
        }
    except dispatch.BackendError as error:
        return row | {"refused": str(error).rpartition("cannot run: ")[2]}
    except Exception as error:  # a kernel that does not compile; the other backends still run
        if "CUDA error" in str(error) or type(error).__name__ == "AcceleratorError":
            raise  # nothing else works in this process
        return row | {"failed": f"{type(error).__name__}: {str(error).strip() or 'no message'}".splitlines()[0]}
    most = known["most"]
    worst = max(errors, key=lambda name: (math.isnan(errors[name]), errors[name] / most[name]))
    passed = errors[worst] <= most[worst]
    return row | {"error": errors[worst], "at_most": most[worst], "where": worst, "passed": passed}


def bounds(case: Case, exact: Inputs, expected: dict[str, Tensor]) -> dict[str, float]:
    """The largest error that each output and gradient may have.

    A LayerNorm amplifies rounding errors by a factor that depends on the data. With one, the bound is twice the error
    that rounding the operands causes in the exact recurrence, if that is larger than the tolerance.
    """
    most = dict.fromkeys(expected, TOLERANCE[case.precision])
    if not case.layer_norm or case.precision not in DIGITS:
        return most
    near = _pass(case, REFERENCE, {name: _rounded(name, x, DIGITS[case.precision]) for name, x in exact.items()})
    return {name: max(most[name], 2 * ratio(near[name].detach(), right)) for name, right in expected.items()}


def repeat(name: str, device: str, small: bool = False, times: int = 3) -> Iterator[dict[str, Any]]:
    """Whether repeated runs of the backends that are chosen are equal bit by bit."""
    case = gpu_cases.named(name, small)
    if case.schedule != "auto":
        os.environ[SCHEDULE] = case.schedule
    inputs = {name: x.to(device) for name, x in inputs_of(case).items()}
    first, *others = (_pass(case, "auto", inputs) for _ in range(times))
    differ = [name for name, x in first.items() if any(not torch.equal(x, other[name]) for other in others)]
    yield {
        "operation": case.operation,
        "precision": case.precision,
        "times": times,
        "differ": differ,
        "passed": not differ,
    }


def inputs_of(case: Case) -> Inputs:
    dtype = torch.float32 if case.precision == "tf32" else getattr(torch, case.precision)
    return {name: _given(name, x, dtype) for name, x in case.make(torch.Generator().manual_seed(0)).items()}


def run_once(name: str, device: str, small: bool = False) -> None:
    """Forward and backward of a case, for programs that look into kernels."""
    case = gpu_cases.named(name, small)
    _pass(case, "auto", {name: x.to(device) for name, x in inputs_of(case).items()})
    if device != "cpu":
        torch.cuda.synchronize()


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
