"""Mixers of Hugging Face transformers that keep a recurrent state, as blocks: ``hf_...``, with the extra ``hf``.

They are plain PyTorch and run anywhere. Any other mixer of that library that keeps its state in a cache of one
convolution and one recurrence is adapted likewise: ``adapt(..., state=..., run=run)``.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Iterable
from typing import Annotated, Any, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

from .adapter import adapt
from .package import package

INSTALL = "titans-build[hf]"


class MixerState(NamedTuple):
    """What a mixer keeps in its cache."""

    convolution: Tensor
    """``[batch, channels, width]``: the last inputs of the convolution, in the model's dtype."""
    recurrent: Tensor
    """``[batch, heads, ...]`` float32: of the recurrence."""


class Cache:
    """A cache of one layer, as mixers use one. It writes into no tensor itself."""

    def __init__(self, state: MixerState) -> None:
        self.convolution, self.recurrent = state

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> Tensor:
        return self.convolution

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> Tensor:
        return self.recurrent

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int = 0) -> bool:
        return True

    def is_recording_past(self, layer_idx: int) -> bool:
        return False

    def update_conv_state(self, conv_states: Tensor, layer_idx: int, **_: Any) -> Tensor:
        """Put ``conv_states`` [batch, channels, time] behind what was kept, and keep the last of both."""
        width = self.convolution.shape[-1]
        seen = torch.cat([self.convolution, conv_states], dim=-1)
        self.convolution = seen[..., -width:].clone()
        return seen

    def update_recurrent_state(self, recurrent_states: Tensor, layer_idx: int, **_: Any) -> Tensor:
        self.recurrent = recurrent_states
        return recurrent_states


def run(mixer: Any, x: Tensor, state: MixerState) -> tuple[Tensor, MixerState]:
    """A mixer on ``x`` [batch, time, dim] after ``state``, which may be written over."""
    cache = Cache(state)
    if x.shape[1] > 1 or not torch.is_grad_enabled():
        return mixer(x, cache_params=cache), MixerState(cache.convolution, cache.recurrent)

    def kept(tensor: Tensor) -> Tensor:
        return tensor.clone() if tensor.data_ptr() == state.recurrent.data_ptr() else tensor

    # a single token's state is written over, and backward needs the one before
    with torch.autograd.graph.saved_tensors_hooks(kept, lambda tensor: tensor):
        y = mixer(x, cache_params=cache)
    return y, MixerState(cache.convolution, cache.recurrent)


def _state(convolution: nn.Conv1d, rows: int, recurrent: tuple[int, ...]) -> MixerState:
    weight = convolution.weight
    return MixerState(
        weight.new_zeros(rows, convolution.in_channels, convolution.kernel_size[0]),
        weight.new_zeros(rows, *recurrent, dtype=torch.float32),
    )


def mixer(model: str, name: str, **config: Any) -> nn.Module:
    """The mixer class ``name`` of the model type ``model``, made and initialised as in such a model of one layer.

    Raises ``ImportError`` that says how to install transformers where it, or the model in it, is missing.
    """
    # not by AutoConfig, where flash-linear-attention puts its own models in the place of some of these
    configurations = package(f"transformers.models.{model}.configuration_{model}", "transformers", INSTALL)
    (kind,) = (kind for kind in vars(configurations).values() if getattr(kind, "model_type", None) == model)
    configuration = kind(num_hidden_layers=1, **config)
    made: nn.Module = _anywhere(model, name)(configuration, layer_idx=0)
    # some of what a mixer has is left to the model to initialise
    made.apply(_model(model)(configuration)._init_weights)
    return made


def _model(model: str) -> Any:
    """The class that models of this type are made of, which knows how their parts are initialised."""
    library = package("transformers", "transformers", INSTALL)
    modules = _modeling(model)
    return next(
        kind
        for kind in vars(modules).values()
        if isinstance(kind, type) and issubclass(kind, library.PreTrainedModel) and kind.__module__ == modules.__name__
    )


def _modeling(model: str) -> Any:
    return package(f"transformers.models.{model}.modeling_{model}", "transformers", INSTALL)


