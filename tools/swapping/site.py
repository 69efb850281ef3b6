"""The modules that a swap installs in a model: a block beside, before or after another module, or in its place."""

from __future__ import annotations

import copy
import secrets
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from ...blocks import Block, materialize
from ...blocks.block import with_parameters
from ...blocks.combinators import Layer
from ...blocks.documents import run_documents
from ...blocks.layers import RMSNorm
from ...blocks.state import State
from ...kernels.documents import Documents
from ...registry import create, is_block, show
from .adapter import ORIGINAL, Adapter, SwapError
from .infer import device_and_dtype
from .replay import Replay

BlockSpec = str | dict[str, Any] | list[Any] | nn.Module | Callable[[int], nn.Module]
"""The description of a block, a built module, or a function from the width to one."""

WHEN_MADE: list[Callable[[], object]] = []
"""Called when a site is made, copied or unpickled."""


class Result(NamedTuple):
    """What a site leaves after one call."""

    state: State
    rows: int
    time: int
    device: torch.device
    dtype: torch.dtype
    replays: tuple[Replay, ...]
    """What was read; in two parts if the call was longer than ``REACH``. Empty if it was not kept."""


class Site(nn.Module):
    """A block in another model. It keeps no state: ``call.ModelCall`` passes the state of each call.

    ``path``: of the module it was swapped into. ``key``: identifies its states in a cache. ``spec``: the block's
    description with every field given; ``None`` for a block that was given as a module. ``plan``: of the swap that
    installed it. ``order``: greater than those of the sites that were in the model then.
    """

    plan: Any  # plan.Plan, which this file cannot import
    order: int = 0

    def __init__(self, block: Block, path: str, how: str, adapter: Adapter, spec: Any) -> None:
        super().__init__()
        self.block = block
        self.path, self.how, self.adapter, self.spec = path, how, adapter, spec
        self.key = secrets.token_hex(8)
        for call in WHEN_MADE:
            call()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for call in WHEN_MADE:
            call()

    def forward(self, x: Any) -> Any:
        """The identity, so that a container that calls all of its children in turn is unchanged."""
        return x

    def run(
        self, x: Tensor, state: State, mask: Tensor | None, documents: Documents | None = None
    ) -> tuple[Tensor, State]:
        """The block on ``x`` [batch, time, dim], in the dtype of its parameters, and the state after it."""
        if documents is None:
            y, after = self.block(self._cast(x), state, mask=mask)
        else:
            y, after = self.block(self._cast(x), state, mask=mask, documents=documents)
        if y.shape != x.shape:
            raise SwapError(f"{self.path}: the block made {list(y.shape)} of {list(x.shape)}: expected the same shape")
        return y, after

    def advance(self, x: Tensor, state: State, mask: Tensor | None) -> State:
        """The state after ``x``."""
        return self.run(x, state, mask)[1]

    def _cast(self, x: Tensor) -> Tensor:
        parameter = next(self.block.parameters(), None)
        if parameter is None or torch.is_autocast_enabled(x.device.type):
            return x
        return x.to(parameter.dtype)

    def extra_repr(self) -> str:
        return f"how={self.how!r}"


class Gated(Site):
    """``gate * block(norm(x))``, which is added to another tensor: zero while the gate is zero."""

    def __init__(self, block: Block, path: str, how: str, adapter: Adapter, spec: Any, gate: float) -> None:
        super().__init__(block, path, how, adapter, spec)
        like = next(block.parameters(), torch.empty(0))
        with torch.device(like.device):
            self.norm = RMSNorm(block.dim).to(like.dtype)
            self.gate = nn.Parameter(torch.full((block.dim,), gate, dtype=like.dtype))
        self.norm.reset_parameters()

    @with_parameters
    def run(
        self, x: Tensor, state: State, mask: Tensor | None, documents: Documents | None = None
    ) -> tuple[Tensor, State]:
        y, after = super().run(self.norm(self._cast(x))[0], state, mask, documents)
        return self.gate * y, after


