"""How wide the tensor is that a module reads, and where its parameters are."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ...blocks.placing import DTYPES
from .calling import behind
from .site import Site


def width(module: nn.Module) -> int | None:
    """Width of the last dimension of what a module reads; ``None`` where it cannot be told."""
    if isinstance(module, Site):
        return module.block.dim
    if isinstance(module, nn.RNNBase):
        return module.input_size
    for name in ("embed_dim", "hidden_size", "d_model", "n_embd", "dim"):
        found: Any = getattr(module, name, None)
        if _is_width(found):
            return int(found)
    attention = getattr(module, "self_attn", None)
    if isinstance(module, nn.TransformerEncoderLayer | nn.TransformerDecoderLayer) and attention is not None:
        return width(attention)
    first = next(_reading(module), None)
    if first is not None:
        return first
    return _configured(module)


def returned_width(module: nn.Module) -> int | None:
    """The same of what it returns, where that is known to be another."""
    while isinstance(module, nn.Sequential) and len(module):
        module = module[-1]
    if isinstance(module, nn.RNNBase):
        return _returned_by(module)
    if isinstance(module, nn.Embedding):
        return module.embedding_dim
    return module.out_features if isinstance(module, nn.Linear) else width(module)


def same_width(module: nn.Module) -> bool:
    """False where a module is known to return another width than it reads."""
    if isinstance(module, nn.RNNBase):
        return module.input_size == _returned_by(module)
    return not isinstance(module, nn.Linear) or module.in_features == module.out_features


def place(module: nn.Module, model: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Device and dtype for what comes to stand beside a module: those of its parameters, or of the model's."""
    known = DTYPES.values()
    own = [*behind(module).parameters(), *model.parameters()]
    fitting = (parameter for parameter in own if parameter.dtype in known)
    parameter = next(fitting, None)
    if parameter is None:
        return torch.device("cpu"), torch.get_default_dtype()
    return parameter.device, parameter.dtype


def _returned_by(module: nn.RNNBase) -> int:
    return (module.proj_size or module.hidden_size) * (2 if module.bidirectional else 1)


def _reading(module: nn.Module) -> Iterator[int]:
    """Input widths of the layers in a module, first to last."""
    for child in module.modules():
        weight: Any = getattr(child, "weight", None)
        if isinstance(child, nn.Linear):
            yield child.in_features
        elif isinstance(child, nn.LayerNorm):
            yield int(child.normalized_shape[-1])
        elif isinstance(child, nn.MultiheadAttention):
            yield child.embed_dim
        elif type(child).__name__ == "Conv1D" and hasattr(child, "nf"):  # GPT-2's linear layer, weight [in, out]
            yield int(weight.shape[0])
        elif type(child).__name__.endswith("RMSNorm") and weight is not None:
            yield int(weight.shape[-1])


def _configured(module: nn.Module) -> int | None:
    config: Any = getattr(module, "config", None)
    found: Any = getattr(config, "hidden_size", None)
    return int(found) if _is_width(found) else None


def _is_width(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
