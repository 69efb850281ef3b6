"""Recipe models on device maps, offloaded to the processor and the disk, and quantized."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import BitsAndBytesConfig, QuantoConfig, TorchAoConfig

from titans_build.huggingface import TitansBuildForCausalLM, from_pretrained
from titans_build.tools.huggingface.model import narrow_layers

Make = Callable[..., TitansBuildForCausalLM]


def expect_the_same(model: Any, other: Any, tokens: Tensor) -> None:
    with torch.no_grad():
        assert_close(model(tokens).logits, other(tokens).logits)
    settings = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(tokens, **settings), other.generate(tokens, **settings))
    assert torch.equal(model.generate(tokens, **settings), model.generate(tokens, use_cache=False, **settings))


@pytest.mark.parametrize("name", ["mac", "mag"])
def test_offloaded_models(small: Make, tokens: Tensor, tmp_path: Path, name: str) -> None:
    plain = small(name)
    plain.save_pretrained(tmp_path / "model")
    half = {"model.layers.0": "disk", "model.layers.1": "cpu", "model.norm": "cpu", "fingerprint": "cpu"}
    half |= {"model.embedding": "cpu", "model.head": "cpu"}
    folder = {"offload_folder": str(tmp_path / "disk")}
    for settings in (
        {"device_map": "auto"},
        {"device_map": half, **folder},
        {"device_map": "auto", "max_memory": {"cpu": 20_000}, **folder},
    ):
        expect_the_same(from_pretrained(tmp_path / "model", **settings), plain, tokens)
    expect_the_same(accelerate.cpu_offload(small(name), execution_device=torch.device("cpu")), plain, tokens)
    expect_the_same(accelerate.disk_offload(small(name), tmp_path, execution_device=torch.device("cpu")), plain, tokens)


def test_gates_are_not_quantized_by_bitsandbytes(small: Make) -> None:
    memory = "model.layers.0.blocks.0.memory"
    narrow = narrow_layers(small("mac", dim=64).config)
    assert f"{memory}.controls" in narrow and f"{memory}.qkv" not in narrow and f"{memory}.output" not in narrow


def quantized(by: str) -> Any:
    pytest.importorskip({"torchao": "torchao", "quanto": "optimum.quanto.nn"}.get(by, "bitsandbytes"))
    if by == "torchao":
        from torchao.quantization import Int8WeightOnlyConfig

        return TorchAoConfig(Int8WeightOnlyConfig())
    return {
        "quanto": QuantoConfig(weights="int8"),
        "8 bit": BitsAndBytesConfig(load_in_8bit=True),
        "4 bit": BitsAndBytesConfig(load_in_4bit=True),
    }[by]


@pytest.mark.parametrize("by", ["torchao", "quanto", "8 bit", "4 bit"])
def test_quantized_models(small: Make, tokens: Tensor, tmp_path: Path, by: str) -> None:
    config = quantized(by)
    plain = small("mag", torch.float32, dim=64)
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter *= 0.3
    plain.save_pretrained(tmp_path / "model")
    model = from_pretrained(tmp_path / "model", quantization_config=config)
    kinds = {
        type(layer).__name__ + type(layer.weight).__name__ for layer in model.modules() if isinstance(layer, nn.Linear)
    }
    assert kinds != {"LinearParameter"}
    with torch.no_grad():
        first, expected = model(tokens).logits, plain(tokens).logits
    assert 0 < (first - expected).norm() / expected.norm() < (0.4 if by == "4 bit" else 0.1)
    settings = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(tokens, **settings), model.generate(tokens, use_cache=False, **settings))
    if by in ("torchao", "quanto"):
        with pytest.raises(ValueError, match=r"cannot be saved|not serializable"):
            model.save_pretrained(tmp_path / "quantized")
        return
    from_pretrained(tmp_path / "model", quantization_config=config).save_pretrained(tmp_path / "quantized")
    with torch.no_grad():
        assert_close(from_pretrained(tmp_path / "quantized")(tokens).logits, first)
