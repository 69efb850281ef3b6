"""Attention of a few new tokens over a cache: from their projection to the outputs, and the cache after them.

What ``normalisation``, ``rotary`` and ``attention`` do one after the other. Backends: ``native`` does it all in one C
kernel, for at one token an operator costs more to start than to run; ``torch`` and ``reference`` call those three.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..cpu_runtime import library
from ..cpu_runtime.call import Kernel, plain, prepares, threads_worth
from ..dispatch import Backend, Operation
from ..norm_gate.norm import rms_norm
from ..rotary import rotate, tables
from . import Prefix, attention

EPS = 1e-6


class Cache(NamedTuple):
    """Keys and values of the tokens before; the newest in the last slot, zeros in slots that hold none."""

    keys: Tensor
    """``[batch, slots, kv_heads, d]``, normalised and rotated."""
    values: Tensor
    """``[batch, slots, kv_heads, d]``."""
    cached: Tensor
    """``[batch]`` int64: slots that hold a token."""
    position: Tensor
    """``[batch]`` int64: tokens read, which is the position of the first new one."""
    prefix_keys: Tensor | None
    """``[batch, P, kv_heads, d]``: persistent tokens, normalised and not rotated; or ``None``."""
    prefix_values: Tensor | None
    """``[batch, P, kv_heads, d]``."""


class Form(NamedTuple):
    """What is computed, apart from tensors: as of :func:`cached_attention`."""

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
        cache: what was read before; it is left as it is.
        window: tokens in sight, a token's own included; ``None`` for all.
        base: of the rotary positions; ``None`` for none.
        step: a divisor of ``time``: every ``step``-th token asks.

    Returns:
        ``[batch, time / step, heads, d]``, and keys and values for the next call: ``window - 1`` slots, or without a
        window ``time`` more than there were.
    """
    run = _operation.choose(
        backend, device=projected.device.type, dtype=projected.dtype, same=cache.keys.dtype == projected.dtype,
        plain=plain(projected, gain, *cache),
    )  # fmt: skip
    return run(projected, gain, cache, Form(heads, window, base, step))


def prepare_attention(
    projected: Tensor, gain: Tensor | None, *, heads: int, window: int, base: float | None = None, step: int = 1
) -> Callable[[Cache], tuple[Tensor, Tensor, Tensor]] | None:
    """:func:`cached_attention` for many times as many tokens, or ``None`` where that gains nothing.

    ``projected`` is the tensor in which they lie each time; the function of a cache returns one tensor for its
    outputs, written anew each time, and new ones for keys and values.
    """
    if not (
        prepares(projected, gain)
        and _operation.choose("auto", device="cpu", dtype=projected.dtype, same=True, plain=True) is _native
    ):
        return None
    return _Prepared(projected, gain, Form(heads, window, base, step))


def _composed(
    projected: Tensor, gain: Tensor | None, cache: Cache, form: Form, backend: str = "auto"
) -> tuple[Tensor, Tensor, Tensor]:
    heads, window, base, step = form
    time, slots, kv_heads = projected.shape[1], *cache.keys.shape[1:3]
    plain, v = projected.split_with_sizes((heads + kv_heads, kv_heads), dim=2)
    if gain is not None:
        plain = rms_norm(plain, gain, EPS, backend=backend)
    rotated = plain
    if base is not None:
        position = cache.position[:, None] + torch.arange(time, device=projected.device)
        rotated = rotate(plain, position, base, backend=backend)
    prefix = None
    asking = slice(step - 1, None, step)
    if cache.prefix_keys is not None and cache.prefix_values is not None:
        prefix = Prefix(plain[:, asking, :heads], cache.prefix_keys, cache.prefix_values)
    k, v = torch.cat((cache.keys, rotated[:, :, heads:]), dim=1), torch.cat((cache.values, v), dim=1)
    held = cache.cached.tolist()
    most = max(held, default=0)
    start = None if min(held, default=0) == most else most - cache.cached
    seen = [x[:, slots - most :] for x in (k, v)]
    asked = rotated[:, asking, :heads]
    y = attention(asked, *seen, window=window, start=start, prefix=prefix, step=step, backend=backend)
    if window is None:
        return y, k, v
    # slots that were never filled come along where there were fewer of them
    spare = k.shape[1] - (window - 1)
    if spare < 0:
        k, v = (torch.cat((x.new_zeros(x.shape[0], -spare, *x.shape[2:]), x), dim=1) for x in (k, v))
    return y, k[:, max(spare, 0) :], v[:, max(spare, 0) :]


_reference = functools.partial(_composed, backend="reference")


def _native(projected: Tensor, gain: Tensor | None, cache: Cache, form: Form) -> tuple[Tensor, Tensor, Tensor]:
    return _Prepared(projected.contiguous(), None if gain is None else gain.contiguous(), form)(cache)


class _Prepared:
    """The kernel's call for ``projected`` where it lies, and one tensor for the outputs."""

    def __init__(self, projected: Tensor, gain: Tensor | None, form: Form) -> None:
        batch, time, lines, d = projected.shape
        heads, self.window, self.base, step = form
        self.time, self.d = time, d
        self.kv_heads = (lines - heads) // 2
        self.y = torch.empty((batch, time // step, heads, d), dtype=projected.dtype)
        self.call = _KERNEL.prepared(
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
        if after == slots and keys.is_contiguous():  # asking by shape takes twice as long as asking by example
            new_keys = torch.empty_like(keys)
        else:
            new_keys = torch.empty((batch, after, self.kv_heads, d), dtype=y.dtype)
        new_values = torch.empty_like(new_keys)
        threads = threads_worth(2 * keys.nbytes)
        self.call(
            threads, slots, after, persistent, self.window or 0, *places,
            keys.data_ptr(), values.data_ptr(), *keys.stride()[:2], *values.stride()[:2], cached.data_ptr(), *first,
            new_keys.data_ptr(), new_values.data_ptr(),
        )  # fmt: skip
        return y, new_keys, new_values


_KERNEL = Kernel("cached_attention", 31, 1)


def _outputs(projected: Tensor, gain: Tensor | None, cache: Cache, form: Form) -> tuple[Tensor, Tensor, Tensor]:
    heads, window, _, step = form
    batch, slots, kv_heads, d = cache.keys.shape
    kept = projected.new_empty(batch, slots + projected.shape[1] if window is None else window - 1, kv_heads, d)
    return projected[:, step - 1 :: step, :heads], kept, kept


def _refuse(*, same: bool = True, **facts: Any) -> str | None:
    return library.refuse(**facts) if same else "takes one dtype"


_operation = Operation(
    "cached_attention",
    [
        Backend("native", _native, _refuse, opaque=True),
        Backend("torch", _composed, opaque=True),
        Backend("reference", _reference, opaque=True),
    ],
    _outputs,
    [Cache, Form],
)
