"""Attention on a GPU through xFormers: masks it knows by name, and one softmax over several of them.

xFormers computes attention under a mask that is an object, not a tensor: causal, with or without a window, the queries
being the last tokens of the keys. What is more than that is a sum of such parts, which are merged by their log-sum-exp:

* a prefix is a part without a mask, with queries of its own;
* where queries stand at every ``step``-th key, the keys are ``step`` interleaved streams, and each is a causal part of
  its own: of the stream that ends ``lag`` keys before the last query, a query sees all that is not after it, and of a
  window of ``w`` keys the last ``(w - lag) / step``, rounded up.

Only what all of this needs is imported, in ``_library``: where xFormers moves its parts, this is the place.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from .constant import constant

OLDEST = (0, 0, 35)
"""The first version whose library is for any PyTorch from 2.10 on; older ones are for one version each."""
WIDEST = 256
"""Numbers of a head that its kernels take, in steps of ``ALIGNED``."""
ALIGNED = 8
_INSTALL = "pip install 'titans-build[gpu]'"

_Prefix: TypeAlias = tuple[Tensor, Tensor, Tensor]
"""Queries without positions, keys, values: ``attention.Prefix``."""


class Part(NamedTuple):
    """Attention under a mask that xFormers knows."""

    q: Tensor
    k: Tensor
    v: Tensor
    causal: bool
    """The queries are the last tokens of the keys, and see none after them; else every query sees every key."""
    window: int | None
    """Keys in sight where it is causal, a query's own included; ``None``: all."""


def xformers_attention(
    q: Tensor, k: Tensor, v: Tensor, window: int | None, start: Tensor | None, prefix: _Prefix | None, step: int
) -> Tensor:
    """``attention`` in float16 or bfloat16 on a GPU; without ``start``."""
    if start is not None:
        raise ValueError("start: expected None, which refuse_xformers makes sure of")
    if not q.numel():
        return torch.zeros_like(q)
    library = _library()
    found = parts(q, k, v, window, prefix, step)
    if len(found) == 1:
        part = found[0]
        y: Tensor = library.whole(part.q, part.k, part.v, attn_bias=mask(library, part))
        return y
    merged: Tensor = library.merge(*(library.partial(p.q, p.k, p.v, attn_bias=mask(library, p)) for p in found))
    return merged


def parts(q: Tensor, k: Tensor, v: Tensor, window: int | None, prefix: _Prefix | None, step: int) -> list[Part]:
    """What is seen, as parts that each have a mask of their own and together one softmax."""
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
    return found


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
    return _missing()


@constant
def _missing() -> str | None:
    return _looked_for()


@functools.cache
def _looked_for() -> str | None:
    if importlib.util.find_spec("xformers") is None:
        return f"needs xFormers: {_INSTALL}"
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


def _numbers(version: str) -> tuple[int, ...]:
    """``0.0.35.post1+cu130`` -> ``0, 0, 35``."""
    return tuple(int(part) for part in version.split("+")[0].split(".") if part.isdigit())


class _Library(NamedTuple):
    """The parts of xFormers that are used here."""

    whole: Any
    """Attention under one mask."""
    partial: Any
    """The same, to be merged with others."""
    merge: Any
    """Of such, the softmax over all."""
    masks: Any
    """The module of masks."""
    built: bool
    """Whether there are kernels that can do all of this."""


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
