"""``attention``: causal self-attention, full or over a sliding window, with persistent tokens always visible."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from ..kernels.attention import Prefix, attention, operand_dtype
from ..kernels.attention.decode import Cache, cached_attention
from ..kernels.dispatch import advanced, integers, known, on_host, seen
from ..kernels.documents import Documents
from ..kernels.linear import is_plain, linear, project
from ..kernels.norm_gate import rms_norm
from ..kernels.padding import align, last
from ..kernels.rotary import normed_rotation, rotate
from ..registry import SameWeights, register
from .block import Block, check_input, like_of
from .documents import run_documents
from .state import concatenate, select

FEW = 4
"""Number of tokens up to which one fused kernel is faster than several operators."""


class AttentionState(NamedTuple):
    """The key-value cache.

    With a window there are ``window - 1`` slots, otherwise as many as the longest row has tokens. The last token is in
    the last slot. Empty slots are zero.
    """

    keys: Tensor
    """``[batch, slots, kv_heads, d]``, normalized and rotated, in the model's dtype."""
    values: Tensor
    """``[batch, slots, kv_heads, d]``."""
    cached: Tensor
    """``[batch]`` int64: number of slots in use."""
    position: Tensor
    """``[batch]`` int64: number of tokens processed. Only the rotation depends on it."""
    prefix_keys: Tensor | None
    """``[batch, P, kv_heads, d]``, normalized and not rotated; ``None`` without persistent tokens."""
    prefix_values: Tensor | None
    """``[batch, P, kv_heads, d]``."""


def concatenate_caches(states: Sequence[AttentionState]) -> AttentionState:
    """Concatenate the rows of states with different numbers of slots."""
    slots = max(state.keys.shape[1] for state in states)

    def pad(x: Tensor) -> Tensor:
        return F.pad(x, (0, 0, 0, 0, slots - x.shape[1], 0))

    joined: AttentionState = concatenate([s._replace(keys=pad(s.keys), values=pad(s.values)) for s in states])
    return joined


