"""Windows of tokens and gated networks in the Triton kernels, in its interpreter, against the per-token reference."""

import pytest
import torch

from titans_build.tools.gpu import parity
from titans_build.tools.gpu.cases import Memory

pytest.importorskip("triton")
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")

SMALL = Memory("", d=6, chunk=4, time=9, heads=1, precision="float64")


def agrees(monkeypatch, schedule, **changes):
    monkeypatch.setenv(parity.SCHEDULE, schedule)
    case = SMALL._replace(**changes).case()
    row = parity.compare(case, "triton", parity.answer(case), "cpu")
    assert row["passed"], row


@pytest.mark.parametrize("schedule", ["streamed", pytest.param("resident", marks=pytest.mark.slow)])
@pytest.mark.parametrize("changes", [
    dict(window=3, masked=True, started=True, clip=0.5),
    dict(window=7, depth=1, read="before", norm=False),
    pytest.param(dict(window=3, chunk=3, deltas=True, momentum=False, read="before"), marks=pytest.mark.slow),
    pytest.param(dict(window=3, chunk=70, time=72, batch=1), marks=pytest.mark.slow),
])  # fmt: skip
def test_windows(monkeypatch, schedule, changes):
    agrees(monkeypatch, schedule, **changes)


@pytest.mark.parametrize("changes", [
    dict(clip=0.5, masked=True, started=True, norm=False),
    dict(read="before", window=3, momentum=False, activation="relu", batch=1),
    pytest.param(dict(activation="silu"), marks=pytest.mark.slow),
    pytest.param(dict(read="anchor"), marks=pytest.mark.slow),
    pytest.param(dict(chunk=70, time=71, batch=1), marks=pytest.mark.slow),
])  # fmt: skip
def test_gated_networks(monkeypatch, changes):
    agrees(monkeypatch, "auto", gated=True, **changes)


def test_an_error_that_is_not_finite_reaches_the_queries_from_its_token_on(monkeypatch):
    monkeypatch.setenv(parity.SCHEDULE, "streamed")
    memory = SMALL._replace(window=3, batch=1, norm=False, precision="float32")
    inputs = memory.make(torch.Generator().manual_seed(0))
    expected = memory.run("triton", **inputs)[0]
    inputs["v"][0, 2 + 5] = float("inf")  # of token 5: the first two are before the sequence
    y = memory.run("triton", **inputs)[0]
    assert torch.equal(y[:, :5], expected[:, :5]) and not y[:, 5:].isfinite().any()
