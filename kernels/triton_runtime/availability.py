"""Whether the Triton kernels can run, and if not, why."""

from __future__ import annotations

import functools
import importlib.util
import os
from typing import Any

import torch

from ..constant import constant

DTYPES = {torch.float32, torch.float64, torch.float16, torch.bfloat16}


def refuse(*, device: str, dtype: torch.dtype, same: bool = True, named: bool = False, **facts: object) -> str | None:
    """Why the kernels cannot run, or ``None``. ``same``: all tensors are of one dtype; ``named``: asked for by name.

    On a CPU they run in Triton's interpreter alone (``TRITON_INTERPRET=1``), which is for tests: never unasked.
    """
    if device == "cpu":
        if os.environ.get("TRITON_INTERPRET") != "1":
            return "runs on a GPU, or in Triton's interpreter (TRITON_INTERPRET=1)"
        if not named:
            return "runs on a CPU in Triton's interpreter, which has to be asked for by name"
    elif device != "cuda":
        return f"runs on a GPU, not on {device}"
    if dtype not in DTYPES:
        return f"takes floating-point numbers, not {dtype}"
    if not same:
        return "takes one dtype"
    return _missing()


def refuse_memory(*, layers: int = 1, width: int = 1, **facts: Any) -> str | None:
    """The same for the kernels of the memory; ``width``: of the heads, whatever is wider of what goes in and out."""
    if layers > 2:
        return f"takes one or two layers, not {layers}"
    if width > 128:
        return f"takes heads of up to 128 numbers, not {width}"
    return refuse(**facts)


@constant
def _missing() -> str | None:
    return _looked_for()


@functools.cache
def _looked_for() -> str | None:
    found = importlib.util.find_spec("triton")
    return None if found else "needs Triton: pip install 'titans-build[gpu]'"
