"""The memory against flash-linear-attention's own references of two rules that it contains.

Their files are run as they stand, without importing the library, whose import looks for a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from titans_build.kernels.memory import MemoryState, titans_memory

BATCH, TIME, HEADS, KEY, VALUE = 2, 23, 2, 6, 5


@pytest.fixture
def given() -> dict[str, Tensor]:
    """Float32, in which the references compute: unit queries and keys, values, a matrix to start from, and gates."""
    generator = torch.Generator().manual_seed(0)
    q, k = F.normalize(torch.randn(2, BATCH, TIME, HEADS, KEY, generator=generator), dim=-1)
    v = torch.randn(BATCH, TIME, HEADS, VALUE, generator=generator)
    start = torch.randn(BATCH, HEADS, KEY, VALUE, generator=generator)
    step, keep, carry = torch.rand(3, BATCH, TIME, HEADS, generator=generator)
    return dict(q=q, k=k, v=v, start=start, step=step, keep=0.5 + 0.5 * keep, carry=carry)


def memory(given: dict[str, Tensor], v: Tensor, step: Tensor, carry: Tensor | None) -> tuple[Tensor, Tensor]:
    """Outputs and the last matrix, keys by values: a linear memory that learns at every token."""
    state = MemoryState.fresh((given["start"].transpose(-1, -2).contiguous(),))
    y, after = titans_memory(
        given["q"], given["k"], v, step / 2, carry, 1 - given["keep"], state, chunk=1, activation="identity"
    )
    return y, after.weights[0].transpose(-1, -2)


def same(got: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    for mine, theirs in zip(got, expected):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


def test_the_gated_delta_rule(given: dict[str, Tensor], fla_reference: Callable[[str], ModuleType]) -> None:
    """It takes the error after it forgets: with the decay drawn out of the error, the value is divided by it."""
    keep = given["keep"]
    expected: Any = fla_reference("gated_delta_rule").naive_recurrent_gated_delta_rule(
        given["q"], given["k"], given["v"], given["step"], keep.log(), 1.0, given["start"], output_final_state=True
    )
    same(memory(given, given["v"] / keep.unsqueeze(-1), given["step"] * keep, None), expected)


def test_the_momentum_delta_rule(given: dict[str, Tensor], fla_reference: Callable[[str], ModuleType]) -> None:
    """Its momentum has the sign of the gradient, and what of it is added, here all, is another gate of its own."""
    y, (matrix, _) = fla_reference("momentum_delta_rule").recurrent_momentum_delta_rule_ref(
        given["q"], given["k"], given["v"], given["keep"].log(), given["carry"].log(), p=given["k"],
        beta=torch.ones_like(given["step"]), eta=given["step"], scale=1.0, initial_S=given["start"],
        output_final_state=True,
    )  # fmt: skip
    same(memory(given, given["v"], given["step"], given["carry"]), (y, matrix))
