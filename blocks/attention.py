"""``attention``: causal self-attention, full or over a sliding window, with persistent tokens always in sight."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Annotated, Any, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from ..kernels.attention import Prefix, attention
from ..kernels.attention.decode import Cache, cached_attention, prepare_attention
from ..kernels.linear import prepare_projection, project
from ..kernels.norm_gate import rms_norm
from ..kernels.padding import align, last
from ..kernels.rotary import rotate
from ..registry import register
from .block import Block, Decoder, check_input, check_kept, check_state
from .linear import Linear, plain


class AttentionState(NamedTuple):
    """The keys and values that later tokens may still see.

    There are ``window - 1`` slots where the window is bounded, and otherwise as many as the row that has read
    the most tokens needs. The newest token is in the last slot; slots that hold none are zero.
    """

    keys: Tensor
    """``[batch, slots, kv_heads, d]``, normalised and rotated, in the model's dtype."""
    values: Tensor
    """``[batch, slots, kv_heads, d]``."""
    cached: Tensor
    """``[batch]`` int64: slots that hold a token."""
    position: Tensor
    """``[batch]`` int64: tokens read. Only the rotation depends on it."""
    prefix_keys: Tensor | None
    """``[batch, P, kv_heads, d]``, normalised and not rotated; ``None`` where there are no persistent tokens."""
    prefix_values: Tensor | None
    """``[batch, P, kv_heads, d]``."""


