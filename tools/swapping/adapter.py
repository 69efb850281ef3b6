"""How a module is called: which argument a block reads, and what the caller expects back."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Mapping
from typing import Any, NamedTuple, get_type_hints

import torch
from pydantic import NonNegativeInt, TypeAdapter, ValidationError
from torch import Tensor, nn

from ...registry import nearest, show


class SwapError(ValueError):
    """A swap that cannot be made, or a call that does not fit one. Names the module and what was expected."""


@dataclasses.dataclass(frozen=True)
class Adapter:
    """Which part of a module's call a block reads and writes: one tensor ``[batch, time, dim]`` in, one out.

    Plain data, so that a swap can be saved. Raises ``SwapError`` for a field of the wrong type.
    """

    argument: str | None = None
    """Name of the argument that the block reads. ``None``: the first."""
    along: tuple[str, ...] = ()
    """Arguments that change with it where they are the same tensor: key and value of self-attention."""
    foreign: tuple[str, ...] = ()
    """Arguments with a second sequence or a state, which a block in the module's place could not read."""
    padding: str | None = None
    """Name of the argument that is true, or minus infinity, at padding: ``[batch, time]``."""
    returns: NonNegativeInt | None = 0
    """0 for a tensor, n for a tuple of n that begins with it. ``None``: unknown, and the module cannot be replaced."""
    time_first: bool = False
    """``[time, batch, dim]`` rather than ``[batch, time, dim]``."""
    layer: bool = False
    """A whole layer with its own residual connection. A block in its place is pre-normed and residual."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            try:
                _checker(field.name).validate_python(value, strict=True)
            except ValidationError:
                raise SwapError(f"adapter: {field.name}: expected {field.type}, got {show(value)}") from None

    def read(self, arguments: Arguments, where: str) -> Tensor:
        """``[batch, time, dim]`` from the arguments of a call. Raises ``SwapError`` if there is no such tensor."""
        name = self.argument or arguments.first
        if name not in arguments.named:
            got = ", ".join(arguments.named) or "nothing"
            raise SwapError(f"{where}: called without {name!r}, which the block reads (got {got})")
        return self._batch_first(arguments.named[name], f"{where}: {name}")

    def with_input(self, arguments: Arguments, x: Tensor) -> Arguments:
        """The same call with ``x`` [batch, time, dim] in place of the tensor that the block reads."""
        names = (self.argument or arguments.first, *self.along)
        old = arguments.named[names[0]]
        new = self._as(x, old)
        return arguments.changed({name: new for name in names if arguments.named.get(name) is old})

    def returned(self, arguments: Arguments, y: Tensor, where: str) -> Any:
        """What the caller of a replaced module gets for the block's output ``y`` [batch, time, dim].

        Raises ``SwapError`` for a call with a second sequence or with a state.
        """
        x = arguments.named[self.argument or arguments.first]
        for name in (*self.foreign, *self.along):
            if arguments.named.get(name) is not None and arguments.named[name] is not x:
                raise SwapError(
                    f"{where}: called with {name!r}, which the block in its place does not read: cross-attention "
                    "cannot be replaced, nor a module that is given a state; how='beside' keeps the module"
                )
        y = self._as(y, x)
        return (y, *[None] * (self.returns - 1)) if self.returns else y

    def output(self, output: Any, where: str) -> Tensor:
        """``[batch, time, dim]`` from what a module returned: a tensor, or the first of a tuple or mapping."""
        return self._batch_first(_first(output), f"{where}: its output")

    def with_output(self, output: Any, y: Tensor) -> Any:
        """What a module returned, with ``y`` [batch, time, dim] in place of its tensor."""
        y = self._as(y, _first(output))
        if isinstance(output, Tensor):
            return y
        if isinstance(output, Mapping):
            return type(output)({**output, next(iter(output)): y})  # type: ignore[call-arg]
        if hasattr(output, "_replace"):
            return output._replace(**{output._fields[0]: y})
        return type(output)([y, *output[1:]])

    def padding_mask(self, arguments: Arguments) -> Any:
        """The padding mask of a call, if it has one and it is of the tokens that the block reads."""
        named = arguments.named
        x = named.get(self.argument or arguments.first)
        if self.padding is None or any(named.get(name) is not x for name in self.along):
            return None
        return named.get(self.padding)

    def _batch_first(self, x: Any, what: str) -> Tensor:
        if not isinstance(x, Tensor) or x.is_nested or not x.is_floating_point():
            got = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise SwapError(f"{what}: expected a dense floating-point tensor [batch, time, dim], got {got}")
        if x.dim() == 2 and self.along:  # torch's attention also takes a single sequence
            return x.unsqueeze(0)
        if x.dim() != 3:
            expected = "[time, batch, dim]" if self.time_first else "[batch, time, dim]"
            raise SwapError(f"{what}: expected {expected}, got {list(x.shape)}")
        return x.transpose(0, 1) if self.time_first else x

    def _as(self, y: Tensor, like: Tensor) -> Tensor:
        """``y`` [batch, time, dim] in the layout and dtype of ``like``."""
        y = y.to(like.dtype)
        if like.dim() == 2:
            return y.squeeze(0)
        return y.transpose(0, 1) if self.time_first else y


@functools.cache
def _checker(field: str) -> TypeAdapter[Any]:
    return TypeAdapter(get_type_hints(Adapter, include_extras=True)[field])


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
    if value is None or isinstance(value, Adapter):
        return value
    if isinstance(value, Mapping):
        fields = [field.name for field in dataclasses.fields(Adapter)]
        unknown = next((name for name in value if name not in fields), None)
        if unknown is not None:
            near = nearest(unknown, fields)
            raise SwapError(f"adapter: unknown field {show(unknown)}{near} (fields: {', '.join(fields)})")
        parts: dict[str, Any] = {name: tuple(part) if isinstance(part, list) else part for name, part in value.items()}
        return Adapter(**parts)
    if not isinstance(value, str) or value not in ADAPTERS:
        near, known = nearest(value, ADAPTERS), ", ".join(ADAPTERS)
        raise SwapError(f"adapter: expected an Adapter or one of {known}; unknown {show(value)}{near}")
    return ADAPTERS[value]


NO_CONTINUOUS_BATCHING = (
    "continuous batching (generate_batch) lays the tokens of all requests in one row, which a memory would read as one "
    "text: use generate"
)


# -- the arguments of a call by name ---------------------------------------------------------------------------------


class Signature(NamedTuple):
    """The arguments of a ``forward``, by name."""

    positional: list[str]
    names: list[str]
    required: list[str]
    variadic: bool
    """Whether it takes any number of positional arguments."""


ORIGINAL = "_original"
"""Attribute of a replacement: the replaced module in a tuple, which keeps it out of the model's tree."""


