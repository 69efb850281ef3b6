"""Timing one function on a device."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Run = Callable[[], Any]
LONG = 2.0
"""Seconds after which a run is timed only once."""


def samples(run: Run, device: str, seconds: float, least: int = 3, most: int = 50) -> list[float]:
    """Seconds of each run, measured with CUDA events on a GPU. A run that takes longer than ``LONG`` is timed once."""
    for _ in range(2):
        start_s = time.perf_counter()
        run()
        wait(device)
        warm = time.perf_counter() - start_s
    if warm > LONG:
        return [warm]
    found: list[float] = []
    began = time.perf_counter()
    while len(found) < most and (len(found) < least or time.perf_counter() - began < seconds):
        if device != "cpu":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
            end.synchronize()
            found.append(start.elapsed_time(end) / 1e3)
        else:
            start_s = time.perf_counter()
            run()
            found.append(time.perf_counter() - start_s)
    return found


def measured(run: Run, device: str, seconds: float) -> dict[str, Any]:
    """Median and quartiles of the seconds of a run, the seconds of the first one, and the peak of allocated bytes."""
    began = time.perf_counter()
    run()
    wait(device)
    first = time.perf_counter() - began
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
    taken = sorted(samples(run, device, seconds))
    low, middle, high = statistics.quantiles(taken, n=4) if len(taken) > 1 else taken * 3
    peak = torch.cuda.max_memory_allocated() if device != "cpu" else 0
    return dict(seconds=middle, low=low, high=high, samples=len(taken), first=first, peak=peak)


def wait(device: str) -> None:
    """Wait until the device is idle."""
    if device != "cpu":
        torch.cuda.synchronize()


def passes(forward: Callable[[], Tensor], leaves: Sequence[Tensor], both: bool) -> Run:
    """Return a function that runs ``forward`` without gradients or, with ``both``, forward and backward.

    The ``leaves`` get gradients with ``both``, and need none without.
    """
    for leaf in leaves:
        leaf.requires_grad_(both)

    def alone() -> Tensor:
        with torch.no_grad():
            return forward()

    def forward_and_backward() -> Tensor:
        for leaf in leaves:
            leaf.grad = None
        y = forward()
        y.backward(torch.ones_like(y))
        return y

    return forward_and_backward if both else alone
