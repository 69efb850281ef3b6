"""Layers of flash-linear-attention as blocks: ``fla_`` and the name of the model there, with the extra ``fla``.

Their fields are those that change what is computed. Heads have the width ``dim / heads`` by default. Other layers of
the library can be adapted with ``layer``, ``zeros``, ``run`` and ``refuse``.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import warnings
from collections.abc import Iterable, Iterator
from typing import Annotated, Any, NamedTuple, TypeAlias

import torch
from pydantic import Field
from torch import Tensor, nn

from ...kernels.triton_runtime import refuse_interpreter
from ...registry import Problem, Unavailable
from ...registry.optional_packages import import_package
from .adapter import Adapted, adapt, cache_argument

Tensors: TypeAlias = "Tensor | tuple[Tensor, ...] | None"


class LayerState(NamedTuple):
    """The entry of a layer in its cache."""

    recurrent: Tensors
    """``[batch, heads, ...]`` float32 each: the state of the recurrence."""
    convolution: Tensors
    """``[batch, channels, width]`` each, in the dtype of the model: the last inputs of the convolutions."""


class Cache:
    """A cache of one layer, with the interface that the layers expect."""

    def __init__(self, state: LayerState | None) -> None:
        self.entry: dict[str, Any] | None = None
        if state is not None:
            self.entry = {"recurrent_state": state.recurrent, "conv_state": state.convolution}

    def __len__(self) -> int:
        return int(self.entry is not None)

    def __getitem__(self, layer_idx: int) -> dict[str, Any] | None:
        return self.entry

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0

    def update(self, **entry: Any) -> dict[str, Any]:
        self.entry = entry
        return entry


def layer(name: str, dim: int, **fields: Any) -> nn.Module:
    """Create the layer ``name`` of the library, of width ``dim``. Raises ``ImportError`` if it is not installed."""
    with _quiet():
        layers = import_package("fla.layers", "flash-linear-attention", "titans-build[fla]")
        cls = getattr(layers, name, None)
        if cls is None:
            raise ImportError(f"needs a flash-linear-attention that has {name}: pip install -U 'titans-build[fla]'")
        cache_argument(cls.forward)
        created: nn.Module = cls(hidden_size=dim, layer_idx=0, **fields)
    return created


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the warnings of the library, such as that there is no GPU, which ``refuse`` reports."""
    logger = logging.getLogger("fla")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def run(layer: nn.Module, x: Tensor, state: LayerState) -> tuple[Tensor, LayerState]:
    """Run a layer on ``x`` [batch, time, dim] after ``state``."""
    return _call(layer, x, Cache(state))


def begin(layer: nn.Module, x: Tensor, state: LayerState) -> tuple[Tensor, LayerState]:
    """Run a layer on its first tokens, with an empty cache."""
    return _call(layer, x, Cache(None))


def run_with_stacked_states(layer: nn.Module, x: Tensor, state: LayerState) -> tuple[Tensor, LayerState]:
    """Run a layer whose recurrent states are stacked ``[count, batch, ...]``, here ``[batch, count, ...]``."""
    assert isinstance(state.recurrent, Tensor)
    stacked = state.recurrent.transpose(0, 1).contiguous()
    y, after = run(layer, x, LayerState(stacked, state.convolution))
    assert isinstance(after.recurrent, Tensor)
    return y, LayerState(after.recurrent.transpose(0, 1), after.convolution)


def _call(layer: nn.Module, x: Tensor, cache: Cache) -> tuple[Tensor, LayerState]:
    if x.is_cpu:
        _interpret()
    # in evaluation mode some layers use kernels without a backward pass
    layer.train(torch.is_grad_enabled())
    try:
        y = layer(x, use_cache=True, **{cache_argument(type(layer).forward): cache})[0]
    except AssertionError as error:  # an unsupported dtype
        raise ValueError(f"{type(layer).__name__} of flash-linear-attention, given {x.dtype}: {error}") from error
    except Exception as error:
        if x.is_cpu and type(error).__module__.startswith("triton.") and (reason := refuse_interpreter()):
            problem = f"{type(layer).__name__} of flash-linear-attention cannot run: {reason}"
            raise Unavailable([Problem("", problem)], "block") from error
        raise
    assert cache.entry is not None
    parts = (cache.entry["recurrent_state"], cache.entry.get("conv_state"))
    return y, LayerState(*(tuple(part) if isinstance(part, list) else part for part in parts))