@functools.cache
def _anywhere(model: str, name: str) -> Any:
    """The mixer's class, which runs on PyTorch alone where there is no GPU.

    With flash-linear-attention or mamba-ssm installed, the functions that a mixer calls are theirs, on a CPU as well,
    where those do not run. Each of them wraps the one in PyTorch.
    """
    found: Any = getattr(_modeling(model), name)
    forward = inspect.unwrap(found.forward)
    unwrapped = {
        name: inspect.unwrap(value) if inspect.isfunction(value) else value
        for name, value in forward.__globals__.items()
    }
    plain = types.FunctionType(forward.__code__, unwrapped, name, forward.__defaults__, forward.__closure__)

    class Mixer(found):
        def forward(self, hidden_states: Tensor, **given: Any) -> Any:
            run = plain if hidden_states.is_cpu else found.forward
            return run(self, hidden_states, **given)

    return Mixer


Heads = Annotated[int, Field(ge=1, description="heads, each with a state of its own")]
KeyDim = Annotated[int | None, Field(ge=1, description="width of a head's keys; null for dim / heads")]
Conv = Annotated[int, Field(ge=2, le=64, description="width of the causal convolution")]


def _of_heads(dim: int | None, fields: dict[str, Any]) -> Iterable[tuple[str, str]]:
    shared = None in (fields["key_dim"], fields["value_dim"])
    if dim is not None and shared and dim % fields["heads"]:
        yield "heads", f"{fields['heads']} heads do not divide the width {dim}; give key_dim and value_dim"


def _of_inner(dim: int | None, fields: dict[str, Any]) -> Iterable[tuple[str, str]]:
    if dim is not None and dim * fields["expand"] % fields["heads"]:
        yield "heads", f"{fields['heads']} heads do not divide the inner width {dim * fields['expand']}"


@adapt(
    "hf_gated_deltanet",
    state=lambda mixer, rows: _state(mixer.conv1d, rows, (mixer.num_v_heads, mixer.head_k_dim, mixer.head_v_dim)),
    run=run,
    problems=_of_heads,
)
def gated_deltanet(
    dim: int,
    *,
    heads: Heads = 4,
    key_dim: KeyDim = None,
    value_dim: Annotated[int | None, Field(ge=1, description="width of a head's values; null for dim / heads")] = None,
    conv: Conv = 4,
) -> nn.Module:
    """The gated delta rule (arXiv 2412.06464) as transformers has it for Qwen3-Next, in plain PyTorch.

    A matrix per head that forgets (a gate per head and token), learns by the delta rule, and is read. Its recurrence is
    computed in float32 whatever the model's dtype.
    """
    return mixer(
        "qwen3_next",
        "Qwen3NextGatedDeltaNet",
        hidden_size=dim,
        layer_types=["linear_attention"],
        linear_num_key_heads=heads,
        linear_num_value_heads=heads,
        linear_key_head_dim=key_dim or dim // heads,
        linear_value_head_dim=value_dim or dim // heads,
        linear_conv_kernel_dim=conv,
    )


@adapt(
    "hf_mamba2",
    state=lambda mixer, rows: _state(mixer.conv1d, rows, (mixer.num_heads, mixer.head_dim, mixer.ssm_state_size)),
    run=run,
    problems=_of_inner,
)
def mamba2(
    dim: int,
    *,
    heads: Heads = 8,
    expand: Annotated[int, Field(ge=1, le=64, description="inner width over dim; heads divide the inner width")] = 2,
    state_size: Annotated[int, Field(ge=1, description="numbers of state for each inner feature")] = 64,
    conv: Conv = 4,
    chunk: Annotated[int, Field(ge=1, description="tokens computed at once; no part of the function")] = 64,
) -> nn.Module:
    """Mamba-2 (arXiv 2405.21060) as transformers has it, in plain PyTorch: a state space with one decay per head.

    Its recurrence is computed in float32 whatever the model's dtype.
    """
    return mixer(
        "mamba2",
        "Mamba2Mixer",
        hidden_size=dim,
        num_heads=heads,
        head_dim=expand * dim // heads,
        expand=expand,
        state_size=state_size,
        n_groups=1,
        conv_kernel=conv,
        chunk_size=chunk,
    )
