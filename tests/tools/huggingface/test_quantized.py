"""Models of recipes whose linear layers are quantized, each by its library, where it is installed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import titans_build as tb

DIM = 64


def built() -> Any:
    ffn = {"type": "ffn", "hidden": 128}
    context = {"type": "context", "segment": 8, "attend": {"type": "attention", "qk_norm": False}}
    layers = {"mac": [context, ffn]}
    return tb.build({"version": 1, "dim": DIM, "vocab": 256, "layers": layers, "stack": ["mac"]}, seed=0).eval()


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(256, (1, 21), generator=torch.Generator().manual_seed(0))


def by_torchao(model: Any) -> Any:
    quantization = pytest.importorskip("torchao.quantization")
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    return model


def by_quanto(model: Any) -> Any:
    pytest.importorskip("optimum.quanto.nn")
    from optimum import quanto

    quanto.quantize(model, weights=quanto.qint8)
    quanto.freeze(model)
    return model


def by_bitsandbytes(bits: int) -> Callable[[Any], Any]:
    def quantize(model: Any) -> Any:
        bitsandbytes = pytest.importorskip("bitsandbytes")
        for name, layer in list(model.named_modules()):
            if type(layer) is nn.Linear:
                kind = bitsandbytes.nn.Linear4bit if bits == 4 else bitsandbytes.nn.Linear8bitLt
                options = {} if bits == 4 else {"has_fp16_weights": False}
                new = kind(layer.in_features, layer.out_features, bias=False, **options)
                new.load_state_dict(layer.state_dict())
                model.set_submodule(name, new.to("cpu"))
        return model

    return quantize


LIBRARIES = {
    "torchao": by_torchao,
    "quanto": by_quanto,
    "bitsandbytes, 4 bits": by_bitsandbytes(4),
    "bitsandbytes, 8 bits": by_bitsandbytes(8),
}


def check(model: Any, whole: Tensor, tokens: Tensor) -> None:
    """The quantized model: near the whole one, and the same at once, in pieces, token by token and in generation."""
    with torch.no_grad():
        logits = model(tokens).logits
        difference = float((logits - whole).abs().max())
        assert 0 < difference < 0.5 * float(whole.abs().max())  # 4 bits are a rounding of 7% of each weight
        first = model(tokens[:, :13])
        state, pieces = first.state, [first.logits]
        for piece in tokens[:, 13:].split([6, 1, 1], dim=1):
            out = model(piece, state)
            state = out.state
            pieces.append(out.logits)
        # 8 bits of bitsandbytes: inputs are rounded to 8 bits too
        assert_close(torch.cat(pieces, dim=1), logits, rtol=0, atol=5e-3)
        assert model.generate(tokens, 3).tokens.shape == (1, 24)


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_quantized_model(library: str, tokens: Tensor) -> None:
    with torch.no_grad():
        whole = built()(tokens).logits
        model = LIBRARIES[library](built())
    check(model, whole, tokens)
