import math

import pytest
import torch

from titans_build.kernels.norm_gate import rms_norm
from titans_build.kernels.rotary import normed_rotation, rotate

BACKENDS = ["torch", "reference"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_against_the_definition(backend):
    x, position, d = torch.randn(2, 5, 3, 8, dtype=torch.float64), torch.randint(0, 100, (2, 5)), 8
    y = rotate(x, position, 500.0, backend=backend)
    for i in range(d // 2):
        angle = position.double()[..., None] * 500.0 ** (-2 * i / d)
        first, second = x[..., i], x[..., i + d // 2]
        torch.testing.assert_close(y[..., i], first * angle.cos() - second * angle.sin(), rtol=0, atol=1e-10)
        torch.testing.assert_close(y[..., i + d // 2], first * angle.sin() + second * angle.cos(), rtol=0, atol=1e-10)


def test_backends_agree_at_any_position():
    x = torch.randn(2, 6, 3, 8, dtype=torch.float64)
    position = torch.tensor([[0, 1, 2**21, 2**21 + 1, 2**40 + 7, 2**62 - 1], [5, 4, 3, 2**31, 2**32, 2**53 + 1]])
    torch.testing.assert_close(rotate(x, position), rotate(x, position, backend="reference"), rtol=0, atol=1e-13)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-13), (torch.float32, 2e-6)])
@pytest.mark.parametrize("shift", [2**21, 2**40 + 12345])
def test_products_depend_on_distance_alone(dtype, tolerance, shift):
    q, k = torch.randn(1, 1, 1, 16, dtype=dtype), torch.randn(1, 200, 1, 16, dtype=dtype)
    q, k = q / q.norm(), k / k.norm(dim=-1, keepdim=True)
    place, places = torch.tensor([[200]]), torch.arange(200)[None]

    near, far = (rotate(q, place + s)[0, 0, 0] @ rotate(k, places + s)[0, :, 0].T for s in (0, shift))
    assert (near - far).abs().max() < tolerance


def test_the_frequency_itself_is_exact_to_a_turn_in_2_to_the_64():
    # at 2^40 tokens a frequency off by 2^-53 would be off by a turn in 2^13
    x = torch.tensor([[[[1.0, 0.0]]]], dtype=torch.float64)
    turns = 2**40 * (1 / (2 * math.pi))
    y = rotate(x, torch.tensor([[2**40]]))[0, 0, 0]
    assert abs(y[0].item() - math.cos(2 * math.pi * (turns % 1))) < 1e-3


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients(backend):
    x, position = torch.randn(2, 3, 2, 4, dtype=torch.float64, requires_grad=True), torch.tensor([[0, 5, 2**21]])
    assert torch.autograd.gradcheck(lambda x: rotate(x, position, backend=backend), (x,))


def test_inputs_are_left_alone_and_may_be_views():
    wide = torch.randn(2, 7, 9, 12, dtype=torch.float64)
    x, position = wide[:, :, 3:6, 6:], torch.randint(0, 10**9, (2, 7))
    before = wide.clone()
    y = rotate(x, position)
    torch.testing.assert_close(y, rotate(x.contiguous(), position), rtol=0, atol=0)
    assert torch.equal(wide, before)


def test_gradients_of_gradients():
    x, position = torch.randn(1, 3, 1, 4, dtype=torch.float64, requires_grad=True), torch.tensor([[0, 5, 2**21]])
    assert torch.autograd.gradgradcheck(lambda x: rotate(x, position).pow(3), (x,))


def test_bfloat16():
    x, position = torch.randn(2, 3, 2, 8), torch.tensor([[0, 5, 2**21]])
    y = rotate(x.bfloat16(), position)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), rotate(x, position), rtol=0, atol=5e-2)


@pytest.mark.parametrize(
    "x, position, base, error, message",
    [
        ((2, 3, 2, 5), (2, 3), 10.0, ValueError, "even d"),
        ((2, 3, 4), (2, 3), 10.0, ValueError, r"x \[2, 3, 4\]"),
        ((2, 3, 2, 4), (3, 3), 10.0, ValueError, r"position \[3, 3\]: expected \[2 or 1, 3\]"),
        ((2, 3, 2, 4), (2, 3), 1.0, ValueError, "base 1.0"),
    ],
)
def test_wrong_arguments(x, position, base, error, message):
    with pytest.raises(error, match=message):
        rotate(torch.randn(x), torch.zeros(position, dtype=torch.int64), base)


def test_a_float_position_is_refused():
    with pytest.raises(TypeError, match=r"position is torch.float32: expected torch.int64"):
        rotate(torch.randn(2, 3, 2, 4), torch.zeros(2, 3))


@pytest.mark.parametrize("base, dynamic", [(71.0, None), (73.0, True)])
def test_compiled_once(base, dynamic):
    """In one graph, which stays valid when the frequencies of a new base have been cached."""
    x, position = torch.randn(2, 3, 2, 8), torch.tensor([[0, 5, 2**21]])
    compiled = torch.compile(rotate, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    first = compiled(x, position, base)
    with torch._dynamo.config.patch(error_on_recompile=True):
        again = compiled(x, position, base)
    for y in (first, again):
        torch.testing.assert_close(y, rotate(x, position, base))


@pytest.mark.parametrize("backend", ["triton", "torch", "reference"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "time, d, first, plain, position",
    [(5, 8, 1, True, range(3, 8)), (40, 6, 0, False, range(1, 80, 2)),
     (3, 16, 2, True, torch.tensor([[1, 5, 2], [7, 0, 3]]))],
)  # fmt: skip
def test_normed_and_rotated(backend, dtype, time, d, first, plain, position):
    """Two heads of a wider tensor, whose gains are among others."""
    random = torch.Generator().manual_seed(0)
    new = lambda *shape: torch.randn(shape, dtype=torch.float64, generator=random)  # noqa: E731
    x, gain, pushed = new(2, time, 4, d)[:, :, 1:3].to(dtype), new(4, d), new(2, 2, time, 2, d)
    gain = gain if dtype == torch.float64 else gain.float()

    def found(x, gain, run):
        leaves = [x.detach().requires_grad_(), gain.detach().requires_grad_()]
        outputs = [y for y in run(*leaves) if y is not None]
        return [*outputs, *torch.autograd.grad(outputs, leaves, [g.to(y.dtype) for g, y in zip(pushed, outputs)])]

    def definition(x, gain):
        normed = rms_norm(x, gain[first : first + 2], backend="reference")
        return rotate(normed, position, 100.0, backend="reference"), normed if plain else None

    expected = found(x.double(), gain.double(), definition)
    results = found(x, gain, lambda *given: normed_rotation(*given, position, 100.0, first=first, plain=plain,
                                                            backend=backend))  # fmt: skip
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 4e-3 if backend == "triton" else 1.5e-2}[
        dtype
    ]
    for a, b in zip(results, expected, strict=True):
        assert (a.double() - b).norm() < tolerance * b.norm()
