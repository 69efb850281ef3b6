"""What the memory operation takes and returns: its state, its tokens, and its options."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from ..dispatch import known


class MemoryState(NamedTuple):
    """What a memory carries from token to token. Every tensor has the batch row first.

    With ``L`` layers, head ``h`` of row ``b`` has matrices ``weights[l][b, h]`` of shape ``[out_l, in_l]``.
    """

    weights: tuple[Tensor, ...]
    """Fast weights ``W_1..W_L`` after the last token, ``[batch, heads, out, in]``, float32 or float64."""
    momentum: tuple[Tensor, ...]
    """Momentum ``S_1..S_L``, same shapes; ``()`` in a memory that never has momentum."""
    anchor: tuple[Tensor, ...]
    """The weights at the start of the current chunk, where this chunk's gradients are taken."""
    position: Tensor
    """``[batch]`` int64: tokens read so far by each row."""

    @classmethod
    def fresh(cls, weights: tuple[Tensor, ...], momentum: tuple[Tensor, ...] | None = None) -> MemoryState:
        """The state before the first token: the given initial weights, momentum zero unless given, position zero.

        Args:
            weights: for each layer ``[batch, heads, out, in]``, float32 or float64, all of one dtype and device; a
                layer's ``out`` is the next one's ``in``.
            momentum: of the shapes of the weights; ``()`` in a memory that never has momentum.

        Raises:
            ValueError, TypeError: a tensor does not fit; the message names it.
        """
        weights = _tuple_of_tensors("weights", weights)
        if not weights:
            raise ValueError("weights: expected a tuple of [batch, heads, out, in], one for each layer, got none")
        first = weights[0]
        if first.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"weights[0]: expected float32 or float64, got {first.dtype}")
        rows, width = (first.shape[:2], first.shape[3]) if first.dim() == 4 else (("batch", "heads"), "any")
        for layer, weight in enumerate(weights):
            if weight.dim() != 4 or weight.shape[:2] != rows or weight.shape[3] != width:
                raise ValueError(
                    f"weights[{layer}]: expected [{rows[0]}, {rows[1]}, out, in={width}], got {list(weight.shape)}"
                )
            width = weight.shape[2]
        if momentum is None:
            momentum = tuple(weight.new_zeros(weight.shape) for weight in weights)
        momentum = _tuple_of_tensors("momentum", momentum)
        if momentum and len(momentum) != len(weights):
            raise ValueError(f"momentum: expected one tensor for each of {len(weights)} layers, got {len(momentum)}")
        for name, part in (("weights", weights), ("momentum", momentum)):
            for layer, (x, weight) in enumerate(zip(part, weights)):
                if x.shape != weight.shape:
                    raise ValueError(f"{name}[{layer}]: expected the shape {list(weight.shape)} of weights[{layer}], "
                                     f"got {list(x.shape)}")  # fmt: skip
                if x.dtype != first.dtype:
                    raise TypeError(f"{name}[{layer}]: expected {first.dtype} as weights[0], got {x.dtype}")
                if x.device != first.device:
                    raise ValueError(f"{name}[{layer}]: expected device {first.device} as weights[0], got {x.device}")
        position = torch.zeros(first.shape[0], dtype=torch.int64, device=first.device)
        return cls(weights, momentum, weights, known(position, [0] * len(position)))

    def rows(self, rows: Sequence[int]) -> MemoryState:
        """The state of the given rows."""
        weights, momentum, anchor = (tuple([x[rows] for x in part]) for part in self[:3])
        return MemoryState(weights, momentum, anchor, self.position[rows])

    def to(self, dtype: torch.dtype) -> MemoryState:
        """The same state with its weights, momentum and anchor in ``dtype``."""
        weights, momentum, anchor = (tuple(x.to(dtype) for x in part) for part in self[:3])
        return MemoryState(weights, momentum, anchor, self.position)


def where_rows(rows: Tensor, new: tuple[Tensor, ...], old: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """``new`` in the batch rows where ``rows`` (bool, one element for each) is true, ``old`` in the others."""
    rows = rows.view(-1, 1, 1, 1)
    return tuple([torch.where(rows, a, b) for a, b in zip(new, old)])


def _tuple_of_tensors(name: str, given: Iterable[Tensor]) -> tuple[Tensor, ...]:
    if isinstance(given, Tensor) or not isinstance(given, Iterable):
        raise TypeError(f"{name}: expected a tuple of tensors, one for each layer, got {type(given).__name__}")
    tensors = tuple(given)
    for layer, tensor in enumerate(tensors):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}[{layer}]: expected a tensor, got {type(tensor).__name__}")
    return tensors


