"""Recurrent mixers of Hugging Face transformers as blocks: ``hf_...``, with the extra ``hf``.

They are implemented in PyTorch and run on any device. Other mixers of the library whose cache contains a convolution
and a recurrence can be adapted with ``mixer`` and ``run``.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
from collections.abc import Iterable
from typing import Annotated, Any, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

from ...registry import SameWeights
from ...registry.optional_packages import import_package
from .adapter import adapt, cache_argument

INSTALL = "titans-build[hf]"


class MixerState(NamedTuple):
    """The states of a mixer in its cache."""

    convolution: Tensor
    """``[batch, channels, width]``, in the dtype of the model: the last inputs of the convolution."""
    recurrent: Tensor
    """``[batch, heads, ...]`` float32: the state of the recurrence."""


class Cache:
    """A cache of one layer, with the interface that mixers expect. It modifies no tensor."""

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
        """Append ``conv_states`` [batch, channels, time] to the last inputs. Return both, and keep the end."""
        width = self.convolution.shape[-1]
        inputs = torch.cat([self.convolution, conv_states], dim=-1)
        self.convolution = inputs[..., -width:].clone()
        return inputs

    def update_recurrent_state(self, recurrent_states: Tensor, layer_idx: int, **_: Any) -> Tensor:
        self.recurrent = recurrent_states
        return recurrent_states


def run(mixer: Any, x: Tensor, state: MixerState) -> tuple[Tensor, MixerState]:
    """Run a mixer on ``x`` [batch, time, dim] after ``state``, which may be modified."""
    cache = Cache(state)
    named = {cache_argument(type(mixer).forward): cache}
    if x.shape[1] > 1 or not torch.is_grad_enabled():
        return mixer(x, **named), MixerState(cache.convolution, cache.recurrent)

    def copy_state(tensor: Tensor) -> Tensor:
        return tensor.clone() if tensor.data_ptr() == state.recurrent.data_ptr() else tensor

    # with a single token the state is modified in place, and backward needs the one before
    with torch.autograd.graph.saved_tensors_hooks(copy_state, lambda tensor: tensor):
        y = mixer(x, **named)
    return y, MixerState(cache.convolution, cache.recurrent)


def _state(convolution: nn.Conv1d, rows: int, recurrent: tuple[int, ...]) -> MixerState:
    weight = convolution.weight
    return MixerState(
        weight.new_zeros(rows, convolution.in_channels, convolution.kernel_size[0]),
        weight.new_zeros(rows, *recurrent, dtype=torch.float32),
    )


def mixer(model: str, name: str, **config: Any) -> nn.Module:
    """Create the mixer class ``name`` of the model type ``model``, initialized as in a model with one layer.

    Raises ``ImportError`` if transformers is not installed, does not have the model, or has a mixer without a cache.
    """
    # not with AutoConfig, where flash-linear-attention replaces some models by its own
    configurations = _module(f"{model}.configuration_{model}")
    (kind,) = (kind for kind in vars(configurations).values() if getattr(kind, "model_type", None) == model)
    configuration = kind(num_hidden_layers=1, **config)
    created: nn.Module = _on_any_device(model, name)(configuration, layer_idx=0)
    # some parameters of a mixer are initialized by the model that contains it
    container = _model_class(model)(configuration)
    container.add_module("mixer", created)
    container.initialize_weights()
    return created


def _module(name: str) -> Any:
    return import_package(f"transformers.models.{name}", "transformers", INSTALL)


def _model_class(model: str) -> Any:
    """The base class of the models of this type, which initializes their modules."""
    modeling = _module(f"{model}.modeling_{model}")
    base = import_package("transformers", "transformers", INSTALL).PreTrainedModel
    return next(
        cls
        for cls in vars(modeling).values()
        if isinstance(cls, type) and issubclass(cls, base) and cls.__module__ == modeling.__name__
    )


@functools.cache
def _on_any_device(model: str, name: str) -> Any:
    """The class of the mixer, with the functions in PyTorch on a CPU.

    Where flash-linear-attention or mamba-ssm is installed, transformers wraps these functions, and calls kernels that
    need a GPU in their place, on a CPU as well. On a CPU the forward method is therefore that of a second copy of the
    module, in which the functions are unwrapped.
    """
    modeling = _module(f"{model}.modeling_{model}")
    base: Any = getattr(modeling, name)
    cache_argument(base.forward)
    spec = importlib.util.find_spec(modeling.__name__)
    assert spec is not None and spec.loader is not None
    copy = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(copy)
    for attribute, value in list(vars(copy).items()):
        if inspect.isfunction(value):
            setattr(copy, attribute, inspect.unwrap(value))
    in_pytorch = getattr(copy, name)

    class Mixer(base):
        @functools.wraps(base.forward)
        def forward(self, hidden_states: Tensor, **given: Any) -> Any:
            cls = in_pytorch if hidden_states.is_cpu else base
            return cls.forward(self, hidden_states, **given)

    return Mixer


Heads = Annotated[int, Field(ge=1, description="number of heads, each with its own state")]
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
    """The gated delta rule (arXiv 2412.06464) of Qwen3-Next in transformers, in PyTorch.

    A matrix per head, with a decay per head and token, updated by the delta rule. The recurrence is computed in float32
    for all dtypes of the model.
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
    expand: Annotated[int, Field(ge=1, le=64, description="inner width relative to dim; a multiple of heads")] = 2,
    state_size: Annotated[int, Field(ge=1, description="size of the state of each inner feature")] = 64,
    conv: Conv = 4,
    chunk: Annotated[int, SameWeights(), Field(ge=1, description="tokens per chunk; does not change the result")] = 64,
) -> nn.Module:
    """Mamba-2 (arXiv 2405.21060) of transformers, in PyTorch: a state space model with one decay per head.

    The recurrence is computed in float32 for all dtypes of the model.
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
