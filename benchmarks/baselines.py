"""Baselines of the benchmarks: causal SDPA attention, a plain transformer, and titans-pytorch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention


class Attention(nn.Module):
    """Full causal attention: one projection to q, k, v, ``scaled_dot_product_attention``, one projection back."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.out = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor, cache: Tensor | None = None, filled: int = 0) -> Tensor:
        """``cache`` [2, batch, heads, slots, d] holds ``filled`` tokens and is filled further, in place."""
        time = x.shape[1]
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        if cache is not None:
            cache[0, :, :, filled : filled + time], cache[1, :, :, filled : filled + time] = k, v
            k, v = cache[:, :, :, : filled + time]
        return self.out(scaled_dot_product_attention(q, k, v, is_causal=time > 1).transpose(1, 2).flatten(2))

    def flops(self, length: int) -> int:
        """Forward FLOPs of one row: the projections, and two products for every visible pair."""
        weights = self.qkv.weight.numel() + self.out.weight.numel()
        return 2 * length * weights + 2 * self.out.weight.shape[0] * length * (length + 1)


class Layer(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(dim), nn.LayerNorm(dim)])
        self.attention = Attention(dim, heads)
        self.feedforward = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor, cache: Tensor | None, filled: int) -> Tensor:
        x = x + self.attention(self.norms[0](x), cache, filled)
        return x + self.feedforward(self.norms[1](x))


class Transformer(nn.Module):
    """A GPT with learned positions, LayerNorm, full attention and GELU, and a preallocated cache."""

    def __init__(self, dim: int, heads: int, depth: int, vocab: int, slots: int) -> None:
        super().__init__()
        self.shape = (heads, slots, dim // heads)
        self.tokens = nn.Embedding(vocab, dim)
        self.positions = nn.Parameter(0.02 * torch.randn(slots, dim))
        self.layers = nn.ModuleList(Layer(dim, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, vocab, bias=False)

    def empty_cache(self, rows: int) -> list[Tensor]:
        heads, slots, d = self.shape
        return [self.positions.new_zeros(2, rows, heads, slots, d) for _ in self.layers]

    def forward(self, tokens: Tensor, caches: list[Tensor] | None = None, filled: int = 0) -> Tensor:
        x = self.tokens(tokens) + self.positions[filled : filled + tokens.shape[1]]
        for index, layer in enumerate(self.layers):
            x = layer(x, caches[index] if caches else None, filled)
        return self.head(self.norm(x))

    def loss(self, text: Tensor) -> Tensor:
        """``text`` [batch, time + 1]: the mean cross-entropy of each token's successor."""
        return cross_entropy(self(text[:, :-1]).flatten(0, 1), text[:, 1:].flatten())


def titans_pytorch_mac(
    dim: int, heads: int, depth: int, vocab: int, segment: int, chunk: int, persistent: int, expansion: int
) -> Any:
    """The memory-as-context transformer of titans-pytorch, with one residual stream and no long-term memory tokens.

    Its initial weights are one head expanded to all heads, which no optimizer can update in place. They are copied.
    """
    from titans_pytorch import MemoryAsContextTransformer, MemoryMLP

    width = dim // heads
    model = MemoryAsContextTransformer(
        num_tokens=vocab, dim=dim, depth=depth, heads=heads, dim_head=width, segment_len=segment,
        num_persist_mem_tokens=persistent, num_residual_streams=1, neural_memory_segment_len=chunk,
        neural_memory_batch_size=chunk,
        neural_memory_model=MemoryMLP(dim=width, depth=2, expansion_factor=expansion),
        neural_memory_kwargs={"dim_head": width, "heads": heads, "max_grad_norm": 1.0},
    )  # fmt: skip
    for parameter in model.parameters():
        parameter.data = parameter.data.contiguous()
    return model
