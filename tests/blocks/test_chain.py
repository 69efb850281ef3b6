"""A chain is its blocks, one after the other."""

import pytest
import torch

from titans_build.blocks.build import build_block
from titans_build.blocks.laws import check_block
from titans_build.blocks.segmented import limit_window
from titans_build.registry import RecipeError, validate

MEMORY = {"type": "memory", "heads": 2, "chunk": 4}
WINDOW = {"type": "attention", "heads": 2, "window": 5}


def test_outputs_of_each_block_are_inputs_of_the_next():
    block = build_block([MEMORY, WINDOW, "ffn"], dim=16)
    first, second, third = block.of
    x = torch.randn(2, 11, 16)
    y, state = block(x)
    a, state_a = first(x)
    b, state_b = second(a)
    assert torch.equal(y, third(b)[0])
    assert torch.equal(state[0].memory.weights[0], state_a.memory.weights[0])
    assert torch.equal(state[1].keys, state_b.keys)
    assert state[2] is None


def test_persistent_tokens_go_through_the_chain():
    block = build_block([MEMORY, WINDOW], dim=16)
    tokens = torch.randn(1, 3, 16)
    y, state = block.prefix(tokens)
    a, memory = block.of[0].prefix(tokens)
    b, attention = block.of[1].prefix(a)
    assert torch.equal(y, b)
    assert torch.equal(state[0].memory.weights[1], memory.memory.weights[1])
    assert torch.equal(state[1].prefix_keys, attention.prefix_keys)


def test_it_repeats_when_all_its_blocks_do_and_grows_when_one_does():
    assert build_block([MEMORY, MEMORY | {"chunk": 6}], dim=16).period == 12
    block = build_block([MEMORY, "attention"], dim=16)
    assert block.grows
    limit_window(block, 8)
    assert not block.grows
    assert block.flops(10) == sum(part.flops(10) for part in block.of)


def test_an_empty_chain_is_refused():
    with pytest.raises(RecipeError, match="of"):
        validate({"type": "chain", "of": []})


def test_it_obeys_the_laws():
    check_block([MEMORY, WINDOW, "ffn"], dim=16, endurance=1000)


def test_a_state_of_another_block_is_refused():
    block, x = build_block({"type": "chain", "of": [MEMORY, WINDOW]}, dim=8), torch.zeros(2, 3, 8)
    with pytest.raises(TypeError, match="Chain: state is a tuple of 3: expected a tuple of 2"):
        block(x, (None, None, None))
    with pytest.raises(TypeError, match="Chain: state is AttentionState: expected a tuple of 2"):
        block(x, build_block(WINDOW, dim=8).init_state(2))
