"""Imports for the server that the processes of ``runner`` are forked from, which take seconds. None starts CUDA."""

from __future__ import annotations

import contextlib

import torch
import torch.profiler

from . import plan  # noqa: F401

with contextlib.suppress(ImportError):  # without Triton
    from ...kernels.memory.triton import network, read, step  # noqa: F401
    from ...kernels.norm_gate import triton as _norm_gate  # noqa: F401
    from ...kernels.short_conv import triton as _short_conv  # noqa: F401
torch.use_deterministic_algorithms(False)  # its first call imports a compiler
