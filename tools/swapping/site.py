"""The modules that a swap puts into a model: a block beside, before or after another, or in its place."""

from __future__ import annotations

import copy
import secrets
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from ...blocks import Block
from ...blocks.normalisation import RMSNorm
from ...blocks.state import State
from .adapter import Adapter
from .calling import BEHIND
from .error import SwapError

Answer: TypeAlias = Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]
"""From a replacement and a call of it to what the caller gets."""


class Site(nn.Module):
    """A block in another model. It keeps no state: ``frame`` says from what state each call starts.

    ``path``: of the module it was swapped into. ``key``: by which a cache tells its states from those of others.
    """

    stands_for_another = False

    def __init__(self, block: Block, path: str, how: str, adapter: Adapter) -> None:
        super().__init__()
        self.block = block
        self.path, self.how, self.adapter = path, how, adapter
        self.key = secrets.token_hex(8)
        self.spec: Any = None
        """The block's description with every field given, where it was given as one."""

    def forward(self, x: Any) -> Any:
        """Nothing: a container that calls all of its children in turn is left as it was."""
        return x

    def run(self, x: Tensor, state: State, mask: Tensor | None) -> tuple[Tensor, State]:
        """The block on ``x`` [batch, time, dim], in the dtype of its parameters, and the state after it."""
        y, after = self.block(self._cast(x), state, mask=mask)
        if y.shape != x.shape:
            raise SwapError(f"{self.path}: the block made {list(y.shape)} of {list(x.shape)}: expected the same shape")
        return y, after

    def _cast(self, x: Tensor) -> Tensor:
        parameter = next(self.block.parameters(), None)
        if parameter is None or x.dtype == parameter.dtype or torch.is_autocast_enabled(x.device.type):
            return x
        return x.to(parameter.dtype)

    def extra_repr(self) -> str:
        return f"how={self.how!r}"


class Gated(Site):
    """``gate * block(norm(x))``, which is added to what is there: nothing at all while the gate is zero."""

    def __init__(self, block: Block, path: str, how: str, adapter: Adapter, *, gate: float) -> None:
        super().__init__(block, path, how, adapter)
        like = next(block.parameters(), torch.empty(0))
        with torch.device(like.device):
            self.norm = RMSNorm(block.dim).to(like.dtype)
            self.gate = nn.Parameter(torch.full((block.dim,), gate, dtype=like.dtype))
        if not like.is_meta:
            with torch.no_grad():
                self.norm.reset_parameters()

    def run(self, x: Tensor, state: State, mask: Tensor | None) -> tuple[Tensor, State]:
        y, after = super().run(self.norm.normalise(self._cast(x)), state, mask)
        return self.gate * y, after


class Replacement(Site):
    """A block in the place of another module, which is kept outside of the model's tree until it is put back.

    The module is asked for attributes that callers look at (``layer_idx``, ``batch_first``), follows the model to
    other devices and dtypes, and takes its own weights out of a state dict that has them.
    """

    stands_for_another = True

    def __init__(self, block: Block, path: str, adapter: Adapter, original: nn.Module, answer: Answer) -> None:
        super().__init__(block, path, "replace", adapter)
        self.__dict__[BEHIND] = (original,)
        self.answer = answer
        """``hooks.replaced``, which knows of the call that each is part of."""

    @property
    def original(self) -> nn.Module:
        """The module in whose place this is."""
        held: nn.Module = vars(self)[BEHIND][0]
        return held

    @property
    def original_is_there(self) -> bool:
        """Whether it has values: it has none in a model that was saved with the block in its place, and read back."""
        return not any(parameter.is_meta for parameter in self.original.parameters())

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.answer(self, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            held = self.__dict__.get(BEHIND)
            if held is None or (name.startswith("_") and name not in _ASKED_FOR):
                raise
            return getattr(held[0], name)

    def train(self, mode: bool = True) -> Replacement:
        super().train(mode)
        self.original.train(mode)
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Replacement:
        super()._apply(fn, recurse)
        if self.original_is_there:
            self.original._apply(fn, recurse)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        ours = tuple(f"{name}." for name in self._modules)
        own = [name for name in self.original.state_dict() if not name.startswith(ours)]
        found = {name: state_dict.pop(prefix + name) for name in own if prefix + name in state_dict}
        if found:
            self.original.load_state_dict(found, strict=False)
        super()._load_from_state_dict(state_dict, prefix, *rest)


_ASKED_FOR = ("_qkv_same_embed_dim",)
"""Private attributes that torch's own layers look at in the modules they hold."""


class Stateless(Block):
    """Any module of ``[batch, time, dim]`` as a block without a state. It is not told of padding, and gets none in."""

    def __init__(self, module: nn.Module, dim: int) -> None:
        super().__init__(dim)
        self.module = module

    def forward(self, x: Tensor, state: State = None, *, mask: Tensor | None = None) -> tuple[Tensor, State]:
        if mask is not None:
            x = x.masked_fill(~mask.unsqueeze(-1), 0.0)
        y = self.module(x)
        y = y[0] if isinstance(y, tuple) else y
        return (y if mask is None else y.masked_fill(~mask.unsqueeze(-1), 0.0)), None


def sites(module: nn.Module) -> list[Site]:
    """What was put beside, before and after a module, first to last."""
    found = [_within(child) for child in module._modules.values()]
    return [child for child in found if isinstance(child, Site) and not child.stands_for_another]


def _within(child: nn.Module | None) -> Any:
    """The site in a wrapper of PEFT's around it (``modules_to_save``): the copy that belongs to the adapter in use."""
    copies = getattr(child, "modules_to_save", None)
    if isinstance(child, Site) or not isinstance(copies, nn.ModuleDict):
        return child
    wrapper: Any = child
    used = () if getattr(wrapper, "disable_adapters", False) else getattr(wrapper, "active_adapters", ())
    return next((copies[name] for name in used if name in copies), wrapper.original_module)


def copied(block: nn.Module) -> nn.Module:
    """A block with parameters of its own."""
    return copy.deepcopy(block)