@functools.cache
def _interpret() -> None:
    """Activate a driver for Triton's interpreter: the autotuner asks for one, and a CPU has none.

    It times no kernel, so that the autotuner chooses the first of its configurations.
    """
    from triton.backends.driver import DriverBase
    from triton.runtime import driver

    class Interpreter(DriverBase):
        @classmethod
        def is_active(cls) -> bool:
            return False  # not to be chosen by Triton

        def get_benchmarker(self) -> Any:
            return lambda kernel_call, quantiles, **_: [0.0 for _ in quantiles]

        def get_current_target(self) -> Any:
            raise RuntimeError("the kernels are not interpreted: set TRITON_INTERPRET=1 before Python starts")

        get_current_device = get_active_torch_device = map_python_to_cpp_type = get_current_target

    try:
        _ = driver.active
    except RuntimeError:  # no GPU
        driver.set_active(Interpreter())


def zeros(layer: Any, rows: int, *recurrent: tuple[int, ...]) -> LayerState:
    """The initial state of a layer, with recurrent states of the given shapes ``[heads, ...]``."""
    weight = next(layer.parameters())
    states = tuple(weight.new_zeros(rows, *shape, dtype=torch.float32) for shape in recurrent)
    convolutions = tuple(
        weight.new_zeros(rows, convolution.in_channels, convolution.kernel_size[0])
        for convolution in layer.children()
        if isinstance(convolution, nn.Conv1d)
    )
    return LayerState(states if len(states) > 1 else states[0], convolutions or None)


def refuse(device: torch.device) -> str | None:
    """The kernels are written in Triton: they run on a GPU, or slowly in Triton's interpreter."""
    if device.type in ("cuda", "xpu", "meta") or os.environ.get("TRITON_INTERPRET") == "1":
        return None
    return (
        f"the kernels of flash-linear-attention run on a GPU, not on {device.type}: build it with device cuda, "
        "or put another block in its place"
    )


Heads = Annotated[int, Field(ge=1, description="number of heads, each with its own state")]
HeadDim = Annotated[int | None, Field(ge=1, description="width of a head's keys; null for dim / heads")]
ExpandValue = Annotated[float, Field(gt=0, le=64, description="width of a head's values relative to its keys")]
OverDim = Annotated[float, Field(gt=0, le=64, description="total width of the values relative to dim")]
Conv = Annotated[int, Field(ge=0, le=64, description="width of the causal convolutions on q, k, v; 0 for none")]
Negative = Annotated[bool, Field(description="step sizes up to 2, which allow negative eigenvalues of the transition")]


def _of_heads(dim: int | None, fields: dict[str, Any]) -> Iterable[tuple[str, str]]:
    """The width of a head, given or ``dim / heads``, and that of its values must be integers."""
    heads, width = fields["heads"], fields.get("head_dim")
    if width is None and dim is not None:
        if dim % heads:
            yield "heads", f"{heads} heads do not divide the width {dim}; head_dim gives them one of their own"
            return
        width = dim // heads
    if width is not None and (width * fields.get("expand_v", 1.0)) % 1:
        yield "expand_v", f"{fields['expand_v']} times {width}, the width of a head, is no whole number"


def _of_dim(dim: int | None, fields: dict[str, Any]) -> Iterable[tuple[str, str]]:
    """``heads`` must divide the widths of all keys and of all values, given as multiples of ``dim``."""
    for name in ("expand_k", "expand_v"):
        if dim is not None and (dim * fields.get(name, 1.0) / fields["heads"]) % 1:
            what = f"{fields['heads']} heads do not divide"
            yield (
                (name, f"{what} {fields[name]} times the width {dim}")
                if name in fields
                else ("heads", f"{what} the width {dim}")
            )
            return


