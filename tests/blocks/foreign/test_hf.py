"""Mixers of transformers as blocks: the laws, gradients, and the outputs of transformers with the same weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache, Mamba2Config
from transformers.models.mamba.modeling_mamba import MambaMixer
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

import titans_build as tb
from titans_build.blocks.foreign import hf
from titans_build.blocks.foreign.adapter import cache_argument
from titans_build.blocks.laws import LAWS
from titans_build.blocks.state import named_tensors

DELTA = {"type": "hf_gated_deltanet", "heads": 2, "value_dim": 6}
MAMBA = {"type": "hf_mamba2", "heads": 4, "state_size": 8, "chunk": 4}
SPECS = pytest.mark.parametrize("spec", [DELTA, MAMBA], ids=["gated deltanet", "mamba2"])
FORWARD = [law for law in LAWS if law != "gradient"]
"""The gradient law uses finite differences in float64. These mixers compute their recurrences in float32."""


@SPECS
def test_mixers_obey_the_laws(spec: dict[str, Any]) -> None:
    tb.check_block(spec, dim=16, dtype=torch.float32, laws=FORWARD, endurance=300, cuts=12)


@SPECS
@pytest.mark.parametrize("cut", [1, 6, 10])
def test_gradients_through_a_state(spec: dict[str, Any], cut: int) -> None:
    """Also for a single token, whose state transformers modifies in place."""
    block = tb.build_block(spec, dim=16)
    x, weights = torch.randn(2, 11, 16, requires_grad=True), torch.randn(2, 11, 16)
    leaves = [x, *block.parameters()]
    whole = torch.autograd.grad((block(x)[0] * weights).sum(), leaves)
    first, state = block(x[:, :cut])
    second, _ = block(x[:, cut:], state)
    parts = torch.autograd.grad((torch.cat([first, second], dim=1) * weights).sum(), leaves)
    for one, other in zip(parts, whole):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


@SPECS
def test_gradient_against_a_finite_difference(spec: dict[str, Any]) -> None:
    torch.manual_seed(0)
    block = tb.build_block(spec, dim=16)
    _, state = block(torch.randn(2, 3, 16))
    x, weights = torch.randn(2, 9, 16), torch.randn(2, 9, 16)
    given = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad((block(given, state)[0] * weights).sum(), given)
    with torch.no_grad():
        step = 0.001 * gradient / gradient.norm()
        ahead, behind = ((block(x + sign * step, state)[0] * weights).double().sum() for sign in (1, -1))
    assert float(ahead - behind) / 2 == pytest.approx(float((gradient * step).sum()), rel=0.01)


def test_mamba2_against_transformers_with_its_own_cache() -> None:
    block = tb.build_block(MAMBA, dim=16)
    config = Mamba2Config(
        hidden_size=16, num_hidden_layers=1, num_heads=4, head_dim=8, state_size=8, n_groups=1, chunk_size=4
    )
    mixer = Mamba2Mixer(config, layer_idx=0)
    mixer.load_state_dict(block.inner.state_dict())
    cache, state, x = DynamicCache(config=config), None, torch.randn(2, 12, 16)
    with torch.no_grad():
        for piece in x.split([5, 1, 1, 4, 1], dim=1):
            expected = mixer(piece, **{cache_argument(Mamba2Mixer.forward): cache})
            y, state = block(piece, state)
            torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    layer = cache.layers[0]
    assert state is not None
    torch.testing.assert_close(state.carried.recurrent, layer.recurrent_states[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(state.carried.convolution, layer.conv_states[0], rtol=1e-5, atol=1e-5)


def test_gated_deltanet_against_the_recurrence() -> None:
    """The gated delta rule token by token, with the projections of the layer."""
    block = tb.build_block({**DELTA, "value_dim": None}, dim=8, dtype=torch.float32)
    mixer, x = block.inner, torch.randn(1, 9, 8)
    with torch.no_grad():
        q, k, v, z, b, a = mixer.fix_query_key_value_ordering(mixer.in_proj_qkvz(x), mixer.in_proj_ba(x))
        past = torch.cat([part.flatten(2) for part in (q, k, v)], dim=-1).transpose(1, 2)
        past = torch.nn.functional.silu(mixer.conv1d(past)[..., : x.shape[1]]).transpose(1, 2)
        q, k, v = (part.unflatten(-1, (2, 4)) for part in past.split(8, dim=-1))
        q, k = (part * (part.square().sum(-1, keepdim=True) + 1e-6).rsqrt() for part in (q, k))
        keep = torch.exp(-mixer.A_log.exp() * torch.nn.functional.softplus(a + mixer.dt_bias))
        matrix, outputs = torch.zeros(1, 2, 4, 4), []  # keys by values
        for t in range(x.shape[1]):
            matrix = keep[:, t, :, None, None] * matrix
            error = v[:, t] - torch.einsum("bhk,bhkv->bhv", k[:, t], matrix)
            matrix = matrix + torch.einsum("bhk,bhv->bhkv", k[:, t], b[:, t].sigmoid().unsqueeze(-1) * error)
            outputs.append(torch.einsum("bhk,bhkv->bhv", q[:, t], matrix) / 2)
        y = mixer.norm(torch.stack(outputs, dim=1).reshape(-1, 4), z.reshape(-1, 4)).view(1, 9, 8)
        got, state = block(x)
    torch.testing.assert_close(got, mixer.out_proj(y), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(state.carried.recurrent, matrix, rtol=1e-4, atol=1e-4)


@SPECS
def test_initialization_is_that_of_the_model(spec: dict[str, Any]) -> None:
    """Each type of model has its own standard deviation for the weights of linear maps."""
    block = tb.build_block(spec, dim=64)
    name, deviation = ("in_proj_qkvz", 0.02) if spec is DELTA else ("in_proj", 0.1)
    assert float(getattr(block.inner, name).weight.detach().std()) == pytest.approx(deviation, rel=0.1)
    assert block.inner.A_log.isfinite().all() and (block.inner.A_log.exp() < 17).all()


def test_heads_must_divide_the_width() -> None:
    with pytest.raises(tb.RecipeError, match="heads: 3 heads do not divide the width 16; give key_dim and value_dim"):
        tb.build_block({"type": "hf_gated_deltanet", "heads": 3}, dim=16)
    assert tb.build_block({**DELTA, "heads": 3, "key_dim": 4}, dim=16).inner.key_dim == 12
    with pytest.raises(tb.RecipeError, match="heads: 5 heads do not divide the inner width 32"):
        tb.build_block({"type": "hf_mamba2", "heads": 5}, dim=16)


def test_mixer_in_a_packaged_recipe() -> None:
    recipe = tb.load_recipe(
        "deltas-and-mac",
        overrides={"dim": 32, "layers.delta.0": "hf_gated_deltanet", "layers.mac.0.segment": 8, "stack.0.repeat": 1},
    )
    model, tokens = tb.build(recipe), torch.randint(256, (2, 20))
    with torch.no_grad():
        whole = model(tokens)
        first = model(tokens[:, :7])
        rest = model(tokens[:, 7:], first.state)
    torch.testing.assert_close(torch.cat([first.logits, rest.logits], dim=1), whole.logits, rtol=1e-4, atol=1e-4)
    names = [name for name, _ in named_tensors(whole.state)]
    assert "layers.0.0.carried.recurrent" in names
    assert isinstance(model.layers[0].blocks[0].inner.conv1d, torch.nn.Conv1d)


def test_a_mixer_whose_cache_has_an_unknown_name_is_an_error_when_created(monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(self: Any, hidden_states: torch.Tensor, memory: Any = None, **kwargs: Any) -> torch.Tensor:
        return hidden_states

    monkeypatch.setattr(MambaMixer, "forward", forward)
    with pytest.raises(
        ImportError,
        match="takes hidden_states, memory, kwargs: expected a cache under one of the names cache, past_key",
    ):
        hf.mixer("mamba", "MambaMixer", hidden_size=8)
