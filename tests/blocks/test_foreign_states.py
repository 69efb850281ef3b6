"""A state of another block is refused, before anything is done with it."""

from __future__ import annotations

import pytest
import torch

import titans_build as tb

MEMORY = {"type": "memory", "heads": 2, "chunk": 4}


@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize(
    ("ours", "theirs", "said"),
    [
        ({"conv": 8}, {"conv": 2}, r"convolution is \[2, 1, 48\], expected \[batch, 7, 48\]"),
        ({"conv": 4}, {"conv": 8}, r"convolution is \[2, 7, 48\], expected \[batch, 3, 48\]"),
        ({"conv": 4}, {"conv": 0}, r"convolution is not there, expected \[batch, 3, 48\]"),
        ({"conv": 0}, {"conv": 4}, r"convolution is \[2, 3, 48\], expected none"),
        ({"depth": 3}, {"depth": 1}, "memory.weights has 1 layers, expected 3"),
        ({"depth": 1}, {"depth": 3}, "memory.weights has 3 layers, expected 1"),
        ({"expansion": 1}, {"expansion": 4}, r"memory.weights.0 is \[2, 2, 32, 8\], expected \[batch, 2, 8, 8\]"),
        ({"momentum": False}, {}, "memory.momentum has 2 layers, expected 0"),
        ({}, {"momentum": False}, "memory.momentum has 0 layers, expected 2"),
        ({}, {"gates": "chunk"}, r"gates is \[2, 6\], expected none"),
        ({}, {"heads": 4}, r"memory.weights.0 is \[2, 4,"),
        ({"type": "attention", "window": 8}, {"type": "attention", "window": 4}, r"keys is \[2, 3, .*\[batch, 7"),
        ({"type": "attention", "window": 4}, {"type": "attention", "kv_heads": 1}, r"keys is \[2, 5, 1"),
        ({"type": "attention"}, {"type": "attention", "heads": 4}, r"keys is \[2, 5, 4"),
    ],
)
def test_a_foreign_state_is_refused(ours, theirs, said, tokens, gradients):
    base = lambda spec: {"type": "attention", "heads": 2} if "type" in spec else MEMORY  # noqa: E731
    block, other = (tb.build_block({**base(spec), **spec}, dim=16) for spec in (ours, theirs))
    x = torch.randn(2, 5, 16)
    _, state = other(x)
    with torch.set_grad_enabled(gradients), pytest.raises(ValueError, match=said):
        block(x[:, :tokens], state)


@pytest.mark.parametrize("spec", [MEMORY, {"type": "attention", "heads": 2}])
def test_ones_own_is_taken_whatever_it_has_read(spec):
    block = tb.build_block(spec, dim=16)
    x = torch.randn(2, 5, 16)
    _, state = block.prefix(x[:, :2])
    for tokens in (5, 1, 3):
        _, state = block(x[:, :tokens], state)
