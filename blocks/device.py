"""Devices and dtypes of parameters, given as objects or by name."""

from __future__ import annotations

import torch

from ..registry import nearest, show

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}

_SYNONYMS = {
    "gpu": "cuda",
    "fp32": "float32",
    "bf16": "bfloat16",
    "fp16": "float16",
    "half": "float16",
    "fp64": "float64",
}
"""What other programs call these devices and dtypes; used in error messages."""


def as_device(device: torch.device | str) -> torch.device:
    """Return ``device`` as a ``torch.device``. Raises ``ValueError`` if it is not available."""
    try:
        device = torch.device(device)
    except (RuntimeError, TypeError):
        near = nearest(_SYNONYMS.get(str(device), str(device)), ("cpu", "cuda", "mps"))
        raise ValueError(f"unknown device {show(device)}{near} (devices: cpu, cuda, cuda:1, mps)") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {device}: this machine, or this build of torch, has no CUDA GPU")
    if device.type == "cuda" and device.index is not None and device.index >= torch.cuda.device_count():
        raise ValueError(f"device {device}: there are {torch.cuda.device_count()} CUDA GPUs, counted from 0")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ValueError("device mps: not available here")
    if device.type not in ("cpu", "meta"):
        try:
            torch.ones(1, device=device).item()
        # backends that are missing raise different errors: AssertionError, NotImplementedError, RuntimeError
        except Exception as error:
            # the first sentence only: the others list all devices that torch may be built with
            first = str(error).partition("\n")[0].partition(". ")[0]
            raise ValueError(f"device {device}: cannot be used on this machine: {first}") from None
    return device


def as_dtype(dtype: torch.dtype | str) -> torch.dtype:
    """Return ``dtype`` as a ``torch.dtype``. Raises ``ValueError`` unless it is one of ``DTYPES``."""
    if isinstance(dtype, str):
        if dtype not in DTYPES:
            near = nearest(_SYNONYMS.get(dtype, dtype), DTYPES)
            raise ValueError(f"unknown dtype {show(dtype)}{near} (dtypes: {', '.join(DTYPES)})")
        return DTYPES[dtype]
    if dtype not in DTYPES.values():
        raise ValueError(f"expected a dtype for parameters ({', '.join(DTYPES)}), got {show(dtype)}")
    return dtype
