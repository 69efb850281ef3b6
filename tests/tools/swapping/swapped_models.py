"""Small models that are swapped into, and what the tests do to them."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

MEMORY = {"type": "memory", "heads": 2, "chunk": 4}
DIM = 16
VOCAB = 11


class Plain(nn.Module):
    """Residual layers of plain functions, with whatever a test wants to happen between them."""

    def __init__(self, depth=3, dim=DIM):
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, dim)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim)) for _ in range(depth)
        )
        self.head = nn.Linear(dim, VOCAB)
        self.between = None
        self.reentrant = None

    def forward(self, tokens, attention_mask=None):
        x = self.embedding(tokens)
        for layer in self.layers:
            x = x + (layer(x) if self.reentrant is None else checkpoint(layer, x, use_reentrant=self.reentrant))
            if self.between is not None:
                self.between()
        return self.head(x)


def plain(depth=3, seed=0):
    torch.manual_seed(seed)
    return Plain(depth)


def awake(model):
    """Gates and blocks away from where they start: what is put in shows."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "titans" in name:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))
    return model


def tokens(rows=2, time=9, seed=0, least=1, most=VOCAB):
    return torch.randint(least, most, (rows, time), generator=torch.Generator().manual_seed(seed))
