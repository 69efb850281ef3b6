"""What an operation asks of its tensors before it looks at shapes."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def expect_tensors(operation: str, *given: tuple[str, Any], one_dtype: bool = True) -> None:
    """Raise unless all are floating-point tensors on the device, and of the dtype, of the first.

    ``given``: names and tensors. ``one_dtype=False``: of any dtypes. The ``TypeError`` or ``ValueError`` names the
    operation and the argument. Under autocast nothing else holds: which of two dtypes is meant, only the caller knows.
    """
    first, like = given[0]
    for name, x in given:
        if not isinstance(x, Tensor):
            raise TypeError(f"{operation}: {name}: expected a tensor, got {type(x).__name__}")
        if not x.is_floating_point():
            raise TypeError(f"{operation}: {name} is {x.dtype}: expected a floating-point dtype")
        if one_dtype and x.dtype != like.dtype:
            raise TypeError(f"{operation}: {name} is {x.dtype}: expected the dtype of {first}, {like.dtype}")
        if x.device != like.device:
            raise ValueError(f"{operation}: {name} is on {x.device}: expected the device of {first}, {like.device}")
