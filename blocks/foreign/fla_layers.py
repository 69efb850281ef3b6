"""Layers of flash-linear-attention as blocks: ``fla_`` and its own name for the model, with the extra ``fla``.

Their fields are those that change what is computed. Heads are as wide as ``dim / heads`` unless said otherwise.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any

from pydantic import Field
from torch import nn

from .adapter import adapt
from .fla import LayerState, begin, layer, refuse, run, run_with_stacked_states, zeros

Heads = Annotated[int, Field(ge=1, description="heads, each with a state of its own")]
HeadDim = Annotated[int | None, Field(ge=1, description="width of a head's keys; null for dim / heads")]
ExpandValue = Annotated[float, Field(gt=0, le=64, description="width of a head's values over that of its keys")]
OverDim = Annotated[float, Field(gt=0, le=64, description="width of all heads' values over dim")]
Conv = Annotated[int, Field(ge=0, le=64, description="width of the causal convolutions on q, k, v; 0 for none")]
Negative = Annotated[bool, Field(description="steps of up to 2, with which a state can be turned to its opposite")]


def _of_heads(dim: int | None, fields: dict[str, Any]) -> Iterable[tuple[str, str]]:
    """Heads of a width of their own, or of an equal share of ``dim``, and values of a whole number of features."""
    heads, width = fields["heads"], fields.get("head_dim")
    if width is None and dim is not None:
        if dim % heads:
            yield "heads", f"{heads} heads do not divide the width {dim}; head_dim gives them one of their own"
            return
        width = dim // heads
    if width is not None and (width * fields.get("expand_v", 1.0)) % 1:
        yield "expand_v", f"{fields['expand_v']} times {width}, the width of a head, is no whole number"


def _of_dim(dim: int | None, fields: dict[str, Any]) -> Iterable[tuple[str, str]]:
    """Heads that divide the widths of all keys and of all values, which are given over ``dim``."""
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


def _convolution(conv: int) -> dict[str, Any]:
    return {"use_short_conv": conv > 0, "conv_size": conv}


@adapt("fla_delta_net", state=_matrices, run=run, refuse=refuse, problems=_of_dim)
def delta_net(
    dim: int,
    *,
    heads: Heads = 4,
    expand_k: Annotated[float, Field(gt=0, le=64, description="width of all heads' keys over dim")] = 1.0,
    expand_v: OverDim = 1.0,
    conv: Conv = 4,
    negative: Negative = False,
) -> nn.Module:
    """The delta rule (DeltaNet, arXiv 2406.06484): a matrix per head, corrected towards each token's value."""
    return layer(
        "DeltaNet",
        dim,
        num_heads=heads,
        expand_k=expand_k,
        expand_v=expand_v,
        allow_neg_eigval=negative,
        **_convolution(conv),
    )


@adapt("fla_gated_deltanet", state=_transposed, run=run, refuse=refuse, problems=_of_heads)
def gated_deltanet(
    dim: int,
    *,
    heads: Heads = 4,
    head_dim: HeadDim = None,
    expand_v: ExpandValue = 1.0,
    conv: Conv = 4,
    negative: Negative = False,
) -> nn.Module:
    """The gated delta rule (Gated DeltaNet, arXiv 2412.06464): the delta rule, and a gate by which a head forgets."""
    return layer(
        "GatedDeltaNet",
        dim,
        num_heads=heads,
        head_dim=head_dim or dim // heads,
        expand_v=expand_v,
        allow_neg_eigval=negative,
        **_convolution(conv),
    )


@adapt("fla_gated_deltaproduct", state=_matrices, run=run, refuse=refuse, problems=_of_heads)
def gated_deltaproduct(
    dim: int,
    *,
    heads: Heads = 4,
    head_dim: HeadDim = None,
    expand_v: ExpandValue = 1.0,
    steps: Annotated[int, Field(ge=1, le=16, description="keys and values that each token writes")] = 2,
    conv: Conv = 4,
    negative: Negative = True,
) -> nn.Module:
    """Several steps of the gated delta rule for each token (DeltaProduct, arXiv 2502.10297)."""
    return layer(
        "GatedDeltaProduct",
        dim,
        num_heads=heads,
        head_dim=head_dim or dim // heads,
        expand_v=expand_v,
        num_householder=steps,
        allow_neg_eigval=negative,
        **_convolution(conv),
    )


