"""One thing that is timed on a device: what it is, how it is run, and what came of it."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...kernels import dispatch
from .sizes import Sizes

Run = Callable[[], Any]


class Row(NamedTuple):
    """One measurement."""

    what: str
    backend: str
    shape: str
    direction: str
    """``"forward"`` or ``"both"``: forward and backward."""
    seconds: float
    low: float
    high: float
    """Median and quartiles."""
    flops: float
    """Useful ones, 0 where bytes are what counts."""
    bytes: float
    """That have to be read and written at least, 0 where FLOPs are what counts."""
    share: float
    """Of the device's measured matrix rate, or of its bandwidth."""
    tokens: int
    peak: int
    """Bytes allocated at most, inputs and results included; 0 where the device does not say."""
    failed: str = ""


class Case(NamedTuple):
    """What is measured; its operation is one of ``dispatch.OPERATIONS``, or a model's name."""

    what: str
    backend: str
    shape: str
    direction: str
    make: Callable[[], Run]
    """Inputs and parameters; what is returned runs it once."""
    flops: float = 0
    moved: float = 0
    """Bytes."""
    tokens: int = 0
    operation: str = ""
    """In the dispatcher, where it is one of those alone."""
    rank: int = 0
    """The lower, the earlier: a run may be cut short."""


class Ceiling(NamedTuple):
    """What the device was measured to do: FLOP/s of a large matrix product in a dtype, bytes/s of a copy."""

    product: float
    copy: float


LONG = 2.0
"""Seconds of a run that is not waited for time and again."""


def ceiling(device: torch.device, dtype: torch.dtype, sizes: Sizes) -> Ceiling:
    """Measured on random numbers: products of zeros draw less power and run faster."""
    a, b = (torch.randn(sizes.matrix, sizes.matrix, device=device).to(dtype) for _ in range(2))
    product = statistics.median(samples(lambda: a @ b, device, max(sizes.seconds, 0.5)))
    x = torch.empty(sizes.copied, dtype=torch.uint8, device=device)
    y = torch.empty_like(x)
    copy = statistics.median(samples(lambda: y.copy_(x), device, max(sizes.seconds, 0.5)))
    return Ceiling(2 * sizes.matrix**3 / product, 2 * sizes.copied / copy)


def samples(run: Run, device: torch.device, seconds: float, least: int = 3, most: int = 50) -> list[float]:
    """Seconds that ``run`` takes, again and again, by the device's own clock; of one that takes long, once."""
    warm = math.nan
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
        if device.type == "cuda":
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


def measure(case: Case, device: torch.device, sizes: Sizes, most: Ceiling) -> Row:
    """Run a case; one that fails, for want of memory say, is a row that says so."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    none = math.nan
    row = Row(*case[:4], none, none, none, case.flops, case.moved, none, case.tokens, 0)
    try:
        run = case.make()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        taken = sorted(samples(run, device, sizes.seconds))
    except dispatch.BackendError as error:
        return row._replace(failed=str(error))
    except Exception as error:  # of the device, of a compiler, of another library
        return row._replace(failed=(str(error).strip() or type(error).__name__).splitlines()[0])
    low, middle, high = statistics.quantiles(taken, n=4) if len(taken) > 1 else taken * 3
    share = case.flops / middle / most.product if case.flops else case.moved / middle / most.copy
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    return row._replace(seconds=middle, low=low, high=high, share=share, peak=peak)


def wait(device: torch.device) -> None:
    """Until the device has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def backends(operation: str, device: torch.device, dtype: torch.dtype, **facts: Any) -> list[str]:
    """Those of an operation that run there, without the references."""
    found = dispatch.OPERATIONS[operation].backends.values()
    named = dict(named=True, device=device.type, dtype=dtype, **facts)
    return [b.name for b in found if b.name not in ("reference", "closed_form") and b.refuse(**named) is None]


def passes(forward: Callable[[], Tensor], leaves: Sequence[Tensor], both: bool) -> Run:
    """What runs ``forward`` without gradients, or with ``both`` forth and back, to gradients of the ``leaves``."""

    def alone() -> Tensor:
        with torch.no_grad():
            return forward()

    def forth_and_back() -> Tensor:
        for leaf in leaves:
            leaf.grad = None
        y = forward()
        y.backward(torch.ones_like(y))
        return y

    return forth_and_back if both else alone
