"""Attention on PyTorch's fused kernels (``scaled_dot_product_attention``), by blocks of queries under a window."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ..autograd import differentiable
from ..dispatch import needs_grad
from .reference import Prefix, visible_keys

JOINT_QUERIES = 16
"""Queries up to which a prefix is scored by plain matrix products, which are fewer steps than merging kernels."""


LARGEST_MASK = 2**25
"""Pairs of queries and keys of a mask. More queries are taken in parts, whose masks backward makes again."""


def sdpa_attention(
    q: Tensor, k: Tensor, v: Tensor, window: int | None, start: Tensor | None, prefix: Prefix | None, step: int
) -> Tensor:
    time, keys = q.shape[1], k.shape[1]
    most = keys if window is None else min(keys, 2 * window + (time - 1) * (step - 1) + 64)
    pairs = time * most * (1 if start is None else q.shape[0])
    if pairs <= LARGEST_MASK or not is_masked(time, keys, window, start, prefix, step):
        return _attend(q, k, v, window, start, prefix, step)
    found = []
    tensors = (q, k, v) if prefix is None else (q, k, v, *prefix)
    for first in range(0, time, size := max(1, time * LARGEST_MASK // pairs)):
        end = min(first + size, time)
        queries, until = slice(first, end), keys - (time - end) * step
        own = None if prefix is None else prefix._replace(q=prefix.q[:, queries])
        given = (q[:, queries], k[:, :until], v[:, :until], window, start, own, step)
        found.append(checkpoint(_attend, *given, use_reentrant=False) if needs_grad(*tensors) else _attend(*given))
    return torch.cat(found, dim=1)


def is_masked(time: int, keys: int, window: int | None, start: Tensor | None, prefix: Prefix | None, step: int) -> bool:
    """Whether this is more than each token attending to those before it, which needs no mask."""
    return window is not None or start is not None or prefix is not None or step > 1 or time not in (1, keys)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, window: int | None, start: Tensor | None, prefix: Prefix | None, step: int
) -> Tensor:
    time = q.shape[1]
    reach = (time - 1) * step + 1  # keys from the first query's place to the end
    if window is not None:
        unseen = k.shape[1] - reach - window + 1  # keys too far back even for the first query
        if unseen > 0:
            k, v = k[:, unseen:], v[:, unseen:]
            start = None if start is None else start - unseen
        if k.shape[1] <= window:
            window = None
    if step == 1 and window is not None and time > _block(window):
        return _in_blocks(q, k, v, window, start, prefix)
    joint = prefix is not None and time <= JOINT_QUERIES
    if step == 1 and window is None and start is None and (joint or time == 1 or time == k.shape[1]):
        return _one_softmax(q, k, v, None, time > 1, prefix)
    return _one_softmax(q, k, v, _visible(time, k.shape[1], window, start, q.device, step)[:, None], False, prefix)


def _visible(time: int, keys: int, window: int | None, start: Tensor | None, device: torch.device, step: int) -> Tensor:
    """``visible_keys``; that of every row is kept for the next segment, or the next layer."""
    if start is not None or torch.compiler.is_compiling() or time * keys > KEPT_MASK:
        return visible_keys(time, keys, window, start, device, step)
    return _kept_mask(time, keys, window, device, step)


KEPT_MASK = 2**20
"""Pairs of queries and keys of masks that are kept: at most 64 of them."""


@functools.lru_cache(maxsize=64)
def _kept_mask(time: int, keys: int, window: int | None, device: torch.device, step: int) -> Tensor:
    with torch.inference_mode(False):
        return visible_keys(time, keys, window, None, device, step)


def _block(window: int) -> int:
    """Queries that share one strip of keys. Half a window: a strip is then 3 / 2 of what each query sees."""
    return max(64, -(-window // 2))


def _in_blocks(q: Tensor, k: Tensor, v: Tensor, window: int, start: Tensor | None, prefix: Prefix | None) -> Tensor:
    """Blocks of queries, each with the strip of keys it can see, as rows of one batch: time x window work."""
    rows, time = q.shape[:2]
    block = _block(window)
    blocks = -(-time // block)
    reach = -(-(window - 1) // block)  # key blocks in sight before a query's own
    before = reach * block - (k.shape[1] - time)  # empty keys that complete the first strip
    after = blocks * block - time  # tokens that complete the last block

    def pad(x: Tensor, before: int) -> Tensor:
        return F.pad(x, (0, 0, 0, 0, before, after)).unflatten(1, (-1, block))

    def strips(x: Tensor) -> Tensor:
        x = pad(x, before)
        return torch.cat([x[:, i : i + blocks] for i in range(reach + 1)], dim=2).flatten(0, 1)

    def repeat(x: Tensor) -> Tensor:
        return x[:, None].expand(-1, blocks, -1, -1, -1).flatten(0, 1)

    strip = (reach + 1) * block
    band = visible_keys(block, strip, window, None, q.device)
    key = torch.arange(blocks, device=q.device)[:, None] * block + torch.arange(strip, device=q.device) - before
    first = key.new_zeros(1) if start is None else start.clamp(min=0)
    visible = band & (key >= first[:, None, None])[:, :, None]  # [batch or 1, blocks, block, strip]
    visible = visible.expand(rows, -1, -1, -1).flatten(0, 1)[:, None]
    if prefix is not None:
        prefix = Prefix(pad(prefix.q, 0).flatten(0, 1), repeat(prefix.k), repeat(prefix.v))
    y = _one_softmax(pad(q, 0).flatten(0, 1), strips(k), strips(v), visible, False, prefix)
    return y.unflatten(0, (rows, blocks)).flatten(1, 2)[:, :time]


MERGING_DEVICES = ("cpu",)
"""Devices whose fused kernel returns the log-sum-exp that merging a prefix takes. Others score both in one product."""


def _one_softmax(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, causal: bool, prefix: Prefix | None
) -> Tensor:
    """``visible``: bool ``[batch or 1, 1, time, keys]``; ``None``: all keys, or those not after the query."""
    time, heads, d = q.shape[1:]
    grouped = heads != k.shape[2]
    merging = q.device.type in MERGING_DEVICES
    if prefix is not None and time <= JOINT_QUERIES:
        return _joint(q, k, v, prefix, visible, causal)
    if prefix is not None and causal and not merging:
        visible, causal = visible_keys(time, k.shape[1], None, None, q.device)[:, None], False
    if prefix is not None and merging:
        qkv = [x.transpose(1, 2) for x in (q, k, v, *prefix)]
        return _Merged.apply(*qkv, _additive(visible, q.dtype), causal).transpose(1, 2)
    if prefix is not None:
        visible = None if visible is None else F.pad(visible, (prefix.k.shape[1], 0), value=True)
        # features [rotated | plain]: one product scores keys by the first half and prefix keys by the second
        k = torch.cat((F.pad(prefix.k, (d, 0)), F.pad(k, (0, d))), dim=1)
        q, v = torch.cat((q, prefix.q), dim=-1), torch.cat((prefix.v, v), dim=1)
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    if grouped and visible is not None and not merging:
        # accelerators have kernels for masks and kernels for groups of heads, none for both
        k, v = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (k, v))
        grouped = False
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, is_causal=causal, scale=d**-0.5, enable_gqa=grouped)
    return y.transpose(1, 2)


def _additive(visible: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """The mask as the kernel wants it: added to the scores, in their dtype."""
    if visible is None:
        return None
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, float("-inf"))


def _joint(q: Tensor, k: Tensor, v: Tensor, prefix: Prefix, visible: Tensor | None, causal: bool) -> Tensor:
    """Both sets of scores by matrix products: few operators, each on ``[batch * kv_heads, ...]``."""
    rows, time, heads, d = q.shape
    kv_heads, always = k.shape[2], prefix.k.shape[1]
    compiling = torch.compiler.is_compiling()  # a compiler makes its own constants
    scale = d**-0.5 if compiling else _scale(d, q.dtype)
    pq, q = (x.transpose(1, 2).reshape(rows * kv_heads, -1, d) for x in (prefix.q, q))
    pk, k, pv, v = (x.transpose(1, 2).flatten(0, 1) for x in (prefix.k, k, prefix.v, v))
    score = torch.cat((torch.bmm(pq, pk.mT), torch.bmm(q, k.mT)), dim=-1) * scale
    if visible is not None:
        score.view(rows, heads, time, -1)[..., always:].masked_fill_(~visible, float("-inf"))
    elif causal:
        # the queries are the last tokens: only among themselves is any key ahead
        ahead = (_ahead.__wrapped__ if compiling else _ahead)(time, q.device)
        score.view(rows, heads, time, -1)[..., -time:].masked_fill_(ahead, float("-inf"))
    weight = score.softmax(dim=-1)
    y = torch.baddbmm(torch.bmm(weight[..., :always], pv), weight[..., always:], v)
    return y.view(rows, heads, time, d).transpose(1, 2)


@functools.lru_cache(maxsize=64)
def _scale(d: int, dtype: torch.dtype) -> Tensor:
    """``d ** -0.5`` as a tensor: an operator would make a tensor of a number at every call."""
    with torch.inference_mode(False):
        return torch.tensor(d**-0.5, dtype=dtype, device="cpu")  # a single number goes with any device


@functools.lru_cache(maxsize=64)
def _ahead(time: int, device: torch.device) -> Tensor:
    """Bool ``[time, time]``: the key comes after the query."""
    with torch.inference_mode(False):
        return torch.ones(time, time, dtype=torch.bool, device=device).triu(1)


def _dense(*tensors: Tensor) -> list[Tensor]:
    """With their last dimension dense, which the fused kernel assumes without a check."""
    return [x if x.stride(-1) == 1 else x.contiguous() for x in tensors]


def _per_kv_head(q: Tensor, k: Tensor) -> Tensor:
    """``[batch, heads, time, d]`` -> ``[batch, kv_heads, group * time, d]``: no key is copied for its group."""
    return q if q.shape[1] == k.shape[1] else q.reshape(q.shape[0], k.shape[1], -1, q.shape[-1])


def _merged_formula(
    ctx: Any, q: Tensor, k: Tensor, v: Tensor, pq: Tensor, pk: Tensor, pv: Tensor, hidden: Tensor | None
) -> Tensor:
    early, score = (
        (_per_kv_head(x, y) @ y.mT).view(*q.shape[:3], -1) * q.shape[-1] ** -0.5 for x, y in ((pq, pk), (q, k))
    )
    if hidden is not None:
        score = score + hidden
    elif ctx.causal:
        score = score.masked_fill(_ahead(q.shape[2], q.device), float("-inf"))
    weight = torch.cat((early, score), dim=-1).softmax(dim=-1)
    return (_per_kv_head(weight, k) @ torch.cat((pv, v), dim=2)).view(q.shape)


class _Merged(torch.autograd.Function):
    """The fused CPU kernel over the keys, plain products over the few prefix keys, one softmax over both.

    The kernel returns the log-sum-exp of its scores, which makes the merge exact. Its backward recomputes the
    weights from a log-sum-exp and an output that it is given: given the joint ones, it returns the gradients
    of the joint softmax. The public ``scaled_dot_product_attention`` returns no log-sum-exp; with it, as on
    other devices, a training step of ``mag`` on this backend takes 1.11 times as long.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        pq: Tensor,
        pk: Tensor,
        pv: Tensor,
        hidden: Tensor | None,
        causal: bool,
    ) -> Tensor:
        given = q, k, v
        q, k, v = _dense(q, k, v)
        y, late = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, attn_mask=hidden)
        if hidden is not None:  # the kernel returns 0 where there was nothing to sum
            late = late.masked_fill(hidden.amax(dim=-1) == float("-inf"), float("-inf"))
        score = (_per_kv_head(pq, pk) @ pk.transpose(-1, -2)).to(late.dtype).view(*q.shape[:3], -1)
        score = score * q.shape[-1] ** -0.5
        both = torch.logaddexp(late, score.logsumexp(dim=-1))
        weight = torch.exp(score - both[..., None])
        early = (_per_kv_head(weight.to(q.dtype), pk) @ pv).view(q.shape)
        y = torch.addcmul(early, y, torch.exp(late - both)[..., None]).to(q.dtype)
        ctx.save_for_backward(*given, pq, pk, pv, hidden, y, both, weight)
        ctx.causal = causal
        return y

    @staticmethod
    @differentiable(_merged_formula, stop=7)
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, pq, pk, pv, hidden, y, both, weight = ctx.saved_tensors
        q, k, v, y, grad = _dense(q, k, v, y, grad)  # hooks on saved tensors may return other strides
        both = both.contiguous()
        grad_q, grad_k, grad_v = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, q, k, v, y, both, 0.0, ctx.causal, attn_mask=hidden
        )
        inner = (grad * y).sum(dim=-1, keepdim=True, dtype=weight.dtype)
        grad_group = _per_kv_head(grad, pk)
        grad_weight = (grad_group @ pv.transpose(-1, -2)).view(weight.shape)
        grad_score = _per_kv_head((weight * (grad_weight - inner) * q.shape[-1] ** -0.5).to(q.dtype), pk)
        grad_pq = (grad_score @ pk).view(q.shape)
        grad_pk = grad_score.transpose(-1, -2) @ _per_kv_head(pq, pk)
        grad_pv = _per_kv_head(weight.to(q.dtype), pk).transpose(-1, -2) @ grad_group
        return grad_q, grad_k, grad_v, grad_pq, grad_pk, grad_pv, None, None
