"""The interface of the mixers of mamba-ssm, with a substitute in PyTorch: the package itself needs a GPU."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import titans_build as tb
from titans_build.blocks.foreign.mamba_ssm import begin, fresh, step
from titans_build.registry import Unavailable


class Mamba2(nn.Module):
    """A state space model with one decay per head. States are modified, and later calls take a single token."""

    def __init__(
        self, d_model: int, d_state: int, d_conv: int, expand: int, headdim: int, layer_idx: int | None = None
    ) -> None:
        super().__init__()
        self.inner, self.headdim, self.layer_idx = expand * d_model, headdim, layer_idx
        self.in_proj = nn.Linear(d_model, self.inner)
        self.conv = nn.Parameter(torch.randn(self.inner, d_conv))
        self.drive = nn.Parameter(torch.randn(d_state))
        self.decay = nn.Parameter(torch.rand(self.inner // headdim))
        self.out_proj = nn.Linear(self.inner, d_model)

    def allocate_inference_cache(self, batch_size: int, max_seqlen: int, dtype: Any = None) -> tuple[Tensor, Tensor]:
        weight = self.in_proj.weight
        heads = len(self.decay)
        return (
            weight.new_zeros(batch_size, self.inner, self.conv.shape[1]),
            weight.new_zeros(batch_size, heads, self.headdim, len(self.drive)),
        )

    def forward(self, x: Tensor, inference_params: Any = None) -> Tensor:
        past, level = inference_params.key_value_memory_dict[self.layer_idx]
        if inference_params.seqlen_offset > 0:
            assert x.shape[1] == 1
        else:
            past.zero_()
            level.zero_()
        outputs = []
        for token in self.in_proj(x).unbind(1):
            past.copy_(torch.cat([past[..., 1:], token.unsqueeze(-1)], dim=-1))
            mixed = (past.clone() * self.conv).sum(-1).tanh().unflatten(-1, (-1, self.headdim))
            after = torch.sigmoid(self.decay)[:, None, None] * level.clone() + mixed.unsqueeze(-1) * self.drive
            level.copy_(after)
            outputs.append(after.sum(-1).flatten(1))
        return self.out_proj(torch.stack(outputs, dim=1))


def of(block: Any, dim: int) -> dict[str, Any]:
    return {"version": 1, "dim": dim, "layers": {"one": [block]}, "stack": ["one"]}


@pytest.mark.usefixtures("own_registry")
def test_mixers_obey_the_laws() -> None:
    @tb.adapt("their_mamba", state=fresh, run=begin, step=step)
    def their_mamba(dim: int) -> nn.Module:
        return Mamba2(dim, d_state=3, d_conv=4, expand=2, headdim=4, layer_idx=0)

    tb.check_block("their_mamba", dim=8, endurance=200, length=11)


def test_the_block_creates_the_mixer_of_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    package = ModuleType("mamba_ssm")
    package.Mamba2 = Mamba2  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "mamba_ssm", package)
    recipe = of({"type": "mamba_ssm_mamba2", "head_dim": 4}, 8)
    model = tb.build(recipe, device="meta")
    (block,) = model.layers[0].blocks
    assert isinstance(block.inner, Mamba2) and block.inner.layer_idx == 0
    assert block.state_bytes() == 4 * (16 * 4 + 4 * 4 * 128) + 8
    with pytest.raises(Unavailable, match="mamba_ssm_mamba2: the kernels of mamba-ssm run on a GPU, not on cpu"):
        tb.build(recipe)


def test_a_missing_package_is_an_error_with_the_install_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mamba_ssm", None)
    recipe = tb.load_recipe(of("mamba_ssm_mamba2", 64))
    message = "mamba_ssm_mamba2: needs mamba-ssm, which is not installed: pip install 'mamba-ssm causal-conv1d'"
    with pytest.raises(Unavailable, match=message):
        tb.build(recipe)


def test_heads_must_divide_the_width() -> None:
    with pytest.raises(tb.RecipeError, match="head_dim: 5 does not divide the inner width 128"):
        tb.load_recipe(of({"type": "mamba_ssm_mamba2", "head_dim": 5}, 64))
