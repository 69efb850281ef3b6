"""Attention of a few new tokens over a cache: from their projection to the outputs, and the next cache.

RMS norm, rotation and attention, one after the other. Backends: ``native`` is one C kernel (decode_cpu.c), because for
one token an operator costs more to start than to run; ``torch`` and ``reference`` call the three operations.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..cpu_runtime import library
from ..cpu_runtime.call import Kernel, threads_for
from ..dispatch import Backend, Operation, can_prepare
from ..norm_gate import rms_norm
from ..rotary import rotate, tables
from . import Prefix, attention

EPS = 1e-6


class Cache(NamedTuple):
    """Keys and values of the tokens before; the newest in the last slot, zeros in slots that hold none."""

    keys: Tensor
    """``[batch, slots, kv_heads, d]``, normalized and rotated."""
    values: Tensor
    """``[batch, slots, kv_heads, d]``."""
    cached: Tensor
    """``[batch]`` int64: slots that hold a token."""
    position: Tensor
    """``[batch]`` int64: tokens read, which is the position of the first new one."""
    prefix_keys: Tensor | None
    """``[batch, P, kv_heads, d]``: persistent tokens, normalized and not rotated; or ``None``."""
    prefix_values: Tensor | None
    """``[batch, P, kv_heads, d]``."""


class Form(NamedTuple):
    """The arguments of :func:`cached_attention` that are not tensors."""

    heads: int
    window: int | None
    base: float | None
    step: int


def cached_attention(
    projected: Tensor,
    gain: Tensor | None,
    cache: Cache,
    *,
    heads: int,
    window: int | None = None,
    base: float | None = None,
    step: int = 1,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Attend from new tokens to the cache and to themselves, each to what is not after it. No gradients.

    Args:
        projected: ``[batch, time, heads + 2 * kv_heads, d]``: queries, keys and values as they were projected.
        gain: ``[heads + kv_heads, d]`` of the RMS norm of queries and keys, or ``None`` for no norm.
        cache: of the tokens before; not modified.
        window: tokens in sight, a token's own included; ``None`` for all.
        base: of the rotary positions; ``None`` for none.
        step: a divisor of ``time``: every ``step``-th token has a query.

    Returns:
        ``[batch, time / step, heads, d]``, and keys and values for the next call: ``window - 1`` slots, or without a
        window ``time`` more than there were.
    """
    same = cache.keys.dtype == projected.dtype  # positions are integers
    run = _operation.choose(backend, projected, gain, *cache, same=same)
    return run(projected, gain, cache, Form(heads, window, base, step))


def prepare_attention(
    projected: Tensor, gain: Tensor | None, *, heads: int, window: int, base: float | None = None, step: int = 1
) -> Callable[[Cache], tuple[Tensor, Tensor, Tensor]] | None:
    """:func:`cached_attention` prepared for many calls, or ``None`` where the C kernel does not run.

    ``projected`` is filled before each call. The function takes a cache; its outputs are one tensor that every call
    overwrites, its keys and values new tensors.
    """
    if not (
        can_prepare(projected, gain)
        and _operation.choose("auto", device="cpu", dtype=projected.dtype, same=True, plain=True) is _native
    ):
        return None
    return _Prepared(projected, gain, Form(heads, window, base, step))


def _torch(
    projected: Tensor, gain: Tensor | None, cache: Cache, form: Form, backend: str = "auto"
) -> tuple[Tensor, Tensor, Tensor]:
    heads, window, base, step = form
    time, slots, kv_heads = projected.shape[1], *cache.keys.shape[1:3]
    unrotated, v = projected.split_with_sizes((heads + kv_heads, kv_heads), dim=2)
    if gain is not None:
        unrotated = rms_norm(unrotated, gain, EPS, backend=backend)
    rotated = unrotated
    if base is not None:
        position = cache.position[:, None] + torch.arange(time, device=projected.device)
        rotated = rotate(unrotated, position, base, backend=backend)
    prefix = None
    queries = slice(step - 1, None, step)
    if cache.prefix_keys is not None and cache.prefix_values is not None:
        prefix = Prefix(unrotated[:, queries, :heads], cache.prefix_keys, cache.prefix_values)
    k, v = torch.cat((cache.keys, rotated[:, :, heads:]), dim=1), torch.cat((cache.values, v), dim=1)
    cached = cache.cached.tolist()
    most = max(cached, default=0)
    start = None if min(cached, default=0) == most else most - cache.cached
    seen = [x[:, slots - most :] for x in (k, v)]
    y = attention(
        rotated[:, queries, :heads], *seen, window=window, start=start, prefix=prefix, step=step, backend=backend
    )
    if window is None:
        return y, k, v
    # a cache with fewer slots than the window has gets empty ones
    spare = k.shape[1] - (window - 1)
    if spare < 0:
        k, v = (torch.cat((x.new_zeros(x.shape[0], -spare, *x.shape[2:]), x), dim=1) for x in (k, v))
    return y, k[:, max(spare, 0) :], v[:, max(spare, 0) :]