def _matrices(module: Any, rows: int) -> LayerState:
    """A matrix per head, keys by values."""
    heads = getattr(module, "num_v_heads", module.num_heads)
    return zeros(module, rows, (heads, module.head_k_dim, module.head_v_dim))


def _transposed(module: Any, rows: int) -> LayerState:
    """A matrix per head, values by keys."""
    heads = getattr(module, "num_v_heads", module.num_heads)
    return zeros(module, rows, (heads, module.head_v_dim, module.head_k_dim))


def _layer(name: str, dim: int, heads: int, conv: int, **fields: Any) -> nn.Module:
    return layer(name, dim, num_heads=heads, use_short_conv=conv > 0, conv_size=conv, **fields)


def _gated_delta_rule(name: str, cls: str, state: Any, doc: str) -> type[Adapted]:
    """Register a layer with the fields of the gated delta rule."""

    def make(
        dim: int,
        *,
        heads: Heads = 4,
        head_dim: HeadDim = None,
        expand_v: ExpandValue = 1.0,
        conv: Conv = 4,
        negative: Negative = False,
    ) -> nn.Module:
        width = head_dim or dim // heads
        return _layer(cls, dim, heads, conv, head_dim=width, expand_v=expand_v, allow_neg_eigval=negative)

    make.__doc__ = doc
    return adapt(name, state=state, run=run, refuse=refuse, problems=_of_heads)(make)


@adapt("fla_delta_net", state=_matrices, run=run, refuse=refuse, problems=_of_dim)
def delta_net(
    dim: int,
    *,
    heads: Heads = 4,
    expand_k: Annotated[float, Field(gt=0, le=64, description="total width of the keys relative to dim")] = 1.0,
    expand_v: OverDim = 1.0,
    conv: Conv = 4,
    negative: Negative = False,
) -> nn.Module:
    """The delta rule (DeltaNet, arXiv 2406.06484): a matrix per head, updated towards the value of each token."""
    return _layer("DeltaNet", dim, heads, conv, expand_k=expand_k, expand_v=expand_v, allow_neg_eigval=negative)


gated_deltanet = _gated_delta_rule(
    "fla_gated_deltanet",
    "GatedDeltaNet",
    _transposed,
    "The gated delta rule (Gated DeltaNet, arXiv 2412.06464): the delta rule with a decay per head and token.",
)
gated_deltanet_2 = _gated_delta_rule(
    "fla_gdn2",
    "GatedDeltaNet2",
    _matrices,
    "The gated delta rule with gates per feature for decay, erasing and writing.",
)
kimi_delta_attention = _gated_delta_rule(
    "fla_kda",
    "KimiDeltaAttention",
    _transposed,
    "Kimi delta attention (arXiv 2510.26692): the gated delta rule with a decay per feature of the key.",
)


@adapt("fla_gated_deltaproduct", state=_matrices, run=run, refuse=refuse, problems=_of_heads)
def gated_deltaproduct(
    dim: int,
    *,
    heads: Heads = 4,
    head_dim: HeadDim = None,
    expand_v: ExpandValue = 1.0,
    steps: Annotated[int, Field(ge=1, le=16, description="updates per token, each with its own key and value")] = 2,
    conv: Conv = 4,
    negative: Negative = True,
) -> nn.Module:
    """Several updates of the gated delta rule per token (DeltaProduct, arXiv 2502.10297)."""
    width, more = head_dim or dim // heads, dict(num_householder=steps, allow_neg_eigval=negative)
    return _layer("GatedDeltaProduct", dim, heads, conv, head_dim=width, expand_v=expand_v, **more)


