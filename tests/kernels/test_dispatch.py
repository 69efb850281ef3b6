import pytest
import torch

from titans_build.kernels import dispatch
from titans_build.kernels.dispatch import VARIABLE, Backend, BackendError, Operation


@pytest.fixture
def operation(monkeypatch):
    """Three backends, the first of which wants a device that is not there, among no other operations."""
    monkeypatch.setattr(dispatch, "OPERATIONS", {})
    monkeypatch.delenv(VARIABLE, raising=False)

    def refuse(*, device, **facts):
        return None if device == "cuda" else f"needs cuda, got {device}"

    backends = [
        Backend("quick", lambda: "quick", refuse),
        Backend("torch", lambda: "torch"),
        Backend("reference", lambda: "slow"),
    ]
    return Operation("sum", backends)


def test_auto_takes_the_first_that_does_not_refuse(operation):
    assert operation.choose(device="cpu")() == "torch"
    assert operation.choose(device="cuda")() == "quick"


def test_a_named_backend_is_taken(operation):
    assert operation.choose("reference", device="cpu")() == "slow"


def test_a_named_backend_that_cannot_run_is_an_error_with_its_reason(operation):
    with pytest.raises(BackendError, match=r"sum: backend='quick': quick cannot run: needs cuda, got cpu"):
        operation.choose("quick", device="cpu")


def test_an_unknown_backend_names_the_known_ones(operation):
    with pytest.raises(BackendError, match=r"no such backend; expected auto, quick, torch, reference"):
        operation.choose("fast", device="cpu")


def test_environment_by_operation(operation, monkeypatch):
    monkeypatch.setenv(VARIABLE, "sum=reference")
    assert operation.choose(device="cuda")() == "slow"
    assert operation.choose("torch", device="cuda")() == "torch", "an argument wins"


def test_environment_for_every_operation_that_has_it(operation, monkeypatch):
    other = Operation("other", [Backend("only", lambda: "only")])
    monkeypatch.setenv(VARIABLE, "torch")
    assert operation.choose(device="cuda")() == "torch"
    assert other.choose(device="cuda")() == "only"


@pytest.mark.parametrize("setting", ["torch, sum=reference", "sum=reference,torch"])
def test_environment_by_operation_goes_before_the_general_one(operation, monkeypatch, setting):
    monkeypatch.setenv(VARIABLE, setting)
    assert operation.choose(device="cpu")() == "slow"


@pytest.mark.parametrize(
    "setting, message",
    [
        ("torhc", "no operation has a backend 'torhc'"),
        ("summ=torch", "no operation 'summ'; expected one of"),
        ("sum=quick", "quick cannot run: needs cuda"),
        ("sum=fast", "no such backend"),
    ],
)
def test_a_wrong_environment_is_an_error(operation, monkeypatch, setting, message):
    monkeypatch.setenv(VARIABLE, setting)
    with pytest.raises(BackendError, match=message):
        operation.choose(device="cpu")


def test_all_refusing_says_why(monkeypatch):
    monkeypatch.setattr(dispatch, "OPERATIONS", {})
    operation = Operation(
        "sum", [Backend("a", print, lambda **facts: "no a"), Backend("b", print, lambda **facts: "no b")]
    )
    with pytest.raises(BackendError, match="a: no a; b: no b"):
        operation.choose(device="cpu")


def test_table(operation):
    quick, torch_, reference = dispatch.table("cpu")
    assert quick == ("sum", "quick", False, "needs cuda, got cpu", False, "")
    assert torch_ == ("sum", "torch", True, "", True, "")
    assert reference == ("sum", "reference", True, "", False, "")


@pytest.mark.parametrize(
    "setting, message",
    [
        ("torhc", "no operation has a backend 'torhc'"),
        ("summ=torch", "no operation 'summ'; expected one of"),
        ("sum=quick", "quick cannot run: needs cuda"),
    ],
)
def test_a_table_under_a_wrong_environment_says_what_is_wrong(operation, monkeypatch, setting, message):
    monkeypatch.setenv(VARIABLE, setting)
    rows = dispatch.table("cpu")
    assert not any(row.chosen for row in rows)
    assert all(message in row.error and f"{VARIABLE}={setting}" in row.error for row in rows)


def test_a_refusal_is_logged_once(operation, caplog):
    dispatch._logged.clear()
    with caplog.at_level("DEBUG"):
        operation.choose(device="cpu")
        operation.choose(device="cpu")
    assert [record.getMessage() for record in caplog.records] == ["sum: quick refused: needs cuda, got cpu"]


def test_every_operation_has_a_reference_and_a_way_to_run_on_the_cpu():
    import titans_build.kernels  # noqa: F401

    rows = dispatch.table("cpu", torch.float64)
    names = {row.operation for row in rows}
    assert {"attention", "convolution", "rms_norm", "l2_norm", "gate", "rotary"} <= names
    for name in names:
        mine = [row for row in rows if row.operation == name]
        assert mine[-1].backend == "reference" and mine[-1].available
        assert sum(row.chosen for row in mine) == 1