def original(module: nn.Module) -> nn.Module:
    """The module that a swap has replaced by ``module``, or ``module`` itself."""
    held = vars(module).get(ORIGINAL)
    return original(held[0]) if held else module


def uncompiled(model: nn.Module) -> nn.Module:
    """The model in what ``torch.compile(model)`` returned, or ``model`` itself."""
    return next(model.children()) if isinstance(model, _compiled_class()) else model


@functools.cache
def _compiled_class() -> type:
    return type(torch.compile(nn.Identity(), backend="eager"))  # without importing the compiler itself


def signature(module: nn.Module) -> Signature:
    """The signature of a module's ``forward``; for a replacement, that of the replaced module."""
    kind: Any = type(original(module))
    return _class_signature(kind)


@functools.lru_cache(maxsize=1024)
def _class_signature(kind: Any) -> Signature:
    given = list(inspect.signature(kind.forward).parameters.values())[1:]
    named = [p for p in given if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    return Signature(
        [p.name for p in named if p.kind is not p.KEYWORD_ONLY],
        [p.name for p in named],
        [p.name for p in named if p.default is p.empty],
        any(p.kind is p.VAR_POSITIONAL for p in given),
    )


class Arguments:
    """The arguments of a call of ``module`` by name, whether positional or keyword; ``*args`` by their position."""

    def __init__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.module, self.args, self.kwargs = module, args, kwargs
        names = signature(module).positional
        self._positions = [names[index] if index < len(names) else str(index) for index in range(len(args))]
        self.named = {**dict(zip(self._positions, args)), **kwargs}
        self.first = names[0] if names else next(iter(self.named), "0")
        """Name of the first argument, given or not."""

    def changed(self, changes: Mapping[str, Any]) -> Arguments:
        """The same call with other values for some arguments."""
        args = tuple(changes.get(name, old) for name, old in zip(self._positions, self.args))
        by_name = {name: value for name, value in changes.items() if name not in self._positions}
        return Arguments(self.module, args, {**self.kwargs, **by_name})


def _first(output: Any) -> Any:
    if isinstance(output, Mapping):
        return next(iter(output.values()), None)
    if isinstance(output, tuple | list):
        return output[0] if output else None
    return output
