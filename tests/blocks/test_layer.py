"""A layer: each block pre-normed and residual."""

import pytest
import torch

from titans_build.blocks.build import materialise
from titans_build.blocks.combinators import Layer
from titans_build.blocks.laws import check_block

SPECS = [{"type": "memory", "heads": 2, "chunk": 4}, "ffn"]


def make(dtype=torch.float32):
    with torch.device("meta"):
        layer = Layer(16, of=SPECS)
    materialise(layer, "cpu", dtype, 0)
    return layer


def test_it_adds_each_block_s_outputs_for_normalised_inputs():
    layer = make()
    x = torch.randn(2, 9, 16)
    y, state = layer(x)
    expected = x
    for norm, block in zip(layer.norms, layer.blocks):
        expected = expected + block(norm.gain * expected / (expected.square().mean(-1, keepdim=True) + 1e-6).sqrt())[0]
    torch.testing.assert_close(y, expected)
    assert len(state) == 2 and state[1] is None


def test_nothing_of_a_masked_token_gets_through_the_residual():
    layer = make()
    mask = torch.tensor([[True, False, True]])
    x = torch.randn(1, 3, 16)
    x[0, 1] = torch.nan
    y, state = layer(x, mask=mask)
    assert torch.equal(y[0, 1], torch.zeros(16))
    assert y.isfinite().all() and state[0].memory.weights[0].isfinite().all()


def test_it_obeys_the_laws():
    check_block(make(), endurance=1000)


def test_a_state_of_another_layer_is_refused():
    layer = Layer(16, of=SPECS)
    materialise(layer, "cpu", torch.float32, 0)
    with pytest.raises(TypeError, match="Layer: state is a tuple of 1: expected a tuple of 2"):
        layer(torch.zeros(2, 3, 16), layer.init_state(2)[:1])
