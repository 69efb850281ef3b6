"""Tests that would have caught the defects of released implementations, for every packaged recipe.

Each recipe keeps its structure and gets small numbers, so that a few tokens cross every chunk, segment and window.
"""

import math
import re

import pytest
import torch
from torch import nn

import titans_build as tb
from titans_build.blocks import state as st
from titans_build.blocks.block import Block
from titans_build.blocks.build import materialize
from titans_build.blocks.language_model import LanguageModel
from titans_build.blocks.laws import LAWS, check_block
from titans_build.blocks.memory import NeuralMemory
from titans_build.recipes import packaged_names
from titans_build.registry import catalogue

VOCAB = 8
RECIPES = [name for name in packaged_names() if not re.search(r"-[0-9.]+[mb]$", name)]
WITH_MEMORY = [name for name in RECIPES if "memory" in tb.load_recipe(name).to_yaml()]

SMALL = {
    "dim": lambda _: 16,
    "vocab": lambda _: VOCAB,
    "heads": lambda _: 2,
    "hidden": lambda _: 24,
    "repeat": lambda _: 1,
    # about a sixteenth; different numbers remain different
    "chunk": lambda chunk: max(2, min(chunk // 16, 18)),
    "reset": lambda reset: reset // 128,
    "segment": lambda segment: max(2, segment // 16),
    "window": lambda window: max(2, window // 32) - 1,
    "tokens": lambda _: 3,
    "persistent": lambda _: 3,
}


def shrink(node, keys=SMALL, **changes):
    """The same recipe with small numbers under ``keys``; ``changes`` are set in every memory."""
    if isinstance(node, list):
        return [shrink(item, keys, **changes) for item in node]
    if not isinstance(node, dict):
        return node
    small = {
        key: SMALL[key](value) if key in keys and isinstance(value, int) else shrink(value, keys, **changes)
        for key, value in node.items()
    }
    return small | changes if small.get("type") == "memory" else small


def make(name, dtype=torch.float32, seed=0, **changes):
    return tb.build(tb.load_recipe(shrink(tb.load_recipe(name).to_dict(), **changes)), dtype=dtype, seed=seed)


def randomize(model):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            scale = 0.3 * (parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 1.0)
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))
    return model


def uniform(rows, time, seed):
    return torch.randint(VOCAB, (rows, time), generator=torch.Generator().manual_seed(seed))


def loss_after_training_on_noise(model, steps=30):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for step in range(steps):
        tokens = uniform(16, 22, seed=step)
        loss = model(tokens[:, :-1], targets=tokens[:, 1:]).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return sum(losses[-10:]) / 10


@pytest.mark.parametrize("name", RECIPES)
def test_independent_random_tokens_cannot_be_predicted(name):
    assert loss_after_training_on_noise(make(name)) > math.log(VOCAB) - 0.01


def test_training_on_random_tokens_detects_a_leak():
    """Negative control of the test above, with a tenth of the next token in each output."""

    class LooksAhead(Block):
        def forward(self, x, state=None, *, mask=None):
            return x + 0.1 * torch.cat([x[:, 1:], torch.zeros_like(x[:, :1])], dim=1), None

    with catalogue.scratch():
        catalogue.register("looks_ahead")(LooksAhead)
        model = LanguageModel(16, vocab=VOCAB, layers=[["looks_ahead", "ffn"]])
        materialize(model, "cpu", torch.float32, 0)
    assert loss_after_training_on_noise(model) < math.log(VOCAB) - 0.3


@pytest.mark.parametrize("name", RECIPES)
def test_all_splits_give_the_whole(name):
    model = make(name, dtype=torch.float64)
    # check_block randomizes the parameters; 41 is larger than every chunk, segment and window, and no multiple of one
    check_block(model, laws=["split", "step"], length=41, cuts=None)


# every layer of these is in other recipes, or in test_all_blocks.py: memories with resets, self_modifying
COMBINED = ("deltas-and-mac", "windows-and-mac", "tnt", "hope")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in COMBINED else ()) for name in RECIPES]
)
def test_laws(name):
    # split and step are tested above at every cut
    laws = [law for law in LAWS if law not in ("split", "step", "hooked")]
    check_block(make(name), laws=laws, length=37, endurance=600)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in ("mac", "mag", "mal") else pytest.mark.slow) for name in RECIPES]
)
def test_the_law_of_modified_layers(name):
    """Every linear layer is modified on its own, in every path; these tokens cross segments and chunks as well."""
    check_block(make(name), laws=["hooked"], length=13)


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_a_hundred_thousand_tokens(name):
    # with the original segments and chunks
    recipe = shrink(tb.load_recipe(name).to_dict(), ["dim", "vocab", "heads", "hidden", "repeat"])
    check_block(tb.build(recipe), laws=["endurance"])


