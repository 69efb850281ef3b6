"""What a module's class and source tell of it: how it is called, how wide it is, where its parameters are."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import textwrap
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from ...blocks.device import DTYPES
from ...registry import nearest
from .adapter import ADAPTERS, HF, PLAIN, Adapter, original, signature
from .site import Site

_LAYERS = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)
_CHANNELS_FIRST = (
    nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.BatchNorm1d,
    nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d,
    nn.GroupNorm,
)  # fmt: skip


def infer_adapter(module: nn.Module, ancestors: Sequence[nn.Module] = ()) -> Adapter:
    """The adapter that fits ``module``.

    ``ancestors``: the modules that it is in, outermost first. Torch's own layers say whether time comes first.
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
    return dataclasses.replace(
        PLAIN,
        returns=2 if isinstance(last, nn.RNNBase) else _returned(last, otherwise=0),
        time_first=not all(batch_first[-1:]),
    )


def mismatch(module: nn.Module, adapter: Adapter, replaced: bool) -> str | None:
    """Why ``module`` cannot be called as ``adapter`` says; ``None`` where nothing speaks against it."""
    taken = signature(module)
    kind = type(module).__name__
    if type(module).forward is nn.Module.forward:
        return f"{kind} has no forward: it only holds modules; name the modules in it"
    if isinstance(_first_called(module), _CHANNELS_FIRST):
        return f"{kind} reads [batch, channels, ...], and a block [batch, time, dim]: name a module that reads that"
    said = f"{kind}.forward({', '.join(taken.names)})"
    if adapter.argument is not None and adapter.argument not in taken.names:
        return f"{said} has no argument {adapter.argument!r}{nearest(adapter.argument, taken.names)}"
    if not taken.names and not taken.variadic:
        return f"{said} takes nothing that a block could read"
    if replaced and adapter.returns is None:
        return (
            f"what {said} returns cannot be told from its source; give it: "
            f"adapter={{'argument': {adapter.argument!r}, 'layer': {adapter.layer}, 'returns': 0}} for a tensor, "
            "n for a tuple of n that begins with it"
        )
    unread = [name for name in taken.required if name != (adapter.argument or next(iter(taken.names)))]
    if replaced and dataclasses.replace(adapter, time_first=False, returns=0) == PLAIN and unread:
        return (
            f"{said} needs {' and '.join(unread)} as well, which a block in its place would not read; "
            f"if that is right, give adapter=Adapter(argument={taken.names[0]!r}, returns=...)"
        )
    return None


def input_width(module: nn.Module) -> int | None:
    """Size of the last dimension of what ``module`` reads; ``None`` where it cannot be told."""
    if isinstance(module, Site):
        return module.block.dim
    if isinstance(module, nn.RNNBase):
        return module.input_size
    for name in ("embed_dim", "hidden_size", "d_model", "n_embd", "dim"):
        found: Any = getattr(module, name, None)
        if type(found) is int and found > 0:
            return found
    if isinstance(module, _LAYERS) and getattr(module, "self_attn", None) is not None:
        return input_width(module.self_attn)
    found = next((width for width in map(_layer_width, module.modules()) if width is not None), None)
    if found is None:
        found = getattr(getattr(module, "config", None), "hidden_size", None)
    return found if type(found) is int and found > 0 else None


def output_width(module: nn.Module) -> int | None:
    """The same of what it returns."""
    module = _last_called(module)
    if isinstance(module, nn.RNNBase):
        return _rnn_output(module)
    if isinstance(module, nn.Embedding):
        return module.embedding_dim
    return module.out_features if isinstance(module, nn.Linear) else input_width(module)


def keeps_width(module: nn.Module) -> bool:
    """False where a module is known to return another width than it reads."""
    if isinstance(module, nn.RNNBase):
        return module.input_size == _rnn_output(module)
    return not isinstance(module, nn.Linear) or module.in_features == module.out_features


def device_and_dtype(module: nn.Module, model: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Those of a module's floating-point parameters, or else of the model's."""
    known = DTYPES.values()
    parameters = [*original(module).parameters(), *model.parameters()]
    parameter = next((p for p in parameters if p.dtype in known), None)
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


def _first_called(module: nn.Module) -> nn.Module:
    while isinstance(module, nn.Sequential) and len(module):
        module = module[0]
    return module


def _last_called(module: nn.Module) -> nn.Module:
    while isinstance(module, nn.Sequential) and len(module):
        module = module[-1]
    return module


def _rnn_output(module: nn.RNNBase) -> int:
    return (module.proj_size or module.hidden_size) * (2 if module.bidirectional else 1)


def _layer_width(module: nn.Module) -> int | None:
    weight: Any = getattr(module, "weight", None)
    if isinstance(module, nn.Linear):
        return module.in_features
    if isinstance(module, nn.LayerNorm):
        return int(module.normalized_shape[-1])
    if isinstance(module, nn.MultiheadAttention):
        return module.embed_dim
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf"):  # GPT-2's linear layer, weight [in, out]
        return int(weight.shape[0])
    if type(module).__name__.endswith("RMSNorm") and weight is not None:
        return int(weight.shape[-1])
    return None


def _returned(module: nn.Module, otherwise: int | None = None) -> int | None:
    """How many values ``forward`` returns: 0 for a tensor, n for a tuple; ``None`` where that cannot be told.

    Told by its ``return`` statements, and only then by its annotation, which may be out of date. ``otherwise``: the
    answer where every statement returns one value of a type that nothing says.
    """
    forward = inspect.unwrap(type(original(module)).forward)
    counts = _return_statements(forward)
    if len(counts) == 1 and counts != {0}:
        return counts.pop()
    annotated = _annotated(forward)
    return otherwise if annotated is None and counts <= {0} else annotated


def _return_statements(forward: Callable[..., Any]) -> set[int]:
    """The length of the tuple in each ``return`` of the source, 0 where there is none; empty without a source."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(forward)))
    except (OSError, TypeError, SyntaxError):
        return set()
    values = [node.value for node in ast.walk(tree) if isinstance(node, ast.Return) and node.value is not None]
    counts = set()
    for value in values:
        if isinstance(value, ast.IfExp):
            values += [value.body, value.orelse]
        else:
            counts.add(len(value.elts) if isinstance(value, ast.Tuple) else 0)
    return counts


def _annotated(forward: Callable[..., Any]) -> int | None:
    annotation = inspect.signature(forward).return_annotation
    text = (annotation if isinstance(annotation, str) else str(annotation)).replace("typing.", "").replace("torch.", "")
    found = re.match(r"(?:Optional\[)?[Tt]uple\[(.*)\]", text)
    if found is None:
        return 0 if re.match(r"(\w*Tensor|<class '\w*Tensor'>)", text) else None
    depth, count = 0, 1
    for letter in found.group(1):
        depth += (letter in "[(") - (letter in ")]")
        if depth < 0:
            break
        count += letter == "," and depth == 0
    return count
