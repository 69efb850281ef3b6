import pytest
import torch

from titans_build.kernels.gate import gate, silu_gate

BACKENDS = ["torch", "reference"]


def inputs(**options):
    return [torch.randn(shape, dtype=torch.float64, **options) for shape in [(2, 3, 4), (2, 3, 4), (4,), (4,)]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_against_the_definition(backend):
    a, b, gain_a, gain_b = inputs()
    left = a / (a.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * gain_a
    right = b / (b.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * gain_b
    torch.testing.assert_close(
        gate(a, b, gain_a, gain_b, backend=backend), left / (1 + torch.exp(-right)), rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients(backend):
    assert torch.autograd.gradcheck(lambda *a: gate(*a, backend=backend), inputs(requires_grad=True))


def test_wrong_shapes():
    a, b, gain_a, gain_b = inputs()
    with pytest.raises(ValueError, match=r"a \[2, 3, 4\] and b \[2, 2, 4\]"):
        gate(a, b[:, 1:], gain_a, gain_b)
    with pytest.raises(ValueError, match=r"gain_b \[3\]: expected \[4\]"):
        gate(a, b, gain_a, gain_b[1:])


def test_silu_gate_and_its_gradient() -> None:
    torch.manual_seed(0)
    y, g = (torch.randn(3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.allclose(silu_gate(y, g), y * torch.nn.functional.silu(g))
    assert torch.autograd.gradcheck(silu_gate, (y, g))
    mixed = silu_gate(y.detach().float(), g.detach().bfloat16())
    assert mixed.dtype == torch.float32