class Replacement(Site):
    """A block in the place of another module, which is kept outside the model's tree until ``unswap``.

    Attributes that callers read (``layer_idx``, ``batch_first``) are the original module's. The original takes its own
    weights from a state dict that has them, and ``restored`` moves it to where the model is by then.
    """

    def __init__(
        self, block: Block, path: str, adapter: Adapter, spec: Any, module: nn.Module, call: Callable[..., Any]
    ) -> None:
        """``call``: ``call.call_replacement``, which this file cannot import."""
        super().__init__(block, path, "replace", adapter, spec)
        self.__dict__[ORIGINAL], self.call = (module,), call
        self.register_load_state_dict_pre_hook(_load_original)
        device, dtype = device_and_dtype(module, block)
        self.register_buffer("follows", torch.empty(0, device=device, dtype=dtype), persistent=False)

    follows: Tensor
    """Empty: moved with the model to other devices and dtypes."""

    @property
    def original(self) -> nn.Module:
        module: nn.Module = vars(self)[ORIGINAL][0]
        return module

    @property
    def original_has_values(self) -> bool:
        """False in a model that was saved after the swap, and loaded."""
        return not any(parameter.is_meta for parameter in self.original.parameters())

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.call(self, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            held = self.__dict__.get(ORIGINAL)
            # torch's encoder layers read one private attribute of their attention
            if held is None or (name.startswith("_") and name != "_qkv_same_embed_dim"):
                raise
            return getattr(held[0], name)

    def train(self, mode: bool = True) -> Replacement:
        super().train(mode)
        self.original.train(mode)
        return self

    def restored(self) -> nn.Module:
        """The original module, on the device and in the dtype that the model has now."""
        now, wanted = device_and_dtype(self.original, self), (self.follows.device, self.follows.dtype)
        if self.original_has_values and not self.follows.is_meta and now != wanted:
            self.original.to(*wanted)
        return self.original


def _load_original(site: Any, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
    """Before a replacement loads its state dict: give the original module the weights that are its own."""
    ours = tuple(f"{name}." for name, _ in site.named_children())
    names = [name for name in site.original.state_dict() if not name.startswith(ours)]
    found = {name: state_dict.pop(prefix + name) for name in names if prefix + name in state_dict}
    if found:
        site.original.load_state_dict(found, strict=False)


class Stateless(Block):
    """Any module of ``[batch, time, dim]`` as a block without a state. Padding is zero in its input and its output."""

    def __init__(self, module: nn.Module, dim: int) -> None:
        super().__init__(dim)
        self.module = module

    def forward(
        self, x: Tensor, state: State = None, *, mask: Tensor | None = None, documents: Documents | None = None
    ) -> tuple[Tensor, State]:
        if documents is not None:
            return run_documents(self._each, documents, [x], None, mask, self.init_state)
        padding = None if mask is None else ~mask.unsqueeze(-1)
        y = self.module(x if padding is None else x.masked_fill(padding, 0.0))
        y = y[0] if isinstance(y, tuple) else y
        return y if padding is None else y.masked_fill(padding, 0.0), None

    def _each(self, x: Tensor, state: State, mask: Tensor | None) -> tuple[Tensor, State]:
        """Rows with padding at their end, each without it: the module may look ahead."""
        if mask is None:
            return self(x)
        lengths = mask.sum(1).tolist()
        rows = [pad(self(x[i : i + 1, :n])[0], (0, 0, 0, x.shape[1] - n)) for i, n in enumerate(lengths)]
        return torch.cat(rows), None


def gated_sites(module: nn.Module, *hows: str) -> list[Gated]:
    """The blocks beside, before or after a module, in the order of their swaps."""
    found = [in_use(child) for name, child in module.named_children() if name.startswith("titans")]
    return [site for site in found if isinstance(site, Gated) and site.how in hows]


def sites_in(model: nn.Module, at: str = "") -> Iterator[tuple[str, Site]]:
    """The sites in a model, and in the modules that some of them replaced, each with the path of the module that its
    block was swapped into."""
    wrapped: tuple[str, ...] = ()
    for name, module in model.named_modules(prefix=at):
        site = in_use(module)
        if isinstance(site, Site) and not name.startswith(wrapped):
            if site is not module:  # PEFT's wrapper, which contains copies of the site
                wrapped += (f"{name}.",)
            yield name if site.how == "replace" else name.rpartition(".")[0], site
            if isinstance(site, Replacement):
                yield from sites_in(site.original, name)


def in_use(child: nn.Module) -> Any:
    """The site in PEFT's wrapper around it (``modules_to_save``): the copy that belongs to the active adapter."""
    copies = getattr(child, "modules_to_save", None)
    if isinstance(child, Site) or not isinstance(copies, nn.ModuleDict):
        return child
    wrapper: Any = child
    active = () if getattr(wrapper, "disable_adapters", False) else getattr(wrapper, "active_adapters", ())
    return next((copies[name] for name in active if name in copies), wrapper.original_module)


def make_block(
    spec: BlockSpec, dim: int, device: torch.device, dtype: torch.dtype, seed: int | None, *, layer: bool, meta: bool
) -> Block:
    """The block for one place. A built module is copied.

    ``layer``: it replaces a whole layer, so a description is of a pre-normed residual layer. ``meta``: a description
    becomes a block on the meta device, without values. Raises ``RecipeError`` or ``SwapError``.
    """
    block: Any
    if isinstance(spec, str | dict | list):
        with torch.device("meta"):
            block = Layer(dim, of=spec if isinstance(spec, list) else [spec]) if layer else create(spec, dim=dim)
        if meta or device.type == "meta":
            return block.to(dtype=dtype)
        materialize(block, device, dtype, seed)
        return block
    # a dry run leaves torch's own generator as it was
    with torch.random.fork_rng([], enabled=seed is not None or meta):
        if seed is not None:
            torch.manual_seed(seed)
        block = copy.deepcopy(spec) if isinstance(spec, nn.Module) else spec(dim)
    if not isinstance(block, nn.Module):
        raise SwapError(f"block: the function returned {show(block)} for the width {dim}: expected a module")
    if not is_block(block):
        block = Stateless(block, dim)
    if block.dim != dim:
        raise SwapError(f"block: {type(block).__name__} is of dim {block.dim}, expected {dim}")
    return block.to(device=device, dtype=dtype)
