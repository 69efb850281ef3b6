"""``gpu_check`` on a CPU: what it finds, refuses and writes."""

from __future__ import annotations

import json

import pytest
import torch

from titans_build.kernels import dispatch
from titans_build.tools.gpu import cases as gpu_cases
from titans_build.tools.gpu import check, parity, speed, timing, workers

NAMES = ("one token, decoding", "prefix and window", "gate", "convolution")


@pytest.fixture
def few_cases(monkeypatch):
    """A few of the cases, each with the kernels of the interpreter among its backends."""
    only(monkeypatch, *NAMES)


def only(monkeypatch, *names):
    every = gpu_cases.cases(small=True)
    kept = tuple(case for case in every if case.name in names)
    assert len(kept) == len(names)
    monkeypatch.setattr(gpu_cases, "cases", lambda small=False: kept)


def run(*words):
    return check.main(["--device", "cpu", "--quick", *words])


def test_parity_then_speed(few_cases, tmp_path, capsys):
    target = tmp_path / "new" / "cpu.json"
    assert run("--json", str(target), "--minutes", "0.02") == 0
    found = json.loads(target.read_text())
    assert found["environment"]["versions"]["torch"] == torch.__version__
    ran = [outcome for outcome in found["parity"] if not outcome["refused"]]
    assert all(outcome["passed"] and outcome["error"] <= outcome["tolerance"] for outcome in ran)
    assert {"native", "torch", "sdpa", "step"} <= {outcome["backend"] for outcome in ran}
    assert {outcome["precision"] for outcome in ran} == {"float32", "bfloat16", "float16"}
    assert found["ceiling"]["product"] > 0
    assert found["left_out"] and not list(tmp_path.glob("**/*.partial"))
    assert "did not fit into --minutes" in capsys.readouterr().err


def test_a_backend_that_fails_its_parity_is_not_timed(tmp_path, monkeypatch, capsys):
    only(monkeypatch, "gate")
    right = dispatch.OPERATIONS["gate"].backends["torch"]
    wrong = dispatch.Backend("torch", lambda *inputs: right.run(*inputs) * 1.01)
    monkeypatch.setitem(dispatch.OPERATIONS["gate"].backends, "torch", wrong)
    monkeypatch.setattr(dispatch.OPERATIONS["gate"], "_chosen", {})
    of = {("gate", "torch"), ("gate", "triton"), ("memory", "torch"), ("memory block", "auto"), ("model mag", "auto")}
    every = speed.timings
    monkeypatch.setattr(speed, "timings", lambda *given: [case for case in every(*given) if case[:2] in of])
    target = tmp_path / "cpu.json"
    assert run("--json", str(target)) == 1
    said = capsys.readouterr()
    assert "gate, torch, gate, float32: " in said.err and "error 1.0e-02, at most 1e-05 is right" in said.err
    assert "not timed: gate, torch: failed its parity" in said.err
    found = json.loads(target.read_text())
    ran = {(row["what"], row["backend"]) for row in found["speed"]}
    assert ("gate", "torch") not in ran and {("gate", "triton"), ("memory", "torch")} <= ran
    # `auto` may run any backend
    assert not [row for row in found["speed"] if row["backend"] == "auto"]
    assert "model mag: may run what failed its parity: torch of gate" in found["untimed"]


def test_one_nan_fails_the_parity(monkeypatch):
    only(monkeypatch, "convolution")
    right = dispatch.OPERATIONS["convolution"].backends["torch"]
    wrong = dispatch.Backend("torch", lambda *inputs: right.run(*inputs).index_fill(1, torch.tensor(0), float("nan")))
    monkeypatch.setitem(dispatch.OPERATIONS["convolution"].backends, "torch", wrong)
    monkeypatch.setattr(dispatch.OPERATIONS["convolution"], "_chosen", {})
    tasks = [task for task in parity.tasks(torch.device("cpu")) if task.precision == "float32"]
    found = [parity.outcome(task, torch.device("cpu")) for task in tasks]
    assert {o.backend: o.passed for o in found} == {"triton": True, "torch": False}


