"""States of other blocks are errors."""

from __future__ import annotations

import pytest
import torch

import titans_build as tb
from titans_build.blocks.state import map_state, named_tensors

MEMORY = {"type": "memory", "heads": 2, "chunk": 4}


@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize(
    ("ours", "theirs", "said"),
    [
        ({"conv": 8}, {"conv": 2}, r"convolution is \[2, 1, 48\], expected \[2, 7, 48\]"),
        ({"conv": 4}, {"conv": 8}, r"convolution is \[2, 7, 48\], expected \[2, 3, 48\]"),
        ({"conv": 4}, {"conv": 0}, r"convolution is absent, expected \[2, 3, 48\]"),
        ({"conv": 0}, {"conv": 4}, r"convolution is \[2, 3, 48\], expected absent"),
        ({"depth": 3}, {"depth": 1}, r"memory.weights.\d is"),
        ({"depth": 1}, {"depth": 3}, r"memory.weights.\d is"),
        ({"expansion": 1}, {"expansion": 4}, r"memory.weights.0 is \[2, 2, 32, 8\], expected \[2, 2, 8, 8\]"),
        ({"momentum": False}, {}, "memory.momentum.0 is .*, expected absent"),
        ({}, {"momentum": False}, "memory.momentum.0 is absent, expected"),
        ({}, {"gates": "chunk"}, r"gates is \[2, 6\], expected absent"),
        ({}, {"heads": 4}, r"memory.weights.0 is \[2, 4,"),
        (
            {"type": "attention", "window": 8},
            {"type": "attention", "window": 4},
            "it holds the last 3 tokens, expected 7",
        ),
        (
            {"type": "attention", "window": 4},
            {"type": "attention", "kv_heads": 1},
            r"keys is \[2, 5, 1, 8\], expected \[2, any, 2, 8\]",
        ),
        ({"type": "attention"}, {"type": "attention", "heads": 4}, r"keys is \[2, 5, 4"),
    ],
)
def test_a_state_of_another_block_is_an_error(ours, theirs, said, tokens, gradients):
    base = lambda spec: {"type": "attention", "heads": 2} if "type" in spec else MEMORY  # noqa: E731
    block, other = (tb.build_block({**base(spec), **spec}, dim=16) for spec in (ours, theirs))
    x = torch.randn(2, 5, 16)
    _, state = other(x)
    with torch.set_grad_enabled(gradients), pytest.raises(ValueError, match=said):
        block(x[:, :tokens], state)


@pytest.mark.parametrize("spec", [MEMORY, {"type": "attention", "heads": 2}, {"type": "attention", "window": 4}])
@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("gradients", [True, False])
def test_a_state_of_another_dtype_or_number_of_rows_is_an_error(spec, tokens, gradients):
    block = tb.build_block(spec, dim=16)
    x = torch.randn(2, 5, 16)
    _, state = block.prefix(x[:, :1])
    _, state = block(x, state)
    with torch.set_grad_enabled(gradients):
        for _, tensor in named_tensors(state):
            short = map_state(lambda each, one=tensor: each[:1] if each is one else each, state)
            with pytest.raises(ValueError, match=r"row|expected \[2"):
                block(x[:, :tokens], short)
            if tensor.is_floating_point():
                wide = map_state(lambda each, one=tensor: each.double() if each is one else each, state)
                with pytest.raises(TypeError, match="float64, expected"):
                    block(x[:, :tokens], wide)


def test_states_inside_a_context_are_checked():
    ours, theirs = (
        tb.build_block({"type": "context", "segment": 4, "memory": {**MEMORY, "conv": conv}}, dim=16) for conv in (0, 4)
    )
    x = torch.randn(2, 9, 16)
    _, state = theirs(x)
    for tokens in (1, 3, 9):
        with pytest.raises(ValueError, match=r"convolution is .*, expected absent"):
            ours(x[:, :tokens], state)


def test_a_state_created_before_bound_was_called():
    x = torch.randn(2, 12, 16)
    for window in (None, 8):
        block = tb.build_block({"type": "attention", "heads": 2, "window": window}, dim=16)
        _, state = block(x[:, :7])
        block.bound(6)
        bound = tb.build_block({"type": "attention", "heads": 2, "window": 6}, dim=16)
        bound.load_state_dict(block.state_dict())
        torch.testing.assert_close(block(x[:, 7:], state)[0], bound(x)[0][:, 7:])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_masked_nan_inputs_do_not_reach_gradients(value):
    block = tb.build_block(MEMORY, dim=16)
    x, mask = torch.randn(2, 6, 16), torch.tensor([[True] * 6, [False] * 3 + [True] * 3])
    x[~mask] = value
    y, _ = block(x, mask=mask)
    y.sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in block.parameters() if parameter.grad is not None)


@pytest.mark.parametrize("spec", [MEMORY, {"type": "attention", "heads": 2}])
def test_states_of_the_block_are_accepted_after_any_input(spec):
    block = tb.build_block(spec, dim=16)
    x = torch.randn(2, 5, 16)
    _, state = block.prefix(x[:, :2])
    for tokens in (5, 1, 3):
        _, state = block(x[:, :tokens], state)
