"""Mixers of the package mamba-ssm as blocks: ``mamba_ssm_...``. They need a GPU.

They modify the tensors of their state in place, and continue from a state one token at a time. Other modules with
``allocate_inference_cache`` and ``forward(x, inference_params=...)`` can be adapted with ``fresh``, ``begin`` and
``step``.
"""

from __future__ import annotations

from collections.abc import Iterable
from types import SimpleNamespace
from typing import Annotated, Any, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

from ...registry.optional_packages import import_package
from .adapter import adapt


class MixerState(NamedTuple):
    """The tensors that a mixer modifies, in the dtype of the model."""

    convolution: Tensor
    """``[batch, channels, width]``: the last inputs of the convolution."""
    recurrent: Tensor
    """``[batch, heads, ...]``: the state of the state space model."""


def fresh(mixer: Any, rows: int) -> MixerState:
    """The initial state, with the shapes that the mixer declares."""
    return MixerState(*mixer.allocate_inference_cache(rows, 1))


def begin(mixer: Any, x: Tensor, state: MixerState) -> tuple[Tensor, MixerState]:
    """Run a mixer on its first tokens ``[batch, time, dim]``. ``state`` is modified."""
    return _call(mixer, x, state, 0)


def step(mixer: Any, x: Tensor, state: MixerState) -> tuple[Tensor, MixerState]:
    """Run a mixer on one token ``[batch, 1, dim]`` after ``state``, which is modified."""
    return _call(mixer, x, state, 1)


def _call(mixer: Any, x: Tensor, state: MixerState, offset: int) -> tuple[Tensor, MixerState]:
    cache = {mixer.layer_idx: tuple(state)}
    params = SimpleNamespace(key_value_memory_dict=cache, seqlen_offset=offset, batch_size_offset=0)
    return mixer(x, inference_params=params), state


def _refuse(device: torch.device) -> str | None:
    if device.type in ("cuda", "meta"):
        return None
    return (
        f"the kernels of mamba-ssm run on a GPU, not on {device.type}: build it with device cuda, or put another block "
        "in its place (hf_mamba2 runs anywhere)"
    )


def _of_inner(dim: int | None, fields: dict[str, Any]) -> Iterable[tuple[str, str]]:
    if dim is not None and dim * fields["expand"] % fields["head_dim"]:
        yield "head_dim", f"{fields['head_dim']} does not divide the inner width {dim * fields['expand']}"


@adapt("mamba_ssm_mamba2", state=fresh, run=begin, step=step, refuse=_refuse, problems=_of_inner)
def mamba2(
    dim: int,
    *,
    head_dim: Annotated[int, Field(ge=1, description="width of a head, a divisor of the inner width")] = 64,
    expand: Annotated[int, Field(ge=1, le=64, description="inner width relative to dim")] = 2,
    state_size: Annotated[int, Field(ge=1, description="size of the state of each inner feature")] = 128,
    conv: Annotated[int, Field(ge=2, le=4, description="width of the causal convolution")] = 4,
) -> nn.Module:
    """Mamba-2 (arXiv 2405.21060) by its authors: a state space model with one decay per head."""
    cls = import_package("mamba_ssm", "mamba-ssm", "mamba-ssm causal-conv1d").Mamba2
    created: nn.Module = cls(d_model=dim, d_state=state_size, d_conv=conv, expand=expand, headdim=head_dim, layer_idx=0)
    return created
