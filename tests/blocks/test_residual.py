"""A residual is its block and a way round it."""

import pytest
import torch

from titans_build.blocks.build import build_block
from titans_build.blocks.laws import check_block
from titans_build.blocks.segmented import limit_window
from titans_build.registry import RecipeError, validate

MEMORY = {"type": "memory", "heads": 2, "chunk": 4}
WINDOW = {"type": "attention", "heads": 2, "window": 5}


def around(spec):
    return {"type": "residual", "of": spec}


def test_what_goes_in_comes_out_beside_what_the_block_makes_of_it():
    block, x = build_block(around(WINDOW), dim=16), torch.randn(2, 11, 16)
    mask = torch.ones(2, 11, dtype=torch.bool)
    mask[0, :3] = mask[1, 4] = False
    y, state = block(x, mask=mask)
    inner, expected = block.of(x, mask=mask)
    assert torch.equal(y, torch.where(mask.unsqueeze(-1), x + inner, 0.0))
    assert torch.equal(state.keys, expected.keys)
    every, _ = block.every(x[:, :10], step=5)
    assert torch.allclose(every, block(x[:, :10])[0][:, 4::5], atol=1e-6)


def test_around_a_memory_it_is_a_memory():
    block, x = build_block(around(MEMORY), dim=16), torch.randn(2, 7, 16)
    state = block.write(x, block.init_state(2))
    torch.testing.assert_close(state, block(x)[1])
    assert torch.equal(block.read(x, state), x + block.of.read(x, state))
    assert block.period == 4 and not block.grows
    with pytest.raises(RecipeError, match="read"):
        validate({"type": "context", "memory": around(WINDOW)})


def test_persistent_tokens_have_the_way_round_too():
    block, tokens = build_block(around(WINDOW), dim=16), torch.randn(1, 3, 16)
    y, state = block.prefix(tokens)
    inner, expected = block.of.prefix(tokens)
    assert torch.equal(y, tokens + inner)
    assert torch.equal(state.prefix_keys, expected.prefix_keys)


def test_a_bound_reaches_the_block():
    block = build_block(around({"type": "attention", "heads": 2}), dim=16)
    assert block.grows
    limit_window(block, 8)
    assert not block.grows and block.of.window == 8


def test_it_obeys_the_laws_within_a_context():
    spec = {"type": "context", "segment": 6, "persistent": 2, "memory": MEMORY, "attend": around(WINDOW)}
    check_block(spec, dim=16, endurance=1000)
