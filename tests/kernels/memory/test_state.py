"""A fresh state: what it holds, and what is refused before any memory has to stumble over it."""

from itertools import pairwise

import pytest
import torch

from titans_build.kernels.memory import MemoryState


def weights(*widths, batch=2, heads=3, **kind):
    return tuple(torch.randn(batch, heads, out, into, **kind) for into, out in pairwise(widths))


def test_a_fresh_state_has_read_nothing():
    given = weights(4, 8, 4)
    state = MemoryState.fresh(list(given))
    assert state.weights == state.anchor == given
    assert [x.shape for x in state.momentum] == [x.shape for x in given]
    assert not any(bool(x.any()) for x in state.momentum)
    assert state.position.tolist() == [0, 0] and state.position.dtype == torch.int64
    assert MemoryState.fresh(given, ()).momentum == ()
    assert MemoryState.fresh(given, given).momentum == given


GOOD = weights(4, 8, 4)


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ((None,), TypeError, "weights: expected a tuple of tensors, one for each layer, got NoneType"),
        ((GOOD[0],), TypeError, "weights: expected a tuple of tensors, one for each layer, got Tensor"),
        (([[1.0]],), TypeError, r"weights\[0\]: expected a tensor, got list"),
        (((),), ValueError, "weights: .* got none"),
        (((torch.tensor(1.0),),), ValueError, r"weights\[0\]: expected \[batch, heads, out, .* got \[\]"),
        ((weights(4, 4, dtype=torch.half),), TypeError, r"weights\[0\]: expected float32 or float64, got torch.f.*16"),
        (((GOOD[0], GOOD[1].double()),), TypeError, r"weights\[1\]: expected torch.float32 .* got torch.float64"),
        (((GOOD[0], GOOD[1].to("meta")),), ValueError, r"weights\[1\]: expected device cpu .* got meta"),
        (((GOOD[0], GOOD[0]),), ValueError, r"weights\[1\]: expected \[2, 3, out, in=8\], got \[2, 3, 8, 4\]"),
        (((GOOD[0], GOOD[1][:1]),), ValueError, r"weights\[1\]: expected \[2, 3, out, in=8\], got \[1, 3, 4, 8\]"),
        ((GOOD, GOOD[:1]), ValueError, "momentum: expected one tensor for each of 2 layers, got 1"),
        ((GOOD, GOOD[::-1]), ValueError, r"momentum\[0\]: expected .*\[2, 3, 8, 4\].* got \[2, 3, 4, 8\]"),
        ((GOOD, (GOOD[0], GOOD[1].double())), TypeError, r"momentum\[1\]: expected torch.float32"),
        ((GOOD, (GOOD[0], None)), TypeError, r"momentum\[1\]: expected a tensor, got NoneType"),
    ],
)
def test_what_is_no_memory_is_refused_in_words(arguments, error, message):
    with pytest.raises(error, match=message):
        MemoryState.fresh(*arguments)
