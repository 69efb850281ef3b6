"""Mixers of mamba-ssm as blocks: ``mamba_ssm_...``, with that package, which needs a GPU.

They keep their state in tensors that are handed to them and written over, and go on from a state one token at a time.
Any other module with ``allocate_inference_cache`` and ``forward(x, inference_params=...)`` is adapted likewise:
``adapt(..., state=fresh, run=begin, step=step)``.
"""

from __future__ import annotations

from collections.abc import Iterable
from types import SimpleNamespace
from typing import Annotated, Any, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

from .adapter import adapt
from .package import package


class MixerState(NamedTuple):
    """What a mixer writes over, in the model's dtype."""

    convolution: Tensor
    """``[batch, channels, width]``: the last inputs of the convolution."""
    recurrent: Tensor
    """``[batch, heads, ...]``: of the state space."""


def fresh(mixer: Any, rows: int) -> MixerState:
    """Zeros, in the shapes that the mixer says."""
    return MixerState(*mixer.allocate_inference_cache(rows, 1))


def begin(mixer: Any, x: Tensor, state: MixerState) -> tuple[Tensor, MixerState]:
    """A mixer on its first tokens ``[batch, time, dim]``; ``state`` is written over."""
    return _call(mixer, x, state, 0)


def step(mixer: Any, x: Tensor, state: MixerState) -> tuple[Tensor, MixerState]:
    """A mixer on one token ``[batch, 1, dim]`` after ``state``, which is written over."""
    return _call(mixer, x, state, 1)


def _call(mixer: Any, x: Tensor, state: MixerState, read: int) -> tuple[Tensor, MixerState]:
    known = SimpleNamespace(
        key_value_memory_dict={mixer.layer_idx: tuple(state)}, seqlen_offset=read, batch_size_offset=0
    )
    return mixer(x, inference_params=known), state


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
    head_dim: Annotated[int, Field(ge=1, description="width of a head; divides the inner width")] = 64,
    expand: Annotated[int, Field(ge=1, le=64, description="inner width over dim")] = 2,
    state_size: Annotated[int, Field(ge=1, description="numbers of state for each inner feature")] = 128,
    conv: Annotated[int, Field(ge=2, le=4, description="width of the causal convolution")] = 4,
) -> nn.Module:
    """Mamba-2 (arXiv 2405.21060) as its authors have it: a state space with one decay per head."""
    mixer = package("mamba_ssm", "mamba-ssm", "mamba-ssm causal-conv1d").Mamba2
    made: nn.Module = mixer(d_model=dim, d_state=state_size, d_conv=conv, expand=expand, headdim=head_dim, layer_idx=0)
    return made