@register("attention")
class Attention(Block):
    """Causal softmax attention with rotary embeddings, grouped key-value heads and an optional sliding window.

    Persistent tokens have no position and remain visible beyond the window. State: the keys and values. It grows with
    the number of tokens unless ``window`` is set or the block is inside ``context``.
    """

    sharding = "pipelined"

    def __init__(
        self,
        dim: int,
        *,
        heads: Annotated[int, Field(ge=1, description="number of query heads, each of width dim / heads")] = 4,
        kv_heads: Annotated[
            int | None, Field(ge=1, description="number of key-value heads, a divisor of heads; null for heads")
        ] = None,
        window: Annotated[
            int | None,
            SameWeights(),
            Field(ge=1, le=2**24, description="tokens that each token sees, including itself; null for all"),
        ] = None,
        rope: Annotated[
            float | None, SameWeights(), Field(gt=1, description="base of rotary embeddings; null for none")
        ] = 10000.0,
        qk_norm: Annotated[bool, Field(description="RMS-normalize queries and keys, with a learned gain")] = True,
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
        self.qkv = nn.Linear(dim, (heads + 2 * self.kv_heads) * self.head_dim, bias=False)
        self.out = nn.Linear(dim, dim, bias=False)
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

    @property
    def grows(self) -> bool:  # type: ignore[override]
        return self.window is None

    def past(self) -> int | None:
        return None if self.window is None else self.window - 1

    def bound(self, tokens: int) -> None:
        """Limit the window to ``tokens``: the block is used for no longer sequences."""
        if tokens < 1:
            raise ValueError(f"bound: tokens is {tokens}: expected at least 1")
        self.window = tokens if self.window is None else min(self.window, tokens)

    def init_state(self, batch_size: int) -> AttentionState:
        like = like_of(self)
        # None: the weights are quantized to integers
        device, dtype = (self.qkv.weight.device, None) if like is None else (like.device, like.dtype)
        slots = 0 if self.window is None else self.window - 1
        empty = torch.zeros(batch_size, slots, self.kv_heads, self.head_dim, dtype=dtype, device=device)
        zero = torch.zeros(batch_size, dtype=torch.int64, device=device)
        if not zero.is_cpu:
            known(zero, [0] * batch_size)
        return AttentionState(empty, empty, zero, zero, None, None)

    def prefix(self, tokens: Tensor) -> tuple[Tensor, AttentionState]:
        """Return the outputs at persistent ``tokens`` [batch, count, dim], and a fresh state in which they are visible.

        Persistent tokens attend causally to each other, without positions. ``position`` and ``cached`` do not count
        them.
        """
        check_input(self, tokens, name="tokens")
        state = self.init_state(tokens.shape[0])
        if tokens.is_meta:
            kept = tokens.new_empty(*tokens.shape[:2], self.kv_heads, self.head_dim)
            return tokens, state._replace(prefix_keys=kept, prefix_values=kept)
        q, k, v, _ = self._project([linear(self.qkv, tokens)], 1, operand_dtype(state.keys), None)
        y = linear(self.out, attention(q, k, v).flatten(2).to(operand_dtype(tokens)))
        dtype = state.keys.dtype
        return y, state._replace(prefix_keys=k.to(dtype), prefix_values=v.to(dtype))

    def forward(
        self,
        x: Tensor,
        state: AttentionState | None = None,
        *,
        mask: Tensor | None = None,
        documents: Documents | None = None,
    ) -> tuple[Tensor, AttentionState]:
        if documents is None:  # of which a subclass may know nothing
            return self.every(x, state, step=1, mask=mask)
        return self.every(x, state, step=1, mask=mask, documents=documents)

    def every(
        self,
        x: Tensor,
        state: AttentionState | None = None,
        *,
        step: int,
        mask: Tensor | None = None,
        documents: Documents | None = None,
        ends: list[int] | None = None,
    ) -> tuple[Tensor, AttentionState]:
        """``forward``, with outputs at every ``step``-th token only. No queries are computed for other tokens.

        ``ends``, without ``documents``: the rows whose states are returned. With none, any state is returned.
        """
        layout, rows = None, x
        if documents is None:
            if state is not None:
                slots = state.keys.shape[1]
                if state.values.shape[1] != slots:
                    values = state.values.shape[1]
                    raise ValueError(f"{type(self).__name__}: state has {slots} keys and {values} values")
                if self.window is not None and slots < self.window - 1:
                    self._expect_visible_tokens(state)
            few = mask is None and state is not None and x.is_cpu and 0 < x.shape[1] <= FEW
            if few and not torch.is_grad_enabled() and not torch.compiler.is_compiling():
                assert state is not None
                return self._run_few(x, state, step)
            layout = None if mask is None else align(mask)
            rows = x if layout is None else layout.spread(x)
            if rows.shape[1] == 0:  # nothing but padding
                empty = linear(self.out, x.new_empty(x.shape[0], 0, self.heads * self.head_dim))
                y = F.pad(empty, (0, 0, 0, x[:, step - 1 :: step].shape[1]))
                return y, self.init_state(x.shape[0]) if state is None else state
        elif mask is not None:  # masked inputs may be NaN, which must not reach gradients
            rows = x.masked_fill(~mask.unsqueeze(-1), 0.0)
        if step == 1 or not is_plain(self.qkv):
            projected = [linear(self.qkv, rows)]
        else:
            weight, own = self.qkv.weight, self.heads * self.head_dim
            projected = [project(rows[:, step - 1 :: step], weight[:own]), project(rows, weight[own:])]
        if documents is None:
            y, state = self._run(projected, state, None if layout is None else layout.length, step, ends)
        else:
            y, state = self._run_packed(projected, state, mask, documents, step)
        y = linear(self.out, y.flatten(2).to(operand_dtype(x)))
        if mask is None:
            return y, state
        if layout is None:  # ``out`` may add a bias
            return torch.where(mask[:, step - 1 :: step, None], y, 0.0), state
        if step > 1:
            several, mask = mask, mask[:, ::step]
            if not (mask.is_cpu or torch.compiler.is_compiling()):
                seen(mask, on_host(several)[:, ::step])
            layout = align(mask)
        return layout.collect(y), state

    def segments(self, x: Tensor, count: int, state: AttentionState) -> Callable[[int, Tensor], Tensor]:
        """``every`` with ``step=2`` for each of ``count`` equal segments of ``x``, which all begin from ``state``.

        ``state`` has no tokens but persistent ones. What depends on ``x`` alone is computed here for all segments.
        Returns a function of a segment's number and ``h`` ``[batch, time / count, dim]``: the outputs for the stream
        ``h_1, x_1, h_2, x_2, ..`` of the segment.
        """
        (rows, time, _), own, half = x.shape, self.heads * self.head_dim, operand_dtype(x)
        dtype, places = operand_dtype(state.keys), range(2 * (x.shape[1] // count))
        x = x.unflatten(1, (count, time // count)).flatten(0, 1)
        odd = None if self.rope is None else (places[1::2], places[1::2])
        parts = self._project([linear(self.qkv, x)], 1, dtype, odd)
        queries, keys, values, plain = (y.unflatten(0, (rows, count)).unbind(1) for y in parts)
        weight, seen = self.qkv.weight[own:].to(half), None  # once, where autocast would cast it for every segment
        if state.prefix_keys is not None and state.prefix_values is not None:
            seen = state.prefix_keys.to(dtype), state.prefix_values.to(dtype)

        def attend(i: int, h: Tensor) -> Tensor:
            heads = project(h.to(half), weight).to(dtype).unflatten(-1, (-1, self.head_dim))
            k, v = heads.split_with_sizes((self.kv_heads, self.kv_heads), dim=2)
            k, _ = normed_rotation(k, self.gain, places[::2], self.rope, first=self.heads)
            k, v = (torch.stack(pair, dim=2).flatten(1, 2) for pair in ((k, keys[i]), (v, values[i])))
            prefix = None if seen is None else Prefix(plain[i], *seen)
            y = attention(queries[i], k, v, window=self.window, prefix=prefix, step=2)
            return linear(self.out, y.flatten(2).to(half))

        return attend

    def _run_packed(
        self,
        projected: Sequence[Tensor],
        state: AttentionState | None,
        mask: Tensor | None,
        documents: Documents,
        step: int,
    ) -> tuple[Tensor, AttentionState]:
        """``_run`` of packed documents, each of whose tokens is ``step`` tokens here."""
        counts = [1, step][-len(projected) :]  # of tokens here
        sizes = [(count, x.shape[-1]) for count, x in zip(counts, projected)]

        def attend(*given: Any) -> tuple[Tensor, AttentionState]:
            *rows, state, layout, ends = given
            rows = [x.unflatten(-1, size).flatten(1, 2) for x, size in zip(rows, sizes)]
            return self._run(rows, state, None if layout is None else layout.length * step, step, ends)

        steps = [x.unflatten(1, (-1, count)).flatten(2) for x, count in zip(projected, counts)]
        return run_documents(
            attend, documents, steps, state, mask, self.init_state, grows=self.grows, aligned=True,
            join=concatenate_caches,
        )  # fmt: skip

    def _run(
        self,
        projected: Sequence[Tensor],
        state: AttentionState | None,
        length: Tensor | None,
        step: int = 1,
        ends: list[int] | None = None,
    ) -> tuple[Tensor, AttentionState]:
        """The outputs of attention ``[batch, .., heads, d]``, and the next state.

        ``projected``: the products with the weights of ``qkv`` in one tensor, or those of the queries and then those of
        keys and values. The valid tokens of each row come first; ``length`` [batch] is their number, ``None`` if all
        are. ``ends``: the rows whose states are returned, by default all.
        """
        (rows, time), fresh = projected[-1].shape[:2], state is None
        state = self.init_state(rows) if state is None else state
        dtype, positions, prefix = operand_dtype(state.keys), None, None
        if self.rope is not None:
            first = integers(state.position, wait=False)
            if first is not None and len(set(first)) == 1:  # rows at the same position share their rotation
                position: Any = range(first[0], first[0] + time)
                positions = position[step - 1 :: step], position
            else:
                position = state.position[: 1 if fresh else None, None] + torch.arange(time, device=state.keys.device)
                positions = position[:, step - 1 :: step], position
        q, k, v, plain = self._project(projected, step, dtype, positions)
        if state.prefix_keys is not None and state.prefix_values is not None:
            prefix = Prefix(plain, state.prefix_keys.to(dtype), state.prefix_values.to(dtype))

        slots = state.keys.shape[1]
        # the largest number of slots in use of any row, and the first of them in each row (None: all in use)
        used, start = 0, None
        if slots and not fresh:
            if torch.compiler.is_compiling() or (time == 1 and not k.is_cpu):
                # reading the number synchronizes an accelerator: attention over a few empty slots is cheaper
                used, start = slots, slots - state.cached
            else:
                cached = integers(state.cached)
                used = max(cached)
                start = None if min(cached) == used else used - state.cached
        seen_k, seen_v = k, v
        if used:
            unused = slots - used
            seen_k = torch.cat((state.keys[:, unused:].to(dtype), k), dim=1)
            seen_v = torch.cat((state.values[:, unused:].to(dtype), v), dim=1)
        y = attention(q, seen_k, seen_v, window=self.window, start=start, prefix=prefix, step=step)
        if ends is not None:
            if not ends:
                return y, state
            state, k, v, length = select((state, k, v, length), ends)
        return y, self._advance(state, k, v, length)

    def _run_few(self, x: Tensor, state: AttentionState, step: int) -> tuple[Tensor, AttentionState]:
        """``_run`` with fewer operators, for few tokens without gradients."""
        heads = linear(self.qkv, x).to(state.keys.dtype).unflatten(-1, (-1, self.head_dim))
        y, keys, values = cached_attention(
            heads, self.gain, Cache(*state), heads=self.heads, window=self.window, base=self.rope, step=step
        )
        cached = state.cached + x.shape[1]
        if self.window is not None:
            cached = cached.clamp_(max=self.window - 1)
        position = state.position + x.shape[1]
        y = linear(self.out, y.flatten(2).to(x.dtype))
        return y, state._replace(keys=keys, values=values, cached=cached, position=position)

    def _project(
        self, projected: Sequence[Tensor], step: int, dtype: torch.dtype, positions: tuple[Any, Any] | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Queries at every ``step``-th token, keys and values, ``[batch, .., heads or kv_heads, d]``, and the queries
        before their rotation. ``positions``: of queries and keys; ``None``: nothing is rotated."""
        shape, shared = (-1, self.head_dim), self.kv_heads
        heads = projected[-1].to(dtype).unflatten(-1, shape)
        if len(projected) == 2:
            q = projected[0].to(dtype).unflatten(-1, shape)
            k, v = heads.split_with_sizes((shared, shared), dim=2)
        else:
            q, k, v = heads.split_with_sizes((self.heads, shared, shared), dim=2)
            q = q[:, step - 1 :: step]
        if positions is not None and self.rope is not None and not q.is_cpu:
            q, plain = normed_rotation(q, self.gain, positions[0], self.rope, plain=True)
            k, _ = normed_rotation(k, self.gain, positions[1], self.rope, first=self.heads)
            return q, k, v, q if plain is None else plain
        if self.gain is not None:
            q, k = rms_norm(q, self.gain[: self.heads]), rms_norm(k, self.gain[self.heads :])
        plain = q
        if positions is not None and self.rope is not None:
            q, k = rotate(q, positions[0], self.rope), rotate(k, positions[1], self.rope)
        return q, k, v, plain

    def _advance(self, state: AttentionState, k: Tensor, v: Tensor, length: Tensor | None) -> AttentionState:
        """Return the state after the new ``k`` and ``v``, in the dtype of ``state``. ``length`` as in :meth:`_run`."""
        time = k.shape[1]
        slots = None if self.window is None else self.window - 1
        if length is None:
            cached, position = advanced(state.cached, time, slots), advanced(state.position, time)
        else:
            cached, position = advanced(state.cached, length, slots), advanced(state.position, length)
        if slots is None:
            # the compiler does not know the number of slots in use: the state then keeps all
            every = length is None or torch.compiler.is_compiling()
            slots = state.keys.shape[1] + time if every else max(integers(cached))
        if length is not None or time < slots or self.window is None:
            k, v = torch.cat((state.keys, k), dim=1), torch.cat((state.values, v), dim=1)
        if length is None:
            spare = k.shape[1] - slots
            k, v = k[:, spare:], v[:, spare:]
            if spare > slots:  # a view would keep the keys and values of all tokens alive
                k, v = k.clone(), v.clone()
        else:
            # rows with more valid tokens need fewer of the slots before them than other rows
            before = max(0, slots - (k.shape[1] - time))
            end = length + (before + k.shape[1] - time)
            k, v = [last(F.pad(x, (0, 0, 0, 0, before, 0)), end, slots) for x in (k, v)]
        dtype = state.keys.dtype  # under autocast, the state keeps it
        return state._replace(keys=k.to(dtype), values=v.to(dtype), cached=cached, position=position)

    def _expect_visible_tokens(self, state: AttentionState) -> None:
        """Raise unless the cache of a smaller window has all visible tokens."""
        assert self.window is not None
        if torch.compiler.is_compiling() or state.cached.is_meta:
            return
        if any(map(operator.lt, integers(state.cached), (min(n, self.window - 1) for n in integers(state.position)))):
            raise ValueError(
                f"{type(self).__name__}: the state is of another block: it holds the last {state.keys.shape[1]} "
                f"tokens, expected {self.window - 1}"
            )

    def reset_parameters(self) -> None:
        # 1 / sqrt(fan_in) keeps unit variance at every width. The output is smaller, because the residual stream sums
        # the branches and a block does not know their number: the variance of fifty, 0.2^2 each, is 2
        nn.init.normal_(self.qkv.weight, std=self.dim**-0.5)
        nn.init.normal_(self.out.weight, std=0.2 * self.dim**-0.5)
        if self.gain is not None:
            nn.init.ones_(self.gain)
