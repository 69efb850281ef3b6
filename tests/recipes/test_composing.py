from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from wrong_recipes import HEAD, PLAIN

from titans_build import Block
from titans_build.recipes import build, load_recipe
from titans_build.registry import RecipeError, register, scratch

SMALL = PLAIN.replace("dim: 64", "dim: 16")


def test_the_stack_in_order():
    text = """
version: 1
dim: 16
vocab: 8
layers:
  a: [{type: attention, heads: 2}]
  m: [{type: memory, heads: 2, depth: 1}, ffn]
stack: [a, {repeat: 2, of: [m]}]
"""
    model = build(text)
    assert [[type(block).__name__ for block in layer.blocks] for layer in model.layers] == [
        ["Attention"],
        ["NeuralMemory", "FeedForward"],
        ["NeuralMemory", "FeedForward"],
    ]
    assert model.layers[1].blocks[0] is not model.layers[2].blocks[0]
    assert model.recipe == load_recipe(text)


def test_one_seed_one_model():
    first, again, other = build(SMALL, seed=1), build(SMALL, seed=1), build(SMALL, seed=2)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters()))
    assert not torch.equal(first.embedding, other.embedding)
    before = torch.random.get_rng_state()
    build(SMALL, seed=1)
    assert torch.equal(torch.random.get_rng_state(), before)
    build(SMALL, seed=None)
    assert not torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize(("dtype", "expected"), [("bfloat16", torch.bfloat16), (torch.float64, torch.float64)])
@pytest.mark.parametrize("device", ["cpu", "meta", torch.device("cpu")])
def test_dtype_and_device(dtype: Any, expected: torch.dtype, device: Any):
    model = build(SMALL, device=device, dtype=dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {expected}
    assert {parameter.device for parameter in model.parameters()} == {torch.device(device)}


def test_without_a_vocabulary():
    model = build("mac", device="meta")
    assert model.vocab == 256
    bare = build(load_recipe(SMALL, {"vocab": None}))
    out = bare(embeddings=torch.randn(2, 5, 16))
    assert out.hidden.shape == (2, 5, 16) and out.logits is None


@pytest.mark.parametrize(
    ("arguments", "fragment"),
    [
        ({"device": "gpu"}, "unknown device 'gpu'"),
        ({"device": "cuda:99"}, "device cuda:99: "),
        ({"dtype": "float23"}, "did you mean 'float32'"),
        ({"dtype": torch.int64}, "expected a dtype for parameters"),
    ],
)
def test_places_that_do_not_exist(arguments: dict[str, Any], fragment: str):
    with pytest.raises(ValueError, match=fragment):
        build(SMALL, **arguments)


def test_a_model_too_large_for_memory_is_refused_before_it_is_made():
    text = HEAD.replace("dim: 64", "dim: 131072") + "layers: {a: [attention, ffn]}\nstack: [{repeat: 50, of: [a]}]\n"
    with pytest.raises(RecipeError, match="GiB for its parameters; this machine has"):
        build(text)


def test_shapes_that_overflow():
    class Unbounded(Block):
        def __init__(self, dim: int, *, hidden: int) -> None:
            super().__init__(dim)
            self.weight = nn.Parameter(torch.empty(dim, hidden))

    text = HEAD.replace("dim: 64", "dim: 131072") + f"layers: {{a: [{{type: wide, hidden: {2**62}}}]}}\nstack: [a]\n"
    with scratch(), pytest.raises(RecipeError, match="no such model can exist"):
        register("wide")(Unbounded)
        build(text, device="meta")


@pytest.mark.parametrize("seed", ["a", 1.5, True, 2**64])
def test_a_seed_that_is_none(seed: object):
    with pytest.raises(ValueError, match="seed: expected an integer of 64 bits, got"):
        build(SMALL, seed=seed)  # type: ignore[arg-type]
