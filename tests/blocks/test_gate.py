"""Two branches over the same inputs, the second gating the first."""

import pytest
import torch

from titans_build.blocks.build import build_block
from titans_build.blocks.laws import check_block
from titans_build.blocks.layers import Gating
from titans_build.registry import RecipeError, validate

ATTENTION = {"type": "attention", "heads": 2, "window": 5}
MEMORY = {"type": "memory", "heads": 2, "chunk": 4}


@pytest.mark.parametrize(
    "form, expected",
    [
        ("sigmoid", lambda a, b: a / (1 + torch.exp(-b))),
        ("silu", lambda a, b: a * b / (1 + torch.exp(-b))),
        ("sum", lambda a, b: a + b),
    ],
)
def test_each_form_is_its_formula(form, expected):
    gating = Gating(6, form).double()
    a, b = torch.randn(2, 3, 6, dtype=torch.float64), torch.randn(2, 3, 6, dtype=torch.float64)
    with torch.no_grad():
        gating.gain_a.copy_(torch.randn(6))
        gating.gain_b.copy_(torch.randn(6))

        def normed(x, gain):
            return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * gain

        torch.testing.assert_close(gating(a, b), expected(normed(a, gating.gain_a), normed(b, gating.gain_b)))
        assert torch.equal(gating(torch.zeros_like(a), torch.zeros_like(b)), torch.zeros_like(a))


def test_both_branches_see_the_inputs():
    block = build_block({"type": "gate", "branches": [ATTENTION, MEMORY]}, dim=16)
    x = torch.randn(2, 9, 16)
    y, state = block(x)
    a, _ = block.branches[0](x)
    b, memory = block.branches[1](x)
    assert torch.equal(y, block.gate(a, b))
    assert torch.equal(state[1].memory.momentum[0], memory.memory.momentum[0])


def test_persistent_tokens_go_to_both_branches():
    block = build_block({"type": "gate", "branches": [ATTENTION, MEMORY]}, dim=16)
    tokens = torch.randn(1, 3, 16)
    y, state = block.prefix(tokens)
    (a, attention), (b, memory) = (branch.prefix(tokens) for branch in block.branches)
    assert torch.equal(y, block.gate(a, b))
    assert torch.equal(state[0].prefix_values, attention.prefix_values)
    assert torch.equal(state[1].memory.position, memory.memory.position)


@pytest.mark.parametrize("branches", [["ffn"], ["ffn", "ffn", "ffn"]])
def test_there_are_two_branches(branches):
    words = rf"branches: expected at {'least' if len(branches) < 2 else 'most'} 2 blocks, got {len(branches)}$"
    with pytest.raises(RecipeError, match=words):
        validate({"type": "gate", "branches": branches}, dim=16)


@pytest.mark.parametrize("form", ["sigmoid", "silu", "sum"])
def test_it_obeys_the_laws(form):
    check_block({"type": "gate", "branches": [ATTENTION, MEMORY], "form": form}, dim=16, endurance=1000)


def test_a_state_of_another_block_is_refused():
    block, x = build_block({"type": "gate", "branches": [ATTENTION, MEMORY]}, dim=8), torch.zeros(2, 3, 8)
    with pytest.raises(TypeError, match="Gate: state is a tuple of 3: expected a tuple of 2"):
        block(x, (None, None, None))
    with pytest.raises(TypeError, match="Gate: state is AttentionState: expected a tuple of 2"):
        block(x, build_block(ATTENTION, dim=8).init_state(2))
