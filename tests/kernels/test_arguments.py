"""Tensors that an operation cannot take are refused by name, before anything stumbles over them."""

import pytest
import torch

from titans_build.kernels.memory import read_memory
from titans_build.kernels.scan import linear_scan
from titans_build.kernels.short_conv import causal_convolution

Q, WEIGHTS, GAIN = torch.randn(2, 5, 3, 4), (torch.randn(2, 3, 8, 4), torch.randn(2, 3, 4, 8)), torch.randn(3, 4)
X, TAPS, HISTORY = torch.randn(2, 5, 4), torch.randn(4, 3), torch.randn(2, 2, 4)
GATES, INPUTS, START = torch.rand(2, 5, 4), torch.randn(2, 5, 4), torch.randn(2, 4)


@pytest.mark.parametrize(
    "change, error, message",
    [
        (dict(q=[1]), TypeError, "q: expected a tensor, got list"),
        (dict(q=Q.int()), TypeError, "q is torch.int32: expected a floating-point dtype"),
        (dict(weights=()), TypeError, "weights: expected a tuple"),
        (dict(weights=WEIGHTS[0]), TypeError, "weights: expected a tuple"),
        (dict(weights=(WEIGHTS[0], None)), TypeError, r"weights\[1\]: expected a tensor, got NoneType"),
        (dict(weights=(WEIGHTS[0].to("meta"), WEIGHTS[1])), ValueError, r"weights\[0\] is on meta: .* of q, cpu"),
        (dict(norm=GAIN.to("meta")), ValueError, "norm is on meta: expected the device of q, cpu"),
        (dict(norm=1.0), TypeError, "norm: expected a tensor, got float"),
        (dict(activation="gelo"), ValueError, "activation: expected one of gelu, .*, got 'gelo'"),
        (dict(activation=None), ValueError, "activation: expected one of gelu, .*, got None"),
    ],
)
def test_reading(change, error, message):
    with pytest.raises(error, match=f"read_memory: {message}"):
        read_memory(**(dict(q=Q, weights=WEIGHTS, norm=GAIN) | change))


def test_reading_takes_queries_of_other_dtypes():
    assert read_memory(Q.half(), WEIGHTS, norm=GAIN.double()).dtype == torch.float16


@pytest.mark.parametrize(
    "change, error, message",
    [
        (dict(x=None), TypeError, "x: expected a tensor, got NoneType"),
        (dict(x=X.int()), TypeError, "x is torch.int32: expected a floating-point dtype"),
        (dict(weight=TAPS.double()), TypeError, "weight is torch.float64: expected the dtype of x, torch.float32"),
        (dict(history=HISTORY.half()), TypeError, "history is torch.float16: expected the dtype of x"),
        (dict(history=HISTORY.to("meta")), ValueError, "history is on meta: expected the device of x, cpu"),
        (dict(weight=TAPS[:, :0]), ValueError, r"weight \[4, 0\]: expected .* \[dim, width >= 1\]"),
    ],
)
def test_convolution(change, error, message):
    with pytest.raises(error, match=f"causal_convolution: .*{message}"):
        causal_convolution(**(dict(x=X, weight=TAPS, history=HISTORY) | change))


@pytest.mark.parametrize(
    "change, error, message",
    [
        (dict(inputs=[1]), TypeError, "inputs: expected a tensor, got list"),
        (dict(inputs=INPUTS.long()), TypeError, "inputs is torch.int64: expected a floating-point dtype"),
        (dict(gates=GATES.double()), TypeError, "gates is torch.float64: expected the dtype of inputs, torch.float32"),
        (dict(start=START.to("meta")), ValueError, "start is on meta: expected the device of inputs, cpu"),
    ],
)
def test_scan(change, error, message):
    with pytest.raises(error, match=f"linear_scan: {message}"):
        linear_scan(**(dict(gates=GATES, inputs=INPUTS, start=START) | change))
