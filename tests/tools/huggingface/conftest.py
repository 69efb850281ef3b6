"""Small models for the tests, and no network access."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, NamedTuple

os.environ["HF_HUB_OFFLINE"] = "1"  # read when the library is imported
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    Qwen2Config,
    Qwen3Config,
)

import titans_build as tb
from titans_build.huggingface import TitansBuildForCausalLM, as_pretrained

MEMORY = {"type": "memory", "heads": 2, "chunk": 4, "expansion": 2}
LAYERS = {
    "mac": [
        {
            "type": "context",
            "segment": 6,
            "persistent": 2,
            "memory": MEMORY,
            "attend": {"type": "attention", "heads": 2},
        },
        "ffn",
    ],
    "mag": [
        {
            "type": "persistent",
            "tokens": 2,
            "of": {"type": "gate", "branches": [{"type": "attention", "heads": 2, "window": 5}, MEMORY]},
        },
    ],
    "full": [{"type": "attention", "heads": 2}, MEMORY],  # its state grows
}


def small_recipe(name: str, **changes: Any) -> dict[str, Any]:
    """Two layers of one kind, over 40 tokens."""
    return {"version": 1, "name": name, "dim": 16, "vocab": 40, "layers": {name: LAYERS[name]}, "stack": [name] * 2} | (
        changes
    )


def randomised(model: Any) -> Any:
    """With no parameter at its initial value, where zeros and ones hide mistakes; and predictions far from even."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return model


@pytest.fixture(scope="session")
def recipe() -> Callable[..., dict[str, Any]]:
    """``recipe("mac", dim=32)``: of a small model."""
    return small_recipe


@pytest.fixture(scope="session")
def small() -> Callable[..., TitansBuildForCausalLM]:
    """A randomised model of float64: two ways to compute the same differ by less than any two tokens."""

    def make(name: str = "mac", dtype: torch.dtype = torch.float64, **changes: Any) -> TitansBuildForCausalLM:
        return as_pretrained(randomised(tb.build(small_recipe(name, **changes), dtype=dtype))).eval()

    return make


@pytest.fixture(scope="session", params=sorted(LAYERS))
def model(request: pytest.FixtureRequest, small: Callable[..., Any]) -> TitansBuildForCausalLM:
    """One of each kind. Tests leave it as it is."""
    return small(request.param)


@pytest.fixture
def tokens() -> torch.Tensor:
    """``[3, 11]``, of 1 to 39: 0 is left for padding."""
    return torch.randint(1, 40, (3, 11), generator=torch.Generator().manual_seed(2))


SIZES: dict[str, Any] = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4}
SIZES |= {"num_hidden_layers": 2, "max_position_embeddings": 64}
SIZES |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
FAMILIES: dict[str, tuple[type, dict[str, Any]]] = {
    "llama": (LlamaConfig, {**SIZES, "num_key_value_heads": 2}),
    "qwen": (Qwen2Config, {**SIZES, "num_key_value_heads": 2, "tie_word_embeddings": True}),
    "qwen3": (Qwen3Config, {**SIZES, "num_key_value_heads": 2, "head_dim": 8}),
    "mistral": (MistralConfig, {**SIZES, "num_key_value_heads": 2, "sliding_window": 5}),
    "gpt2": (
        GPT2Config,
        {"vocab_size": 40, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 64, "bos_token_id": 1}
        | {"eos_token_id": None, "pad_token_id": 0, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    ),
}
PACKED: dict[str, tuple[type, dict[str, Any]]] = {
    "gemma": (
        Gemma3TextConfig,
        {**SIZES, "num_key_value_heads": 2, "head_dim": 4, "sliding_window": 3}
        | {"layer_types": ["sliding_attention", "full_attention"]},
    ),
    "neox": (GPTNeoXConfig, SIZES),
    "opt": (
        OPTConfig,
        {name: value for name, value in SIZES.items() if name != "intermediate_size"}
        | {"ffn_dim": 24, "word_embed_proj_dim": 16, "dropout": 0.0},
    ),
}
"""Further families, for the tests of packed rows."""
ATTENTION = {"gpt2": "transformer.h.*.attn", "neox": "gpt_neox.layers.*.attention"}
ATTENTION["opt"] = "model.decoder.layers.*.self_attn"
LAYER = {"gpt2": "transformer.h.*", "neox": "gpt_neox.layers.*", "opt": "model.decoder.layers.*"}


class Family(NamedTuple):
    """How to make a small model of one family, and where things are in it."""

    name: str
    attention: str
    layer: str

    def config(self, **changes: Any) -> Any:
        kind, values = (FAMILIES | PACKED)[self.name]
        return kind(**(values | changes))

    def plain(self, dtype: torch.dtype = torch.float64, **changes: Any) -> Any:
        """Randomised, in evaluation mode."""
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(self.config(**changes)).to(dtype).eval()
        return randomised(model)

    def swapped(self, *hows: str, dtype: torch.dtype = torch.float64, **changes: Any) -> Any:
        """With a memory in both layers, or in as many ways as are given; what was put in is randomised, too."""
        model = self.plain(dtype, **changes)
        for how in hows:
            tb.swap(model, self.attention, MEMORY, how)
        generator = torch.Generator().manual_seed(9)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if ".titans" in name or ".block." in name:
                    parameter += 0.3 * torch.randn(parameter.shape, generator=generator, dtype=dtype)
        return model


EVERY_DAY = [name if name != "qwen3" else pytest.param(name, marks=pytest.mark.slow) for name in sorted(FAMILIES)]


@pytest.fixture(scope="session", params=EVERY_DAY)
def family(request: pytest.FixtureRequest) -> Family:
    """Each family of models, by turns; of the two that are Qwen's one every day."""
    return make_family(request.param)


@pytest.fixture(scope="session")
def llama() -> Family:
    return make_family("llama")


@pytest.fixture(scope="session")
def families() -> Callable[[str], Family]:
    """``families("neox")``: a family by its name."""
    return make_family


def make_family(name: str) -> Family:
    return Family(name, ATTENTION.get(name, "model.layers.*.self_attn"), LAYER.get(name, "model.layers.*"))
