"""The summary of a model: the parts of a block add up to no more than the block, wherever it stands."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import titans_build as tb
from titans_build.blocks.flops import every_flops
from titans_build.recipes import packaged_names
from titans_build.registry import scratch
from titans_build.tools.commands.model_summary import LENGTH, Part, summarize

BASES = [name for name in packaged_names() if not name.endswith(("m", "b"))]


def every(parts: list[Part]) -> Iterator[Part]:
    for part in parts:
        yield part
        yield from every(part.parts)


def summarized(source: object, **overrides: object) -> tuple[torch.nn.Module, list[Part]]:
    recipe = tb.load_recipe(source, overrides)
    model = tb.build(recipe)
    found = summarize(model, recipe)
    return model, found.parts


@pytest.mark.parametrize("name", BASES)
def test_parts_add_up(name: str) -> None:
    _, parts = summarized(name, dim=32)
    for part in every(parts):
        assert sum(child.parameters for child in part.parts) <= part.parameters
        assert sum(child.flops for child in part.parts) <= part.flops
        assert sum(child.state_bytes for child in part.parts) <= part.state_bytes
        assert part.flops >= 0 and part.state_bytes >= 0


def test_the_cost_of_a_part_is_what_its_parent_uses(small: Path) -> None:
    model, parts = summarized(small)
    (mac,) = (part for part in parts if part.label == "mac")
    context, block = mac.parts[0], model.layers[2].blocks[0]
    memory, attend = context.parts
    assert memory.flops == block.memory.flops(LENGTH)
    # two tokens for each, after the persistent ones, in every segment
    assert attend.flops == LENGTH // 16 * every_flops(block.attend, 3 + 32, 2)
    state = model.init_state(1).layers[2][0]
    assert attend.state_bytes == tb.state.nbytes(state.attend)
    assert memory.state_bytes == tb.state.nbytes(state.memory)
    assert context.state_bytes == tb.state.nbytes(state)
    assert context.state["snapshot"] == memory.state_bytes


def test_the_state_includes_persistent_tokens(small: Path) -> None:
    model, parts = summarized(small)
    (mag,) = (part for part in parts if part.label == "mag")
    attention = mag.parts[0].parts[0].parts[0]
    assert attention.type == "attention"
    assert attention.state_bytes == tb.state.nbytes(model.init_state(1).layers[0][0][0])


def test_summarizing_does_not_change_the_model(small: Path) -> None:
    recipe = tb.load_recipe(small)
    model = tb.build(recipe)
    before = [sorted(vars(module)) for module in model.modules()]
    summarize(model, recipe)
    assert [sorted(vars(module)) for module in model.modules()] == before


def test_a_users_combinator() -> None:
    with scratch():

        @tb.register("twice")
        class Twice(tb.Block):
            """The block inside, two times."""

            def __init__(self, dim: int, *, what: tb.Spec) -> None:
                super().__init__(dim)
                self.inner = tb.create(what, dim=dim)

            def forward(self, x, state=None, *, mask=None):  # type: ignore[no-untyped-def]
                state = state if state is not None else (None, None)
                x, a = self.inner(x, state[0], mask=mask)
                x, b = self.inner(x, state[1], mask=mask)
                return x, (a, b)

            def init_state(self, batch_size: int) -> tuple[object, object]:
                return self.inner.init_state(batch_size), self.inner.init_state(batch_size)

            def flops(self, length: int) -> int:
                return 2 * self.inner.flops(length)

        layers = {"a": [{"type": "twice", "what": {"type": "memory", "heads": 2}}]}
        _, parts = summarized({"version": 1, "dim": 32, "layers": layers, "stack": ["a"]})
        (twice,) = (part for part in every(parts) if part.type == "twice")
        (inner,) = twice.parts
        # stored under another name than its field's: named by its class
        assert (inner.label, inner.type) == ("inner", "NeuralMemory")
        assert inner.flops == twice.flops and twice.state_bytes == 2 * inner.state_bytes
