"""Persistent tokens are tokens that were read before the sequence: [P | x]."""

import torch

from titans_build.blocks.build import build_block
from titans_build.blocks.laws import check_block

MEMORY = {"type": "memory", "heads": 2, "chunk": 4}
WINDOW = {"type": "attention", "heads": 2, "window": 5}


def make(of, tokens=3):
    block = build_block({"type": "persistent", "tokens": tokens, "of": of}, dim=16, dtype=torch.float64)
    with torch.no_grad():
        block.tokens.normal_()
    return block


def joined(block, x):
    return torch.cat([block.tokens.expand(len(x), -1, -1), x], dim=1)


def test_a_memory_has_written_them():
    block = make(MEMORY)
    x = torch.randn(2, 9, 16, dtype=torch.float64)
    expected, ended = block.of(joined(block, x))
    y, state = block(x)
    torch.testing.assert_close(y, expected[:, 3:])
    torch.testing.assert_close(state.memory.weights, ended.memory.weights)


def test_attention_keeps_them_in_sight_whatever_the_window():
    block = make(WINDOW)
    x = torch.randn(2, 40, 16, dtype=torch.float64)
    y, _ = block(x)
    (gradient,) = torch.autograd.grad(y[:, -1].square().sum(), block.tokens)
    assert bool((gradient.abs().amax(dim=1) > 1e-8).all())


def test_memory_as_layer_is_a_chain_over_both():
    """[P | x] runs through the memory; attention over its outputs always sees those at P."""
    block = make([MEMORY, {"type": "attention", "heads": 2, "rope": None}])
    x = torch.randn(2, 9, 16, dtype=torch.float64)
    memory, attention = block.of.of
    # without positions and without a window, tokens that are always in sight are ordinary first tokens
    expected, _ = attention(memory(joined(block, x))[0])
    torch.testing.assert_close(block(x)[0], expected[:, 3:])


def test_nested_the_outer_tokens_come_first():
    block = make({"type": "persistent", "tokens": 2, "of": MEMORY})
    with torch.no_grad():
        block.of.tokens.normal_()
    x = torch.randn(1, 7, 16, dtype=torch.float64)
    whole = torch.cat([block.tokens[None], block.of.tokens[None], x], dim=1)
    expected, _ = block.of.of(whole)
    torch.testing.assert_close(block(x)[0], expected[:, 5:])
    torch.testing.assert_close(block.of.prefix(block.tokens[None])[0], expected[:, :3])


def test_rows_share_the_fresh_state_s_memory():
    block = make(MEMORY)
    state = block.init_state(64)
    assert (
        state.memory.weights[0].untyped_storage().nbytes()
        == block.init_state(1).memory.weights[0].untyped_storage().nbytes()
    )


def test_it_obeys_the_laws():
    gate = {"type": "gate", "branches": [WINDOW, MEMORY]}
    check_block({"type": "persistent", "tokens": 3, "of": gate}, dim=16, endurance=1000)
    check_block({"type": "persistent", "tokens": 3, "of": [MEMORY, WINDOW]}, dim=16, endurance=1000)
