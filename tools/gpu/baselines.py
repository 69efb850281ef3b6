"""What the GPU kernels are measured beside: other libraries where they are installed, and a plain transformer."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, logsigmoid, normalize, scaled_dot_product_attention

from ...kernels.norm_gate import rms_norm, swiglu

Forward = Callable[[], Tensor]


def titans_pytorch(
    device: torch.device, dtype: torch.dtype, rows: int, length: int, heads: int, d: int, expansion: int, chunk: int,
) -> tuple[Forward, list[Tensor]]:  # fmt: skip
    """Its memory, which projects its inputs as our block does, gradients at each chunk's weights as ours.

    Returns what runs it forward, and the leaves that it gives gradients to.
    """
    from titans_pytorch import MemoryMLP, NeuralMemory

    module = NeuralMemory(
        dim=heads * d, heads=heads, dim_head=d, chunk_size=chunk, batch_size=chunk, max_grad_norm=1.0,
        model=MemoryMLP(dim=d, depth=2, expansion_factor=expansion),
    ).to(device)  # fmt: skip
    x = torch.randn(rows, length, heads * d, device=device)

    def forward() -> Tensor:
        with autocast(device, dtype):
            return module(x)[0]

    return forward, [x, *module.parameters()]


def autocast(device: torch.device, dtype: torch.dtype) -> contextlib.AbstractContextManager[object]:
    """As models are trained in half precision."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def linear_memories(
    device: torch.device, dtype: torch.dtype, rows: int, length: int, d: int
) -> dict[str, Callable[[], tuple[Forward, list[Tensor]]]]:
    """The linear memories of flash-linear-attention, each with a state of ``d x d`` for every row."""

    def random(*shape: int) -> Tensor:
        return torch.randn(1, length, rows, *shape, device=device)

    def operands() -> tuple[Tensor, Tensor, Tensor]:
        q, k = (normalize(random(d), dim=-1).to(dtype) for _ in range(2))
        return q, k, random(d).to(dtype)

    def gated_delta_rule() -> tuple[Forward, list[Tensor]]:
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule

        (q, k, v), g, beta = operands(), logsigmoid(random() + 4), torch.sigmoid(random()).to(dtype)
        return lambda: chunk_gated_delta_rule(q, k, v, g, beta)[0], [q, k, v, g, beta]

    def momentum_delta_rule() -> tuple[Forward, list[Tensor]]:
        from fla.ops.momentum_delta_rule import chunk_momentum_delta_rule

        (q, k, v), beta = operands(), torch.sigmoid(random()).to(dtype)
        alpha, mu = logsigmoid(random() + 4), logsigmoid(random() + 1)
        call = lambda: chunk_momentum_delta_rule(q, k, v, alpha, mu, beta=beta)[0]  # noqa: E731
        return call, [q, k, v, alpha, mu, beta]

    def ttt_linear() -> tuple[Forward, list[Tensor]]:
        from fla.ops.ttt import chunk_ttt_linear

        (q, k, v), eta = operands(), (0.1 * torch.sigmoid(random(1))).to(dtype)
        w, b = torch.ones(rows, d, device=device, dtype=dtype), torch.zeros(rows, d, device=device, dtype=dtype)
        return lambda: chunk_ttt_linear(q, k, v, w, b, eta)[0], [q, k, v, w, b, eta]

    return {
        "fla gated delta rule": gated_delta_rule,
        "fla momentum delta rule": momentum_delta_rule,
        "fla TTT-Linear": ttt_linear,
    }


class Transformer(nn.Module):
    """What a memory model is compared with: full causal attention through SDPA, and a SwiGLU."""

    def __init__(self, dim: int, depth: int, vocab: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.heads = heads
        self.tokens = nn.Embedding(vocab, dim)
        names = {"qkv": (dim, 3 * dim), "out": (dim, dim), "up": (dim, 2 * hidden), "down": (hidden, dim)}
        self.layers = nn.ModuleList(
            nn.ModuleDict({name: nn.Linear(*shape, bias=False) for name, shape in names.items()}) for _ in range(depth)
        )
        self.head = nn.Linear(dim, vocab, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens)
        for layer in self.layers:
            assert isinstance(layer, nn.ModuleDict)
            q, k, v = layer["qkv"](rms_norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
            x = x + layer["out"](scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
            x = x + layer["down"](swiglu(layer["up"](rms_norm(x))))
        return self.head(rms_norm(x))

    def loss(self, tokens: Tensor) -> Tensor:
        return cross_entropy(self(tokens[:, :-1]).flatten(0, 1).float(), tokens[:, 1:].flatten())
