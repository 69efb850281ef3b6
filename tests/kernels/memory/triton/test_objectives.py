"""Objectives other than the squared error, and reads at the anchor, in Triton's interpreter, against the reference."""

import pytest
import torch

from titans_build.kernels.memory import Objective

pytest.importorskip("triton")
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")

OBJECTIVES = {
    "l2_half": Objective("l2_half"), "dot": Objective("dot"), "lp": Objective("lp", p=3),
    "lp_root": Objective("lp", p=1.5), "lp_smooth": Objective("lp", p=2.5, smooth=5.0),
    "tanh": Objective("lp", p=1, smooth=5.0), "huber": Objective("huber", delta=1.25),
    "huber_elementwise": Objective("huber", delta=0.75, form="elementwise"),
}  # fmt: skip


EVERY_DAY = [("huber", 1, False), ("huber", 2, True), ("lp_smooth", 1, True)]


@pytest.mark.parametrize("name, depth, norm", [
    pytest.param(name, depth, norm, marks=[] if (name, depth, norm) in EVERY_DAY else pytest.mark.slow)
    for number, name in enumerate(OBJECTIVES)
    for depth, norm in ((1 + number % 2, number % 3 > 0), (2 - number % 2, number % 3 == 0))
])  # fmt: skip
@pytest.mark.parametrize("schedule", ["streamed", pytest.param("resident", marks=pytest.mark.slow)])
def test_objectives(memory_case, monkeypatch, name, depth, norm, schedule):
    monkeypatch.setenv("TITANS_BUILD_SCHEDULE", schedule)
    case = memory_case(
        time=4, batch=1, heads=1, depth=depth, norm=norm, scale=0.4, step=0.05, phases=[2], forget=0.05
    )  # fmt: skip
    options = dict(objective=OBJECTIVES[name], chunk=3, read="anchor" if norm else "after", clip=0.4 if norm else None)
    found, expected = (case.tensors(case.run(backend=backend, **options)) for backend in ("triton", "reference"))
    case.assert_equal(found, expected)
    case.assert_equal(case.gradients(found), case.gradients(expected))


@pytest.mark.parametrize("form, depth, norm, clip, schedule", [
    ("norm", 2, True, 0.4, "streamed"), ("elementwise", 1, False, None, "resident"),
    pytest.param("norm", 2, False, None, "resident", marks=pytest.mark.slow),
    pytest.param("elementwise", 1, True, 0.4, "streamed", marks=pytest.mark.slow),
])  # fmt: skip
def test_a_threshold_for_each_token(memory_case, monkeypatch, form, depth, norm, clip, schedule):
    monkeypatch.setenv("TITANS_BUILD_SCHEDULE", schedule)
    mask = torch.rand(2, 7, generator=torch.Generator().manual_seed(0)) > 0.3
    case = memory_case(
        time=7, heads=1, depth=depth, norm=norm, deltas=True, phases=[0, 2], mask=mask, step=0.05, scale=0.4
    )
    options = dict(objective=Objective("huber", form=form), chunk=3, clip=clip)
    found, expected = (case.tensors(case.run(backend=backend, **options)) for backend in ("triton", "reference"))
    case.assert_equal(found, expected)
    case.assert_equal(case.gradients(found), case.gradients(expected))


@pytest.mark.parametrize("name", [name if name in ("dot", "lp", "huber_elementwise") else
                                  pytest.param(name, marks=pytest.mark.slow) for name in OBJECTIVES])  # fmt: skip
@torch.no_grad()
def test_step(memory_case, name):
    depth, norm = 1 + (name == "lp"), name != "dot"
    case = memory_case(time=3, batch=1, heads=1, depth=depth, norm=norm, scale=0.4, step=0.05, phases=[2], forget=0.05)
    options = dict(objective=OBJECTIVES[name], chunk=4, read="after" if name == "dot" else "anchor")
    whole, state, outputs = case.run(backend="reference", **options), case.state, []
    for t in range(3):
        y, state = case.run(state, slice(t, t + 1), backend="triton_step", **options)
        outputs.append(y)
    case.assert_equal(case.tensors((torch.cat(outputs, 1), state)), case.tensors(whole))
