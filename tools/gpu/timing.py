"""Timing one case on a device."""

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

Run = Callable[[], Any]
LONG = 2.0
"""Seconds after which a run is timed only once."""


class Sizes(NamedTuple):
    """Sizes of the timed cases."""

    matrix: int
    """Side of the square matrices whose product gives the matrix rate."""
    copied: int
    """Bytes of the copy that gives the bandwidth."""
    heads: int
    """Rows x heads, enough to fill the device."""
    lengths: tuple[int, ...]
    widths: tuple[tuple[int, int, int], ...]
    """``(d, expansion, layers)`` of the memories."""
    chunk: int
    window: int
    decoding: int
    """Rows x heads of a decoding step."""
    model: str
    """The suffix of the packaged recipes; empty for the small ones."""
    transformer: dict[str, int]
    """Arguments of the transformer of that size. The other models have its vocabulary."""
    texts: tuple[int, ...]
    """Lengths of the texts for whole models."""
    seconds: float
    """Seconds to measure each case after the warm-up."""


FULL = Sizes(
    8192, 2**32, 128, (2048, 8192, 32768, 131072), ((64, 2, 2), (64, 4, 2), (64, 1, 2), (64, 1, 1), (128, 1, 1)),
    64, 1024, 2048, "-170m", dict(dim=768, depth=12, vocab=256, heads=12, hidden=4224), (8192, 32768, 131072), 0.4,
)  # fmt: skip
QUICK = Sizes(
    64, 2**16, 2, (32,), ((16, 2, 2), (16, 1, 1)), 16, 16, 4, "",
    dict(dim=32, depth=1, vocab=256, heads=2, hidden=64), (64,), 0.0,
)  # fmt: skip


class Timing(NamedTuple):
    """A case to time."""

    what: str
    backend: str
    shape: str
    direction: str
    """``"forward"`` or ``"both"``: forward and backward."""
    make: Callable[[], Run]
    """Makes inputs and parameters and returns a function that runs once."""
    flops: float = 0
    """Useful FLOPs; 0 where memory bandwidth is the limit."""
    moved: float = 0
    """Bytes that must be read and written; 0 where FLOPs are the limit."""
    tokens: int = 0
    operation: str = ""
    """The name in ``dispatch.OPERATIONS`` if the case is a single operation."""
    rank: int = 0
    """Cases of lower rank are measured first."""


class Measurement(NamedTuple):
    """The result of timing a case."""

    what: str
    backend: str
    shape: str
    direction: str
    seconds: float
    low: float
    high: float
    """Median and quartiles."""
    flops: float
    bytes: float
    share: float
    """The share of the measured matrix rate, or of the measured bandwidth."""
    tokens: int
    peak: int
    """Peak of allocated bytes, with inputs and results; 0 where the device does not report it."""
    failed: str = ""


class Ceiling(NamedTuple):
    """Measured limits of the device: FLOP/s of a large matrix product, bytes/s of a copy."""

    product: float
    copy: float


def ceiling(device: torch.device, dtype: torch.dtype, sizes: Sizes) -> Ceiling:
    """Measure the limits, with random numbers: products of zeros draw less power and run faster."""
    a, b = (torch.randn(sizes.matrix, sizes.matrix, device=device).to(dtype) for _ in range(2))
    product = statistics.median(samples(lambda: a @ b, device, max(sizes.seconds, 0.5)))
    x = torch.empty(sizes.copied, dtype=torch.uint8, device=device)
    y = torch.empty_like(x)
    copy = statistics.median(samples(lambda: y.copy_(x), device, max(sizes.seconds, 0.5)))
    return Ceiling(2 * sizes.matrix**3 / product, 2 * sizes.copied / copy)


def samples(run: Run, device: torch.device, seconds: float, least: int = 3, most: int = 50) -> list[float]:
    """Seconds of each run, measured with CUDA events on a GPU. A run that takes longer than ``LONG`` is timed once."""
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


def measure(case: Timing, device: torch.device, sizes: Sizes, most: Ceiling) -> Measurement:
    """Time a case. If it fails, for example for lack of memory, the measurement holds the reason."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    none = math.nan
    row = Measurement(*case[:4], none, none, none, case.flops, case.moved, none, case.tokens, 0)
    try:
        run = case.make()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        taken = sorted(samples(run, device, sizes.seconds))
    except dispatch.BackendError as error:
        return row._replace(failed=str(error))
    except Exception as error:  # from the device, a compiler or another library
        return row._replace(failed=(str(error).strip() or type(error).__name__).splitlines()[0])
    low, middle, high = statistics.quantiles(taken, n=4) if len(taken) > 1 else taken * 3
    share = case.flops / middle / most.product if case.flops else case.moved / middle / most.copy
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    return row._replace(seconds=middle, low=low, high=high, share=share, peak=peak)


def wait(device: torch.device) -> None:
    """Wait until the device is idle."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def backends(operation: str, device: torch.device, dtype: torch.dtype, **facts: Any) -> list[str]:
    """The backends of an operation that run on ``device``, without the references."""
    found = dispatch.OPERATIONS[operation].backends.values()
    named = dict(named=True, device=device.type, dtype=dtype, **facts)
    return [b.name for b in found if b.name not in ("reference", "closed_form") and b.refuse(**named) is None]


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
