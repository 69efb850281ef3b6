"""What a module's class and source say about it: how it is called, how wide it is, where its parameters are."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import textwrap
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ...blocks.device import DTYPES
from ...registry import nearest
from .adapter import ADAPTERS, HF, PLAIN, Adapter, SwapError, original, signature

_LAYERS = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)
_CHANNELS_FIRST = (
    nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.BatchNorm1d,
    nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d,
    nn.GroupNorm,
)  # fmt: skip


def infer_adapter(module: nn.Module, ancestors: Sequence[nn.Module] = ()) -> Adapter:
    """The adapter that fits ``module``.

    ``ancestors``: the modules around it, outermost first. Torch's own layers say whether time comes first.
    """
    if isinstance(module, nn.MultiheadAttention):
        return dataclasses.replace(ADAPTERS["multihead_attention"], time_first=not module.batch_first)
    for kind, name in zip(_LAYERS, ("encoder_layer", "decoder_layer")):
        if isinstance(module, kind):
            return dataclasses.replace(ADAPTERS[name], time_first=not _is_batch_first(module))
    if signature(module).positional[:1] == ["hidden_states"]:
        returned = _returned(module)
        if _is_attention(module):
            return dataclasses.replace(HF, returns=2 if returned is None else returned)
        if any(_is_attention(child) for child in module.modules()):
            return dataclasses.replace(HF, layer=True, returns=returned)
        return dataclasses.replace(PLAIN, returns=returned or 0)
    if isinstance(module, nn.RNNBase):
        return Adapter(foreign=("hx",), returns=2, time_first=not module.batch_first)
    last = _last_called(module)
    batch_first = [_is_batch_first(outer) for outer in ancestors if isinstance(outer, _LAYERS)]
    returned = 2 if isinstance(last, nn.RNNBase) else _returned(last, otherwise=0)
    return Adapter(returns=returned, time_first=not all(batch_first[-1:]))


def check_adapter(module: nn.Module, adapter: Adapter, replaced: bool) -> None:
    """Raise ``SwapError`` if ``module`` cannot be called, or ``replaced``, as ``adapter`` says."""
    taken = signature(module)
    kind = type(module).__name__
    if type(module).forward is nn.Module.forward:
        raise SwapError(f"{kind} has no forward: it only holds modules; name the modules in it")
    first = module
    while isinstance(first, nn.Sequential) and len(first):
        first = first[0]
    if isinstance(first, _CHANNELS_FIRST):
        raise SwapError(
            f"{kind} reads [batch, channels, ...], and a block [batch, time, dim]: name a module that reads that"
        )
    forward = f"{kind}.forward({', '.join(taken.names)})"
    if adapter.argument is not None and adapter.argument not in taken.names:
        raise SwapError(f"{forward} has no argument {adapter.argument!r}{nearest(adapter.argument, taken.names)}")
    if not taken.names and not taken.variadic:
        raise SwapError(f"{forward} takes no argument that a block could read")
    if replaced and adapter.returns is None:
        raise SwapError(
            f"the source of {forward} does not say what it returns; give it: "
            f"adapter={{'argument': {adapter.argument!r}, 'layer': {adapter.layer}, 'returns': 0}} for a tensor, "
            "n for a tuple of n that begins with it"
        )
    unread = [name for name in taken.required if name != (adapter.argument or next(iter(taken.names)))]
    if replaced and unread and dataclasses.replace(adapter, time_first=False, returns=0) == PLAIN:
        raise SwapError(
            f"{forward} also needs {' and '.join(unread)}, which a block in its place does not read; "
            f"if that is right, give adapter=Adapter(argument={taken.names[0]!r}, returns=...)"
        )


def input_width(module: nn.Module) -> int | None:
    """Size of the last dimension of what ``module`` reads; ``None`` if it is unknown."""
    found: Any
    if original(module) is not module:
        found = module.block
        return int(found.dim)
    if isinstance(module, nn.RNNBase):  # which also has a hidden_size
        return module.input_size
    for name in ("embed_dim", "hidden_size", "d_model", "n_embd", "dim"):
        found = getattr(module, name, None)
        if type(found) is int and found > 0:
            return found
    if isinstance(module, _LAYERS) and getattr(module, "self_attn", None) is not None:
        return input_width(module.self_attn)
    found = next((reads for reads, _ in map(_layer_widths, module.modules()) if reads is not None), None)
    if found is None:
        found = getattr(getattr(module, "config", None), "hidden_size", None)
    return found if type(found) is int and found > 0 else None


def output_width(module: nn.Module) -> int | None:
    """The same of what it returns."""
    possible = output_widths(module)
    return possible.pop() if possible is not None and len(possible) == 1 else input_width(_last_called(module))


def output_widths(module: nn.Module) -> set[int] | None:
    """Widths of which ``module`` returns one; ``None`` if they are unknown, empty if it keeps the width."""
    if isinstance(module, nn.Sequential):
        return next((widths for widths in map(output_widths, reversed(module)) if widths is None or widths), set())
    found = set()
    for layer in module.modules():
        if next(layer.parameters(recurse=False), None) is not None:
            _, width = _layer_widths(layer)
            if width in (None, 1):  # 1 scales any width
                return None
            found.add(width)
    return found


def device_and_dtype(module: nn.Module, model: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Those of a module's floating-point parameters, or else of the model's."""
    parameters = [*original(module).parameters(), *model.parameters()]
    parameter = next((p for p in parameters if p.dtype in DTYPES.values()), None)
    if parameter is None:
        return torch.device("cpu"), torch.get_default_dtype()
    return parameter.device, parameter.dtype