def test_the_tolerance_of_a_normalized_memory_grows_with_rounding():
    """Only that of a normalized memory, and not at float32."""
    cases = {case.name: case for case in gpu_cases.cases(small=True) if case.operation == "memory"}
    for name, precision, wider in (
        ("two layers", "bfloat16", True), ("two layers", "float32", False), ("no norm", "bfloat16", False),
    ):  # fmt: skip
        case = cases[name]
        exact = case.make(torch.Generator().manual_seed(0))
        expected = parity._pass(case, "reference", exact)
        found = parity.bounds(case, exact, expected, precision)
        least = parity.TOLERANCE[precision]
        assert found.keys() == expected.keys() and min(found.values()) == least
        assert (max(found.values()) > least) == wider


def test_a_worker_that_hangs_is_a_failed_outcome(monkeypatch):
    monkeypatch.setattr(workers, "TIMEOUT", 0.05)
    tasks = parity.tasks(torch.device("cpu"))[:2]
    found = list(workers.outcomes(tasks, torch.device("cpu"), 2))
    assert len(found) == 2 and all("its process ended with -9" in each.failed and not each.passed for each in found)


@pytest.mark.slow
def test_workers_and_one_process_give_the_same_outcomes():
    names = ("two layers", "gate")
    tasks = [task for task in parity.tasks(torch.device("cpu")) if task.case in names and task.backend != "triton"]
    found = set(workers.outcomes(tasks, torch.device("cpu"), 2))
    assert {each[:4] for each in found} == {(t.operation, t.backend, t.case, t.precision) for t in tasks}
    assert all(each.passed for each in found)
    assert all(parity.outcome(task, torch.device("cpu")).where in {e.where for e in found} for task in tasks[:3])


def test_without_a_gpu_it_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert check.main([]) == 2
    assert "has no CUDA GPU" in capsys.readouterr().err


@pytest.mark.slow
def test_every_case_of_the_check(capsys):
    assert run("--only", "parity") == 0, capsys.readouterr().err


@pytest.mark.slow
def test_every_measurement_of_the_check(tmp_path):
    target = tmp_path / "cpu.json"
    assert run("--only", "speed", "--dtype", "float32", "--json", str(target), "--minutes", "60") == 0
    found = json.loads(target.read_text())
    assert not found["left_out"]
    others = ("titans-pytorch", "fla")
    ours = [row for row in found["speed"] if not row["backend"].startswith(others)]
    assert ours and not [row for row in ours if row["failed"]]
    assert {row["what"] for row in ours} >= {"memory", "memory block", "memory step", "attention", "gate", "model mac"}
    assert {"torch", "torch, compiled"} <= {row["backend"] for row in ours if row["what"] == "memory"}
    beside = {row["backend"] for row in found["speed"]} - {row["backend"] for row in ours}
    assert beside == {"titans-pytorch", "fla gated delta rule", "fla momentum delta rule", "fla TTT-Linear"}
    assert len(found["goals"]) == 10 and {"exponent", "bytes"} <= found["trends"][0].keys() if found["trends"] else True


def test_the_most_important_cases_come_first():
    cases = speed.timings(torch.device("cpu"), torch.float32, timing.QUICK)
    ranks = [case.rank for case in cases]
    assert ranks == sorted(ranks)
    assert cases[0].what == "memory" and cases[-1].what.startswith("model") and "compiled" in cases[-1].backend


def test_a_dry_run_lists_the_cases_on_any_machine(capsys):
    assert check.main(["--dry-run"]) == 0
    out = capsys.readouterr().out
    assert all(operation in out for operation in dispatch.OPERATIONS) and "model mac" in out
    assert check.main(["--dry-run", "--only", "speed"]) == 0
    assert "parity" not in capsys.readouterr().out
