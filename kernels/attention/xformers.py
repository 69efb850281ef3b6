"""Attention on a GPU through xFormers: masks it knows by name (parts.py), with gradients through merging them.

All of xFormers that is used here is imported in ``_library``.
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
from .parts import Part, parts, refuse_flash_form
from .reference import Prefix
from .trial import Case, Trial, reason

OLDEST = (0, 0, 35)
"""The first version whose library is for any PyTorch from 2.10 on; older ones are for one version each."""
_INSTALL = "pip install 'titans-build[gpu]'"


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
        y = _attend(_library(), parts(q, k, v, window, None, prefix, step))
        return refuse_second_derivative(y, "attention: xformers; name another, such as backend='reference'")
    except (ImportError, NotImplementedError, ValueError) as error:
        raise BackendUnavailable(reason(error)) from error


def _attend(library: _Library, found: list[Part]) -> Tensor:
    if len(found) == 1:
        part = found[0]
        y: Tensor = library.whole(part.q, part.k, part.v, attn_bias=mask(library, part))
        return y
    merged: Tensor = library.merge(*(library.partial(p.q, p.k, p.v, attn_bias=mask(library, p)) for p in found))
    return merged


def mask(library: Any, part: Part) -> Any:
    """The object for the part's mask, or ``None``."""
    if not part.causal:
        return None
    if part.window is None:
        return library.masks.LowerTriangularFromBottomRightMask()
    return library.masks.LowerTriangularFromBottomRightLocalAttentionMask(_window_size=part.window)


def refuse_xformers(
    *,
    device: str,
    dtype: torch.dtype,
    width: int = 8,
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
    if refused := refuse_flash_form(dtype=dtype, width=width):
        return refused
    if start:
        return "takes rows that all begin at one key"
    if gaps:
        return "takes queries that each have a key of their own in every stream"
    if grad and deterministic:
        return "its gradients differ from run to run, and deterministic algorithms are asked for"
    return _trial.refuse(dtype, width)


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


_trial = Trial(xformers_attention, (Case(None), Case(16), Case(16, 5), Case(16, 5, step=2)), lambda: _installed())


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
