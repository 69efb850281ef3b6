"""Rotary positions that stay exact however far a sequence has run.

An angle formed in floating point from an absolute position loses bits as the position grows. Here a position
becomes a phase in 64-bit fixed point, in turns: ``phase = position * frequency`` wraps around by itself, so the
phase between two tokens is the same integer wherever in the sequence they stand.
"""

from __future__ import annotations

import functools
import math
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ..cpu_runtime import library
from ..cpu_runtime.call import Kernel, plain, tracks
from ..cpu_runtime.huge_pages import fresh
from ..dispatch import Backend, Operation

_TURN = 2**64

_Key: TypeAlias = "tuple[int, float, torch.device]"
"""Width of a head, base, and device."""


def rotate(x: Tensor, position: Tensor, base: float = 10000.0, *, backend: str = "auto") -> Tensor:
    """Rotate the pair ``(x_i, x_{i + d/2})`` by ``position * base^(-2 i / d)`` radians, for each ``i < d/2``.

    ``x``: ``[batch, time, heads, d]`` with even ``d``. ``position``: int64 ``[batch, time]`` (or ``[1, time]``).
    ``base``: a number above 1. Returns ``x``'s shape and dtype. Raises ``ValueError`` or ``TypeError`` otherwise.
    """
    if x.dim() != 4 or x.shape[-1] % 2:
        raise ValueError(f"rotate: x {list(x.shape)}: expected [batch, time, heads, d] with an even d")
    if position.dtype != torch.int64:
        raise TypeError(f"rotate: position is {position.dtype}: expected torch.int64")
    if position.dim() != 2 or position.shape[0] not in (1, x.shape[0]) or position.shape[1] != x.shape[1]:
        raise ValueError(f"rotate: position {list(position.shape)}: expected [{x.shape[0]} or 1, {x.shape[1]}]")
    if not base > 1:
        raise ValueError(f"rotate: base {base}: expected a number above 1")
    run = _operation.choose(backend, device=x.device.type, dtype=x.dtype, plain=plain(x, position))
    return run(x, position, float(base))


def _reference(x: Tensor, position: Tensor, base: float) -> Tensor:
    """One pair at a time, as a complex product; Python's integers do the wrapping."""
    half = x.shape[-1] // 2
    y = []
    for i, frequency in enumerate(_frequencies(x.shape[-1], base)):
        turns = [[(place * frequency % _TURN) / _TURN for place in row] for row in position.tolist()]
        angle = 2 * math.pi * torch.tensor(turns, dtype=torch.float64, device=x.device)[..., None]
        cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        real, imaginary = x[..., i], x[..., i + half]
        y.append(torch.stack((real * cos - imaginary * sin, real * sin + imaginary * cos)))
    return torch.stack(y, dim=-1).movedim(0, -2).flatten(-2)


def _torch(x: Tensor, position: Tensor, base: float) -> Tensor:
    cos, sin = _tables_of(x, position, base)
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), sin)


def _native(x: Tensor, position: Tensor, base: float) -> Tensor:
    cos, sin = _tables_of(x, position, base)
    if not tracks(x):
        return _turned(x, cos, sin, False)
    y: Tensor = _Rotated.apply(x, cos, sin)
    return y


class _Rotated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, back: bool = False) -> Tensor:
        ctx.tables, ctx.back = (cos, sin), back
        return _turned(x, cos, sin, back)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        turn = _Rotated.apply if torch.is_grad_enabled() else _turned
        cos, sin = ctx.tables
        return turn(grad, cos, sin, not ctx.back), None, None, None


def _turned(x: Tensor, cos: Tensor, sin: Tensor, back: bool) -> Tensor:
    batch, time, heads, d = x.shape
    x = x if x.stride(3) == 1 else x.contiguous()
    y = fresh(x.shape, x.dtype)
    _KERNEL(
        x.dtype, torch.get_num_threads(), batch, time, heads, d, back, x.data_ptr(), *x.stride()[:3],
        cos.data_ptr(), sin.data_ptr(), cos.stride(0) if cos.shape[0] > 1 else 0, cos.stride(1), y.data_ptr(),
    )  # fmt: skip
    return y


def _tables_of(x: Tensor, position: Tensor, base: float) -> tuple[Tensor, Tensor]:
    """As :func:`tables`, for one position of each token."""
    key = (x.shape[-1], base, x.device)
    if x.is_cpu and position.numel() <= _SOME and not torch.compiler.is_compiling():
        known = _recent if position.numel() <= _FEW else _lately
        return known(key, x.dtype, tuple([tuple(row) for row in position.tolist()]))
    return _tables(key, x.dtype, position)


def tables(first: Tensor, time: int, d: int, base: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """``[cos cos]`` and ``[-sin sin]`` of ``time`` tokens from the positions ``first`` int64 ``[batch]`` on, on a CPU.

    ``[batch, time, 1, d]``: ``x`` turned is ``x * cos + x.roll(d / 2) * sin``. For the few tokens of decoding.
    """
    key = (d, float(base), first.device)
    return _recent(key, dtype, tuple([tuple(range(start, start + time)) for start in first.tolist()]))


_FEW, _SOME = 16, 2048
"""Positions up to so many are looked up by value: in decoding every layer asks for the same few, and where attention
begins anew at every segment, every segment of every layer for the same ones."""


@functools.lru_cache(maxsize=512)
def _recent(key: _Key, dtype: torch.dtype, position: tuple[tuple[int, ...], ...]) -> tuple[Tensor, Tensor]:
    with torch.inference_mode(False):
        return _tables(key, dtype, torch.tensor(position, dtype=torch.int64))


_lately = functools.lru_cache(maxsize=8)(_recent.__wrapped__)


def _tables(key: _Key, dtype: torch.dtype, position: Tensor) -> tuple[Tensor, Tensor]:
    """``[cos cos]`` and ``[-sin sin]``, ``[batch, time, 1, d]``."""
    if key not in _TABLES:
        _TABLES[key] = _table(*key)
    frequency, ahead = _TABLES[key]
    phase = torch.addcmul(ahead, position[..., None], frequency)
    # the phase is exact and less than a turn, so that rounding it only now costs an ulp at any position
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    table = torch.sin(phase.to(wide) * (2 * math.pi / _TURN)).to(dtype).unsqueeze(2)
    return table[..., : key[0]], table[..., key[0] :]


def _frequencies(d: int, base: float) -> list[int]:
    """Turns per token in units of 2^-64; the fastest is 1 / (2 pi) turns, well inside a signed int64."""
    return [round(base ** (-2 * i / d) / (2 * math.pi) * _TURN) for i in range(d // 2)]


_TABLES: dict[_Key, tuple[Tensor, Tensor]] = {}


def _table(d: int, base: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """Frequencies ``[2 d]`` and the phases added to them, so that one sine gives ``[cos cos | -sin sin]``.

    A sine a quarter of a turn ahead is the cosine, half a turn ahead its own negative.
    """
    half = d // 2
    with torch.inference_mode(False):
        frequency = torch.tensor(_frequencies(d, base) * 4, dtype=torch.int64, device=device)
        ahead = torch.tensor([_TURN // 4] * d + [-_TURN // 2] * half + [0] * half, dtype=torch.int64, device=device)
    return frequency, ahead


_KERNEL = Kernel("rotate", 15, 0)

_operation = Operation(
    "rotary",
    [
        Backend("native", _native, library.refuse, opaque=True),
        Backend("torch", _torch),
        Backend("reference", _reference, opaque=True),
    ],
    lambda x, position, base: x,
)
