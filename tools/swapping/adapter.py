"""How a module is called: which argument the block reads, and what the caller takes back."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from ...registry import nearest, show
from .calling import changed, given, parameters
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
    """Arguments that bring in another sequence, or a state, which a block in the module's place could not see."""
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
                    f"{where}: called with {name!r}, which is not what the block in its place reads: cross-attention "
                    "cannot be replaced, nor what is handed a state of its own; how='beside' leaves it in place"
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


PLAIN = Adapter()
HF = Adapter(argument="hidden_states", foreign=("encoder_hidden_states", "key_value_states"))

ADAPTERS: dict[str, Adapter] = {
    "plain": PLAIN,
    "time_first": Adapter(time_first=True),
    "hf_attention": dataclasses.replace(HF, returns=2),
    "hf_layer": dataclasses.replace(HF, layer=True),
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
        value = Adapter(**parts)
    if isinstance(value, str):
        if value not in ADAPTERS:
            known = ", ".join(ADAPTERS)
            raise SwapError(f"adapter: unknown {show(value)}{nearest(value, ADAPTERS)} (adapters: {known})")
        return ADAPTERS[value]
    if value is not None and not isinstance(value, Adapter):
        raise SwapError(f"adapter: expected a name ({', '.join(ADAPTERS)}) or an Adapter, got {show(value)}")
    if value is not None:
        _expect_fields(value)
    return value


def _expect_fields(adapter: Adapter) -> None:
    kinds: dict[str, tuple[Callable[[Any], bool], str]] = {
        "argument": (lambda v: v is None or isinstance(v, str), "the name of an argument, or None"),
        "along": (_are_names, "a tuple of names of arguments"),
        "foreign": (_are_names, "a tuple of names of arguments"),
        "padding": (lambda v: v is None or isinstance(v, str), "the name of an argument, or None"),
        "returns": (
            lambda v: v is None or (isinstance(v, int) and not isinstance(v, bool) and v >= 0),
            "0 for a tensor, n for a tuple of n, or None",
        ),
        "time_first": (lambda v: isinstance(v, bool), "true or false"),
        "layer": (lambda v: isinstance(v, bool), "true or false"),
    }
    for name, (fits, expected) in kinds.items():
        if not fits(getattr(adapter, name)):
            raise SwapError(f"adapter: {name}: expected {expected}, got {show(getattr(adapter, name))}")


def _are_names(value: Any) -> bool:
    return isinstance(value, tuple) and all(isinstance(name, str) for name in value)


def _first(output: Any) -> Any:
    if isinstance(output, Mapping):
        return next(iter(output.values()), None)
    if isinstance(output, tuple | list):
        return output[0] if output else None
    return output


def _listed(named: Mapping[str, Any]) -> str:
    return ", ".join(named) or "nothing"
