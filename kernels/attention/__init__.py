"""Causal attention with a sliding window, unfilled cache slots and an always visible prefix.

The queries stand at the last keys, or at every ``step``-th of them: with ``S`` keys and ``T`` queries, query ``i``
stands at key ``S - 1 - (T - 1 - i) step``. It sees the keys at or before its own place, none ``window`` or more tokens
back, none before ``start``; and every prefix key. All it sees shares one softmax. A query that sees nothing returns
zero.

Prefix keys have no position. Where the other scores come from rotated queries and keys, theirs come from queries that
were not rotated, which is why :class:`Prefix` brings its own.

Backends: ``native`` is a C kernel for CPUs (cpu.py). On GPUs, ``xformers`` (xformers.py) and ``flash`` (flash.py) are
FlashAttention with windows, from xFormers and from PyTorch, and ``flex`` is FlexAttention (flex.py). ``sdpa`` are
PyTorch's fused kernels (sdpa.py), and ``reference`` is a dense mask (reference.py). A few new tokens over a cache, from
projection to output, are in decode.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..cpu_runtime import library
from ..dispatch import (
    Backend,
    BackendUnavailable,
    Operation,
    expect_tensors,
    half_dtype,
    is_plain_cpu_tensor,
    needs_grad,
    sum_is_finite,
    transforming,
)
from .cpu import native_attention
from .flash import flash_attention, refuse_flash
from .flex import flex_attention, refuse_flex
from .reference import Prefix as Prefix
from .reference import reference_attention
from .sdpa import JOINT_QUERIES, is_masked, sdpa_attention
from .xformers import refuse_xformers, xformers_attention


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int | None = None,
    start: Tensor | None = None,
    prefix: Prefix | None = None,
    step: int = 1,
    backend: str = "auto",
) -> Tensor:
    """Attend from ``q`` ``[batch, T, heads, d]`` to ``k``, ``v`` ``[batch, S, kv_heads, d]``.

    ``kv_heads`` divides ``heads``; neighboring query heads share one. ``window``: tokens in sight, the query's
    own included. ``start``: int64 ``[batch]``, the first key of each row that holds a token. ``step``: keys from one
    query's place to the next one's, so that ``S > (T - 1) step``. Scores are scaled by ``d ** -0.5``. Returns
    ``[batch, T, heads, d]`` in ``q``'s dtype.

    On a CPU, NaN and infinity in keys and values are confined to the queries that see them, which become NaN; in
    compiled code that holds for the ``native`` backend alone.

    Raises ``ValueError`` or ``TypeError`` naming the argument that does not fit; ``BackendError``.
    """
    _check(q, k, v, window, start, prefix, step)
    if prefix is not None and prefix.k.shape[1] == 0:
        prefix = None
    grad = needs_grad(q, k, v, *(() if prefix is None else prefix))
    plain = is_plain_cpu_tensor(q, k, v, start, *(() if prefix is None else prefix))
    facts: dict[str, Any] = dict(device=q.device.type, dtype=q.dtype, grad=grad, plain=plain)
    if not q.is_cpu:
        facts |= accelerator_facts(q, k, window, start, prefix, step)
    run: Callable[..., Tensor] = _operation.choose(backend, **facts)
    # libraries refuse a batch of no rows, or no queries; fused kernels have no transforms and no forward mode
    if not q.numel() or (not plain and transforming()):
        run = reference_attention
    try:
        return run(q, k, v, window, start, prefix, step)
    except BackendUnavailable as error:
        run = _operation.fallback("xformers", str(error), backend, **facts)
        return run(q, k, v, window, start, prefix, step)


LARGE = 2**18
"""Pairs of queries and keys from which on compiling a kernel for them pays."""


def accelerator_facts(
    q: Tensor, k: Tensor, window: int | None, start: Tensor | None, prefix: Prefix | None, step: int
) -> dict[str, Any]:
    """What backends for accelerators decide by, besides device, dtype and gradients."""
    time, keys = q.shape[1], k.shape[1]
    return dict(
        width=q.shape[3], start=start is not None, gaps=step > 1 and keys < time * step,
        several=step > 1 or prefix is not None, masked=is_masked(time, keys, window, start, prefix, step),
        few=time <= JOINT_QUERIES, large=time > JOINT_QUERIES and time * keys >= LARGE,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )  # fmt: skip


FULL_PRECISION_DEVICES = ("cpu",)
"""Devices on which autocast changes nothing: their kernels are faster in float32, and more exact."""


def operand_dtype(like: Tensor) -> torch.dtype:
    """The dtype of queries, keys and values where the state is like ``like``: that of autocast if it is enabled."""
    half = None if like.device.type in FULL_PRECISION_DEVICES else half_dtype(like)
    return like.dtype if half is None else getattr(torch, half)


def _check(
    q: Tensor, k: Tensor, v: Tensor, window: int | None, start: Tensor | None, prefix: Prefix | None, step: int
) -> None:
    if prefix is not None and not isinstance(prefix, Prefix):
        raise TypeError(f"attention: prefix: expected a Prefix(q, k, v) or None, got {type(prefix).__name__}")
    given = [("q", q), ("k", k), ("v", v)]
    if prefix is not None:
        given += [("prefix.q", prefix.q), ("prefix.k", prefix.k), ("prefix.v", prefix.v)]
    expect_tensors("attention", *given)
    if q.dim() != 4:
        raise ValueError(f"attention: q {list(q.shape)}: expected [batch, time, heads, d]")
    rows, time, heads, d = q.shape
    if k.dim() != 4 or k.shape[0] != rows or k.shape[3] != d:
        raise ValueError(
            f"attention: k {list(k.shape)}: expected [{rows}, keys, kv_heads, {d}] to fit q {list(q.shape)}"
        )
    if v.shape != k.shape:
        raise ValueError(f"attention: v {list(v.shape)}: expected the shape of k, {list(k.shape)}")
    for name, number in (("step", step), ("window", window)):
        if number is None and name == "window":
            continue
        if isinstance(number, bool) or not isinstance(number, int):
            raise TypeError(f"attention: {name} is {number!r}: expected a whole number of keys")
    if step < 1:
        raise ValueError(f"attention: step is {step}: expected at least 1")
    if k.shape[1] < (time - 1) * step + 1 and time:
        raise ValueError(
            f"attention: k has {k.shape[1]} keys for {time} queries: expected at least {(time - 1) * step + 1}"
        )
    if k.shape[2] < 1 or heads % k.shape[2]:
        raise ValueError(f"attention: k has {k.shape[2]} heads: expected a divisor of q's {heads}")
    if window is not None and window < 1:
        raise ValueError(f"attention: window is {window}: expected at least 1, or None")
    if start is not None:
        if not isinstance(start, Tensor):
            raise TypeError(f"attention: start: expected a tensor, got {type(start).__name__}")
        if start.dtype != torch.int64:
            raise TypeError(f"attention: start is {start.dtype}: expected torch.int64")
        if start.shape != (rows,):
            raise ValueError(f"attention: start {list(start.shape)}: expected [{rows}]")
        if start.device != q.device:
            raise ValueError(f"attention: start is on {start.device}: expected the device of q, {q.device}")
    if prefix is not None:
        if prefix.q.shape != q.shape:
            raise ValueError(f"attention: prefix.q {list(prefix.q.shape)}: expected the shape of q, {list(q.shape)}")
        if prefix.k.dim() != 4 or prefix.k.shape != (rows, prefix.k.shape[1], k.shape[2], d):
            raise ValueError(
                f"attention: prefix.k {list(prefix.k.shape)}: expected [{rows}, tokens, {k.shape[2]}, {d}]"
            )
        if prefix.v.shape != prefix.k.shape:
            raise ValueError(f"attention: prefix.v {list(prefix.v.shape)}: expected {list(prefix.k.shape)}")


def _confine_nonfinite(attend: Callable[..., Tensor], *, adds_mask: bool = False) -> Callable[..., Tensor]:
    """On a CPU, ``attend`` without NaN and infinity, and NaN for the queries that see one.

    Masked scores are multiplied by zero, and zero times NaN is NaN. On other devices a check would wait for the device.
    ``adds_mask``: ``attend`` hides a score by adding ``-inf``, which is NaN where the product of finite numbers
    overflowed. The reference then replaces it.
    """

    def run(
        q: Tensor, k: Tensor, v: Tensor, window: int | None, start: Tensor | None, prefix: Prefix | None, step: int
    ) -> Tensor:
        options = (window, start, prefix, step)
        hides = q.shape[1] > 1 or start is not None or (window is not None and window < k.shape[1])
        if not (hides and q.is_cpu and not torch.compiler.is_compiling() and is_plain_cpu_tensor(q, k, v, start)):
            return attend(q, k, v, *options)
        saw = None
        if not sum_is_finite(k, v):
            nonfinite = ~(k.isfinite().all(-1) & v.isfinite().all(-1))
            saw = _sees_any(nonfinite, q.shape[1], window, start, step).repeat_interleave(q.shape[2] // k.shape[2], 2)
            k, v = (x.masked_fill(nonfinite.unsqueeze(-1), 0.0) for x in (k, v))
        y = attend(q, k, v, *options)
        if adds_mask and not sum_is_finite(y):
            y = reference_attention(q, k, v, *options)
        return y if saw is None else y.masked_fill(saw.unsqueeze(-1), math.nan)

    return run


def _sees_any(marked: Tensor, queries: int, window: int | None, start: Tensor | None, step: int) -> Tensor:
    """Whether each query sees a marked key: bool ``[batch, keys, kv_heads]`` -> ``[batch, queries, kv_heads]``."""
    rows, keys, _ = marked.shape
    place = torch.arange(1 - queries, 1, device=marked.device) * step + (keys - 1)
    first = torch.zeros_like(place) if window is None else (place - window + 1).clamp(min=0)
    first = first.expand(rows, -1)
    if start is not None:
        first = torch.maximum(first, start.unsqueeze(1)).clamp(max=keys)
    # how many marked keys come before each key, and before the end
    count = torch.nn.functional.pad(marked.cumsum(1), (0, 0, 1, 0))
    until = count[:, place + 1]
    return until > count.gather(1, first.unsqueeze(-1).expand_as(until))


_operation = Operation(
    "attention",
    [
        Backend("native", _confine_nonfinite(native_attention), library.refuse, opaque=True),
        Backend("xformers", xformers_attention, refuse_xformers, opaque=True),
        Backend("flash", flash_attention, refuse_flash),
        Backend("flex", _confine_nonfinite(flex_attention), refuse_flex),
        Backend("sdpa", _confine_nonfinite(sdpa_attention, adds_mask=True)),
        Backend("reference", _confine_nonfinite(reference_attention)),
    ],
    lambda q, *others: q,
    [Prefix],
)
