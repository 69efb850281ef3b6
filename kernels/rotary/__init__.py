"""Rotary positions that are exact at any position.

An angle computed in floating point from an absolute position loses bits as the position grows. Here a position becomes
a phase in 64-bit fixed point, in turns: ``phase = position * frequency`` wraps around by itself, so that the phase
between two tokens is the same integer at any position.
"""

from __future__ import annotations

import functools
import math
import operator
from contextlib import nullcontext
from typing import Any, TypeAlias

import torch
from torch import Tensor

from .. import triton_runtime
from ..dispatch import Backend, Operation, transforming
from ..norm_gate import rms_norm

EPS = 1e-6
"""In the norm."""
_TURN = 2**64

_Key: TypeAlias = "tuple[int, float, torch.device]"
"""Width of a head, base, and device."""


def rotate(x: Tensor, position: Tensor | range, base: float = 10000.0, *, backend: str = "auto") -> Tensor:
    """Rotate the pair ``(x_i, x_{i + d/2})`` by ``position * base^(-2 i / d)`` radians, for each ``i < d/2``.

    ``x``: ``[batch, time, heads, d]`` with even ``d``. ``position``: int64 ``[batch, time]`` (or ``[1, time]``), or the
    range of positions that all rows have, for which tables are kept on any device.
    ``base``: a number above 1. Returns ``x``'s shape and dtype. Raises ``ValueError`` or ``TypeError`` otherwise.
    """
    if x.dim() != 4 or x.shape[-1] % 2:
        raise ValueError(f"rotate: x {list(x.shape)}: expected [batch, time, heads, d] with an even d")
    if not isinstance(position, range) and position.dtype != torch.int64:
        raise TypeError(f"rotate: position is {position.dtype}: expected torch.int64")
    shape = [1, len(position)] if isinstance(position, range) else list(position.shape)
    if len(shape) != 2 or shape[0] not in (1, x.shape[0]) or shape[1] != x.shape[1]:
        raise ValueError(f"rotate: position {shape}: expected [{x.shape[0]} or 1, {x.shape[1]}]")
    if not base > 1:
        raise ValueError(f"rotate: base {base}: expected a number above 1")
    y: Tensor = _operation.choose(backend, device=x.device.type, dtype=x.dtype)(x, position, float(base))
    return y