def _native(projected: Tensor, gain: Tensor | None, cache: Cache, form: Form) -> tuple[Tensor, Tensor, Tensor]:
    return _Prepared(projected.contiguous(), None if gain is None else gain.contiguous(), form)(cache)


class _Prepared:
    """The kernel's call for one tensor ``projected`` and one of outputs."""

    def __init__(self, projected: Tensor, gain: Tensor | None, form: Form) -> None:
        batch, time, lines, d = projected.shape
        heads, self.window, self.base, step = form
        self.time, self.d = time, d
        self.kv_heads = (lines - heads) // 2
        self.y = torch.empty((batch, time // step, heads, d), dtype=projected.dtype)
        self.call = _KERNEL.prepare(
            projected.dtype, 9, 22, batch, time, heads, self.kv_heads, d, step, projected, gain, self.y, *[0] * 22, EPS
        )

    def __call__(self, cache: Cache) -> tuple[Tensor, Tensor, Tensor]:
        d, time, y = self.d, self.time, self.y
        keys, values = (x if x.stride()[2:] == (d, 1) else x.contiguous() for x in (cache.keys, cache.values))
        batch, slots = keys.shape[:2]
        cached = cache.cached.contiguous()
        places = 0, 0, 0, 0
        if self.base is not None:
            cos, sin = tables(cache.position, time, d, self.base, y.dtype)
            places = cos.data_ptr(), sin.data_ptr(), (cos.stride(0) if cos.shape[0] > 1 else 0), cos.stride(1)
        persistent, first = 0, (0, 0, 0, 0)
        if cache.prefix_keys is not None and cache.prefix_values is not None:
            first_keys, first_values = cache.prefix_keys, cache.prefix_values
            if first_keys.stride() != first_values.stride() or first_keys.stride()[2:] != (d, 1):
                first_keys, first_values = first_keys.contiguous(), first_values.contiguous()
            persistent, step = first_keys.shape[1], first_keys.stride()
            first = first_keys.data_ptr(), first_values.data_ptr(), step[0], step[1]
        after = slots + time if self.window is None else self.window - 1
        if after == slots and keys.is_contiguous():  # empty_like takes half as long as empty
            new_keys = torch.empty_like(keys)
        else:
            new_keys = torch.empty((batch, after, self.kv_heads, d), dtype=y.dtype)
        new_values = torch.empty_like(new_keys)
        threads = threads_for(2 * keys.nbytes)
        self.call(
            threads, slots, after, persistent, self.window or 0, *places,
            keys.data_ptr(), values.data_ptr(), *keys.stride()[:2], *values.stride()[:2], cached.data_ptr(), *first,
            new_keys.data_ptr(), new_values.data_ptr(),
        )  # fmt: skip
        return y, new_keys, new_values


_KERNEL = Kernel("cached_attention", integers=31, doubles=1)


def _outputs(projected: Tensor, gain: Tensor | None, cache: Cache, form: Form) -> tuple[Tensor, Tensor, Tensor]:
    heads, window, _, step = form
    batch, slots, kv_heads, d = cache.keys.shape
    kept = projected.new_empty(batch, slots + projected.shape[1] if window is None else window - 1, kv_heads, d)
    return projected[:, step - 1 :: step, :heads], kept, kept


_operation = Operation(
    "cached_attention",
    [
        Backend("native", _native, library.refuse, opaque=True),
        Backend("torch", _torch, opaque=True),
        Backend("reference", functools.partial(_torch, backend="reference"), opaque=True),
    ],
    _outputs,
    [Cache, Form],
)