@register("attention")
class Attention(Block):
    """Causal softmax attention with rotary positions, grouped key-value heads and an optional window.

    Persistent tokens (:meth:`prefix`) have no position and never leave the window. The state is bounded when
    ``window`` is set or an enclosing block has called :meth:`bound`; without either it grows.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: Annotated[int, Field(ge=1, description="query heads, each of width dim / heads")] = 4,
        kv_heads: Annotated[
            int | None, Field(ge=1, description="key and value heads, shared by groups of query heads; null for heads")
        ] = None,
        window: Annotated[
            int | None, Field(ge=1, le=2**24, description="tokens in sight, a token's own included; null for all")
        ] = None,
        rope: Annotated[float | None, Field(gt=1, description="base of the rotary positions; null for none")] = 10000.0,
        qk_norm: Annotated[bool, Field(description="RMS-normalise queries and keys, with a gain per head")] = True,
    ) -> None:
        super().__init__(dim)
        fields = {"heads": heads, "kv_heads": kv_heads, "rope": rope}
        for field, message in self.problems(dim, fields):
            raise ValueError(f"{field}: {message}")
        self.heads = heads
        self.kv_heads = heads if kv_heads is None else kv_heads
        self.window = window
        self.rope = rope
        self.head_dim = dim // heads
        self.grows = window is None
        self.qkv = Linear(dim, (heads + 2 * self.kv_heads) * self.head_dim, bias=False)
        self.out = Linear(dim, dim, bias=False)
        self.gain = nn.Parameter(torch.empty(heads + self.kv_heads, self.head_dim)) if qk_norm else None

    @classmethod
    def problems(cls, dim: int | None, fields: dict[str, Any]) -> Iterator[tuple[str, str]]:
        heads, kv_heads = fields["heads"], fields["kv_heads"]
        if kv_heads is not None and heads % kv_heads:
            yield "kv_heads", f"expected a divisor of heads = {heads}, got {kv_heads}"
        if dim is None:
            return
        if dim % heads:
            yield "heads", f"expected a divisor of the width {dim}, got {heads}"
        elif fields["rope"] is not None and dim // heads % 2:
            yield "rope", f"expected null, or heads of even width: {dim} / {heads} = {dim // heads}"

    def bound(self, tokens: int) -> None:
        if tokens < 1:
            raise ValueError(f"bound: tokens is {tokens}: expected at least 1")
        self.window = tokens if self.window is None else min(self.window, tokens)
        self.grows = False

    def init_state(self, batch_size: int) -> AttentionState:
        weight = self.qkv.weight
        slots = 0 if self.window is None else self.window - 1
        empty = weight.new_zeros(batch_size, slots, self.kv_heads, self.head_dim)
        none = torch.zeros(batch_size, dtype=torch.int64, device=weight.device)
        return AttentionState(empty, empty, none, none, None, None)

    def prefix(self, tokens: Tensor) -> tuple[Tensor, AttentionState]:
        """A fresh state with persistent ``tokens`` [batch, count, dim] in sight of every token to come.

        The outputs at them attend causally among themselves, without positions. They count for nothing in
        ``position`` and ``cached``.
        """
        check_input(self, tokens, None, name="tokens", like=self.qkv.weight)
        if tokens.is_meta:
            kept = tokens.new_empty(*tokens.shape[:2], self.kv_heads, self.head_dim)
            return tokens, self.init_state(tokens.shape[0])._replace(prefix_keys=kept, prefix_values=kept)
        q, k, v = self._project(tokens, 1)
        y = attention(q, k, v)
        state = self.init_state(tokens.shape[0])
        return self.out(y.flatten(2)), state._replace(prefix_keys=k, prefix_values=v)

    def forward(
        self, x: Tensor, state: AttentionState | None = None, *, mask: Tensor | None = None
    ) -> tuple[Tensor, AttentionState]:
        return self.every(x, state, step=1, mask=mask)

    def every(
        self, x: Tensor, state: AttentionState | None = None, *, step: int, mask: Tensor | None = None
    ) -> tuple[Tensor, AttentionState]:
        """Nothing is asked, projected or put out where no output is wanted."""
        check_input(self, x, mask, like=self.qkv.weight)
        if state is not None:
            self._check_state(state, x.shape[0])
        if mask is None:
            few = state is not None and x.is_cpu and 0 < x.shape[1] <= _FEW
            if few and not torch.is_grad_enabled() and not torch.compiler.is_compiling():
                assert state is not None
                return self._step(x, state, step)
            return self._run(x, state, None, step)
        layout = align(mask)
        y, state = self._run(layout.spread(x), state, layout.length, step)
        return (layout if step == 1 else align(mask[:, ::step])).collect(y), state

    def _check_state(self, state: AttentionState, rows: int) -> None:
        check_state(self, state, AttentionState, rows)
        slots, dtype = state.keys.shape[1], self.qkv.weight.dtype
        for name, tensor in (("keys", state.keys), ("values", state.values)):
            check_kept(self, name, tensor, (rows, slots, self.kv_heads, self.head_dim), dtype)
        prefixes = ("prefix_keys", state.prefix_keys), ("prefix_values", state.prefix_values)
        for name, kept in prefixes if state.prefix_keys is not None else ():
            check_kept(self, name, kept, (rows, None, self.kv_heads, self.head_dim), dtype)
        if state.cached.shape[0] != rows:
            check_kept(self, "cached", state.cached, (rows,), torch.int64)
        # made before the window was bound, or under another: as good, if it holds what is in sight
        if self.window is not None and slots < self.window - 1 and not torch.compiler.is_compiling():
            lacking = state.cached < state.position.clamp(max=self.window - 1)
            if not lacking.is_meta and bool(lacking.any()):
                raise ValueError(
                    f"{type(self).__name__}: the state is of another block: it holds the last {slots} tokens, "
                    f"expected {self.window - 1}"
                )

    def _run(
        self, x: Tensor, state: AttentionState | None, length: Tensor | None, step: int
    ) -> tuple[Tensor, AttentionState]:
        """``x``: real tokens first in each row; ``length``: ``[batch]``, how many, or ``None`` for all."""
        rows, time, _ = x.shape
        fresh = state is None
        if state is None:
            state = self.init_state(rows)
        if time == 0:  # nothing but padding
            return x, state
        q, k, v = self._project(x, step)
        prefix = None
        if state.prefix_keys is not None and state.prefix_values is not None:
            prefix = Prefix(q, state.prefix_keys, state.prefix_values)
        if self.rope is not None:
            # rows that stand at one place share their rotation, and what is kept of it
            alike = fresh or (x.is_cpu and not torch.compiler.is_compiling() and _alike(state.position.tolist()))
            position = state.position[:1, None] if alike else state.position[:, None]
            if time > 1:
                kept = time <= 8 and not torch.compiler.is_compiling()
                position = position + (_ahead(time, x.device) if kept else torch.arange(time, device=x.device))
            q, k = rotate(q, position[:, step - 1 :: step], self.rope), rotate(k, position, self.rope)

        slots = state.keys.shape[1]
        known, start = (0, None) if fresh else _known(state, time)
        if known or length is not None or self.window is None or time < slots:
            k, v = torch.cat((state.keys, k), dim=1), torch.cat((state.values, v), dim=1)
        unknown = k.shape[1] - known - time
        seen_k, seen_v = (k[:, unknown:], v[:, unknown:]) if unknown else (k, v)
        y = attention(q, seen_k, seen_v, window=self.window, start=start, prefix=prefix, step=step)
        return self.out(y.flatten(2)), self._advance(state, k, v, length, time)

    def _step(self, x: Tensor, state: AttentionState, step: int) -> tuple[Tensor, AttentionState]:
        """``_run`` in fewer operations, for a few tokens without gradients."""
        time = x.shape[1]
        heads = self.qkv(x).to(self.qkv.weight.dtype).unflatten(-1, (-1, self.head_dim))
        y, keys, values = cached_attention(
            heads, self.gain, Cache(*state), heads=self.heads, window=self.window, base=self.rope, step=step
        )
        cached = state.cached + time
        if self.window is not None:
            cached = cached.clamp_(max=self.window - 1)
        after = state._replace(keys=keys, values=values, cached=cached, position=state.position + time)
        return self.out(y.flatten(2)), after

    def decoder(self, rows: int, *, time: int = 1, step: int = 1) -> Decoder | None:
        window, weight, out = self.window, self.qkv.weight, self.out.weight
        if window is None or time > _FEW or time % step or not plain(self.qkv, self.out) or not weight.is_cpu:
            return None
        heads = weight.new_empty(rows, time, len(weight) // self.head_dim, self.head_dim)
        load = prepare_projection(weight, heads.flatten(2))
        finish = prepare_projection(out, out.new_empty(rows, time // step, self.dim))
        attend = prepare_attention(heads, self.gain, heads=self.heads, window=window, base=self.rope, step=step)
        if load is None or attend is None or finish is None:
            return None

        def decode(x: Tensor, state: AttentionState) -> tuple[Tensor, AttentionState]:
            load(x)
            y, keys, values = attend(Cache(*state))
            cached = (state.cached + time).clamp_(max=window - 1)
            after = AttentionState(keys, values, cached, state.position + time, state.prefix_keys, state.prefix_values)
            return finish(y), after

        return decode

    def _project(self, x: Tensor, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """Queries at every ``step``-th token, keys and values ``[batch, .., heads or kv_heads, d]``, not rotated."""
        kinds, dtype = (self.heads, self.kv_heads, self.kv_heads), self.qkv.weight.dtype
        # under autocast the products are narrow; what is kept in the state is not
        if step == 1:
            q, k, v = self.qkv(x).to(dtype).unflatten(-1, (-1, self.head_dim)).split_with_sizes(kinds, dim=2)
        else:
            asking, seen = self.qkv.weight.split_with_sizes(
                (self.heads * self.head_dim, 2 * self.kv_heads * self.head_dim)
            )
            q = project(x[:, step - 1 :: step], asking).to(dtype).unflatten(-1, (-1, self.head_dim))
            k, v = project(x, seen).to(dtype).unflatten(-1, (2, self.kv_heads, -1)).unbind(2)
        if self.gain is not None:
            q, k = rms_norm(q, self.gain[: self.heads]), rms_norm(k, self.gain[self.heads :])
        return q, k, v

    def _advance(self, state: AttentionState, k: Tensor, v: Tensor, length: Tensor | None, time: int) -> AttentionState:
        """The state after ``k`` and ``v``, the last ``time`` of which are new; ``length`` as in :meth:`_run`."""
        read = time if length is None else length
        cached = state.cached + read
        if self.window is None:
            # a compiler does not know how many are in use: the state then has room for all
            slots = k.shape[1] if length is None or torch.compiler.is_compiling() else int(cached.max())
        else:
            slots = self.window - 1
            cached = cached.clamp(max=slots)
        if length is None:
            k, v = (_newest(x, slots) for x in (k, v))
        else:
            # a row that is full while another is not may have fewer slots before it than its neighbours need
            before = max(0, slots - (k.shape[1] - time))
            end = length + (before + k.shape[1] - time)
            k, v = (last(F.pad(x, (0, 0, 0, 0, before, 0)), end, slots) for x in (k, v))
        return state._replace(keys=k, values=v, cached=cached, position=state.position + read)

    def reset_parameters(self) -> None:
        # 1 / sqrt(fan_in) keeps unit variance at every width, where a fixed 0.02 would only at one. What goes to
        # the residual stream starts smaller: a block cannot know the depth, and fifty branches of 0.2^2 add 2
        nn.init.normal_(self.qkv.weight, std=self.dim**-0.5)
        nn.init.normal_(self.out.weight, std=0.2 * self.dim**-0.5)
        if self.gain is not None:
            nn.init.ones_(self.gain)

    def flops(self, length: int) -> int:
        return self.every_flops(length, 1)

    def every_flops(self, length: int, step: int) -> int:
        """The matrix products: projections, then scores and values of every key in sight of a query."""
        queries = length // step
        whole = min(queries, (length if self.window is None else self.window) // step)
        # the first queries see step, 2 step, ... keys, the rest a window's
        pairs = step * whole * (whole + 1) // 2 + (queries - whole) * (self.window or 0)
        seen = 2 * self.kv_heads * self.head_dim * self.dim
        asking = self.qkv.weight.numel() - seen + self.out.weight.numel()
        return 2 * (length * seen + queries * asking) + 4 * self.dim * pairs


def _alike(values: list[int]) -> bool:
    return len(set(values)) == 1


_FEW = 4
"""Tokens up to which an operator costs more to start than to run."""


@functools.lru_cache(maxsize=16)
def _ahead(time: int, device: torch.device) -> Tensor:
    """``0 .. time - 1``, kept for the few lengths of decoding."""
    with torch.inference_mode(False):
        return torch.arange(time, device=device)


def _known(state: AttentionState, time: int) -> tuple[int, Tensor | None]:
    """How many of the last slots hold a token in some row, and where each row's begin among them.

    ``None`` instead of a beginning: all hold one. Looking costs a wait on an accelerator, which one token's
    attention over a few empty slots does not repay.
    """
    slots = state.keys.shape[1]
    if not slots:
        return 0, None
    if torch.compiler.is_compiling() or (time == 1 and state.cached.device.type != "cpu"):
        return slots, slots - state.cached
    cached = state.cached.tolist()
    least, most = min(cached), max(cached)
    return most, None if least == most else most - state.cached


def _newest(x: Tensor, count: int) -> Tensor:
    spare = x.shape[1] - count
    # a view of a few slots too many is free; of many, it would keep all that was read alive with the state
    return x[:, spare:] if spare <= count else x[:, spare:].clone()
