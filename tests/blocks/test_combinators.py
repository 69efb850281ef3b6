"""Blocks that contain blocks: chain, residual, gate, persistent, and the layer of a model."""

import pytest
import torch

from titans_build.blocks.build import build_block, materialize
from titans_build.blocks.combinators import Layer
from titans_build.blocks.laws import check_block
from titans_build.blocks.segmented import limit_window
from titans_build.registry import RecipeError, validate

MEMORY = {"type": "memory", "heads": 2, "chunk": 4}
WINDOW = {"type": "attention", "heads": 2, "window": 5}


# -- chain ------------------------------------------------------------------------------------------------------------


def test_chain_feeds_each_block_the_outputs_before():
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


def test_chain_passes_persistent_tokens_through():
    block = build_block([MEMORY, WINDOW], dim=16)
    tokens = torch.randn(1, 3, 16)
    y, state = block.prefix(tokens)
    a, memory = block.of[0].prefix(tokens)
    b, attention = block.of[1].prefix(a)
    assert torch.equal(y, b)
    assert torch.equal(state[0].memory.weights[1], memory.memory.weights[1])
    assert torch.equal(state[1].prefix_keys, attention.prefix_keys)


def test_chain_period_growth_and_flops():
    assert build_block([MEMORY, MEMORY | {"chunk": 6}], dim=16).period == 12
    block = build_block([MEMORY, "attention"], dim=16)
    assert block.grows
    limit_window(block, 8)
    assert not block.grows
    assert block.flops(10) == sum(part.flops(10) for part in block.of)


def test_an_empty_chain_is_an_error():
    with pytest.raises(RecipeError, match="of"):
        validate({"type": "chain", "of": []})


def test_chain_with_a_state_of_another_block():
    block, x = build_block({"type": "chain", "of": [MEMORY, WINDOW]}, dim=8), torch.zeros(2, 3, 8)
    with pytest.raises(TypeError, match="Chain: state is a tuple of 3: expected a tuple of 2"):
        block(x, (None, None, None))
    with pytest.raises(TypeError, match="Chain: state is AttentionState: expected a tuple of 2"):
        block(x, build_block(WINDOW, dim=8).init_state(2))


# -- residual ---------------------------------------------------------------------------------------------------------


def residual(spec):
    return {"type": "residual", "of": spec}


def test_residual_adds_the_inputs():
    block, x = build_block(residual(WINDOW), dim=16), torch.randn(2, 11, 16)
    mask = torch.ones(2, 11, dtype=torch.bool)
    mask[0, :3] = mask[1, 4] = False
    y, state = block(x, mask=mask)
    inner, expected = block.of(x, mask=mask)
    assert torch.equal(y, torch.where(mask.unsqueeze(-1), x + inner, 0.0))
    assert torch.equal(state.keys, expected.keys)
    every, _ = block.every(x[:, :10], step=5)
    assert torch.allclose(every, block(x[:, :10])[0][:, 4::5], atol=1e-6)


def test_residual_of_a_memory_is_a_memory():
    block, x = build_block(residual(MEMORY), dim=16), torch.randn(2, 7, 16)
    state = block.write(x, block.init_state(2))
    torch.testing.assert_close(state, block(x)[1])
    assert torch.equal(block.read(x, state), x + block.of.read(x, state))
    assert block.period == 4 and not block.grows
    with pytest.raises(RecipeError, match="read"):
        validate({"type": "context", "memory": residual(WINDOW)})


def test_residual_adds_persistent_tokens():
    block, tokens = build_block(residual(WINDOW), dim=16), torch.randn(1, 3, 16)
    y, state = block.prefix(tokens)
    inner, expected = block.of.prefix(tokens)
    assert torch.equal(y, tokens + inner)
    assert torch.equal(state.prefix_keys, expected.prefix_keys)


def test_residual_passes_on_the_window_limit():
    block = build_block(residual({"type": "attention", "heads": 2}), dim=16)
    assert block.grows
    limit_window(block, 8)
    assert not block.grows and block.of.window == 8


# -- gate -------------------------------------------------------------------------------------------------------------


def test_gate_branches_see_the_inputs():
    block = build_block({"type": "gate", "branches": [WINDOW, MEMORY]}, dim=16)
    x = torch.randn(2, 9, 16)
    y, state = block(x)
    a, _ = block.branches[0](x)
    b, memory = block.branches[1](x)
    assert torch.equal(y, block.gate(a, b))
    assert torch.equal(state[1].memory.momentum[0], memory.memory.momentum[0])


def test_gate_passes_persistent_tokens_to_both_branches():
    block = build_block({"type": "gate", "branches": [WINDOW, MEMORY]}, dim=16)
    tokens = torch.randn(1, 3, 16)
    y, state = block.prefix(tokens)
    (a, attention), (b, memory) = (branch.prefix(tokens) for branch in block.branches)
    assert torch.equal(y, block.gate(a, b))
    assert torch.equal(state[0].prefix_values, attention.prefix_values)
    assert torch.equal(state[1].memory.position, memory.memory.position)


@pytest.mark.parametrize("count, bound", [(1, "least 2"), (27, "most 26")])
def test_gate_has_two_to_26_branches(count, bound):
    with pytest.raises(RecipeError, match=rf"branches: expected at {bound} blocks, got {count}$"):
        validate({"type": "gate", "branches": ["ffn"] * count}, dim=16)


