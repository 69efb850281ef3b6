"""The parts of a model with their parameters, FLOPs and state: the tree behind the cost table and the diagram."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ...blocks.block import Block
from ...blocks.combinators import Persistent
from ...blocks.context import Context
from ...blocks.language_model import LanguageModel
from ...blocks.state import nbytes
from ...recipes import Recipe, build
from ...recipes.build import state_bytes

LENGTH = 2048
"""Tokens that FLOPs are averaged over: the cost of a window, a chunk or a segment depends on how full it is."""


@dataclass
class Part:
    """A block, or another part of the model such as the embedding. Figures include the parts inside."""

    label: str
    """The field of the enclosing block, such as ``memory`` or ``branches.0``, or the name of the layer."""
    type: str
    """The block's registered name."""
    fields: dict[str, Any]
    """Its fields in the recipe, without the blocks inside."""
    parameters: int
    flops: int
    """For ``LENGTH`` tokens of one row."""
    state_bytes: int
    """For one row."""
    state: dict[str, int] = field(default_factory=dict)
    """Bytes of each named part of the state."""
    grows: bool = False
    count: int = 1
    """How often it occurs in the stack; the figures are those of one."""
    parts: list[Part] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, with the figures as the table names them."""
        return {
            "label": self.label,
            "type": self.type,
            "count": self.count,
            "parameters": self.parameters,
            "flops_per_token": self.flops / LENGTH,
            "state_bytes_per_row": self.state_bytes,
            "state_grows": self.grows,
            "fields": self.fields,
            "parts": [part.to_dict() for part in self.parts],
        }


@dataclass
class ModelSummary:
    """Every part once, and the sums over the whole model."""

    parts: list[Part]
    parameters: int
    flops: int
    state_bytes: int
    grows: bool


def summarize(model: LanguageModel, recipe: Recipe) -> ModelSummary:
    """The summary of a model that ``build`` made from ``recipe``. Layers of one name are alike and counted together."""
    names = recipe.expand()
    parts = []
    if model.embedding is not None:
        parts.append(Part("embedding", "", {"vocab": model.vocab}, model.embedding.numel(), 0, 0))
    for name, count in Counter(names).items():
        part = summarize_layer(model.layers[names.index(name)], name, recipe)  # type: ignore[arg-type]
        part.count = count
        parts.append(part)
    parts.append(Part("norm", "rms_norm", {}, _parameters(model.norm), model.norm.flops(LENGTH), 0))
    if model.vocab is not None:
        own = 0 if model.head is None else model.head.numel()
        parts.append(Part("head", "", {"tied": model.head is None}, own, 2 * model.dim * model.vocab * LENGTH, 0))
    # every state holds its recipe's fingerprint and the id of a document
    marks = 2 * torch.int64.itemsize
    parts.append(Part("recipe", "", {"fingerprint": recipe.fingerprint}, 0, 0, marks))
    found = ModelSummary(
        parts,
        parameters=sum(part.parameters * part.count for part in parts),
        flops=sum(part.flops * part.count for part in parts),
        state_bytes=sum(part.state_bytes * part.count for part in parts),
        grows=model.grows,
    )
    assert found.state_bytes == model.state_bytes(), (found.state_bytes, model.state_bytes())
    assert found.parameters == _parameters(model), (found.parameters, _parameters(model))
    assert found.flops == model.flops(LENGTH), (found.flops, model.flops(LENGTH))
    return found


def on_meta(recipe: Recipe, model: LanguageModel | None = None, dtype: torch.dtype = torch.float32) -> LanguageModel:
    """A model of ``recipe`` to summarize, on the meta device, where nothing is allocated or computed.

    If a custom block cannot create its state there: ``model``, which was built from ``recipe``, or a new one.
    """
    dtype = dtype if model is None else next(model.parameters()).dtype
    shapes = build(recipe, device="meta", dtype=dtype)
    if state_bytes(shapes, recipe) is not None:
        return shapes
    return build(recipe, dtype=dtype) if model is None else model


def summarize_layer(layer: Block, name: str, recipe: Recipe) -> Part:
    """One layer of the stack and everything inside."""
    with torch.no_grad():
        return _part(layer, name, {"type": "layer", "blocks": recipe.layers[name]}, _shares_of_flops(layer))


def _shares_of_flops(layer: Block) -> dict[Block, int]:
    """The FLOPs of every block within its layer.

    Only the enclosing block knows how often a block runs, and on how many tokens. A block's share is therefore what
    the layer's FLOPs lose when the block reports zero.
    """
    whole = layer.flops(LENGTH)
    shares = {layer: whole}
    for block in layer.modules():
        if isinstance(block, Block) and block is not layer:
            block.flops = lambda length: 0  # type: ignore[method-assign]
            try:
                shares[block] = whole - layer.flops(LENGTH)
            finally:
                del block.flops
    return shares


def _part(block: Block, label: str, node: Any, flops: dict[Block, int], prefix: Tensor | None = None) -> Part:
    """``prefix``: the persistent tokens that the fresh state of the block has seen."""
    node = node if isinstance(node, dict) else {"type": type(block).__name__}
    state = block.init_state(1) if prefix is None else block.prefix(prefix)[1]
    inside = _persistent_tokens(block, prefix)
    names = getattr(state, "_fields", ())
    return Part(
        label=label,
        type=node["type"],
        fields={key: value for key, value in node.items() if key != "type" and not _holds_blocks(value)},
        parameters=_parameters(block),
        flops=flops[block],
        state_bytes=nbytes(state),
        state={name: nbytes(child) for name, child in zip(names, state or ())} if names else {},
        grows=block.grows,
        parts=[_part(child, path, _at(node, path), flops, inside) for path, child in _children(block)],
    )


def _persistent_tokens(block: Block, given: Tensor | None) -> Tensor | None:
    """The persistent tokens before those of the blocks inside ``block``, which itself has seen those ``given``."""
    if isinstance(block, Context):
        return None if block.persistent is None else block.persistent.unsqueeze(0)
    if not isinstance(block, Persistent):
        return given
    own = block.tokens.unsqueeze(0)
    return own if given is None else torch.cat([given, own], dim=1)


def _children(module: nn.Module, path: str = "") -> Iterator[tuple[str, Block]]:
    """The blocks directly inside, through containers such as ``ModuleList``; norms of a layer are the layer's own."""
    for name, child in module.named_children():
        here = f"{path}.{name}" if path else name
        if isinstance(child, Block):
            if not here.startswith("norms."):
                yield here, child
        else:
            yield from _children(child, here)


def _at(node: Any, path: str) -> Any:
    """The part of the recipe at ``path`` inside a block, if blocks are stored under the names of their fields."""
    for key in path.split("."):
        if isinstance(node, list) and key.isdigit() and int(key) < len(node):
            node = node[int(key)]
        elif isinstance(node, dict) and key in node:
            node = node[key]
        else:
            return None
    return node


def _holds_blocks(value: Any) -> bool:
    if isinstance(value, list):
        return any(map(_holds_blocks, value))
    return isinstance(value, dict) and "type" in value


def _parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
