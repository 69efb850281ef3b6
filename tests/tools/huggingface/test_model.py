"""Models of recipes in transformers: classes, arguments, gradients."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

import titans_build as tb
from titans_build.huggingface import TitansBuildConfig, TitansBuildForCausalLM, TitansBuildModel, as_pretrained
from titans_build.recipes import StorageError

Make = Callable[..., TitansBuildForCausalLM]
Recipe = Callable[..., dict[str, Any]]


def test_auto_classes(recipe: Recipe) -> None:
    config = AutoConfig.for_model("titans_build", recipe=recipe("mac"))
    assert isinstance(config, TitansBuildConfig)
    assert isinstance(AutoModelForCausalLM.from_config(config), TitansBuildForCausalLM)
    assert isinstance(AutoModel.from_config(config), TitansBuildModel)
    assert AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).dtype == torch.bfloat16


def test_config_of_a_recipe(recipe: Recipe) -> None:
    config = TitansBuildConfig(recipe=tb.load_recipe(recipe("mac"), overrides={"dim": 32}), eos_token_id=3)
    assert (config.vocab_size, config.hidden_size, config.num_hidden_layers, config.eos_token_id) == (40, 32, 2, 3)
    again = TitansBuildConfig(**config.to_dict())
    assert again.checked() == config.checked() and again.checked().overrides == {"dim": 32}
    assert again.fingerprint == config.checked().fingerprint
    assert TitansBuildConfig(recipe="mac").hidden_size == 256  # whatever load_recipe takes
    with pytest.raises(tb.RecipeError, match="dpeth"):
        TitansBuildConfig(recipe=recipe("mac", layers={"mac": [{"type": "memory", "dpeth": 3}]}))
    with pytest.raises(ValueError, match="expected recipe="):
        TitansBuildForCausalLM(TitansBuildConfig())


def test_config_imports_no_modules(recipe: Recipe) -> None:
    asks = recipe("mac", imports=["antigravity"])
    with pytest.raises(tb.RecipeError, match="asks to import antigravity, which runs that code"):
        TitansBuildConfig(recipe=asks)
    # one that was allowed to is of registered blocks now
    allowed = tb.load_recipe(recipe("mac", imports=["this"]), allow_imports=True)
    assert "imports" not in TitansBuildConfig(recipe=allowed).recipe


def test_a_changed_recipe_in_a_config_is_refused(recipe: Recipe) -> None:
    data = TitansBuildConfig(recipe=recipe("mac")).to_dict()
    data["recipe"]["layers"]["mac"][0]["segment"] = 7
    with pytest.raises(StorageError, match="the recipe of this configuration is not the one that was saved"):
        TitansBuildConfig(**data)


def test_same_seed_same_model(recipe: Recipe) -> None:
    config = TitansBuildConfig(recipe=recipe("mac"))
    torch.manual_seed(5)
    first = TitansBuildForCausalLM(config)
    torch.manual_seed(5)
    second = AutoModelForCausalLM.from_config(config)
    for (name, mine), other in zip(first.named_parameters(), second.parameters(), strict=True):
        assert torch.equal(mine, other), name
        assert not mine.isnan().any()


def test_as_pretrained_shares_parameters(recipe: Recipe, tokens: Tensor) -> None:
    inner = tb.build(recipe("mac"))
    model = as_pretrained(inner)
    assert model.model is inner and isinstance(model, TitansBuildForCausalLM)
    assert {id(p) for p in model.parameters()} == {id(p) for p in inner.parameters()}
    assert torch.equal(model(tokens).logits, inner(tokens).logits)
    copied = copy.deepcopy(model)
    assert copied.get_input_embeddings().weight is copied.model.embedding
    with pytest.raises(TypeError, match="expected a model made by build"):
        as_pretrained(torch.nn.Linear(2, 2))


def test_logits_to_keep(model: TitansBuildForCausalLM, tokens: Tensor) -> None:
    with torch.no_grad():
        every = model(tokens).logits
        assert_close(model(tokens, logits_to_keep=2).logits, every[:, -2:])
        assert_close(model(tokens, logits_to_keep=torch.tensor([0, 4])).logits, every[:, [0, 4]])
        loss, logits = model(tokens, labels=tokens, logits_to_keep=1, use_cache=False, return_dict=False)
        assert_close(logits, every[:, -1:])
        assert_close(loss, model(tokens, labels=tokens).loss)
        assert model(tokens, use_cache=False).past_key_values is None


def test_embeddings_in_and_hidden_states_out(recipe: Recipe, tokens: Tensor) -> None:
    model = as_pretrained(tb.build(recipe("mac", vocab=None)))
    assert isinstance(model, TitansBuildModel) and not model.can_generate()
    x = torch.randn(2, 7, 16)
    out = model(inputs_embeds=x)
    assert_close(out.last_hidden_state, model.model(embeddings=x).hidden)
    more = model(inputs_embeds=x, past_key_values=copy.deepcopy(out.past_key_values))
    assert_close(more.last_hidden_state, model.model(embeddings=x, state=out.past_key_values.state).hidden)
    with pytest.raises(ValueError, match="a recipe without vocab has no logits: TitansBuildModel"):
        AutoModelForCausalLM.from_config(model.config)
    with pytest.raises(ValueError, match="no vocabulary"):
        model(tokens)


@pytest.mark.parametrize(
    "wrong", ["none", "both", "ids", "mask", "width", "dtype", "labels", "label", "floats", "dimensions"]
)
def test_wrong_inputs_are_refused(small: Make, tokens: Tensor, wrong: str) -> None:
    model, x = small(), torch.randn(3, 11, 16, dtype=torch.float64)
    given: dict[str, tuple[dict[str, Any], str]] = {
        "none": ({}, "give either input_ids"),
        "both": ({"input_ids": tokens, "inputs_embeds": x}, "and not both"),
        "ids": ({"input_ids": tokens + 40}, "outside the vocabulary of 40"),
        "mask": ({"input_ids": tokens, "attention_mask": torch.ones(3, 12)}, r"expected \[3, 11\], .* got \[3, 12\]"),
        "width": ({"inputs_embeds": x[..., :3]}, r"expected \[batch, time, 16\]"),
        "dtype": ({"inputs_embeds": x.float()}, "expected torch.float64"),
        "labels": ({"input_ids": tokens, "labels": tokens[:, 1:]}, r"labels: expected .*\[3, 11\], got \[3, 10\]"),
        "label": ({"input_ids": tokens, "labels": tokens + 40}, "labels: id .* outside the vocabulary of 40"),
        "floats": ({"input_ids": tokens, "labels": tokens.float()}, "labels: expected torch.int64, got torch.float32"),
        "dimensions": ({"input_ids": tokens, "attention_mask": torch.ones(3, 1, 11, 11)}, "0 at padding"),
    }
    arguments, message = given[wrong]
    with pytest.raises((ValueError, TypeError), match=message):
        model(**arguments)


def test_the_vocabulary_cannot_change(small: Make) -> None:
    model = small()
    assert model.resize_token_embeddings(40) is model.get_input_embeddings()
    assert model.get_input_embeddings().weight.shape == (40, 16)
    with pytest.raises(ValueError, match="the vocabulary is part of the recipe: 40 ids, and not 41"):
        model.resize_token_embeddings(41)
    with pytest.raises(ValueError, match="cannot be replaced"):
        model.set_input_embeddings(torch.nn.Embedding(40, 16))


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("name", ["mac", "mag"])
def test_gradient_checkpointing(small: Make, tokens: Tensor, name: str, every: int) -> None:
    model = small(name).train()
    calls: list[int] = []
    for index, layer in enumerate(model.model.layers):
        layer.norms[0].register_forward_hook(lambda *_, index=index: calls.append(index))
    model(tokens, labels=tokens).loss.backward()
    assert calls == [0, 1]
    plain = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    model.activation_checkpointing_enable(every_n_layers=every)
    assert model.is_activation_checkpointing
    loss = model(tokens, labels=tokens).loss
    loss.backward()
    assert sorted(calls) == ([0, 0, 0, 1, 1, 1] if every == 1 else [0, 0, 0, 1, 1])
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert_close(parameter.grad, plain[name], msg=name)
    with pytest.raises(ValueError, match="use_reentrant=True"):
        model.activation_checkpointing_enable({"use_reentrant": True})
    model.activation_checkpointing_disable()
    assert not model.is_activation_checkpointing


def test_gradients_flow_through_a_cache(small: Make, tokens: Tensor) -> None:
    model = small()
    cache = model(tokens[:, :5]).past_key_values
    model(tokens[:, 5:], past_key_values=cache).logits.sum().backward()
    through = model.model.embedding.grad.clone()
    model.zero_grad()
    model(tokens).logits[:, 5:].sum().backward()
    assert_close(through, model.model.embedding.grad)


def test_enable_input_require_grads(small: Make, tokens: Tensor) -> None:
    model = small()
    model.requires_grad_(False)
    model.enable_input_require_grads()
    assert model(tokens).logits.requires_grad
    model.disable_input_require_grads()
    assert not model(tokens).logits.requires_grad
