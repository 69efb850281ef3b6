"""What parity finds on a CPU, and the references that are computed beforehand."""

from __future__ import annotations

import pytest
import torch

from titans_build.kernels import dispatch
from titans_build.tools.gpu import cases as gpu_cases
from titans_build.tools.gpu import parity


@pytest.fixture(autouse=True)
def as_before(monkeypatch):
    """What a check sets in its process is reset."""
    monkeypatch.setenv(parity.SCHEDULE, "auto")
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_float32_matmul_precision("highest")


def rows(name, answers=None):
    return {row["backend"]: row for row in parity.check(name, "cpu", small=True, answers=answers)}


@pytest.mark.parametrize(
    "name", ["two layers, resident", "one token, decoding", "prefix and window", "gate", "float64"]
)
def test_backends_agree_with_references_from_a_file(name, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_cases, "cases", lambda small=False, every=gpu_cases.cases: [
        case for case in every(small) if case.name == name
    ])  # fmt: skip
    parity.write_answers(tmp_path / "answers.pt", small=True)
    monkeypatch.setattr(parity, "answer", None)  # is not computed again
    ran = [row for row in rows(name, str(tmp_path / "answers.pt")).values() if "refused" not in row]
    assert ran and all(row["passed"] for row in ran), ran


@pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")
@pytest.mark.parametrize("name", [
    "gated network", "decays by channel, read before write, gates of 0 and 1, masked",
    "window of 5, masked, inside chunks, clipped", "thresholds for each token",
])  # fmt: skip
def test_what_goes_beyond_the_paper_is_as_exact_in_half_precision(name):
    ran = rows(name)
    assert ran["triton_batched"]["passed"] and all(row["passed"] for row in ran.values() if "refused" not in row), ran


@pytest.mark.parametrize("wrong", [lambda y: y * 1.02, lambda y: y.index_fill(1, torch.tensor(0), float("nan"))])
def test_a_backend_that_is_wrong_is_red_and_the_others_are_not(wrong, monkeypatch):
    backends = dispatch.OPERATIONS["convolution"].backends
    right = backends["torch"]
    monkeypatch.setitem(backends, "torch", dispatch.Backend("torch", lambda *inputs: wrong(right.run(*inputs))))
    monkeypatch.setattr(dispatch.OPERATIONS["convolution"], "_chosen", {})
    found = rows("convolution")
    assert found["torch"]["passed"] is False and found["triton"]["passed"]


def test_a_backend_that_is_refused_has_not_passed(monkeypatch):
    found = rows("prefix and window")["xformers"]
    assert found["refused"] and "passed" not in found


def test_attention_is_not_checked_in_deterministic_mode_which_xformers_refuses(monkeypatch):
    seen = {}
    monkeypatch.setattr(parity, "compare", lambda case, *rest: seen.setdefault(
        case.operation, torch.are_deterministic_algorithms_enabled()
    ))  # fmt: skip
    for name in ("gate", "prefix and window"):
        list(parity.check(name, "cpu", small=True))
    assert seen == {"gate": True, "attention": False}


def test_the_tolerance_of_a_normalized_memory_grows_with_rounding():
    """Only that of a normalized memory, and not in float32."""
    every = {case.name: case for case in gpu_cases.cases(small=True)}
    for name, wider in (
        ("two layers, streamed", True), ("two layers, float32, streamed", False), ("SiLU, no norm", False),
    ):  # fmt: skip
        most = parity.answer(every[name])["most"]
        least = parity.TOLERANCE[every[name].precision]
        assert min(most.values()) == least and (max(most.values()) > least) == wider


@pytest.mark.parametrize("name", ["heads of 48, expansion 4, chunk 16, clipped", "read before write, gates of 0 and 1"])
def test_gradients_of_gates_keep_their_digits_in_half_precision(name):
    """Large terms cancel in them. With all operands of reads in half precision, the errors are 0.013 to 0.026."""
    case = gpu_cases.named(name, small=True)
    known = parity.answer(case)
    for backend in ("triton", "triton_batched"):
        row = parity.compare(case, backend, known, "cpu")
        assert row["passed"], row


def test_repeated_runs_are_compared_bit_by_bit(monkeypatch):
    (row,) = parity.repeat("two layers, resident", "cpu", small=True)
    assert row["passed"]
    case = gpu_cases.named("gate", small=True)
    noisy = case._replace(run=lambda backend, **x: [y + torch.rand(()) for y in case.run(backend, **x)])
    monkeypatch.setattr(gpu_cases, "named", lambda *names: noisy)
    (row,) = parity.repeat("gate", "cpu", small=True)
    assert row["differ"] == ["output 0"] and not row["passed"]
