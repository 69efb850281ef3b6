import pytest
import torch

from titans_build.blocks.build import materialise
from titans_build.blocks.laws import check_block
from titans_build.blocks.layers import LayerNorm, RMSNorm

NORMS = [RMSNorm, LayerNorm]


def make(cls, **fields):
    block = cls(8, **fields)
    materialise(block, "cpu", torch.float64, seed=0)
    with torch.no_grad():
        block.gain.normal_()
    return block


@pytest.mark.parametrize("cls", NORMS)
def test_against_the_definition(cls):
    block, x = make(cls, eps=1e-2), torch.randn(2, 5, 8, dtype=torch.float64) + 3
    centred = x if cls is RMSNorm else x - x.mean(-1, keepdim=True)
    expected = centred / (centred.square().mean(-1, keepdim=True) + 1e-2).sqrt() * block.gain
    torch.testing.assert_close(block(x)[0], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("cls", NORMS)
def test_masked_outputs_are_zero_whatever_stands_there(cls):
    block, x = make(cls), torch.randn(2, 3, 8, dtype=torch.float64)
    mask = torch.tensor([[True, False, True], [False, False, True]])
    x[~mask] = float("nan")
    y, _ = block(x, mask=mask)
    assert torch.equal(y[~mask], torch.zeros_like(y[~mask])) and y.isfinite().all()


@pytest.mark.parametrize("name", ["rms_norm", "layer_norm"])
def test_the_laws(name):
    check_block(name, dim=8, endurance=200)


def test_a_wrong_width_is_refused():
    with pytest.raises(ValueError, match=r"RMSNorm: x \[2, 8\]: expected \[batch, time, 8\]"):
        make(RMSNorm)(torch.randn(2, 8))
