"""How a module is called: which argument the block reads, and what the caller takes back."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ...registry import nearest, show
from .calling import behind, changed, given, parameters
from .error import SwapError


@dataclasses.dataclass(frozen=True)
class Adapter:
    """What has to be known of a module's ``forward`` for a block to stand beside it or in its place.

    The block reads one tensor ``[batch, time, dim]`` and gives one. Plain data, so that a swap can be written down.
    """

    argument: str | None = None
    """Name of the argument that the block reads; ``None``: the first."""
    along: tuple[str, ...] = ()
    """Arguments that are changed with it where they are the same tensor: key and value of self-attention."""
    foreign: tuple[str, ...] = ()
    """Arguments that bring in another sequence, which a block in the module's place could not see."""
    padding: str | None = None
    """Name of the argument that is true, or minus infinity, at padding: ``[batch, time]``."""
    returns: int | None = 0
    """Of a module in whose place a block stands: 0 for the tensor, n for a tuple of n that begins with it; ``None``
    where that is not known, and no block can take its place."""
    time_first: bool = False
    """``[time, batch, dim]`` rather than ``[batch, time, dim]``."""
    layer: bool = False
    """A whole layer with its own residual: blocks in its place are pre-normed and residual, as in a recipe's layer."""

    def read(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], where: str) -> Tensor:
        """``[batch, time, dim]`` out of a call. Raises ``SwapError`` where there is no such tensor."""
        named = given(module, args, kwargs)
        name = self._name(module, named)
        if name not in named:
            raise SwapError(f"{where}: called without {name!r}, which the block is to read (got {_listed(named)})")
        return self.batch_first(named[name], where, name)

    def call(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], x: Tensor
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The same call with ``x`` [batch, time, dim] in place of what the block has read."""
        named = given(module, args, kwargs)
        name = self._name(module, named)
        value = self.as_was(x, named[name])
        same = {other: value for other in self.along if other in named and named[other] is named[name]}
        return changed(module, args, kwargs, {name: value, **same})

    def answer(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], y: Tensor, where: str) -> Any:
        """What the caller of a module expects, of what a block in its place gave: ``[batch, time, dim]``."""
        named = given(module, args, kwargs)
        x = named[self._name(module, named)]
        for name in (*self.foreign, *self.along):
            if named.get(name) is not None and named[name] is not x:
                raise SwapError(
                    f"{where}: called with {name!r}, another sequence than the block in its place reads: "
                    "cross-attention cannot be replaced; how='beside' leaves it in place"
                )
        y = self.as_was(y, x)
        return (y, *[None] * (self.returns - 1)) if self.returns else y

    def result(self, output: Any, where: str) -> Tensor:
        """``[batch, time, dim]`` out of what a module returned: a tensor, or the first of a tuple or mapping."""
        return self.batch_first(_first(output), where, "what it returned")

    def with_result(self, output: Any, y: Tensor) -> Any:
        """What a module returned, with ``y`` [batch, time, dim] in place of its tensor."""
        y = self.as_was(y, _first(output))
        if isinstance(output, Tensor):
            return y
        if isinstance(output, Mapping):
            return type(output)({**output, next(iter(output)): y})  # type: ignore[call-arg]
        if hasattr(output, "_replace"):
            return output._replace(**{output._fields[0]: y})
        return type(output)([y, *output[1:]])

    def own_padding(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """The padding mask that a call brings along, where it is of the tokens that the block reads."""
        if self.padding is None:
            return None
        named = given(module, args, kwargs)
        x = named.get(self._name(module, named))
        if any(named.get(name) is not x for name in self.along):
            return None
        return named.get(self.padding)

    def batch_first(self, x: Any, where: str, name: str) -> Tensor:
        """``x`` as ``[batch, time, dim]``. Raises ``SwapError``."""
        if not isinstance(x, Tensor):
            raise SwapError(f"{where}: {name}: expected a tensor [batch, time, dim], got {type(x).__name__}")
        if x.is_nested or not x.is_floating_point():
            raise SwapError(f"{where}: {name}: expected floating-point numbers in a dense tensor, got {x.dtype}")
        if x.dim() == 2 and self.along:  # torch's attention takes a single sequence, too
            return x.unsqueeze(0)
        if x.dim() != 3:
            kind = "[time, batch, dim]" if self.time_first else "[batch, time, dim]"
            raise SwapError(f"{where}: {name}: expected {kind}, got {list(x.shape)}")
        return x.transpose(0, 1) if self.time_first else x

    def as_was(self, y: Tensor, like: Tensor) -> Tensor:
        """``y`` [batch, time, dim] laid out and typed as ``like``."""
        y = y.to(like.dtype)
        if like.dim() == 2:
            return y.squeeze(0)
        return y.transpose(0, 1) if self.time_first else y

    def _name(self, module: nn.Module, named: Mapping[str, Any]) -> str:
        if self.argument is not None:
            return self.argument
        return next(iter(parameters(module).positional), None) or next(iter(named), "0")


_PLAIN = Adapter()
_HF = Adapter(argument="hidden_states", foreign=("encoder_hidden_states", "key_value_states"))

ADAPTERS: dict[str, Adapter] = {
    "plain": _PLAIN,
    "time_first": Adapter(time_first=True),
    "hf_attention": dataclasses.replace(_HF, returns=2),
    "hf_layer": dataclasses.replace(_HF, layer=True),
    "multihead_attention": Adapter("query", along=("key", "value"), padding="key_padding_mask", returns=2),
    "encoder_layer": Adapter("src", padding="src_key_padding_mask", layer=True),
    "decoder_layer": Adapter("tgt", foreign=("memory",), padding="tgt_key_padding_mask", layer=True),
}
"""By name, as ``tb.swap(..., adapter=)`` takes them."""


def as_adapter(value: str | Adapter | Mapping[str, Any] | None) -> Adapter | None:
    """An adapter from itself, its name, or its fields as plain data. Raises ``SwapError`` with the nearest name."""
    if isinstance(value, Mapping):
        fields = [field.name for field in dataclasses.fields(Adapter)]
        for name in value:
            if name not in fields:
                raise SwapError(
                    f"adapter: unknown field {show(name)}{nearest(name, fields)} (fields: {', '.join(fields)})"
                )
        parts: dict[str, Any] = {name: tuple(p) if isinstance(p, list) else p for name, p in value.items()}
        return Adapter(**parts)
    if isinstance(value, str):
        if value not in ADAPTERS:
            known = ", ".join(ADAPTERS)
            raise SwapError(f"adapter: unknown {show(value)}{nearest(value, ADAPTERS)} (adapters: {known})")
        return ADAPTERS[value]
    if value is not None and not isinstance(value, Adapter):
        raise SwapError(f"adapter: expected a name ({', '.join(ADAPTERS)}) or an Adapter, got {show(value)}")
    return value


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
            return dataclasses.replace(_HF, returns=2 if returned is None else returned)
        if any(_is_attention(child) for child in module.modules()):
            return dataclasses.replace(_HF, layer=True, returns=_returned(module))
        return dataclasses.replace(_PLAIN, returns=_returned(module) or 0)
    layers = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)
    batch_first = [_batch_first(outer) for outer in around if isinstance(outer, layers)]
    if isinstance(module, nn.RNNBase):
        batch_first.append(module.batch_first)
    return dataclasses.replace(_PLAIN, time_first=not all(batch_first[-1:]))


def misfit(module: nn.Module, adapter: Adapter, replaced: bool) -> str | None:
    """Why a module cannot be called as ``adapter`` says, in words; ``None`` where it can, as far as can be told."""
    taken = parameters(module)
    kind = type(module).__name__
    if type(module).forward is nn.Module.forward:
        return f"{kind} has no forward: it holds modules and is never called itself; name the modules in it"
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
    if replaced and dataclasses.replace(adapter, time_first=False) == _PLAIN and unseen:
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
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(forward)))
    except (OSError, TypeError, SyntaxError):
        counts = set()
    else:
        values = [node.value for node in ast.walk(tree) if isinstance(node, ast.Return) and node.value is not None]
        counts = {len(value.elts) if isinstance(value, ast.Tuple) else 0 for value in values}
    if len(counts) == 1 and counts != {0}:
        return counts.pop()
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


def _first(output: Any) -> Any:
    if isinstance(output, Mapping):
        return next(iter(output.values()), None)
    if isinstance(output, tuple | list):
        return output[0] if output else None
    return output


def _listed(named: Mapping[str, Any]) -> str:
    return ", ".join(named) or "nothing"
