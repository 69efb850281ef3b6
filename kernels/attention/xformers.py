"""Attention on a GPU through xFormers: masks it knows by name, and one softmax over several of them.

xFormers takes a mask as an object, not a tensor: causal, with or without a window, with queries at the last keys.
Everything else is composed of such parts, merged by their log-sum-exp:

* a prefix is a part without a mask, with its own queries;
* where queries stand at every ``step``-th key, the keys are ``step`` interleaved streams, and each is a causal part: of
  the stream that ends ``lag`` keys before the last query, a query sees the keys not after it, and of a window of ``w``
  keys the last ``(w - lag) / step``, rounded up.

All of xFormers that is used here is imported in ``_library``. Whether a build has kernels for a GPU, and whether they
are right, shows on the GPU alone: before their first use they are tried, forward and backward.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..autograd import refuse_second_derivative
from ..dispatch import BackendUnavailable
from .reference import Prefix, reference_attention

OLDEST = (0, 0, 35)
"""The first version whose library is for any PyTorch from 2.10 on; older ones are for one version each."""
WIDEST = 256
"""Largest head that its kernels take, in steps of ``ALIGNED``."""
ALIGNED = 8
KERNELS = (32, 64, 96, 128, 192, 256)
"""Widths of heads that its kernels are compiled for; each takes all up to it."""
OFF = 0.03
"""Largest ``rms(out - ref) / rms(ref)`` in a trial: at least three times what rounding to bfloat16 causes."""
_INSTALL = "pip install 'titans-build[gpu]'"


class Part(NamedTuple):
    """Attention under a mask that xFormers knows."""

    q: Tensor
    k: Tensor
    v: Tensor
    causal: bool
    """Queries stand at the last keys and see none after them; else every query sees every key."""
    window: int | None
    """Keys in sight where it is causal, the query's own included; ``None``: all."""


def xformers_attention(
    q: Tensor, k: Tensor, v: Tensor, window: int | None, start: Tensor | None, prefix: Prefix | None, step: int
) -> Tensor:
    """``attention`` in float16 or bfloat16 on a GPU; without ``start``.

    Raises ``BackendUnavailable`` where xFormers' own checks refuse.
    """
    if start is not None:
        raise ValueError("start: expected None: refuse_xformers refuses it")
    if not q.numel():
        return torch.zeros_like(q)
    try:
        y = _attend(_library(), parts(q, k, v, window, prefix, step))
        return refuse_second_derivative(y, "attention: xformers; name another, such as backend='reference'")
    except (ImportError, NotImplementedError, ValueError) as error:
        raise BackendUnavailable(_reason(error)) from error


def _attend(library: _Library, found: list[Part]) -> Tensor:
    if len(found) == 1:
        part = found[0]
        y: Tensor = library.whole(part.q, part.k, part.v, attn_bias=mask(library, part))
        return y
    merged: Tensor = library.merge(*(library.partial(p.q, p.k, p.v, attn_bias=mask(library, p)) for p in found))
    return merged


