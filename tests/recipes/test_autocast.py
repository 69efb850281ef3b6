"""Which backends packaged recipes take on a GPU under autocast: the choices are made for a GPU, and run on the CPU."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch

from titans_build.blocks import attention as block
from titans_build.blocks.state import named_tensors
from titans_build.kernels import attention as operation
from titans_build.kernels import triton_runtime
from titans_build.kernels.attention.trial import Trial
from titans_build.kernels.dispatch import OPERATIONS, Operation
from titans_build.recipes import build, load_recipe, packaged_names

RECIPES = [name for name in packaged_names() if not re.search(r"-[0-9.]+[mb]$", name)]
NORMS = {"rms_norm", "l2_norm", "gate", "gated_norm", "swiglu"}
NARROW = torch.bfloat16


class Picked(NamedTuple):
    operation: str
    backend: str
    dtype: torch.dtype
    without_xformers: str
    """The backend where xFormers cannot run."""


@pytest.fixture
def picked(monkeypatch: pytest.MonkeyPatch) -> Counter[Picked]:
    """How often each operation picked each backend."""
    found: Counter[Picked] = Counter()
    missing = set[str]()
    monkeypatch.setattr(operation, "FULL_PRECISION_DEVICES", ())
    monkeypatch.setattr(triton_runtime, "_MISSING", None)
    monkeypatch.setattr(Trial, "refuse", lambda self, *given: "missing" if self.run.__name__ in missing else None)
    attend, choose = block.attention, Operation.choose

    def count(name: str, facts: dict[str, Any]) -> None:
        facts |= {"device": "cuda", "plain": False}
        names = []
        for missing_now in (), ("xformers_attention",):
            missing.update(missing_now)
            names.append(OPERATIONS[name]._pick("auto", facts).name)
            missing.clear()
        found[Picked(name, names[0], facts["dtype"], names[1])] += 1

    def attention(q: Any, k: Any, v: Any, **options: Any) -> Any:
        given = {"window": None, "start": None, "prefix": None, "step": 1} | options
        facts = operation.accelerator_facts(q, k, **given)
        count("attention", {"dtype": q.dtype, "grad": torch.is_grad_enabled()} | facts)
        return attend(q, k, v, **options)

    def spy(self: Operation, backend: str = "auto", *tensors: Any, **facts: Any) -> Callable[..., Any]:
        if self.name != "attention":
            dtypes = [x.dtype for x in tensors if x is not None]
            count(self.name, {"dtype": (*dtypes, None)[0], "same": len(set(dtypes)) == 1} | facts)
        return choose(self, backend, *tensors, **facts)

    monkeypatch.setattr(block, "attention", attention)
    monkeypatch.setattr(Operation, "choose", spy)
    return found


def once(node: Any) -> Any:
    """The same recipe without repeated layers."""
    if isinstance(node, list):
        return [once(each) for each in node]
    if isinstance(node, dict):
        return {key: 1 if key == "repeat" else once(value) for key, value in node.items()}
    return node


@pytest.mark.parametrize("name", RECIPES)
def test_kernels_for_half_precision_are_chosen(name: str, picked: Counter[Picked]) -> None:
    model = build(load_recipe(once(load_recipe(name, overrides={"dim": 32, "vocab": 16}).to_dict())), seed=0)
    tokens = torch.randint(16, (2, 150), generator=torch.Generator().manual_seed(0))

    def run(training: bool, autocast: bool) -> dict[str, set[Picked]]:
        picked.clear()
        with torch.autocast("cpu", NARROW, enabled=autocast), torch.set_grad_enabled(training):
            done = model(tokens) if training else model(tokens[:, 90:], model(tokens[:, :90]).state)
        assert {x.dtype for _, x in named_tensors(done.state)} <= {torch.float32, torch.int64}, "states keep theirs"
        return {each.operation: {one for one in picked if one.operation == each.operation} for each in picked}

    for training in True, False:
        found, plain = run(training, autocast=True), run(training, autocast=False)
        for each in found.get("attention", ()):
            assert (each.backend, each.dtype) == ("xformers", NARROW)
            assert each.without_xformers in (("sdpa", "flex", "flash") if training else ("sdpa", "flash"))
        assert {each.backend for norm in NORMS for each in found.get(norm, ())} == {"triton"}
        for other in found.keys() - NORMS - {"attention"}:
            assert {each.backend for each in found[other]} == {each.backend for each in plain[other]}, other


@pytest.mark.parametrize("time, several, grad, expected", [
    (2048, False, True, "flash"), (2048, True, False, "flash"), (2048, True, True, "flex"), (64, True, True, "sdpa"),
    (4, False, False, "sdpa"),
])  # fmt: skip
def test_windows_without_xformers(
    time: int, several: bool, grad: bool, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Trial, "refuse", lambda self, *given: "no" if "xformers" in self.run.__name__ else None)
    q = torch.empty(1, time, 2, 64, device="meta", dtype=NARROW)
    prefix = operation.Prefix(q, q[:, :4], q[:, :4]) if several else None
    facts = operation.accelerator_facts(q, q, 32, None, prefix, 1)
    chosen = OPERATIONS["attention"]._pick("auto", {"device": "cuda", "dtype": NARROW, "grad": grad} | facts)
    assert chosen.name == expected


def test_the_cpu_keeps_float32() -> None:
    with torch.autocast("cpu", NARROW):
        assert operation.operand_dtype(torch.zeros(1)) == torch.float32
