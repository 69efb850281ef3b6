import pytest
import torch

from titans_build.blocks.build import build_block, materialize
from titans_build.blocks.layers import Gating, LayerNorm, RMSNorm

NORMS = [RMSNorm, LayerNorm]


def make(cls, **fields):
    block = cls(8, **fields)
    materialize(block, "cpu", torch.float64, seed=0)
    with torch.no_grad():
        block.gain.normal_()
    return block


@pytest.mark.parametrize("cls", NORMS)
def test_norms_are_their_formulas(cls):
    block, x = make(cls, eps=1e-2), torch.randn(2, 5, 8, dtype=torch.float64) + 3
    centered = x if cls is RMSNorm else x - x.mean(-1, keepdim=True)
    expected = centered / (centered.square().mean(-1, keepdim=True) + 1e-2).sqrt() * block.gain
    torch.testing.assert_close(block(x)[0], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("cls", NORMS)
def test_norms_are_zero_at_masked_tokens(cls):
    block, x = make(cls), torch.randn(2, 3, 8, dtype=torch.float64)
    mask = torch.tensor([[True, False, True], [False, False, True]])
    x[~mask] = float("nan")
    y, _ = block(x, mask=mask)
    assert torch.equal(y[~mask], torch.zeros_like(y[~mask])) and y.isfinite().all()


def test_inputs_of_another_width_are_errors():
    with pytest.raises(ValueError, match=r"RMSNorm: x \[2, 8\]: expected \[batch, time, 8\]"):
        make(RMSNorm)(torch.randn(2, 8))


@pytest.mark.parametrize(
    "form, expected",
    [
        ("sigmoid", lambda a, b: a / (1 + torch.exp(-b))),
        ("silu", lambda a, b: a * b / (1 + torch.exp(-b))),
        ("sum", lambda a, b: a + b),
    ],
)
def test_gating_forms(form, expected):
    gating = Gating(6, form).double()
    a, b = torch.randn(2, 3, 6, dtype=torch.float64), torch.randn(2, 3, 6, dtype=torch.float64)
    with torch.no_grad():
        gating.gain_a.copy_(torch.randn(6))
        gating.gain_b.copy_(torch.randn(6))

        def normed(x, gain):
            return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * gain

        torch.testing.assert_close(gating(a, b), expected(normed(a, gating.gain_a), normed(b, gating.gain_b)))
        assert torch.equal(gating(torch.zeros_like(a), torch.zeros_like(b)), torch.zeros_like(a))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 3e38])
@pytest.mark.parametrize("kind", ["ffn", {"type": "ffn", "kind": "gelu"}, "rms_norm", "layer_norm"])
def test_values_at_masked_tokens_reach_no_gradient(kind, value):
    block = build_block(kind, dim=8)
    mask = torch.tensor([[True, True, False, True]])
    x = torch.randn(1, 4, 8)

    def gradients(at_masked):
        given = torch.where(mask[..., None], x, at_masked).requires_grad_()
        y, _ = block(given, mask=mask)
        return [y, *torch.autograd.grad(y.square().sum(), [given, *block.parameters()])]

    for got, expected in zip(gradients(value), gradients(0.0)):
        torch.testing.assert_close(got, expected, rtol=0, atol=0)
