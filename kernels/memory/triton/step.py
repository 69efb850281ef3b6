"""One token on the Triton kernel. No gradients. Waits for nothing: no number of the state is asked for on the host."""

from __future__ import annotations

from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from ...triton_runtime import launch
from ..network_torch import ACTIVATION_NUMBERS, EPS
from ..state import MemoryState, Options, Tokens
from .schedule import schedule
from .step_kernel import step_kernel


def triton_step(
    tokens: Tokens, state: MemoryState, norm: Tensor | None, mask: Tensor | None, options: Options
) -> tuple[Tensor, MemoryState]:
    """``titans_memory`` for ``time = 1`` and one or two layers, without gradients."""
    q, k, v, theta, eta, alpha = tokens
    chunk, activation, clip, read, *_ = options
    batch, _, heads, d_in = q.shape
    layers, (d_out, width) = len(state.weights), state.weights[-1].shape[2:]
    y = torch.empty(v.shape, dtype=q.dtype, device=q.device)
    old = [_dense(part) for part in (state.weights, state.momentum if eta is not None else (), state.anchor)]
    new = [[torch.empty_like(x) for x in part] for part in old[: 2 if chunk == 1 else 3]]
    q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
    if batch * heads:
        tiles = schedule(step_kernel.__name__, 1, d_in, width, d_out)
        launch(
            step_kernel, (batch * heads,),
            q, k, v, theta, eta, alpha, None if norm is None else norm.contiguous(), mask, state.position.contiguous(),
            *(x for part in old for x in _two(part)), y, *(x for part in new for x in _two(part)),
            *([None, None] if chunk == 1 else []), torch.empty(batch, heads, width, dtype=y.dtype, device=y.device),
            heads, d_in, width, d_out, chunk, clip or 0.0, EPS,
            *(n for x in (q, k, v, theta, eta, alpha) for n in _steps(x)), 0 if mask is None else mask.stride(0),
            LAYERS=layers, ACTIVATION=ACTIVATION_NUMBERS[activation], MOMENTUM=eta is not None,
            FORGETTING=alpha is not None,
            NORM=norm is not None, CLIP=clip is not None, MASKED=mask is not None, ANCHORED=chunk > 1,
            AFTER=read == "after", WIDE=tl.float64 if y.dtype == torch.float64 else tl.float32,
            **{name: tiles[name] for name in ("IN", "OUT", "BLOCK", "num_warps", "num_stages")},
        )  # fmt: skip
    weights, momentum, *anchor = map(tuple, new)
    return y, MemoryState(
        weights,
        state.momentum if eta is None else momentum,
        # a masked token leaves the anchor, which with chunks of one token nobody looks at again
        anchor[0] if anchor else _anchor(weights, state, mask),
        state.position + (1 if mask is None else mask[:, 0]),
    )


def _anchor(weights: tuple[Tensor, ...], state: MemoryState, mask: Tensor | None) -> tuple[Tensor, ...]:
    if mask is None:
        return weights
    real = mask.view(-1, 1, 1, 1)
    return tuple([torch.where(real, new, old) for new, old in zip(weights, state.anchor)])


def _dense(part: tuple[Tensor, ...]) -> list[Tensor]:
    return [x.contiguous() for x in part]


def _two(layers: list[Tensor]) -> tuple[Tensor | None, Tensor | None]:
    """The two layers' tensors; one layer stands in the second's place."""
    return (layers[0], layers[-1]) if layers else (None, None)


def _steps(x: Any) -> tuple[int, int]:
    """From batch row to batch row and from head to head, of ``[batch, 1, heads, ...]``."""
    return (0, 0) if x is None else (x.stride(0), x.stride(2))
