"""What C kernels must never be given: each is an error, or goes to a path of PyTorch's."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad

from titans_build.kernels.attention import Prefix, attention
from titans_build.kernels.linear import project
from titans_build.kernels.memory import MemoryState, read_memory, titans_memory
from titans_build.kernels.norm_gate import rms_norm
from titans_build.kernels.norm_gate.decode import feed_forward, gated_output
from titans_build.kernels.short_conv import query_key_value
from titans_build.kernels.short_conv.decode import Layers, memory_inputs, memory_query


@pytest.mark.parametrize(
    "call",
    [
        lambda: project(torch.randn(1, 32), torch.randn(8, 16)),
        lambda: project(torch.randn(1, 16), torch.randn(8, 16), torch.randn(4)),
        lambda: feed_forward(torch.randn(1, 32), torch.randn(32, 16), torch.randn(16, 16)),
        lambda: attention(*[torch.randn(1, 2, 1, 4)] * 3, prefix=Prefix(*[torch.randn(1, 2, 1, 4).double()] * 3)),
        lambda: read_memory(torch.randn(3, 2, 1, 4), (torch.randn(1, 1, 4, 4),)),
        lambda: read_memory(torch.randn(1, 2, 1, 4), (torch.randn(1, 1, 4, 5),)),
        lambda: read_memory(torch.randn(1, 2, 1, 4), (torch.randn(1, 1, 4, 4), torch.randn(1, 1, 4, 4).double())),
        lambda: query_key_value(torch.randn(3, 2, 6), None, None, 1, torch.tensor([1, 1, 3])),
        lambda: query_key_value(torch.randn(3, 2, 6), None, None, 1, torch.tensor([1, 1], dtype=torch.int64)),
        lambda: query_key_value(torch.randn(3, 2, 6), None, None, 1, torch.tensor([1, 1, 1], dtype=torch.int32)),
    ],
)
def test_mismatched_arguments_are_errors(call):
    with torch.no_grad(), pytest.raises((ValueError, TypeError, RuntimeError)):
        call()


def test_a_row_first_mask_of_one_number():
    projected, weight, history = torch.randn(3, 2, 6), torch.randn(6, 3), torch.randn(3, 2, 6)
    length = torch.tensor(1).expand(3)
    got = query_key_value(projected, weight, history, 1, length)
    expected = query_key_value(projected, weight, history, 1, length, backend="reference")
    for a, b in zip(got, expected):
        torch.testing.assert_close(a, b)
    q = torch.randn(2, 4, 1, 4)
    start = torch.tensor(2).expand(2)
    torch.testing.assert_close(attention(q, q, q, start=start), attention(q, q, q, start=start, backend="reference"))


def test_a_bias_in_any_layout():
    x, weight = torch.randn(1, 16), torch.randn(8, 16)
    for bias in (torch.randn(16)[::2], torch.randn(1).expand(8)):
        torch.testing.assert_close(project(x, weight, bias), torch.nn.functional.linear(x, weight, bias))


def test_a_scalar_gain_and_no_width():
    x = torch.randn(2, 5)
    torch.testing.assert_close(rms_norm(x, torch.tensor(2.0)), rms_norm(x, torch.tensor(2.0), backend="reference"))
    assert rms_norm(torch.randn(3, 0)).shape == (3, 0)


def test_the_negative_of_a_view():
    x = torch._neg_view(torch.randn(2, 5))
    torch.testing.assert_close(rms_norm(x), rms_norm(x, backend="reference"))


@torch.no_grad()
def test_the_negative_of_a_view_among_the_parameters_of_one_token():
    x, square, conv, gain = torch.randn(1, 1, 16), torch.randn(16, 16), torch.randn(48, 3), torch.randn(2, 8)
    negative = Layers(torch.randn(48, 16), torch._neg_view(conv), 2, torch.randn(6, 16), torch.randn(6))
    history, answer = torch.randn(1, 2, 48), torch.randn(1, 1, 2, 8)
    for got, expected in (
        [memory_inputs(x, history, negative, backend=backend) for backend in ("auto", "reference")],
        [memory_query(x, history, negative.queries(), backend=backend) for backend in ("auto", "reference")],
        [gated_output(answer, torch._neg_view(gain), x, square, square, backend=b) for b in ("auto", "reference")],
    ):
        torch.testing.assert_close(got, expected)


def test_forward_mode_keeps_its_tangent():
    x, tangent = torch.randn(2, 5), torch.randn(2, 5)
    with forward_ad.dual_level():
        got, expected = (
            forward_ad.unpack_dual(rms_norm(forward_ad.make_dual(x, tangent), backend=backend)).tangent
            for backend in ("auto", "reference")
        )
        torch.testing.assert_close(got, expected)


def test_tracing_sees_operators():
    x = torch.randn(2, 5)
    made = torch.fx.experimental.proxy_tensor.make_fx(lambda x: rms_norm(x))(x)
    torch.testing.assert_close(made(x + 1), rms_norm(x + 1))


def test_tensors_without_numbers():
    with FakeTensorMode():
        assert rms_norm(torch.randn(2, 5)).shape == (2, 5)
    assert rms_norm(torch.randn(2, 5, device="meta"), torch.randn(5, device="meta")).is_meta


@pytest.mark.c_kernels
def test_a_chunk_as_long_as_any_sequence():
    x, gate = torch.randn(1, 5, 1, 4), torch.full((1, 5, 1), 0.1)
    state = MemoryState.fresh((torch.randn(1, 1, 4, 4),))
    expected = titans_memory(x, x, x, gate, gate, gate, state, chunk=5)[0]
    for chunk in (2**24, 2**24 + 1, 2**31):
        torch.testing.assert_close(titans_memory(x, x, x, gate, gate, gate, state, chunk=chunk)[0], expected)


def test_exponentials_of_anything():
    x = torch.tensor([-3e38, -1e10, -200.0, -87.5, 87.5, 1e10, 3e38])
    gain, x = torch.ones(1, 1), x.view(-1, 1, 1)
    from titans_build.kernels.norm_gate import gated_norm

    ones = torch.ones(7, 1, 1)
    got, expected = (gated_norm(ones, gain, x.view(7, 1), backend=backend) for backend in ("auto", "reference"))
    torch.testing.assert_close(got, expected, atol=1e-30, rtol=1e-5)
