"""Causal attention with a sliding window, unfilled cache slots and an always visible prefix.

The queries are the last tokens of the keys, or every ``step``-th of them: of ``S`` keys and ``T`` queries, query
``i`` stands at key ``S - 1 - (T - 1 - i) step``. It sees the keys at or before its own place, none ``window`` or more
tokens back, none before ``start``; and every prefix key. All it sees shares one softmax. A query that sees nothing
returns zero.

Prefix keys have no position. Where the other scores come from rotated queries and keys, theirs come from
queries that were not rotated, which is why :class:`Prefix` brings its own.

Backends: ``native`` is a C kernel for CPUs, ``xformers`` a GPU library with windowed kernels, ``sdpa`` runs PyTorch's
fused kernels, ``flex`` is FlexAttention, ``reference`` a dense mask.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..arguments import expect_tensors
from ..cpu_runtime import library
from ..cpu_runtime.call import plain, tracks
from ..dispatch import Backend, Operation, Unable
from .cpu import native_attention
from .nonfinite import without_infinities
from .reference import Prefix as Prefix
from .reference import reference_attention, visible_keys
from .xformers import refuse_xformers, xformers_attention


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int | None = None,
    start: Tensor | None = None,
    prefix: Prefix | None = None,
    step: int = 1,
    backend: str = "auto",
) -> Tensor:
    """Attend from ``q`` ``[batch, T, heads, d]`` to ``k``, ``v`` ``[batch, S, kv_heads, d]``.

    ``kv_heads`` divides ``heads``; neighbouring query heads share one. ``window``: tokens in sight, the query's
    own included. ``start``: int64 ``[batch]``, the first key of each row that holds a token. ``step``: keys from one
    query's place to the next one's, so that ``S > (T - 1) step``. Scores are scaled by ``d ** -0.5``. Returns
    ``[batch, T, heads, d]`` in ``q``'s dtype.

    On a CPU a key or value that is not finite makes NaN of the queries that see it, and of no others; compiled code
    promises that of the ``native`` backend alone.

    Raises ``ValueError`` or ``TypeError`` naming the argument that does not fit; ``BackendError``.
    """
    _check(q, k, v, window, start, prefix, step)
    if prefix is not None and prefix.k.shape[1] == 0:
        prefix = None
    grad = tracks(q, k, v, *(() if prefix is None else prefix))
    ordinary = plain(q, k, v, start, *(() if prefix is None else prefix))
    if q.is_cpu:
        run = _operation.choose(backend, device="cpu", dtype=q.dtype, grad=grad, plain=ordinary)
        y: Tensor = run(q, k, v, window, start, prefix, step)
        return y
    facts: dict[str, Any] = dict(
        device=q.device.type, dtype=q.dtype, grad=grad, plain=ordinary, width=q.shape[3],
        start=start is not None, gaps=step > 1 and k.shape[1] < q.shape[1] * step,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )  # fmt: skip
    run = _operation.choose(backend, **facts)
    try:
        y = run(q, k, v, window, start, prefix, step)
    except Unable as error:
        y = _operation.instead("xformers", str(error), backend, **facts)(q, k, v, window, start, prefix, step)
    return y


def _apart(attend: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A backend for the CPU that is given finite keys and values; elsewhere a look at them would make a device wait."""

    def run(
        q: Tensor, k: Tensor, v: Tensor, window: int | None, start: Tensor | None, prefix: Prefix | None, step: int
    ) -> Tensor:
        if q.shape[1] > 1 and q.is_cpu and not torch.compiler.is_compiling() and plain(q, k, v, start):
            finite = without_infinities(k, v, q.shape[1], window, start, step)
            if finite is not None:
                k, v, spoiled = finite
                y = attend(q, k, v, window, start, prefix, step)
                return y.masked_fill(spoiled.repeat_interleave(q.shape[2] // k.shape[2], dim=2).unsqueeze(-1), math.nan)
        return attend(q, k, v, window, start, prefix, step)

    return run


def _check(
    q: Tensor, k: Tensor, v: Tensor, window: int | None, start: Tensor | None, prefix: Prefix | None, step: int
) -> None:
    if prefix is not None and not isinstance(prefix, Prefix):
        raise TypeError(f"attention: prefix: expected a Prefix(q, k, v) or None, got {type(prefix).__name__}")
    given = [("q", q), ("k", k), ("v", v)]
    if prefix is not None:
        given += [("prefix.q", prefix.q), ("prefix.k", prefix.k), ("prefix.v", prefix.v)]
    expect_tensors("attention", *given)
    if q.dim() != 4:
        raise ValueError(f"attention: q {list(q.shape)}: expected [batch, time, heads, d]")
    rows, time, heads, d = q.shape
    if k.dim() != 4 or k.shape[0] != rows or k.shape[3] != d:
        raise ValueError(
            f"attention: k {list(k.shape)}: expected [{rows}, keys, kv_heads, {d}] to fit q {list(q.shape)}"
        )
    if v.shape != k.shape:
        raise ValueError(f"attention: v {list(v.shape)}: expected the shape of k, {list(k.shape)}")
    for name, number in (("step", step), ("window", window)):
        if number is None and name == "window":
            continue
        if isinstance(number, bool) or not isinstance(number, int):
            raise TypeError(f"attention: {name} is {number!r}: expected a whole number of keys")
    if step < 1:
        raise ValueError(f"attention: step is {step}: expected at least 1")
    if k.shape[1] < (time - 1) * step + 1 and time:
        raise ValueError(
            f"attention: k has {k.shape[1]} keys for {time} queries: expected at least {(time - 1) * step + 1}"
        )
    if k.shape[2] < 1 or heads % k.shape[2]:
        raise ValueError(f"attention: k has {k.shape[2]} heads: expected a divisor of q's {heads}")
    if window is not None and window < 1:
        raise ValueError(f"attention: window is {window}: expected at least 1, or None")
    if start is not None:
        if not isinstance(start, Tensor):
            raise TypeError(f"attention: start: expected a tensor, got {type(start).__name__}")
        if start.dtype != torch.int64:
            raise TypeError(f"attention: start is {start.dtype}: expected torch.int64")
        if start.shape != (rows,):
            raise ValueError(f"attention: start {list(start.shape)}: expected [{rows}]")
        if start.device != q.device:
            raise ValueError(f"attention: start is on {start.device}: expected the device of q, {q.device}")
    if prefix is not None:
        if prefix.q.shape != q.shape:
            raise ValueError(f"attention: prefix.q {list(prefix.q.shape)}: expected the shape of q, {list(q.shape)}")
        if prefix.k.dim() != 4 or prefix.k.shape != (rows, prefix.k.shape[1], k.shape[2], d):
            raise ValueError(
                f"attention: prefix.k {list(prefix.k.shape)}: expected [{rows}, tokens, {k.shape[2]}, {d}]"
            )
        if prefix.v.shape != prefix.k.shape:
            raise ValueError(f"attention: prefix.v {list(prefix.v.shape)}: expected {list(prefix.k.shape)}")


# ----------------------------------------------------------------------------------------------------- sdpa

_FEW = 16
"""Queries up to this many meet a prefix by plain matrix products: fewer, smaller steps than a merge of kernels."""


def _sdpa(
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
    if step > 1:
        visible = visible_keys(time, k.shape[1], window, start, q.device, step)[:, None]
        return _one_softmax(q, k, v, visible, False, prefix)
    if window is not None and time > _block(window):
        return _sdpa_blocks(q, k, v, window, start, prefix)
    few = prefix is not None and time <= _FEW
    if window is None and start is None and (few or time == 1 or time == k.shape[1]):
        return _one_softmax(q, k, v, None, time > 1, prefix)
    return _one_softmax(q, k, v, visible_keys(time, k.shape[1], window, start, q.device)[:, None], False, prefix)


def _block(window: int) -> int:
    """Queries that share one strip of keys. Half a window: a strip is then 3 / 2 of what each query sees."""
    return max(64, -(-window // 2))


def _sdpa_blocks(q: Tensor, k: Tensor, v: Tensor, window: int, start: Tensor | None, prefix: Prefix | None) -> Tensor:
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


_MERGING = ("cpu",)
"""Devices whose fused kernel can be merged with a prefix. The others score both in one product, twice as wide."""


def _one_softmax(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, causal: bool, prefix: Prefix | None
) -> Tensor:
    """``visible``: bool ``[batch or 1, 1, time, keys]``; ``None``: all keys, or those not after the query."""
    time, heads, d = q.shape[1:]
    grouped = heads != k.shape[2]
    merging = q.device.type in _MERGING
    if prefix is not None and time <= _FEW:
        return _joint(q, k, v, prefix, visible, causal)
    if prefix is not None and causal and not merging:
        visible, causal = visible_keys(time, k.shape[1], None, None, q.device)[:, None], False
    if prefix is not None and merging:
        qkv = [x.transpose(1, 2) for x in (q, k, v, *prefix)]
        return _Merged.apply(*qkv, _hidden(visible, q.dtype), causal).transpose(1, 2)
    if prefix is not None:
        visible = None if visible is None else F.pad(visible, (prefix.k.shape[1], 0), value=True)
        q, k, v = _side_by_side(q, k, v, prefix)
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    if grouped and visible is not None and not merging:
        # accelerators have kernels for masks and kernels for groups of heads, none for both
        k, v = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (k, v))
        grouped = False
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, is_causal=causal, scale=d**-0.5, enable_gqa=grouped)
    return y.transpose(1, 2)


def _hidden(visible: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """The mask as the kernel wants it: added to the scores, in their dtype."""
    if visible is None:
        return None
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, float("-inf"))


def _joint(q: Tensor, k: Tensor, v: Tensor, prefix: Prefix, visible: Tensor | None, causal: bool) -> Tensor:
    """Both sets of scores, written out: few operators, each on ``[batch * kv_heads, ...]``."""
    rows, time, heads, d = q.shape
    kv_heads, always = k.shape[2], prefix.k.shape[1]
    compiling = torch.compiler.is_compiling()  # which makes constants of its own
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
    """``d ** -0.5`` as a tensor: a number would be made into one at every call."""
    with torch.inference_mode(False):
        return torch.tensor(d**-0.5, dtype=dtype, device="cpu")  # a single number goes with any device


@functools.lru_cache(maxsize=64)
def _ahead(time: int, device: torch.device) -> Tensor:
    """Bool ``[time, time]``: the key comes after the query."""
    with torch.inference_mode(False):
        return torch.ones(time, time, dtype=torch.bool, device=device).triu(1)


def _dense(*tensors: Tensor) -> list[Tensor]:
    """With their last dimension dense: the fused kernel takes it to be, and does not look."""
    return [x if x.stride(-1) == 1 else x.contiguous() for x in tensors]


def _per_kv_head(q: Tensor, k: Tensor) -> Tensor:
    """``[batch, heads, time, d]`` -> ``[batch, kv_heads, group * time, d]``: no key is copied for its group."""
    return q if q.shape[1] == k.shape[1] else q.reshape(q.shape[0], k.shape[1], -1, q.shape[-1])


class _Merged(torch.autograd.Function):
    """The fused CPU kernel over the keys, plain products over the few prefix keys, one softmax over both.

    The kernel returns the log-sum-exp of its scores, which makes the merge exact. Its backward recomputes the
    weights from a log-sum-exp and an output that it is given: given the joint ones, it returns the gradients
    of the joint softmax. First derivatives only.
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
        ctx.save_for_backward(q, k, v, pq, pk, pv, hidden, y, both, weight)
        ctx.causal = causal
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, pq, pk, pv, hidden, y, both, weight = ctx.saved_tensors
        q, k, v, y, grad = _dense(q, k, v, y, grad)  # saved tensors too: who hooks them may return other strides
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


def _side_by_side(q: Tensor, k: Tensor, v: Tensor, prefix: Prefix) -> tuple[Tensor, Tensor, Tensor]:
    """Features ``[rotated | plain]``: one product scores keys by the first half and prefix keys by the second."""
    keys = torch.cat((F.pad(prefix.k, (q.shape[-1], 0)), F.pad(k, (0, q.shape[-1]))), dim=1)
    return torch.cat((q, prefix.q), dim=-1), keys, torch.cat((prefix.v, v), dim=1)


# ----------------------------------------------------------------------------------------------------- flex


@functools.cache
def _flex_kernel(device: str) -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    kernel: Callable[..., Any] = flex_attention
    return torch.compile(kernel) if device == "cuda" else kernel


def _flex(
    q: Tensor, k: Tensor, v: Tensor, window: int | None, start: Tensor | None, prefix: Prefix | None, step: int
) -> Tensor:
    from torch.nn.attention.flex_attention import create_block_mask

    rows, time, heads, d = q.shape
    keys, kv_heads = k.shape[1:3]
    always = 0
    if prefix is not None:
        always = prefix.k.shape[1]
        q, k, v = _side_by_side(q, k, v, prefix)

    def visible(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        back = (query - (time - 1)) * step + (keys - 1 + always) - key  # tokens between the query's place and the key
        seen = back >= 0
        if window is not None:
            seen = seen & (back < window)
        if start is not None:
            seen = seen & (key - always >= start[row])
        return seen | (key < always)

    if q.device.type == "cpu":  # it refuses tensors that could want a gradient even where none is recorded
        q, k, v = q.detach(), k.detach(), v.detach()
    mask = create_block_mask(visible, None if start is None else rows, None, time, keys + always, device=q.device)
    y = _flex_kernel(q.device.type)(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        block_mask=mask,
        scale=d**-0.5,
        enable_gqa=heads != kv_heads,
    )
    return y.transpose(1, 2)


def _refuse_flex(*, device: str, dtype: torch.dtype, grad: bool = False, **facts: Any) -> str | None:
    if device == "cpu" and grad:
        return "it has no backward on the CPU"
    if device == "cuda" and dtype == torch.float64:
        return "its kernels have no float64"
    return None


_operation = Operation(
    "attention",
    [
        Backend("native", _apart(native_attention), library.refuse, opaque=True),
        Backend("xformers", xformers_attention, refuse_xformers, opaque=True),
        Backend("sdpa", _apart(_sdpa)),
        Backend("flex", _apart(_flex), _refuse_flex),
        Backend("reference", _apart(reference_attention)),
    ],
    lambda q, *others: q,
    [Prefix],
)
