"""Attention on a GPU through PyTorch's own FlashAttention with windows: ``torch.nn.attention.varlen.varlen_attn``.

Its masks are those of parts.py, for sequences of any lengths side by side. Rows that begin at different keys are two
sequences each: the keys before the first one, with no queries, and the rest. The gradient of its log-sum-exp, which
merging parts takes, it does not give.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
from torch import Tensor

from ..autograd import refuse_second_derivative
from .parts import Part, merge, parts, refuse_flash_form
from .reference import Prefix
from .trial import Case, Trial


def flash_attention(
    q: Tensor, k: Tensor, v: Tensor, window: int | None, start: Tensor | None, prefix: Prefix | None, step: int
) -> Tensor:
    """``attention`` in float16 or bfloat16 on a GPU; gradients for one part alone."""
    found = [_attend(part) for part in parts(q, k, v, window, start, prefix, step)]
    y = found[0][0] if len(found) == 1 else merge(*found)
    return refuse_second_derivative(y, "attention: flash; name another, such as backend='reference'")


def _attend(part: Part) -> tuple[Tensor, Tensor]:
    """The output ``[batch, T, heads, d]`` and log-sum-exp ``[batch, T, heads]`` of a part."""
    from torch.nn.attention.varlen import AuxRequest, varlen_attn

    (rows, time, _, d), keys = part.q.shape, part.k.shape[1]
    window = (-1, -1) if not part.causal else (-1 if part.window is None else part.window - 1, 0)
    q, k, v = (x.flatten(0, 1) for x in (part.q, part.k, part.v))
    queries, sequences = _sequences(rows, time, keys, part.start, q.device)
    y, sums = varlen_attn(
        q, k, v, queries, sequences, time, keys,
        return_aux=AuxRequest(lse=True), scale=d**-0.5, window_size=window,
    )  # fmt: skip
    sums = sums.masked_fill(sums == float("inf"), float("-inf"))  # where there was nothing to sum
    return y.unflatten(0, (rows, time)), sums.t().unflatten(0, (rows, time))


def _sequences(rows: int, time: int, keys: int, start: Tensor | None, device: torch.device) -> tuple[Tensor, Tensor]:
    """Where the sequences of queries, and those of keys, begin and end: int32."""
    row = torch.arange(rows + 1, dtype=torch.int32, device=device)
    if start is None:
        return row * time, row * keys
    first = row[:-1] * keys + start.clamp(0, keys).to(torch.int32)
    found = []
    for begin, end in ((row[:-1] * time, row[1:] * time), (first, row[1:] * keys)):
        found.append(torch.cat((row[:1], torch.stack((begin, end), dim=1).flatten())))
    return found[0], found[1]


def refuse_flash(
    *,
    device: str,
    dtype: torch.dtype,
    width: int = 8,
    grad: bool = False,
    several: bool = False,
    masked: bool = True,
    few: bool = False,
    named: bool = False,
    **facts: Any,
) -> str | None:
    """Why it cannot run, or ``None``.

    ``several``: parts are merged. ``masked``: anything but causal attention of every token to the ones before it.
    ``few``: few queries.
    """
    if device != "cuda":
        return f"runs on a GPU, not on {device}"
    if refused := refuse_flash_form(dtype=dtype, width=width):
        return refused
    if grad and several:
        return "gives no gradient of the log-sum-exp, which merging several masks takes"
    if not named and (few or not masked):
        return "is for many queries under a mask: others take the rest"
    return _trial.refuse(dtype, width)


@functools.cache
def _missing() -> str | None:
    from torch.nn.attention.varlen import varlen_attn

    if "window_size" not in inspect.signature(varlen_attn).parameters:
        return f"needs a PyTorch whose varlen_attn takes windows, not {torch.__version__}"
    if not torch.backends.cuda.is_flash_attention_available():
        return f"PyTorch {torch.__version__} was built without FlashAttention"
    return None


_trial = Trial(
    flash_attention,
    (
        Case(None), Case(16), Case(16, start=True), Case(16, persistent=5, start=True, grad=False),
        Case(16, persistent=5, step=2, grad=False),
    ),
    _missing,
)  # fmt: skip
