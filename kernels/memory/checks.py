"""The arguments of the memory operation: whether they are of the kinds, shapes, dtypes and devices it takes."""

from __future__ import annotations

import torch
from torch import Tensor

from .activation import ACTIVATIONS
from .state import MemoryState
from .tokens import Options, Tokens


def check_memory(
    tokens: Tokens, state: MemoryState, norm: Tensor | None, mask: Tensor | None, options: Options
) -> None:
    """Raise ``ValueError`` or ``TypeError`` naming what does not fit; shapes as of ``titans_memory``.

    Cheap when all is well, for decoding pays it at every token; messages are made only for what is wrong.
    """
    q, k, v, theta, eta, alpha = tokens
    chunk, activation, clip, read, keep, _, threshold = options
    if not isinstance(state, MemoryState):
        raise TypeError(f"state: expected a MemoryState (MemoryState.fresh(weights)), got {type(state).__name__}")
    for name, part in (("weights", state.weights), ("momentum", state.momentum), ("anchor", state.anchor)):
        if not isinstance(part, tuple):
            raise TypeError(f"state.{name}: expected a tuple of tensors, got {type(part).__name__}")
    tensors = [("q", q), ("k", k), ("v", v), ("theta", theta)]
    tensors += [(n, x) for n, x in (("eta", eta), ("alpha", alpha), ("norm", norm)) if x is not None]
    stacks = [("weights", state.weights), ("momentum", state.momentum), ("anchor", state.anchor)]
    tensors += [(f"state.{n}[{l}]", w) for n, part in stacks for l, w in enumerate(part)]
    for name, x in tensors:
        if not isinstance(x, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")
        if not x.is_floating_point():
            raise TypeError(f"{name}: expected a floating-point tensor, got {x.dtype}")
        if x.device != q.device:
            raise ValueError(f"{name}: expected device {q.device} as q, got {x.device}")
    if q.dim() != 4:
        raise ValueError(f"q: expected [batch, time, heads, d_in], got {list(q.shape)}")
    batch, time, heads, d_in = q.shape
    if v.dim() != 4:
        raise ValueError(f"v: expected [batch, time, heads, d_out], got {list(v.shape)}")
    d_out = v.shape[3]
    per_token = (batch, time, heads)
    for name, given, shape in (
        ("k", k, q.shape),
        ("v", v, (*per_token, d_out)),
        ("theta", theta, per_token),
        ("eta", eta, per_token),
        ("alpha", alpha, per_token),
    ):
        if given is not None and given.shape != shape:
            raise ValueError(f"{name}: expected {list(shape)} to go with q {list(q.shape)}, got {list(given.shape)}")
    if not state.weights:
        raise ValueError("state.weights: expected at least one layer, got none")
    width = d_in
    for l, w in enumerate(state.weights):
        shape = w.shape
        if len(shape) != 4 or shape[0] != batch or shape[1] != heads or shape[3] != width:
            raise ValueError(
                f"state.weights[{l}]: expected [batch={batch}, heads={heads}, out, in={width}] to go with q, "
                f"got {list(w.shape)}"
            )
        width = shape[2]
    if width != d_out:
        raise ValueError(f"state.weights[{len(state.weights) - 1}]: expected out={d_out} to go with v, got {width}")
    shapes, dtype = [w.shape for w in state.weights], state.weights[0].dtype
    if dtype not in (torch.float32, torch.float64):
        raise TypeError(f"state.weights[0]: expected float32 or float64, got {dtype}")
    for name, part in stacks:
        if name == "momentum" and eta is None and not part:
            continue
        if [x.shape for x in part] != shapes:
            raise ValueError(
                f"state.{name}: expected the shapes of state.weights {[list(w.shape) for w in state.weights]}, "
                f"got {[list(x.shape) for x in part]}"
            )
        for l, x in enumerate(part):
            if x.dtype != dtype:
                raise TypeError(f"state.{name}[{l}]: expected {dtype} as state.weights[0], got {x.dtype}")
    position = state.position
    if not isinstance(position, Tensor) or position.shape != (batch,) or position.dtype != torch.int64:
        got = f"{position.dtype} {list(position.shape)}" if isinstance(position, Tensor) else repr(position)
        raise ValueError(f"state.position: expected int64 [{batch}], got {got}")
    if position.device != q.device:
        raise ValueError(f"state.position: expected device {q.device} as q, got {position.device}")
    if isinstance(chunk, bool) or not isinstance(chunk, int) or chunk < 1:
        raise ValueError(f"chunk: expected a whole number of tokens >= 1, got {chunk!r}")
    if not isinstance(activation, str) or activation not in ACTIVATIONS:
        raise ValueError(f"activation: expected one of {', '.join(sorted(ACTIVATIONS))}, got {activation!r}")
    if norm is not None:
        if d_in != d_out:
            raise ValueError(f"norm: a residual memory needs d_in = d_out, got {d_in} and {d_out}")
        if norm.shape != (heads, d_out):
            raise ValueError(f"norm: expected a gain [heads={heads}, d_out={d_out}], got {list(norm.shape)}")
    if mask is not None:
        if not isinstance(mask, Tensor) or mask.shape != (batch, time) or mask.dtype != torch.bool:
            got = f"{mask.dtype} {list(mask.shape)}" if isinstance(mask, Tensor) else repr(mask)
            raise ValueError(f"mask: expected bool [{batch}, {time}], got {got}")
        if mask.device != q.device:
            raise ValueError(f"mask: expected device {q.device} as q, got {mask.device}")
    if clip is not None and not (isinstance(clip, (int, float)) and clip > 0):
        raise ValueError(f"clip: expected a norm > 0 or None, got {clip!r}")
    if threshold is not None and not (isinstance(threshold, (int, float)) and threshold > 0):
        raise ValueError(f"threshold: expected a norm > 0 or None, got {threshold!r}")
    if read not in ("after", "before"):
        raise ValueError(f"read: expected 'after' or 'before', got {read!r}")
    if keep is not None and (isinstance(keep, bool) or not isinstance(keep, int) or keep < 1):
        raise ValueError(f"keep: expected a whole number of chunks >= 1, got {keep!r}")