def parts(q: Tensor, k: Tensor, v: Tensor, window: int | None, prefix: Prefix | None, step: int) -> list[Part]:
    """The visible keys as parts with a mask each, which share one softmax."""
    heads, keys = q.shape[2], k.shape[1]
    found = []
    for lag in range(step):
        reach = None if window is None else -(-(window - lag) // step)
        if reach is None or reach > 0:
            stream = slice((keys - 1 - lag) % step, None, step)
            found.append(Part(q, _per_head(k[:, stream], heads), _per_head(v[:, stream], heads), True, reach))
    if prefix is not None:
        pq, pk, pv = prefix
        found.append(Part(pq, _per_head(pk, heads), _per_head(pv, heads), False, None))
    return [part._replace(q=_aligned(part.q), k=_aligned(part.k), v=_aligned(part.v)) for part in found]


def _aligned(x: Tensor) -> Tensor:
    """Aligned as its kernels assume without a check: they read 16 bytes at a time."""
    apart = [step for step, size in zip(x.stride(), x.shape) if size > 1]
    if x.stride(-1) == 1 and not any(step % ALIGNED for step in apart[:-1]) and not x.storage_offset() % ALIGNED:
        return x
    return x.clone(memory_format=torch.contiguous_format)


def mask(library: Any, part: Part) -> Any:
    """The object for the part's mask, or ``None``."""
    if not part.causal:
        return None
    if part.window is None or part.window >= part.k.shape[1]:
        return library.masks.LowerTriangularFromBottomRightMask()
    return library.masks.LowerTriangularFromBottomRightLocalAttentionMask(_window_size=part.window)


def _per_head(x: Tensor, heads: int) -> Tensor:
    """Keys or values for every query head: kernels for groups of heads have no backward."""
    return x if x.shape[2] == heads else x.repeat_interleave(heads // x.shape[2], dim=2)


def refuse_xformers(
    *,
    device: str,
    dtype: torch.dtype,
    width: int = ALIGNED,
    start: bool = False,
    gaps: bool = False,
    grad: bool = False,
    deterministic: bool = False,
    **facts: Any,
) -> str | None:
    """Why xFormers cannot run, or ``None``.

    ``width``: of a head. ``start``: rows may begin at different keys. ``gaps``: queries stand at every so many keys,
    and the first has fewer than that before it.
    """
    if device != "cuda":
        return f"runs on a GPU, not on {device}"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"takes float16 and bfloat16, not {dtype}: for others it has no windows with gradients and no prefix"
    if width > WIDEST or width % ALIGNED:
        return f"takes heads of up to {WIDEST} numbers in steps of {ALIGNED}, not {width}"
    if start:
        return "takes rows that all begin at one key"
    if gaps:
        return "takes queries that each have a key of their own in every stream"
    if grad and deterministic:
        return "its gradients differ from run to run, and deterministic algorithms are asked for"
    return _missing(dtype, next(each for each in KERNELS if width <= each))


_trials: dict[tuple[torch.dtype, int], str | None] = {}


def _missing(dtype: torch.dtype, width: int) -> str | None:
    if (dtype, width) not in _trials:
        if torch.compiler.is_compiling():  # a tracer cannot run kernels
            return "is tried on this GPU at the first call that is not compiled"
        _trials[dtype, width] = _installed() or _tried(dtype, width)
    return _trials[dtype, width]


@functools.cache
def _installed() -> str | None:
    spec = importlib.util.find_spec("xformers")
    if spec is None or spec.origin is None:
        return f"needs xFormers: {_INSTALL}"
    if spec.submodule_search_locations is None:
        return f"needs xFormers, but Python finds {spec.origin} in its place"
    version = importlib.metadata.version("xformers")
    if _numbers(version) < OLDEST:
        return f"needs xFormers {'.'.join(map(str, OLDEST))} or newer, not {version}: {_INSTALL}"
    if torch.version.hip:
        return "its kernels for NVIDIA's GPUs are the ones that are used here"
    try:
        library = _library()
    except Exception as error:  # a build for another PyTorch fails in its own ways
        return f"xFormers {version} cannot be loaded beside PyTorch {torch.__version__}: {error}"
    if not library.built:
        return f"xFormers {version} has no FlashAttention beside PyTorch {torch.__version__}"
    if torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 0):
        major, minor = torch.cuda.get_device_capability()
        return f"needs a GPU of compute capability 8.0 or newer, not {major}.{minor}"
    return None


TRIALS = ((None, 0, 1), (16, 0, 1), (16, 5, 1), (16, 5, 2))
"""Window, persistent tokens, keys from one query to the next: every kind of mask, alone and merged."""


@functools.cache
def _tried(dtype: torch.dtype, width: int, device: str = "cuda") -> str | None:
    """Why its kernels fail on this GPU, by running them once; or ``None``."""
    deterministic, warning = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    torch.use_deterministic_algorithms(False)
    try:
        with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device, enabled=False):
            off = [_off(dtype, width, device, *trial) for trial in TRIALS]
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # kernels for another GPU fail in their own ways
        return f"failed when it was tried on this GPU: {type(error).__name__}: {_reason(error)}"
    finally:
        torch.use_deterministic_algorithms(deterministic, warn_only=warning)
    if all(each <= OFF for each in off):
        return None
    return f"gave wrong numbers when it was tried on this GPU, off by up to {max(off):.0%}"


def _off(dtype: torch.dtype, width: int, device: str, window: int | None, persistent: int, step: int) -> float:
    """The largest error ratio of outputs and gradients; infinity for NaN."""
    random = torch.Generator().manual_seed(0)
    lengths = [40, 40 * step + 16, 40 * step + 16, *([40, persistent, persistent] if persistent else [])]
    given = [torch.randn(2, n, 2, width, generator=random).to(device, dtype) for n in lengths]

    def passes(run: Any, inputs: list[Tensor]) -> list[Tensor]:
        leaves = [x.requires_grad_() for x in inputs]
        y = run(*leaves[:3], Prefix(*leaves[3:]) if persistent else None)
        grads = torch.autograd.grad(y, leaves, given[0].detach().to(y.dtype))
        return [x.detach().double() for x in (y, *grads)]

    found = passes(lambda q, k, v, first: xformers_attention(q, k, v, window, None, first, step), list(given))
    right = passes(
        lambda q, k, v, first: reference_attention(q, k, v, window, None, first, step),
        [x.detach().double() for x in given],
    )
    off = [float((x - y).norm() / y.norm()) for x, y in zip(found, right)]
    return max(x if x == x else float("inf") for x in off)


def _reason(error: Exception) -> str:
    """One line; xFormers lists its reasons below a line that repeats the inputs."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    reasons = [line for line, before in zip(lines[1:], lines) if before.endswith("is not supported because:")]
    return "; ".join(dict.fromkeys(reasons)) or (lines[0] if lines else type(error).__name__)


def _numbers(version: str) -> tuple[int, ...]:
    """``0.0.35.post1+cu130`` -> ``0, 0, 35``."""
    return tuple(int(part) for part in version.split("+")[0].split(".") if part.isdigit())


class _Library(NamedTuple):
    """The parts of xFormers that are used here."""

    whole: Any
    """Attention under one mask."""
    partial: Any
    """The same, for merging."""
    merge: Any
    """Merges those into one softmax."""
    masks: Any
    """The module of masks."""
    built: bool
    """Whether this build has the kernels."""


@functools.cache
def _library() -> _Library:
    from xformers.ops import fmha
    from xformers.ops.fmha import attn_bias, flash, merge_training

    built = flash.FwOp.is_available() and flash.BwOp.is_available()
    return _Library(
        fmha.memory_efficient_attention,
        merge_training.memory_efficient_attention_partial_autograd,
        merge_training.merge_attentions_autograd,
        attn_bias,
        built,
    )