class Tokens(NamedTuple):
    """The operation's inputs for each token; a gate that the memory does not have is ``None``."""

    q: Tensor
    """``[batch, time, heads, d_in]``."""
    k: Tensor
    """The same."""
    v: Tensor
    """``[batch, time, heads, d_out]``."""
    theta: Tensor
    """``[batch, time, heads]``, as the other gates."""
    eta: Tensor | None
    alpha: Tensor | None
    """The same, or for each input channel of the layers, one after the other, ``[batch, time, heads, channels]``."""
    delta: Tensor | None = None
    """Of each token in place of the objective's: ``[batch, time, heads]``."""
    gamma: Tensor | None = None
    """With a window of ``c`` tokens, the weight of each token in every window, ``[batch, c - 1 + time, heads]``. ``k``,
    ``v`` and ``delta`` then begin with the ``c - 1`` tokens before these, too; one that is not there has weight 0."""

    def map(self, function: Callable[[Tensor], Tensor]) -> Tokens:
        """``function`` of every tensor that is not ``None``."""
        q, k, v, theta, *optional = self
        return Tokens(
            function(q), function(k), function(v), function(theta), *[x if x is None else function(x) for x in optional]
        )

    def like_outputs(self) -> Tensor:
        """A tensor of the outputs' shape and dtype."""
        return self.v[:, self.v.shape[1] - self.q.shape[1] :]

    def at(self, span: slice) -> Tokens:
        """The tokens of a span of time, with those that are in their windows."""
        start, stop, _ = span.indices(time := self.theta.shape[1])
        return self.map(lambda x: x[:, start : stop + x.shape[1] - time])


class Objective(NamedTuple):
    """The loss of a token, from the prediction ``p = M(k)`` and the value ``v``; ``r = p - v``.

    =============  =====================================================================================================
    ``kind``       derivative with respect to ``p``
    =============  =====================================================================================================
    ``"l2"``       ``2 r``
    ``"l2_half"``  ``r``
    ``"dot"``      ``-v``
    ``"lp"``       ``p |r|^(p-1) sign(r)``, with ``tanh(smooth r)`` in place of ``sign(r)`` where ``smooth`` is given
    ``"huber"``    ``form="norm"``: ``2 r`` where the norm of ``r`` is at most ``delta``, else ``delta sign(r)``;
                   ``form="elementwise"``: ``r`` clamped to ``[-delta, delta]``
    =============  =====================================================================================================
    """

    kind: str = "l2"
    p: float = 2.0
    delta: float = 1.0
    smooth: float | None = None
    form: str = "norm"


SQUARED = Objective()

CHANNELS, FIRST = "decays for each channel", "decays before the gradient"
DELTA, WINDOW, GATED = "thresholds for each token", "windows of tokens", "gated networks"


class Options(NamedTuple):
    """What a memory computes from its tensors, and how."""

    chunk: int
    """Tokens per chunk."""
    activation: str
    """Between the network's layers: a name in ``network_torch.ACTIVATIONS``."""
    clip: float | None
    """Largest norm of one token's gradient; ``None`` for no bound."""
    read: str
    """``"after"`` the token was written, ``"before"``, or at the ``"anchor"``: the weights at its chunk's start."""
    keep: int | None = None
    """Chunks between the states that are kept for backward; ``None``: each backend's choice."""
    half: str | None = None
    """The dtype that operands of matrix products may be rounded to (``half_dtype`` of the queries)."""
    threshold: float | None = None
    """Below this surprise a token neither writes nor forgets; ``None``: every token does."""
    objective: Objective = SQUARED
    ends: Sequence[int] | None = None
    """The rows whose state is returned; ``None``: all. Other rows may leave out the last write."""
    decay_first: bool = False
    """Whether the weights decay before a token's gradient is taken, and not after; of chunks of one token."""
    window: int = 1
    """Tokens whose gradients are in a step."""
    gated: bool = False
    """Whether the network is ``W_2 (act(W_1 x) * (W_3 x))``, and not one layer after the other."""

    @property
    def confines(self) -> bool:
        """Whether the operation confines NaN and infinity to the tokens from which on they belong to a memory.

        Otherwise the caller does.
        """
        return self.window == 1 and not self.gated

    def rare(self, tokens: Tokens) -> tuple[str, ...]:
        """What these and ``tokens`` have that not every backend knows. Fast: it runs at every decoded token."""
        _, _, _, _, _, alpha, delta, _ = tokens
        channels = alpha is not None and alpha.dim() == 4
        if not (channels or self.decay_first or self.gated) and delta is None and self.window == 1:
            return ()
        has = ((CHANNELS, channels), (FIRST, self.decay_first), (DELTA, delta is not None), (WINDOW, self.window > 1),
               (GATED, self.gated))  # fmt: skip
        return tuple([name for name, it in has if it])


BackendFunction: TypeAlias = Callable[
    [Tokens, MemoryState, Tensor | None, Tensor | None, Options], tuple[Tensor, MemoryState]
]
"""``backend(tokens, state, norm, mask, options) -> y, state``, arguments as of ``titans_memory``, which has checked
them and cast all tensors to one dtype."""
