import pytest
import torch
from torch.nn import functional as F

from titans_build.blocks.build import materialize
from titans_build.blocks.feedforward import FeedForward

KINDS = ["swiglu", "gelu"]


def make(**fields):
    block = FeedForward(16, **fields)
    materialize(block, "cpu", torch.float64, seed=0)
    return block


@pytest.mark.parametrize("kind", KINDS)
def test_against_the_definition(kind):
    block, x = make(kind=kind, hidden=24), torch.randn(2, 5, 16, dtype=torch.float64)
    up, down = block.up.weight, block.down.weight
    expected = F.gelu(x @ up.T) if kind == "gelu" else F.silu(x @ up[:24].T) * (x @ up[24:].T)
    y, state = block(x)
    torch.testing.assert_close(y, expected @ down.T, rtol=0, atol=1e-12)
    assert state is None


def test_masked_outputs_are_zero_for_nan_inputs():
    block, x = make(), torch.randn(2, 5, 16, dtype=torch.float64)
    mask = torch.tensor([[True, True, False, True, False], [False, True, True, True, True]])
    x[~mask] = float("nan")
    y, _ = block(x, mask=mask)
    assert torch.equal(y[~mask], torch.zeros_like(y[~mask])) and y.isfinite().all()


@pytest.mark.parametrize("kind, width, hidden", [("swiglu", 256, 688), ("swiglu", 768, 2048), ("gelu", 256, 1024)])
def test_the_default_width_gives_8_dim_squared_parameters(kind, width, hidden):
    with torch.device("meta"):
        block = FeedForward(width, kind=kind)
    assert block.down.in_features == hidden
    assert sum(p.numel() for p in block.parameters()) / (8 * width**2) == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("kind", KINDS)
def test_flops(kind):
    assert make(kind=kind, hidden=24).flops(7) == 7 * 2 * 16 * 24 * (3 if kind == "swiglu" else 2)


def test_an_unknown_kind_is_an_error():
    with pytest.raises(ValueError, match="kind: expected 'swiglu' or 'gelu', got 'relu'"):
        FeedForward(16, kind="relu")


def test_inputs_of_another_width_are_errors():
    with pytest.raises(ValueError, match=r"FeedForward: x \[1, 2, 15\]: expected \[batch, time, 16\]"):
        make()(torch.randn(1, 2, 15))


@torch.no_grad()
def test_hooks_on_projections_are_called_for_one_token():
    block, x = make(), torch.randn(1, 1, 16, dtype=torch.float64)
    y = block(x)[0]
    with block.up.register_forward_hook(lambda module, args, out: out * 0):
        assert torch.equal(block(x)[0], torch.zeros_like(x))
    assert torch.equal(block(x)[0], y)
    torch.testing.assert_close(y, block(x.expand(1, 8, 16))[0][:, :1], rtol=0, atol=1e-12)