def _is_batch_first(layer: nn.Module) -> bool:
    return bool(getattr(layer.self_attn, "batch_first", False))


def _is_attention(module: nn.Module) -> bool:
    if signature(module).positional[:1] != ["hidden_states"]:
        return False
    kind = type(original(module)).__name__
    return (hasattr(module, "layer_idx") and bool(re.search("attention", kind, re.I))) or kind.endswith("Attention")


def _last_called(module: nn.Module) -> nn.Module:
    while isinstance(module, nn.Sequential) and len(module):
        module = module[-1]
    return module


def _layer_widths(layer: nn.Module) -> tuple[int | None, int | None]:
    """The widths that a layer with parameters reads and returns; ``None`` for one that is unknown."""
    weight: Any = getattr(layer, "weight", None)
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features
    if isinstance(layer, nn.RNNBase):
        returned = layer.proj_size or layer.hidden_size
        return layer.input_size, returned * (2 if layer.bidirectional else 1)
    if isinstance(layer, nn.Embedding):
        return None, layer.embedding_dim
    if isinstance(layer, nn.MultiheadAttention):
        return layer.embed_dim, layer.embed_dim
    if type(layer).__name__ == "Conv1D" and hasattr(layer, "nf"):  # GPT-2's linear layer, weight [in, out]
        return int(weight.shape[0]), int(weight.shape[1])
    if isinstance(layer, nn.LayerNorm) or (type(layer).__name__.endswith("RMSNorm") and weight is not None):
        return int(weight.shape[-1]), int(weight.shape[-1])
    return None, None


def _returned(module: nn.Module, otherwise: int | None = None) -> int | None:
    """How many values ``forward`` returns: 0 for a tensor, n for a tuple; ``None`` if the source does not say.

    Told by its ``return`` statements, and only then by its annotation, which may be out of date. ``otherwise``: the
    answer if every statement returns one value of unknown type.
    """
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(type(original(module)).forward))))
    except (OSError, TypeError, SyntaxError):
        return otherwise
    values = [node.value for node in ast.walk(tree) if isinstance(node, ast.Return) and node.value is not None]
    counts = set()
    for value in values:
        if isinstance(value, ast.IfExp):
            values += [value.body, value.orelse]
        else:
            counts.add(len(value.elts) if isinstance(value, ast.Tuple) else 0)
    if len(counts) == 1 and counts != {0}:
        return counts.pop()
    annotated = _annotated(getattr(tree.body[0], "returns", None))
    names = {value.id if isinstance(value, ast.Name) else "" for value in values}
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign | ast.AugAssign) and isinstance(node.value, ast.Tuple):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            if names & {target.id for target in targets if isinstance(target, ast.Name)}:
                otherwise = None  # a tuple of unknown length
    if annotated and names == {*signature(module).names[:1]}:  # the tensor that it was given, changed: no tuple
        return 0
    return otherwise if annotated is None and counts <= {0} else annotated


def _annotated(node: ast.expr | None) -> int | None:
    """The same by a return annotation: ``Tensor``, ``tuple[...]``, ``Optional[...]``, the first of a union."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        node = ast.parse(node.value, mode="eval").body
    if isinstance(node, ast.BinOp):
        return _annotated(node.left)
    if isinstance(node, ast.Subscript):
        kind = ast.unparse(node.value).rpartition(".")[2]
        if kind == "Optional":
            return _annotated(node.slice)
        if kind.lower() == "tuple":
            return len(node.slice.elts) if isinstance(node.slice, ast.Tuple) else 1
    elif node is not None and ast.unparse(node).endswith("Tensor"):
        return 0
    return None
