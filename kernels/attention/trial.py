"""Trying a library's kernels on the GPU at hand before their first use.

Whether a build has kernels for a GPU, and whether they are right, shows on the GPU alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .reference import Prefix, reference_attention

OFF = 0.03
"""Largest ``rms(out - ref) / rms(ref)``: at least three times what rounding to bfloat16 causes."""
KERNELS = (32, 64, 96, 128, 192, 256)
"""Widths of heads that FlashAttention has kernels for; each takes all up to it."""


class Case(NamedTuple):
    """One kind of mask."""

    window: int | None
    persistent: int = 0
    step: int = 1
    start: bool = False
    grad: bool = True
    """Whether gradients are tried too."""


class Trial:
    """``refuse(dtype, width)``: why a backend fails on this GPU, by running it once; or ``None``.

    Args:
        run: the backend.
        cases: every kind of mask, alone and merged.
        missing: why the backend cannot be tried, or ``None``.
    """

    def __init__(self, run: Callable[..., Tensor], cases: Sequence[Case], missing: Callable[[], str | None]) -> None:
        self.run, self.cases, self.missing = run, cases, missing
        self._found: dict[tuple[torch.dtype, int], str | None] = {}

    def refuse(self, dtype: torch.dtype, width: int) -> str | None:
        width = next(each for each in KERNELS if width <= each)
        if (dtype, width) not in self._found:
            if torch.compiler.is_compiling():  # a tracer cannot run kernels
                return "is tried on this GPU at the first call that is not compiled"
            self._found[dtype, width] = self.missing() or self.failure(dtype, width)
        return self._found[dtype, width]

    def failure(self, dtype: torch.dtype, width: int, device: str = "cuda") -> str | None:
        """Runs every case once."""
        deterministic, warning = (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
        )
        torch.use_deterministic_algorithms(False)
        try:
            with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device, enabled=False):
                off = [self._off(dtype, width, device, case) for case in self.cases]
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # kernels for another GPU fail in their own ways
            return f"failed when it was tried on this GPU: {type(error).__name__}: {reason(error)}"
        finally:
            torch.use_deterministic_algorithms(deterministic, warn_only=warning)
        if all(each <= OFF for each in off):
            return None
        return f"gave wrong numbers when it was tried on this GPU, off by up to {max(off):.0%}"

    def _off(self, dtype: torch.dtype, width: int, device: str, case: Case) -> float:
        """The largest error ratio of outputs and gradients; infinity for NaN."""
        window, persistent, step, start, grad = case
        random = torch.Generator().manual_seed(0)
        lengths = [40, 40 * step + 16, 40 * step + 16, *([40, persistent, persistent] if persistent else [])]
        given = [torch.randn(2, n, 2, width, generator=random).to(device, dtype) for n in lengths]
        begin = torch.tensor([0, 11], device=device) if start else None

        def passes(run: Callable[..., Tensor], inputs: list[Tensor]) -> list[Tensor]:
            leaves = [x.requires_grad_(grad) for x in inputs]
            y = run(*leaves[:3], window, begin, Prefix(*leaves[3:]) if persistent else None, step)
            seed = given[0].detach().to(y.dtype)
            grads = torch.autograd.grad(y, leaves, seed) if grad else ()
            return [x.detach().double() for x in (y, *grads)]

        found = passes(self.run, list(given))
        right = passes(reference_attention, [x.detach().double() for x in given])
        off = [float((x - y).norm() / y.norm()) for x, y in zip(found, right)]
        return max(x if x == x else float("inf") for x in off)


def reason(error: Any) -> str:
    """One line; xFormers lists its reasons below a line that repeats the inputs."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    reasons = [line for line, before in zip(lines[1:], lines) if before.endswith("is not supported because:")]
    return "; ".join(dict.fromkeys(reasons)) or (lines[0] if lines else type(error).__name__)
