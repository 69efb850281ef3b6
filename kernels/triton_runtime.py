"""Triton kernels: why they cannot run, and launching one on the device of its tensors.

The modules that define kernels (``triton.py``, ``triton/``) import Triton, so they are imported inside functions.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor

DTYPES = {torch.float32, torch.float64, torch.float16, torch.bfloat16}


def refuse(*, device: str, dtype: torch.dtype, same: bool = True, named: bool = False, **facts: object) -> str | None:
    """Why the kernels cannot run, or ``None``. ``same``: all tensors have one dtype; ``named``: this backend is named.

    On a CPU they run in Triton's interpreter alone (``TRITON_INTERPRET=1``), which is for tests and has to be named.
    """
    if device == "cpu":
        if os.environ.get("TRITON_INTERPRET") != "1":
            return "runs on a GPU, or in Triton's interpreter (TRITON_INTERPRET=1)"
        if not named:
            return "runs on a CPU in Triton's interpreter, which has to be asked for by name"
        if _MISSING is None and (reason := refuse_interpreter()):
            return reason
    elif device != "cuda":
        return f"runs on a GPU, not on {device}"
    if dtype not in DTYPES:
        return f"takes floating-point numbers, not {dtype}"
    if not same:
        return "takes one dtype"
    return _MISSING


def refuse_memory(*, layers: int = 1, width: int = 1, **facts: Any) -> str | None:
    """The same for the kernels of the memory; ``width``: of a head, the larger of input and output."""
    if layers > 2:
        return f"takes one or two layers, not {layers}"
    if width > 128:
        return f"takes heads of up to 128 numbers, not {width}"
    return refuse(**facts)


def refuse_interpreter() -> str | None:
    """Why Triton's interpreter cannot run kernels, or ``None``. Triton must be installed."""
    import triton

    if _release(triton.__version__) >= (3, 7) or _release(np.__version__) < (2, 4):
        return None
    versions = f"the interpreter of Triton {triton.__version__} does not run with NumPy {np.__version__}"
    return f"{versions}: install triton>=3.7 or numpy<2.4, or use a GPU"


def _release(version: str) -> tuple[int, int]:
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


VARYING = (
    "chunks", "once", "batch_heads", "b", "writes", "time", "problems", "tokens", "stretch", "batch_step",
    "grad_batch_step", "theta", "eta", "alpha", "valid", "theta_row", "eta_row", "alpha_row", "mask_row",
    "moves",
)  # fmt: skip
"""Arguments of kernels that vary from call to call. Triton compiles a kernel again for a number that is 1 or a multiple
of 16, and for an address that is; not for these."""

_MISSING = None if importlib.util.find_spec("triton") else "needs Triton: pip install 'titans-build[gpu]'"


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constexprs: Any) -> None:
    """``kernel[grid](*arguments, **constexprs)`` on the device of its tensors.

    Triton launches on the current device, where the address of a tensor on another device is invalid.

    Raises:
        ValueError: the tensors are on more than one device.
    """
    device = None
    for name, x in zip(kernel.arg_names, arguments):
        if isinstance(x, Tensor):
            if device is None:
                first, device = name, x.device
            elif x.device != device:
                raise ValueError(
                    f"{kernel.__name__}: {name} is on {x.device}: expected all tensors on one device, "
                    f"and {first} is on {device}"
                )
    if _recorders:
        _recorders[-1](kernel, grid, arguments, constexprs)
        return
    with _current(device):
        kernel[grid](*arguments, **constexprs)


_recorders: list[Callable[..., None]] = []


@contextmanager
def recording(recorder: Callable[..., None]) -> Iterator[None]:
    """A region in which ``launch`` calls ``recorder(kernel, grid, arguments, constexprs)`` and launches nothing."""
    _recorders.append(recorder)
    try:
        yield
    finally:
        _recorders.pop()


def _current(device: torch.device | None) -> AbstractContextManager[object]:
    if device is None or device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)