@adapt("fla_gdn2", state=_matrices, run=run, refuse=refuse, problems=_of_heads)
def gated_deltanet_2(
    dim: int,
    *,
    heads: Heads = 4,
    head_dim: HeadDim = None,
    expand_v: ExpandValue = 1.0,
    conv: Conv = 4,
    negative: Negative = False,
) -> nn.Module:
    """The gated delta rule with gates for each feature: what is forgotten, what is erased, and what is written."""
    return layer(
        "GatedDeltaNet2",
        dim,
        num_heads=heads,
        head_dim=head_dim or dim // heads,
        expand_v=expand_v,
        allow_neg_eigval=negative,
        **_convolution(conv),
    )


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
    decayed: Annotated[
        bool, Field(description="the error is that of the memory once it has forgotten, not as it stood")
    ] = True,
) -> nn.Module:
    """The momentum delta rule (arXiv 2605.05838): the gated delta rule, past corrections carrying on."""
    return layer(
        "MomentumDeltaNet",
        dim,
        num_heads=heads,
        head_dim=head_dim or dim // heads,
        expand_v=expand_v,
        use_p_times_alpha=decayed,
        **_convolution(conv),
    )


@adapt("fla_kda", state=_transposed, run=run, refuse=refuse, problems=_of_heads)
def kimi_delta_attention(
    dim: int,
    *,
    heads: Heads = 4,
    head_dim: HeadDim = None,
    expand_v: ExpandValue = 1.0,
    conv: Conv = 4,
    negative: Negative = False,
) -> nn.Module:
    """Kimi delta attention (arXiv 2510.26692): the gated delta rule, every feature of a key forgetting on its own."""
    return layer(
        "KimiDeltaAttention",
        dim,
        num_heads=heads,
        head_dim=head_dim or dim // heads,
        expand_v=expand_v,
        allow_neg_eigval=negative,
        **_convolution(conv),
    )


@adapt("fla_gla", state=_transposed, run=run, refuse=refuse, problems=_of_dim)
def gated_linear_attention(
    dim: int,
    *,
    heads: Heads = 4,
    expand_k: Annotated[float, Field(gt=0, le=64, description="width of all heads' keys over dim")] = 0.5,
    expand_v: OverDim = 1.0,
    conv: Conv = 0,
) -> nn.Module:
    """Gated linear attention (arXiv 2312.06635): a matrix per head adds up values, each feature of a key forgetting."""
    return layer(
        "GatedLinearAttention", dim, num_heads=heads, expand_k=expand_k, expand_v=expand_v, **_convolution(conv)
    )


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
    slots: Annotated[int, Field(ge=1, description="keys and values that a head keeps")] = 64,
    conv: Conv = 0,
) -> nn.Module:
    """Gated slot attention (arXiv 2409.07146): softmax attention over a fixed number of slots, which forget."""
    return layer("GatedSlotAttention", dim, num_heads=heads, num_slots=slots, **_convolution(conv))


@adapt(
    "fla_hgrn2",
    state=lambda module, rows: zeros(module, rows, (module.num_heads, module.head_i_dim, module.head_f_dim)),
    run=run,
    refuse=refuse,
    problems=_of_dim,
)
def hgrn2(dim: int, *, heads: Heads = 4, conv: Conv = 0) -> nn.Module:
    """HGRN2 (arXiv 2404.07904): a gated recurrence whose state is expanded to a matrix per head."""
    return layer("HGRN2Attention", dim, num_heads=heads, expand_ratio=None, **_convolution(conv))


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
    expand: Annotated[int, Field(ge=1, le=64, description="inner width over dim; heads divide the inner width")] = 2,
    state_size: Annotated[int, Field(ge=1, description="numbers of state for each inner feature")] = 64,
    conv: Annotated[int, Field(ge=2, le=64, description="width of the causal convolution")] = 4,
) -> nn.Module:
    """Mamba-2 (arXiv 2405.21060): a state space with one decay per head. After a state it reads token by token."""
    return layer(
        "Mamba2",
        dim,
        num_heads=heads,
        head_dim=dim * expand // heads,
        expand=expand,
        state_size=state_size,
        conv_kernel=conv,
    )
