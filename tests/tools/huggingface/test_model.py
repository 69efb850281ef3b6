"""Models of recipes in transformers: classes, arguments, gradients."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from torch import Tensor
from torch.testing import assert_close
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

import titans_build as tb
from titans_build.huggingface import (
    StateCache,
    TitansBuildConfig,
    TitansBuildForCausalLM,
    TitansBuildModel,
    as_pretrained,
)
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


def test_hidden_states(model: TitansBuildForCausalLM, tokens: Tensor) -> None:
    with torch.no_grad():
        expected = [model.model.embed(tokens)]
        for layer in model.model.layers:
            expected.append(layer(expected[-1])[0])
        expected[-1] = model.model(tokens).hidden
        out = model(tokens, labels=tokens, output_hidden_states=True)
        assert_close(out.hidden_states, tuple(expected))
        assert_close(out.logits, model(tokens).logits)
        assert model(tokens).hidden_states is None
        for which, kept in ((1, {1}), (0, {0}), ([-1, 0], {0, 2})):
            chosen = model(tokens, output_hidden_states=which).hidden_states
            assert {index for index, state in enumerate(chosen) if state is not None} == kept
            assert all(torch.equal(chosen[index], out.hidden_states[index]) for index in kept)
        assert model(tokens, output_hidden_states=True, use_cache=False, return_dict=False)[1][0].shape == (3, 11, 16)


def test_hidden_states_have_gradients_under_checkpointing(small: Make, tokens: Tensor) -> None:
    model, gradients = small().train(), []
    for enable in (model.activation_checkpointing_disable, model.activation_checkpointing_enable):
        enable()
        model.zero_grad()
        states = model(tokens, output_hidden_states=True).hidden_states
        torch.stack(states).square().sum().backward()
        gradients.append(model.model.embedding.grad.clone())
    assert_close(*gradients)


def test_the_base_model_and_the_head(model: TitansBuildForCausalLM, tokens: Tensor) -> None:
    with torch.no_grad():
        expected = model.model(tokens)
        for base in (model.base_model, model.get_decoder(), copy.deepcopy(model).base_model):
            assert isinstance(base, TitansBuildModel)
            assert_close(base(tokens).last_hidden_state, expected.hidden)
        head = model.get_output_embeddings()
        assert_close(head(expected.hidden), expected.logits)
        assert_close(expected.hidden @ head.weight.T, expected.logits)
        assert head.bias is None
    assert model.base_model.model is model.model and model.base_model.base_model is model.base_model
    assert sum(1 for _ in model.named_parameters()) == sum(1 for _ in model.model.named_parameters())


def test_the_head_of_tied_weights_is_the_embedding(small: Make) -> None:
    model = small("mag", tie=True)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert model.config.tie_word_embeddings and not small("mag").config.tie_word_embeddings


def test_hooks_of_embedding_head_and_base_model_run(small: Make, tokens: Tensor) -> None:
    model, calls = small(), []
    for name in ("embed_tokens", "lm_head", "base_model"):
        getattr(model, name).register_forward_hook(lambda *_, name=name: calls.append(name))
    model(tokens)
    assert calls == ["embed_tokens", "base_model", "lm_head"]


def test_a_forward_that_was_set_on_a_layer_survives_checkpointing(small: Make, tokens: Tensor) -> None:
    model, calls = small().train(), []

    class Count(ModelHook):
        def pre_forward(self, module: Any, *args: Any, **kwargs: Any) -> Any:
            calls.append(module)
            return args, kwargs

    model.activation_checkpointing_enable()
    add_hook_to_module(model.model.layers[0], Count())
    for expected in (2, 4):  # in the forward pass, and when it is recomputed
        model(tokens, labels=tokens).loss.backward()
        assert len(calls) == expected


def test_both_names_of_the_cache(small: Make, tokens: Tensor) -> None:
    model = small()
    with torch.no_grad():
        whole = model(tokens).logits[:, 5:]
        for name in ("cache", "past_key_values"):
            cache = StateCache()
            model(tokens[:, :5], **{name: cache})
            assert_close(model(tokens[:, 5:], **{name: cache}).logits, whole)
    with pytest.raises(TypeError, match="two names of one argument"):
        model(tokens, cache=cache, past_key_values=cache)


ROW = torch.arange(11)
PACKED = torch.cat([torch.arange(6), torch.arange(5)])


def test_positions_of_one_document_change_nothing(small: Make, tokens: Tensor) -> None:
    model, mask = small(), torch.ones(3, 11, dtype=torch.long)
    mask[0, :4] = mask[1, 5:7] = mask[2, 9:] = 0
    one = {"cu_seq_lens_q": torch.tensor([0, 11]), "seq_idx": torch.zeros(1, 11), "max_length_q": 11}
    with torch.no_grad():
        expected = model(tokens, attention_mask=mask).logits
        for positions in (ROW[None], ROW.expand(3, 11), (mask.cumsum(-1) - 1).clamp(min=0)):
            assert_close(model(tokens, attention_mask=mask, position_ids=positions, **one).logits, expected)
            assert_close(model(tokens, attention_mask=mask.bool(), position_ids=positions).logits, expected)
        cache = StateCache()
        first = model(tokens[:, :5], cache=cache, position_ids=ROW[None, :5]).logits
        rest = model(tokens[:, 5:], cache=copy.deepcopy(cache), position_ids=ROW[None, 5:]).logits
        assert_close(torch.cat([first, rest], dim=1), model(tokens).logits)
    with pytest.raises(ValueError, match="and a cache: its state is of one document"):
        model(tokens[:, 5:], cache=cache, position_ids=PACKED[None, 3:9])


@pytest.mark.parametrize(
    "wrong",
    [
        "none",
        "both",
        "ids",
        "mask",
        "numbers",
        "additive",
        "width",
        "dtype",
        "labels",
        "label",
        "floats",
        "dimensions",
        "attentions",
        "positions",
        "unknown",
    ],
)
def test_wrong_inputs_are_refused(small: Make, tokens: Tensor, wrong: str) -> None:
    model, x = small(), torch.randn(3, 11, 16, dtype=torch.float64)
    given: dict[str, tuple[dict[str, Any], str]] = {
        "none": ({}, "give either input_ids"),
        "both": ({"input_ids": tokens, "inputs_embeds": x}, "and not both"),
        "ids": ({"input_ids": tokens + 40}, "outside the vocabulary of 40"),
        "numbers": ({"input_ids": tokens, "attention_mask": torch.arange(11).expand(3, 11)}, "are given as seq_idx"),
        "additive": ({"input_ids": tokens, "attention_mask": torch.full((3, 11), -1e9)}, "1 at tokens and 0 at"),
        "mask": ({"input_ids": tokens, "attention_mask": torch.ones(3, 12)}, r"expected \[3, 11\], .* got \[3, 12\]"),
        "width": ({"inputs_embeds": x[..., :3]}, r"expected \[batch, time, 16\]"),
        "dtype": ({"inputs_embeds": x.float()}, "expected torch.float64"),
        "labels": ({"input_ids": tokens, "labels": tokens[:, 1:]}, r"labels: expected .*\[3, 11\], got \[3, 10\]"),
        "label": ({"input_ids": tokens, "labels": tokens + 40}, "labels: id .* outside the vocabulary of 40"),
        "floats": ({"input_ids": tokens, "labels": tokens.float()}, "labels: expected torch.int64, got torch.float32"),
        "attentions": ({"input_ids": tokens, "output_attentions": True}, "returns no attention weights"),
        "positions": (
            {"input_ids": tokens, "position_ids": tokens[:, 1:]},
            r"position_ids: .*got \[3, 10\]",
        ),
        "unknown": ({"input_ids": tokens, "token_type_ids": tokens}, "takes no argument 'token_type_ids'"),
        "dimensions": (
            {"input_ids": tokens, "attention_mask": torch.ones(3, 1, 11, 11)},
            "all tokens before it",
        ),
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
    with pytest.raises(ValueError, match="cannot be replaced"):
        model.set_output_embeddings(torch.nn.Linear(16, 40))


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
