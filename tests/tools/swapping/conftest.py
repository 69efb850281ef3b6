"""Small models to swap into, and what the tests do with them."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import titans_build as tb

DIM = 16
VOCAB = 11
MEMORY = {"type": "memory", "heads": 2, "chunk": 4}


class Plain(nn.Module):
    """Residual layers of plain functions. ``between`` is called after each; ``reentrant`` checkpoints each."""

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


def make_plain(depth=3, seed=0):
    torch.manual_seed(seed)
    return Plain(depth)


def randomise_swaps(model):
    """Move gates and blocks away from where they start, so that what is put in has an effect."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "titans" in name:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))
    return model


def make_swapped(how="beside", seed=0, block=MEMORY, **settings):
    model = make_plain(seed=seed)
    tb.swap(model, "layers.*", block, how, **settings)
    return randomise_swaps(model)


def draw_tokens(rows=2, time=9, seed=0, vocab=VOCAB):
    return torch.randint(1, vocab, (rows, time), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="session")
def plain():
    """``plain(depth=3, seed=0)``: a model without swaps."""
    return make_plain


@pytest.fixture(scope="session")
def randomised():
    """``randomised(model)``: ``model``, with random parameters in what swaps have put in."""
    return randomise_swaps


@pytest.fixture(scope="session")
def swapped():
    """``swapped(how="beside", seed=0, block=..., **settings)``: a model with a block at each of its three layers."""
    return make_swapped


@pytest.fixture(scope="session")
def tokens():
    """``tokens(rows=2, time=9, seed=0, vocab=11)``: ids of 1 and more, ``[rows, time]``."""
    return draw_tokens
