"""How memories get what they need of earlier tokens, and the model of cost that chooses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import titans_build as tb
from titans_build.blocks.parallel_plan import Step, elapsed, plan
from titans_build.registry import scratch

MATRIX = {"type": "memory", "heads": 2, "depth": 1, "norm": False, "clip": None}
ANCHOR = {"type": "memory", "heads": 2, "chunk": 64, "retrieve": "anchor"}


def model_of(*blocks: Any, dim: int = 16, layers: int = 1) -> Any:
    recipe = {"version": 1, "dim": dim, "vocab": 11, "layers": {"a": [*blocks, "ffn"]}, "stack": ["a"] * layers}
    return tb.build(tb.load_recipe(recipe), device="meta")


def ways(model: Any, time: int = 64, context: str = "auto", ranks: int = 4) -> list[str]:
    return [step.way for step in plan(model.layers, ranks, time, context) if step.way != "local"]


@pytest.mark.parametrize(
    "change",
    [
        {"depth": 2}, {"norm": True}, {"clip": 1.0}, {"objective": {"type": "lp", "p": 3.0}}, {"gates": "chunk"},
        {"objective": "dot", "window": 4}, {"retention": "kl"}, {"optimizer": {"type": "muon"}}, {"threshold": 0.1},
        {"objective": "dot", "query": "projected", "reset": 32, "chunk": 16}, {"conv": 32},
    ],
    ids=str,
)  # fmt: skip
def test_memories_that_are_not_affine_are_pipelined(change: dict[str, Any]) -> None:
    assert ways(model_of(MATRIX), context="affine") == ["affine"]
    assert ways(model_of({**MATRIX, **change}), context="affine") == ["pipelined"]


@pytest.mark.parametrize(
    "change",
    [{"retrieve": "after"}, {"threshold": 0.1}, {"retention": "kl"}, {"keys": 2}, {"window": 2}, {"gates": "chunk"}],
    ids=str,
)
def test_memories_whose_chunks_are_no_sums_are_pipelined(change: dict[str, Any]) -> None:
    assert ways(model_of(ANCHOR), context="chunk") == ["chunk"]
    assert ways(model_of({**ANCHOR, **change}), context="chunk") == ["pipelined"]


def test_frozen_memories_and_windows_and_custom_blocks() -> None:
    with scratch():

        @tb.register("says_nothing")
        class SaysNothing(tb.Block):
            def reset_parameters(self) -> None: ...

            def forward(self, x: Tensor, state: Any = None, *, mask: Any = None) -> tuple[Tensor, Any]:
                return x, None

        window = {"type": "attention", "heads": 2, "window": 8}
        model = model_of("says_nothing", window, MATRIX)
        assert ways(model, context="affine") == ["gathered", "window", "affine"]
    model = model_of(MATRIX)
    model.freeze_memory()
    assert ways(model, context="affine") == ["pipelined"]


def test_ranks_that_wait_work_on_other_layers_meanwhile() -> None:
    block: Any = None
    waiting, together = (Step("", block, way, 1.0) for way in ("pipelined", "affine"))
    assert elapsed([waiting] * 3, 4) == 3 + 4 - 1
    assert elapsed([together] * 3, 4) == 3
    assert elapsed([waiting, together, waiting], 4) == 4 + 1 + 4
    assert elapsed([waiting] * 3, 4, groups=2) == 3 + (4 - 1) / 2  # ranks wait for a half of the rows


def test_long_rows_are_affine_and_short_ones_wait() -> None:
    model = model_of({"type": "gated_delta_net", "heads": 16}, dim=1024, layers=24)
    assert set(ways(model, 2**20, ranks=8)) == {"affine"}
    assert set(ways(model, 2**13, ranks=8)) == {"pipelined"}


def test_chunks_are_summed_where_they_are_as_long_as_the_row() -> None:
    def found(chunk: int) -> list[str]:
        return ways(model_of({**ANCHOR, "heads": 16, "chunk": chunk}, dim=1024, layers=4), 2**15, ranks=8)

    assert set(found(2**15)) == {"chunk"}
    assert set(found(2**11)) == {"pipelined"}


@pytest.mark.parametrize("name", ["lact", "titans"])
def test_flops_of_a_memory_that_is_read_at_the_anchor(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    # the backend whose products are all counted
    monkeypatch.setenv("TITANS_BUILD_BACKEND", "torch,memory=closed_form")
    block = tb.build_block({"type": name, "heads": 2, "chunk": 64, "retrieve": "anchor"}, dim=64, device="cpu")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        block(torch.randn(1, 64, 64))
    assert block.flops(64) == pytest.approx(counter.get_total_flops(), rel=0.2)
