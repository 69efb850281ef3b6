"""Packaged models whose layers are modified: LoRA, pruning, hooks, and parameters that accelerate has offloaded."""

import copy

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from peft import LoraConfig, get_peft_model
from torch.nn.utils import parametrize, prune
from torch.testing import assert_close

import titans_build as tb

RECIPES = ["mac", "mag", "mal", "lmm", "memory-as-ffn", "windows-and-mac"]
CLOSE = {"rtol": 1e-8, "atol": 1e-9}


def built(name, **overrides):
    recipe = tb.load_recipe(name, overrides={"dim": 32} | overrides)
    return tb.build(recipe, dtype=torch.float64, seed=0).eval().requires_grad_(False)


@pytest.fixture
def tokens():
    return torch.randint(256, (2, 37), generator=torch.Generator().manual_seed(0))


def results(model, tokens):
    """Logits at once, in pieces, one token at a time, and of generation."""
    first = model(tokens[:, :30])
    state, pieces = first.state, [first.logits]
    for piece in tokens[:, 30:].split([4, 1, 2], dim=1):
        out = model(piece, state)
        state = out.state
        pieces.append(out.logits)
    generated = model.generate(tokens, 3)
    return {
        "at once": model(tokens).logits,
        "in pieces": torch.cat(pieces, dim=1),
        "from init_state": model(tokens, model.init_state(2)).logits,
        "generated": generated.tokens,
        "last": generated.logits,
    }


def linear_layers(model):
    return [layer for layer in model.modules() if isinstance(layer, torch.nn.Linear)]


def compare(model, other, tokens):
    with torch.no_grad():
        found, expected = results(model, tokens), results(other, tokens)
    for name, value in found.items():
        assert_close(value, expected[name], msg=lambda text, name=name: f"{name}: {text}", **CLOSE)
    assert_close(found["in pieces"], found["at once"], **CLOSE)


@pytest.mark.parametrize("name", RECIPES)
def test_lora_gives_the_results_of_merged_weights(name, tokens):
    torch.manual_seed(0)
    adapted = get_peft_model(built(name), LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)).eval()
    model = adapted.base_model.model
    assert len(linear_layers(model)) > 2 * len(linear_layers(built(name)))
    merged = copy.deepcopy(adapted).merge_and_unload()
    assert not torch.allclose(merged(tokens).logits, built(name)(tokens).logits)
    compare(model, merged, tokens)


def test_pruned_layers(tokens):
    model = built("mac")
    for layer in linear_layers(model):
        prune.l1_unstructured(layer, "weight", amount=0.5)
    permanent = copy.deepcopy(model)
    for layer in linear_layers(permanent):
        prune.remove(layer, "weight")
    compare(model, permanent, tokens)


class Scale(torch.nn.Module):
    def forward(self, value):
        return 1.5 * value


def test_every_parameter_may_be_parametrized(tokens):
    """Parametrized in place: gains, convolutions, initial weights, persistent tokens, embedding and head."""
    model, other = built("mac"), built("mac")
    for module in list(model.modules()):
        for name, _ in list(module.named_parameters(recurse=False)):
            parametrize.register_parametrization(module, name, Scale())
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    compare(model, other, tokens)


def test_hooks_on_the_model_are_called_for_every_generated_token(tokens):
    model, calls = built("lmm"), []
    expected = model.generate(tokens, 4)
    with model.register_forward_hook(lambda module, args, out: calls.append(out.logits.shape[1])):
        found = model.generate(tokens, 4)
    assert calls == [37, 1, 1, 1, 1]
    assert torch.equal(found.tokens, expected.tokens)
    assert_close(found.logits, expected.logits, **CLOSE)


@pytest.mark.parametrize("name", ["mac", "mag", "lmm"])
@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_offloaded_models_give_the_same_results(name, place, tokens, tmp_path):
    model, other = built(name), built(name)
    if place == "cpu":
        cpu_offload(model, execution_device=torch.device("cpu"))
    else:
        disk_offload(model, tmp_path, execution_device=torch.device("cpu"))
    assert model.embedding.is_meta and model.layers[0].norms[0].gain.is_meta
    compare(model, other, tokens)
    assert model.embedding.is_meta and model.layers[0].norms[0].gain.is_meta


def test_a_memory_that_is_offloaded_can_be_read():
    x, block = torch.randn(1, 9, 32), tb.build_block({"type": "memory", "heads": 2}, dim=32)
    outer = torch.nn.Sequential(block)
    with torch.no_grad():
        state = block.write(x, block.init_state(1))
        expected = [block.read(x[:, :time], state) for time in (1, 9)]
        cpu_offload(outer, execution_device=torch.device("cpu"))
        for value, time in zip(expected, (1, 9)):
            assert_close(block.read(x[:, :time], state), value)
        state, other = block.init_state(1), tb.build_block({"type": "memory", "heads": 2}, dim=32).init_state(1)
    assert_close(dict(tb.state.named_tensors(state)), dict(tb.state.named_tensors(other)), rtol=0, atol=0)


def test_a_block_that_is_offloaded_alone():
    x, block = torch.randn(2, 9, 32), tb.build_block({"type": "memory", "heads": 2}, dim=32)
    with torch.no_grad():
        expected, _ = block(x)
        _, state = block(x[:, :5])
        cpu_offload(block, execution_device=torch.device("cpu"))
        assert_close(block(x)[0], expected)
        assert_close(block(x[:, 5:], state)[0], expected[:, 5:])
        with pytest.raises(RuntimeError, match=r"NeuralMemory\.read: the parameters are offloaded"):
            block.read(x, state)
