"""The one command for a machine with a GPU, tried on a CPU: what it finds, what it refuses, what it leaves behind."""

from __future__ import annotations

import json

import pytest
import torch

from titans_build.kernels import dispatch
from titans_build.tools import gpu_check, gpu_parity

NAMES = ("one token, decoding", "prefix and window", "gate", "convolution")


@pytest.fixture
def few_cases(monkeypatch):
    """A few of the cases, each with the kernels of the interpreter among its backends."""
    monkeypatch.setattr(gpu_parity, "CASES", tuple(case for case in gpu_parity.CASES if case.name in NAMES))
    assert len(gpu_parity.CASES) == len(NAMES)


def check(*words):
    return gpu_check.main(["--device", "cpu", "--quick", *words])


def test_parity_then_speed(few_cases, tmp_path, capsys):
    target = tmp_path / "new" / "cpu.json"
    assert check("--json", str(target), "--minutes", "0.02") == 0
    found = json.loads(target.read_text())
    assert found["environment"]["versions"]["torch"] == torch.__version__
    ran = [outcome for outcome in found["parity"] if not outcome["refused"]]
    assert all(outcome["passed"] and outcome["error"] <= outcome["tolerance"] for outcome in ran)
    assert {"native", "torch", "sdpa", "step"} <= {outcome["backend"] for outcome in ran}
    assert {outcome["precision"] for outcome in ran} == {"float32", "bfloat16", "float16"}
    assert found["ceiling"]["product"] > 0
    assert found["left_out"] and not list(tmp_path.glob("**/*.partial"))
    assert "did not fit into --minutes" in capsys.readouterr().err


def test_what_is_wrong_is_not_timed(few_cases, tmp_path, monkeypatch, capsys):
    right = dispatch.OPERATIONS["gate"].backends["torch"]
    wrong = dispatch.Backend("torch", lambda *inputs: right.run(*inputs) * 1.01)
    monkeypatch.setitem(dispatch.OPERATIONS["gate"].backends, "torch", wrong)
    monkeypatch.setattr(dispatch.OPERATIONS["gate"], "_chosen", {})
    target = tmp_path / "cpu.json"
    assert check("--json", str(target)) == 1
    said = capsys.readouterr()
    assert "gate, torch, gate, float32: error" in said.err
    assert "Nothing was timed" in said.out
    assert "speed" not in json.loads(target.read_text())


def test_a_nan_is_an_error_whatever_else_is_right(monkeypatch):
    monkeypatch.setattr(gpu_parity, "CASES", tuple(case for case in gpu_parity.CASES if case.name == "convolution"))
    right = dispatch.OPERATIONS["convolution"].backends["torch"]
    wrong = dispatch.Backend("torch", lambda *inputs: right.run(*inputs).index_fill(1, torch.tensor(0), float("nan")))
    monkeypatch.setitem(dispatch.OPERATIONS["convolution"].backends, "torch", wrong)
    monkeypatch.setattr(dispatch.OPERATIONS["convolution"], "_chosen", {})
    found = list(gpu_parity.outcomes(torch.device("cpu"), ["float32"]))
    assert {o.backend: o.passed for o in found} == {"triton": True, "torch": False}


def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_check.main([]) == 2
    assert "has no CUDA GPU" in capsys.readouterr().err


@pytest.mark.slow
def test_every_case_of_the_check(capsys):
    assert check("--only", "parity") == 0, capsys.readouterr().err


@pytest.mark.slow
def test_every_measurement_of_the_check(tmp_path):
    target = tmp_path / "cpu.json"
    assert check("--only", "speed", "--dtype", "float32", "--json", str(target), "--minutes", "60") == 0
    found = json.loads(target.read_text())
    assert not found["left_out"]
    ours = [row for row in found["speed"] if row["backend"] != "titans-pytorch"]
    assert ours and not [row for row in ours if row["failed"]]
    assert {row["what"] for row in ours} >= {"memory", "memory step", "attention", "gate", "model mac", "model lmm"}