def normed_rotation(
    x: Tensor,
    gain: Tensor | None,
    position: Tensor | range,
    base: float | None,
    *,
    first: int = 0,
    plain: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """``rotate(rms_norm(x, gain), position, base)``, one kernel on a GPU; and if ``plain``, what was rotated.

    Args:
        x: ``[batch, time, heads, d]``.
        gain: ``[at least first + heads, d]``, of which the heads of ``x`` have the rows from ``first`` on; ``None``:
            nothing is normalized.
        position: as of :func:`rotate`.
        base: as of :func:`rotate`; ``None``: nothing is rotated.
    """
    facts = dict(device=x.device.type, dtype=x.dtype, both=gain is not None and base is not None)
    run = _normed.choose(backend, **facts)
    result: tuple[Tensor, Tensor | None] = run(x, gain, position, base, first, plain)
    return result


def _separately(
    x: Tensor,
    gain: Tensor | None,
    position: Tensor | range,
    base: float | None,
    first: int,
    plain: bool,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    if gain is not None:
        x = rms_norm(x, gain[first : first + x.shape[2]], EPS, backend=backend)
    y = x if base is None else rotate(x, position, base, backend="auto" if backend == "auto" else "reference")
    return y, x if plain else None


def _normed_triton(
    x: Tensor, gain: Tensor, position: Tensor | range, base: float, first: int, plain: bool
) -> tuple[Tensor, Tensor | None]:
    from .triton import normed_rotation

    key, wide = (x.shape[-1], float(base), x.device), torch.promote_types(x.dtype, torch.float32)
    kept = isinstance(position, range) and 0 < len(position) <= SEGMENT_POSITIONS and not torch.compiler.is_compiling()
    few = kept and len(position) <= DECODE_POSITIONS
    cos, sin = (_tables_of_few if few else _tables_of_segment if kept else _tables)(key, wide, position)
    return normed_rotation(x, gain, cos, sin, first, plain, EPS)


def _refuse_normed(*, both: bool = True, **facts: Any) -> str | None:
    return triton_runtime.refuse(**facts) if both else "normalizes and rotates, not one of these alone"


def _reference(x: Tensor, position: Tensor | range, base: float) -> Tensor:
    """One pair at a time, as a complex product, with phases in Python's integers."""
    half, places = x.shape[-1] // 2, [list(position)] if isinstance(position, range) else position.tolist()
    y = []
    for i, frequency in enumerate(_frequencies(x.shape[-1], base)):
        turns = [[(place * frequency % _TURN) / _TURN for place in row] for row in places]
        angle = 2 * math.pi * torch.tensor(turns, dtype=torch.float64, device=x.device).view(len(places), x.shape[1], 1)
        cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        real, imaginary = x[..., i], x[..., i + half]
        y.append(torch.stack((real * cos - imaginary * sin, real * sin + imaginary * cos)))
    return torch.stack(y, dim=-1).movedim(0, -2).flatten(-2)


def _torch(x: Tensor, position: Tensor | range, base: float) -> Tensor:
    key = (x.shape[-1], base, x.device)
    count = len(position) if isinstance(position, range) else position.numel()
    few = 0 < count <= SEGMENT_POSITIONS and (isinstance(position, range) or x.is_cpu)
    cacheable = few and not torch.compiler.is_compiling()
    if not cacheable or transforming():  # what is made inside of a transform is of no use after it
        cos, sin = _tables(key, x.dtype, position)
    else:
        cached = _tables_of_few if count <= DECODE_POSITIONS else _tables_of_segment
        places = position if isinstance(position, range) else tuple(map(tuple, position.tolist()))
        cos, sin = cached(key, x.dtype, places)
    return (x * cos).addcmul_(x.roll(x.shape[-1] // 2, dims=-1), sin)


def tables(first: Tensor, time: int, d: int, base: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """``[cos cos]`` and ``[-sin sin]`` of ``time`` tokens at positions from ``first`` int64 ``[batch]`` on, on a CPU.

    ``[batch, time, 1, d]``: the rotated ``x`` is ``x * cos + x.roll(d / 2) * sin``. For the few tokens of decoding.
    """
    key = (d, float(base), first.device)
    return _tables_of_few(key, dtype, tuple([tuple(range(start, start + time)) for start in first.tolist()]))


DECODE_POSITIONS, SEGMENT_POSITIONS = 16, 2048
"""Tables of up to so many positions are cached by value: every layer needs those of the same few tokens in decoding,
and every segment of every layer the same ones where attention begins anew at each segment."""


@functools.lru_cache(maxsize=512)
def _tables_of_few(
    key: _Key, dtype: torch.dtype, position: range | tuple[tuple[int, ...], ...]
) -> tuple[Tensor, Tensor]:
    with torch.inference_mode(False):
        given = position if isinstance(position, range) else torch.tensor(position, dtype=torch.int64)
        return _tables(key, dtype, given)


_tables_of_segment = functools.lru_cache(maxsize=8)(_tables_of_few.__wrapped__)


def _tables(key: _Key, dtype: torch.dtype, position: Tensor | range) -> tuple[Tensor, Tensor]:
    """As :func:`tables`, for one position of each token."""
    d, base, device = key
    if isinstance(position, range):
        position = torch.arange(position.start, position.stop, position.step, device=device).unsqueeze(0)
    frequency, ahead = _fixed_point(d, base, device)
    phase = torch.addcmul(ahead, position[..., None], frequency)
    # the phase is exact and less than a turn: rounding it here costs an ulp at any position
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    table = torch.sin(phase.to(wide) * (2 * math.pi / _TURN)).to(dtype).unsqueeze(2)
    return table[..., :d], table[..., d:]


def _frequencies(d: int, base: float) -> list[int]:
    """Turns per token in units of 2^-64; the fastest is 1 / (2 pi) turns, well inside a signed int64."""
    return [round(base ** (-2 * i / d) / (2 * math.pi) * _TURN) for i in range(d // 2)]


_FIXED_POINT: dict[_Key, tuple[Tensor, Tensor]] = {}


def _fixed_point(d: int, base: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """Frequencies, and phases to add so that one sine gives ``[cos cos | -sin sin]``: int64 ``[2 d]`` each.

    A quarter of a turn ahead the sine is the cosine, half a turn ahead its negative.
    """
    compiling = torch.compiler.is_compiling()  # a graph makes its own table, and has no guard on what is cached
    found = None if compiling else _FIXED_POINT.get((d, base, device))
    if found is None:
        # a constant takes no symbolic number: index and hex make a tracer specialize on values
        frequencies, half = _frequencies(operator.index(d), float.fromhex(base.hex())), operator.index(d) // 2
        ahead = [_TURN // 4] * (2 * half) + [-_TURN // 2] * half + [0] * half
        with nullcontext() if compiling else torch.inference_mode(False):
            table = torch.tensor([frequencies * 4, ahead], dtype=torch.int64, device=device)
            found = table[0], table[1]
        if type(table) is Tensor and not (compiling or transforming()):  # no fake tensor of torch.export
            _FIXED_POINT[d, base, device] = found
    return found


_normed = Operation(
    "normed_rotation",
    [
        Backend("triton", _normed_triton, _refuse_normed),
        Backend("torch", _separately),
        Backend("reference", functools.partial(_separately, backend="reference")),
    ],
)
_operation = Operation(
    "rotary",
    [
        Backend("torch", _torch),
        Backend("reference", _reference, opaque=True),
    ],
    lambda x, position, base: x,
)
