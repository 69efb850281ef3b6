"""Which adapter fits a module, told by its class and by what its ``forward`` takes and returns."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import textwrap
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from ...registry import nearest
from .adapter import ADAPTERS, HF, PLAIN, Adapter
from .calling import behind, parameters


def adapter_of(module: nn.Module, around: Sequence[nn.Module] = ()) -> Adapter:
    """The adapter that fits a module, told by its class and by what its ``forward`` takes and returns.

    ``around``: the modules that it is in, outermost first, of which torch's own say whether time goes first.
    """
    if isinstance(module, nn.MultiheadAttention):
        return dataclasses.replace(ADAPTERS["multihead_attention"], time_first=not module.batch_first)
    for kind, name in ((nn.TransformerEncoderLayer, "encoder_layer"), (nn.TransformerDecoderLayer, "decoder_layer")):
        if isinstance(module, kind):
            return dataclasses.replace(ADAPTERS[name], time_first=not _batch_first(module))
    if parameters(module).positional[:1] == ["hidden_states"]:
        if _is_attention(module):
            returned = _returned(module)
            return dataclasses.replace(HF, returns=2 if returned is None else returned)
        if any(_is_attention(child) for child in module.modules()):
            return dataclasses.replace(HF, layer=True, returns=_returned(module))
        return dataclasses.replace(PLAIN, returns=_returned(module) or 0)
    if isinstance(module, nn.RNNBase):
        # the state it is handed is another than a block's, and so is the one it gives
        return Adapter(foreign=("hx",), returns=2, time_first=not module.batch_first)
    layers = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)
    batch_first = [_batch_first(outer) for outer in around if isinstance(outer, layers)]
    return dataclasses.replace(PLAIN, returns=_returned_plain(module), time_first=not all(batch_first[-1:]))


def misfit(module: nn.Module, adapter: Adapter, replaced: bool) -> str | None:
    """Why a module cannot be called as ``adapter`` says, in words; ``None`` where it can, as far as can be told."""
    taken = parameters(module)
    kind = type(module).__name__
    if type(module).forward is nn.Module.forward:
        return f"{kind} has no forward: it holds modules and is never called itself; name the modules in it"
    if isinstance(_first_called(module), _CHANNELS_FIRST):
        return f"{kind} reads [batch, channels, ...], and a block [batch, time, dim]: name a module that reads that"
    said = f"{kind}.forward({', '.join(taken.names)})"
    if adapter.argument is not None and adapter.argument not in taken.names:
        return f"{said} has no argument {adapter.argument!r}{nearest(adapter.argument, taken.names)}"
    if not taken.names and not taken.any:
        return f"{said} takes nothing that a block could read"
    if replaced and adapter.returns is None:
        return (
            f"what {said} returns cannot be told; say it: "
            f"adapter={{'argument': {adapter.argument!r}, 'layer': {adapter.layer}, 'returns': 0}} for a tensor, "
            "n for a tuple of n that begins with it"
        )
    unseen = [name for name in taken.needed if name != (adapter.argument or next(iter(taken.names)))]
    if replaced and dataclasses.replace(adapter, time_first=False, returns=0) == PLAIN and unseen:
        return (
            f"{said} needs {' and '.join(unseen)} as well, which a block in its place would not see; "
            f"if it need not, say what it reads and returns: adapter=Adapter(argument={taken.names[0]!r}, returns=...)"
        )
    return None


def _batch_first(module: nn.Module) -> bool:
    attention: Any = module.self_attn
    return bool(getattr(attention, "batch_first", False))


def _is_attention(module: nn.Module) -> bool:
    if parameters(module).positional[:1] != ["hidden_states"]:
        return False
    kind = type(behind(module)).__name__
    return (hasattr(module, "layer_idx") and bool(re.search("attention", kind, re.I))) or kind.endswith("Attention")


def _returned(module: nn.Module) -> int | None:
    """How many values ``forward`` returns: 0 for a tensor, n for a tuple; ``None`` where that cannot be told.

    Told by its ``return`` statements, and only then by its annotation, which may be of an earlier time.
    """
    forward = inspect.unwrap(type(behind(module)).forward)
    counts = _counts(forward)
    return counts.pop() if len(counts) == 1 and counts != {0} else _promised(forward)


def _returned_plain(module: nn.Module) -> int | None:
    """The same for a function of ``x``, whose one return value is taken for a tensor where nothing says otherwise."""
    while isinstance(module, nn.Sequential) and len(module):
        module = module[-1]
    if isinstance(module, nn.RNNBase):
        return 2
    forward = inspect.unwrap(type(behind(module)).forward)
    counts = _counts(forward)
    if len(counts) == 1 and counts != {0}:
        return counts.pop()
    promised = _promised(forward)
    return 0 if promised is None and counts <= {0} else promised


def _counts(forward: Callable[..., Any]) -> set[int]:
    """How long the tuple in each ``return`` of the source is, 0 where there is none; nothing without a source."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(forward)))
    except (OSError, TypeError, SyntaxError):
        return set()
    waiting = [node.value for node in ast.walk(tree) if isinstance(node, ast.Return) and node.value is not None]
    counts = set()
    for value in waiting:
        if isinstance(value, ast.IfExp):
            waiting += [value.body, value.orelse]
        else:
            counts.add(len(value.elts) if isinstance(value, ast.Tuple) else 0)
    return counts


def _promised(forward: Callable[..., Any]) -> int | None:
    """The same from the annotation."""
    said = inspect.signature(forward).return_annotation
    text = (said if isinstance(said, str) else str(said)).replace("typing.", "").replace("torch.", "")
    promised = re.match(r"(?:Optional\[)?[Tt]uple\[(.*)\]", text)
    if promised is None:
        return 0 if re.match(r"(\w*Tensor|<class '\w*Tensor'>)", text) else None
    depth, count = 0, 1
    for letter in promised.group(1):
        depth += (letter in "[(") - (letter in ")]")
        if depth < 0:
            break
        count += letter == "," and depth == 0
    return count


_CHANNELS_FIRST = (
    nn.modules.conv._ConvNd,
    nn.modules.batchnorm._BatchNorm,
    nn.modules.instancenorm._InstanceNorm,
    nn.GroupNorm,
)


def _first_called(module: nn.Module) -> nn.Module:
    """The module itself, or of modules in a row the first."""
    while isinstance(module, nn.Sequential) and len(module):
        module = module[0]
    return module