@pytest.mark.parametrize("name", WITH_MEMORY)
def test_outputs_depend_on_writing(name):
    model = randomize(make(name, dtype=torch.float64))
    frozen = make(name, dtype=torch.float64, use="read")
    frozen.load_state_dict(model.state_dict())
    tokens = uniform(2, 21, seed=1)
    with torch.no_grad():
        difference = (model(tokens).logits - frozen(tokens).logits).abs().amax(dim=(0, 2))
    first = 2 if name == "hope" else 0  # all of its memories read the weights at their chunk's start
    assert bool((difference[first:] > 1e-6).all()), difference


@pytest.mark.parametrize("name", RECIPES)
def test_every_parameter_gets_a_gradient(name):
    model = randomize(make(name))
    tokens = uniform(4, 41, seed=1)
    model(tokens[:, :-1], targets=tokens[:, 1:]).loss.backward()
    for path, parameter in model.named_parameters():
        assert parameter.grad is not None, path
        assert parameter.grad.isfinite().all() and bool((parameter.grad != 0).any()), path


@pytest.mark.parametrize("name", RECIPES)
def test_optimizer_step_and_state_dict(name):
    model, tokens = make(name), uniform(4, 41, seed=1)
    for parameter in model.parameters():
        assert parameter.is_contiguous() and parameter.is_leaf
    before = {path: tensor.clone() for path, tensor in model.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model(tokens[:, :-1], targets=tokens[:, 1:]).loss.backward()
    optimizer.step()
    after = model.state_dict()
    assert all(not torch.equal(after[path], tensor) for path, tensor in before.items())
    other = make(name, seed=1)
    other.load_state_dict(after)
    with torch.no_grad():
        assert torch.equal(other(tokens).logits, model(tokens).logits)


@pytest.mark.parametrize("name", RECIPES)
def test_the_size_of_the_state_does_not_depend_on_the_prompt(name):
    model = make(name)
    with torch.no_grad():
        sizes = {st.nbytes(model(uniform(1, time, seed=time)).state) for time in (1, 2, 17, 200)}
    assert sizes == {model.state_bytes()}


@pytest.mark.parametrize("name", RECIPES)
def test_a_state_shares_no_larger_memory(name):
    """The storages of a state, which may be larger than its tensors, are of bounded size."""
    model = make(name)
    with torch.no_grad():
        state = model(uniform(1, 400, seed=0)).state
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for _, t in st.named_tensors(state)}
    assert sum(storages.values()) <= 2.5 * model.state_bytes()


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_sixteen_thousand_tokens_stay_finite_at_every_depth(depth):
    """The initialized memory in one call, with gradients taken at the start of each chunk."""
    block = tb.build_block({"type": "memory", "depth": depth, "heads": 2, "chunk": 64}, dim=16, seed=depth)
    x = torch.randn(1, 16_384, 16, generator=torch.Generator().manual_seed(depth))
    with torch.no_grad():
        y, state = block(x)
    assert y.isfinite().all()
    assert all(tensor.isfinite().all() for _, tensor in st.named_tensors(state))
    # bounded, and not only before an overflow
    assert max(float(weight.abs().max()) for weight in state.memory.weights) < 100


@pytest.mark.parametrize("chunk", [16, 64])
@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_gradients_through_four_thousand_tokens_do_not_explode(depth, chunk):
    """Backward through all updates: the last outputs depend less on the first tokens than on the last."""
    block = tb.build_block({"type": "memory", "depth": depth, "heads": 1, "chunk": chunk}, dim=64, seed=depth)
    x = torch.randn(1, 4096, 64, generator=torch.Generator().manual_seed(depth)).requires_grad_()
    y, _ = block(x)
    y[:, -64:].square().mean().backward()
    near, far = x.grad[:, -64:].norm(), x.grad[:, :64].norm()
    assert far < near, (far, near)
    assert all(parameter.grad.isfinite().all() for parameter in block.parameters())


def test_a_memory_without_clipping_overflows():
    """Negative control: the default ``clip`` is what keeps outputs finite."""
    spec = {"type": "memory", "depth": 4, "heads": 2, "chunk": 64, "max_step": 1.0, "norm": False}
    x = torch.randn(1, 4096, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        bounded, _ = tb.build_block(spec, dim=16)(x)
        unbounded, _ = tb.build_block(spec | {"clip": None}, dim=16)(x)
    assert bounded.isfinite().all()
    assert not unbounded.isfinite().all()


def test_a_memory_is_written_during_generation():
    model = make("mac")
    memories = [module for module in model.modules() if isinstance(module, NeuralMemory)]
    assert memories and all(isinstance(module, nn.Module) for module in memories)
    prompt = uniform(1, 9, seed=0)
    gen = model.generate(prompt, 12)
    before, after = model(prompt).state, gen.state
    moved = [
        (old - new).abs().max()
        for (path, old), (_, new) in zip(st.named_tensors(before), st.named_tensors(after))
        if ".memory.memory.weights." in path
    ]
    assert moved and all(float(difference.detach()) > 0 for difference in moved)
