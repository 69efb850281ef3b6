from __future__ import annotations

import time
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from titans_build import Block
from titans_build.blocks.state import named_tensors
from titans_build.recipes import build, load_recipe
from titans_build.recipes.build import measure, state_bytes
from titans_build.recipes.recipe import MAX_BUILT
from titans_build.registry import RecipeError, register, scratch
from titans_build.registry.validation import MAX_BLOCKS

HEAD = "version: 1\ndim: 64\nvocab: 256\n"
SMALL = HEAD.replace("dim: 64", "dim: 16") + "layers:\n  plain: [attention, ffn]\nstack: [plain]\n"


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
def test_invalid_devices_and_dtypes(arguments: dict[str, Any], fragment: str):
    with pytest.raises(ValueError, match=fragment):
        build(SMALL, **arguments)


def test_a_model_larger_than_memory_is_an_error():
    text = HEAD.replace("dim: 64", "dim: 131072") + "layers: {a: [attention, ffn]}\nstack: [{repeat: 50, of: [a]}]\n"
    with pytest.raises(RecipeError, match=r"GiB for its parameters and .* this machine has"):
        build(text)


def test_a_state_larger_than_memory_is_an_error():
    text = HEAD + f"layers: {{a: [{{type: attention, window: {2**24}}}]}}\nstack: [{{repeat: 500, of: [a]}}]\n"
    with pytest.raises(RecipeError, match=r"and [\d,]{4,}\.0 GiB for the state of one row; this machine has"):
        build(text)


@pytest.mark.parametrize("name", ["mac", "mag", "mal", "lmm", "transformer", "two-memories"])
def test_state_bytes_on_the_meta_device(name: str):
    recipe = load_recipe(name)
    model, made = build(recipe, device="meta"), build(recipe)
    assert state_bytes(model, recipe) == made.state_bytes()
    there = [(path, tensor.shape, tensor.dtype) for path, tensor in named_tensors(model.init_state(2))]
    assert there == [(path, tensor.shape, tensor.dtype) for path, tensor in named_tensors(made.init_state(2))]


def test_a_model_is_measured_by_its_distinct_layers():
    recipe = load_recipe("windows-and-mac", overrides={"stack.0.repeat": 3})
    model = build(recipe)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert measure(recipe) == (parameters, model.state_bytes(), model.grows)


@pytest.mark.parametrize(
    "layer",
    [
        pytest.param("{type: memory, heads: 2}", marks=pytest.mark.slow),  # it is in the next, as often
        "{type: context, memory: {type: memory, heads: 2}}",
        "[[[[[[[[ffn]]]]]]]]",
    ],
)
def test_the_largest_recipes_are_measured_in_little_time_and_memory(layer: str):
    """As many blocks as a recipe may have, without and with repeats."""
    count = MAX_BLOCKS // (9 if "[[" in layer else 3 if "context" in layer else 1)
    text = HEAD + f"layers: {{a: [{', '.join([layer] * count)}]}}\nstack: [{{repeat: 8, of: [a]}}]\n"
    measure(load_recipe("mac"))
    tracemalloc.start()
    started = time.process_time()
    measure(load_recipe(text.replace("repeat: 8", f"repeat: {MAX_BUILT // MAX_BLOCKS}")))
    assert time.process_time() - started < 20  # tracing memory and other processes included
    assert tracemalloc.get_traced_memory()[1] < 100 * 2**20
    tracemalloc.stop()
    with pytest.raises(RecipeError, match="blocks with repeats expanded; at most 8192 are allowed"):
        load_recipe(text.replace("repeat: 8", "repeat: 1024"))


def test_state_bytes_of_a_block_without_support_for_the_meta_device():
    class Looks(Block):
        def __init__(self, dim: int) -> None:
            super().__init__(dim)
            self.weight = nn.Parameter(torch.empty(dim))

        def reset_parameters(self) -> None:
            nn.init.ones_(self.weight)

        def init_state(self, batch_size: int) -> torch.Tensor:
            return torch.full((batch_size, 1), self.weight.sum().item())

        def forward(self, x: torch.Tensor, state: Any = None, *, mask: Any = None) -> Any:
            return x, state

    recipe = {"version": 1, "dim": 4, "layers": {"a": ["looks"]}, "stack": ["a"]}
    with scratch():
        register("looks")(Looks)
        assert state_bytes(build(recipe, device="meta"), load_recipe(recipe)) is None
        assert build(recipe).init_state(2).layers[0][0].tolist() == [[4.0], [4.0]]


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
def test_an_invalid_seed(seed: object):
    with pytest.raises(ValueError, match="seed: expected an integer of 64 bits, got"):
        build(SMALL, seed=seed)  # type: ignore[arg-type]


def test_overrides_are_those_of_load_recipe(tmp_path: Path) -> None:
    overrides = {"dim": 16, "layers.mac.0.segment": 8}
    (tmp_path / "mine.yaml").write_text(load_recipe("mac").to_yaml(), encoding="utf-8")
    for source in ("mac", tmp_path / "mine.yaml", load_recipe("mac")):
        model = build(source, device="meta", overrides=overrides)
        assert model.dim == 16 and model.layers[0].blocks[0].segment == 8
        assert model.recipe.overrides == overrides
    with pytest.raises(RecipeError, match=r"did you mean 'layers\.mac\.0\.segment'"):
        build("mac", overrides={"segment": 8})