@pytest.mark.parametrize("form", ["sigmoid", "silu", "sum"])
def test_gate_of_three_branches(form):
    """Each branch after the second is a further factor, or a summand, with a gain of its own."""
    block = build_block({"type": "gate", "branches": ["ffn", "ffn", "rms_norm"], "form": form}, dim=8)
    assert [name for name, _ in block.gate.named_parameters()] == ["gain_a", "gain_b", "gain_c"]
    x = torch.randn(2, 5, 8)
    with torch.no_grad():
        for index, gain in enumerate(block.gate.parameters()):
            gain.fill_(1 + index / 2)
        a, b, c = (
            torch.nn.functional.rms_norm(branch(x)[0], (8,), eps=1e-6) * (1 + index / 2)
            for index, branch in enumerate(block.branches)
        )
        factors = {"sigmoid": torch.sigmoid, "silu": torch.nn.functional.silu}
        expected = a + b + c if form == "sum" else a * factors[form](b) * factors[form](c)
        y, state = block(x)
    assert len(state) == 3
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)


def test_gate_with_a_state_of_another_block():
    block, x = build_block({"type": "gate", "branches": [WINDOW, MEMORY]}, dim=8), torch.zeros(2, 3, 8)
    with pytest.raises(TypeError, match="Gate: state is a tuple of 3: expected a tuple of 2"):
        block(x, (None, None, None))
    with pytest.raises(TypeError, match="Gate: state is AttentionState: expected a tuple of 2"):
        block(x, build_block(WINDOW, dim=8).init_state(2))


# -- persistent -------------------------------------------------------------------------------------------------------


def persistent(of, tokens=3):
    block = build_block({"type": "persistent", "tokens": tokens, "of": of}, dim=16, dtype=torch.float64)
    with torch.no_grad():
        block.tokens.normal_()
    return block


def joined(block, x):
    return torch.cat([block.tokens.expand(len(x), -1, -1), x], dim=1)


def test_persistent_tokens_are_written_into_a_memory():
    block = persistent(MEMORY)
    x = torch.randn(2, 9, 16, dtype=torch.float64)
    expected, ended = block.of(joined(block, x))
    y, state = block(x)
    torch.testing.assert_close(y, expected[:, 3:])
    torch.testing.assert_close(state.memory.weights, ended.memory.weights)


def test_persistent_tokens_are_visible_beyond_the_window():
    block = persistent(WINDOW)
    x = torch.randn(2, 40, 16, dtype=torch.float64)
    y, _ = block(x)
    (gradient,) = torch.autograd.grad(y[:, -1].square().sum(), block.tokens)
    assert bool((gradient.abs().amax(dim=1) > 1e-8).all())


def test_memory_as_layer_is_a_persistent_chain():
    """The memory processes [P | x]; attention over its outputs always sees those at P."""
    block = persistent([MEMORY, {"type": "attention", "heads": 2, "rope": None}])
    x = torch.randn(2, 9, 16, dtype=torch.float64)
    memory, attention = block.of.of
    # without positions and without a window, persistent tokens are ordinary first tokens
    expected, _ = attention(memory(joined(block, x))[0])
    torch.testing.assert_close(block(x)[0], expected[:, 3:])


def test_nested_persistent_tokens_outer_first():
    block = persistent({"type": "persistent", "tokens": 2, "of": MEMORY})
    with torch.no_grad():
        block.of.tokens.normal_()
    x = torch.randn(1, 7, 16, dtype=torch.float64)
    whole = torch.cat([block.tokens[None], block.of.tokens[None], x], dim=1)
    expected, _ = block.of.of(whole)
    torch.testing.assert_close(block(x)[0], expected[:, 5:])
    torch.testing.assert_close(block.of.prefix(block.tokens[None])[0], expected[:, :3])


def test_rows_of_a_fresh_state_share_memory():
    block = persistent(MEMORY)
    state = block.init_state(64)
    assert (
        state.memory.weights[0].untyped_storage().nbytes()
        == block.init_state(1).memory.weights[0].untyped_storage().nbytes()
    )


# -- layer ------------------------------------------------------------------------------------------------------------


LAYER = [{"type": "memory", "heads": 2, "chunk": 4}, "ffn"]


def layer_of(dtype=torch.float32):
    with torch.device("meta"):
        layer = Layer(16, of=LAYER)
    materialize(layer, "cpu", dtype, 0)
    return layer


def test_layer_is_pre_normalized_and_residual():
    layer = layer_of()
    x = torch.randn(2, 9, 16)
    y, state = layer(x)
    expected = x
    for norm, block in zip(layer.norms, layer.blocks):
        expected = expected + block(norm.gain * expected / (expected.square().mean(-1, keepdim=True) + 1e-6).sqrt())[0]
    torch.testing.assert_close(y, expected)
    assert len(state) == 2 and state[1] is None


def test_layer_output_is_zero_at_masked_tokens():
    layer = layer_of()
    mask = torch.tensor([[True, False, True]])
    x = torch.randn(1, 3, 16)
    x[0, 1] = torch.nan
    y, state = layer(x, mask=mask)
    assert torch.equal(y[0, 1], torch.zeros(16))
    assert y.isfinite().all() and state[0].memory.weights[0].isfinite().all()


def test_laws_of_a_layer():
    check_block(layer_of(), endurance=300)


def test_layer_with_a_state_of_another_block():
    layer = Layer(16, of=LAYER)
    materialize(layer, "cpu", torch.float32, 0)
    with pytest.raises(TypeError, match="Layer: state is a tuple of 1: expected a tuple of 2"):
        layer(torch.zeros(2, 3, 16), layer.init_state(2)[:1])
