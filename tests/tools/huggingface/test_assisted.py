"""Assisted generation: the tokens are those of plain generation, with a smaller model and with prompt look-up."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import titans_build as tb

NEW = 20


@pytest.fixture(scope="module")
def prompt() -> Tensor:
    """It repeats itself, so that prompt look-up finds candidates."""
    return torch.randint(1, 40, (1, 8), generator=torch.Generator().manual_seed(7)).repeat(1, 2)


def run(model: Any, prompt: Tensor, **settings: Any) -> Tensor:
    torch.manual_seed(3)
    # transformers takes tokens of the assistant with the id of padding for padding
    settings = {"do_sample": False, "suppress_tokens": [0], **settings}
    return model.generate(prompt, max_new_tokens=NEW, pad_token_id=0, **settings)


class Calls:
    """Counts the calls of a model and the tokens that they read."""

    def __init__(self, model: Any) -> None:
        self.tokens: list[int] = []
        model.register_forward_hook(self, with_kwargs=True)

    def __call__(self, model: Any, args: Any, named: Any, output: Any) -> None:
        self.tokens.append(named["input_ids"].shape[1])


@pytest.mark.parametrize("name", ["mac", "mag", "full"])
def test_a_recipe_model(small: Any, llama: Any, prompt: Tensor, name: str) -> None:
    model = small(name)
    expected = run(model, prompt)
    for settings in (
        {"prompt_lookup_num_tokens": 3},
        {"assistant_model": small("mag")},
        {"assistant_model": llama.plain()},
    ):
        assert torch.equal(run(model, prompt, **settings), expected)
    assert run(model, prompt, assistant_model=small("mag"), do_sample=True).shape == expected.shape


@pytest.mark.parametrize("how", ["beside", "replace"])
def test_a_swapped_model(family: Any, llama: Any, small: Any, prompt: Tensor, how: str) -> None:
    model = family.swapped(how)
    expected = run(model, prompt)
    for settings in (
        {"prompt_lookup_num_tokens": 3},
        {"assistant_model": llama.swapped("replace", num_hidden_layers=1)},
        {"assistant_model": small("mag")},
    ):
        assert torch.equal(run(model, prompt, **settings), expected)


@pytest.mark.parametrize("kind", ["recipe", "swapped"])
def test_all_candidates_of_an_equal_model_are_accepted(small: Any, llama: Any, prompt: Tensor, kind: str) -> None:
    make = small if kind == "recipe" else lambda: llama.swapped("replace")
    model, assistant = make(), make()
    assistant.generation_config.num_assistant_tokens = 5
    assistant.generation_config.assistant_confidence_threshold = 0.0
    assistant.generation_config.num_assistant_tokens_schedule = "constant"
    calls, drafted = Calls(model), Calls(assistant)
    assert torch.equal(run(model, prompt, assistant_model=assistant), run(make(), prompt))
    assert calls.tokens == [16 + 5, 6, 6, 2]
    # the assistant has read each token once
    assert sum(drafted.tokens) <= 16 + NEW


def test_a_long_prompt(llama: Any, small: Any) -> None:
    prompt = torch.randint(1, 40, (1, 300), generator=torch.Generator().manual_seed(7)).repeat(1, 2)
    for model in (llama.swapped("replace", max_position_embeddings=700), small("mac")):
        expected = run(model, prompt)
        calls = Calls(model)
        assert torch.equal(run(model, prompt, prompt_lookup_num_tokens=4), expected)
        assert len(calls.tokens) <= NEW


def test_the_carried_state_follows(llama: Any, prompt: Tensor) -> None:
    model, states = llama.swapped("beside"), []
    for settings in ({}, {"prompt_lookup_num_tokens": 3}, {"assistant_model": llama.swapped("replace")}):
        with tb.memory(model) as m:
            run(model, prompt, **settings)
        states.append([tensor for _, tensor in tb.state.named_tensors(m.state)])
    for state in states[1:]:
        for mine, other in zip(state, states[0], strict=True):
            torch.testing.assert_close(mine, other, atol=1e-10, rtol=1e-10)