@adapt(
    "fla_momentum_deltanet",
    state=lambda module, rows: zeros(module, rows, (2, module.num_v_heads, module.head_k_dim, module.head_v_dim)),
    run=run_with_stacked_states,
    refuse=refuse,
    problems=_of_heads,
)
def momentum_deltanet(
    dim: int,
    *,
    heads: Heads = 4,
    head_dim: HeadDim = None,
    expand_v: ExpandValue = 1.0,
    conv: Conv = 4,
    decayed: Annotated[bool, Field(description="compute the error after the decay of the memory, not before")] = True,
) -> nn.Module:
    """The momentum delta rule (arXiv 2605.05838): the gated delta rule with momentum."""
    width = head_dim or dim // heads
    return _layer("MomentumDeltaNet", dim, heads, conv, head_dim=width, expand_v=expand_v, use_p_times_alpha=decayed)


@adapt("fla_gla", state=_transposed, run=run, refuse=refuse, problems=_of_dim)
def gated_linear_attention(
    dim: int,
    *,
    heads: Heads = 4,
    expand_k: Annotated[float, Field(gt=0, le=64, description="total width of the keys relative to dim")] = 0.5,
    expand_v: OverDim = 1.0,
    conv: Conv = 0,
) -> nn.Module:
    """Gated linear attention (arXiv 2312.06635): a matrix per head, with a decay per feature of the key."""
    return _layer("GatedLinearAttention", dim, heads, conv, expand_k=expand_k, expand_v=expand_v)


@adapt(
    "fla_gsa",
    state=lambda module, rows: zeros(
        module,
        rows,
        (module.num_heads, module.head_k_dim, module.num_slots),
        (module.num_heads, module.num_slots, module.head_v_dim),
    ),
    run=run,
    refuse=refuse,
    problems=_of_dim,
)
def gated_slot_attention(
    dim: int,
    *,
    heads: Heads = 4,
    slots: Annotated[int, Field(ge=1, description="number of slots per head, each with a key and a value")] = 64,
    conv: Conv = 0,
) -> nn.Module:
    """Gated slot attention (arXiv 2409.07146): softmax attention over a fixed number of decaying slots."""
    return _layer("GatedSlotAttention", dim, heads, conv, num_slots=slots)


@adapt(
    "fla_hgrn2",
    state=lambda module, rows: zeros(module, rows, (module.num_heads, module.head_i_dim, module.head_f_dim)),
    run=run,
    refuse=refuse,
    problems=_of_dim,
)
def hgrn2(dim: int, *, heads: Heads = 4, conv: Conv = 0) -> nn.Module:
    """HGRN2 (arXiv 2404.07904): a gated recurrence with a matrix per head as state."""
    return _layer("HGRN2Attention", dim, heads, conv, expand_ratio=None)


def _of_inner(dim: int | None, fields: dict[str, Any]) -> Iterable[tuple[str, str]]:
    if dim is not None and dim * fields["expand"] % fields["heads"]:
        yield "heads", f"{fields['heads']} heads do not divide the inner width {dim * fields['expand']}"


def _of_state_space(module: Any, rows: int) -> LayerState:
    recurrent, convolutions = zeros(module, rows, (module.num_heads, module.head_dim, module.ssm_state_size))
    assert isinstance(convolutions, tuple)
    return LayerState(recurrent, convolutions[0])


@adapt("fla_mamba2", state=_of_state_space, run=begin, step=run, refuse=refuse, problems=_of_inner)
def mamba2(
    dim: int,
    *,
    heads: Heads = 8,
    expand: Annotated[int, Field(ge=1, le=64, description="inner width relative to dim; a multiple of heads")] = 2,
    state_size: Annotated[int, Field(ge=1, description="size of the state of each inner feature")] = 64,
    conv: Annotated[int, Field(ge=2, le=64, description="width of the causal convolution")] = 4,
) -> nn.Module:
    """Mamba-2 (arXiv 2405.21060): a state space model with one decay per head. Continues token by token."""
    return layer(
        "Mamba2",
        dim,
        num_heads=heads,
        head_dim=dim * expand // heads,
        expand=expand,
        state_size=state_size,
        conv_kernel=conv,
    )
