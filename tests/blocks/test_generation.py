"""Generation: one token at a time from the state equals running the model on all tokens."""

import pytest
import torch

from titans_build.blocks import state as st
from titans_build.blocks.build import materialize
from titans_build.blocks.generation import Sampler, generate, read_prompt, steps
from titans_build.blocks.language_model import LanguageModel

VOCAB = 13
MEMORY = {"type": "memory", "heads": 2, "chunk": 4}
CONTEXT = {
    "type": "context",
    "segment": 5,
    "persistent": 2,
    "memory": MEMORY,
    "attend": {"type": "attention", "heads": 2},
}


@pytest.fixture(scope="module")
def model():
    with torch.device("meta"):
        model = LanguageModel(
            16, vocab=VOCAB, layers=[[CONTEXT, "ffn"], [{"type": "attention", "heads": 2, "window": 6}]]
        )
    materialize(model, "cpu", torch.float64, 0)
    with torch.no_grad():
        # confident predictions, so that rounding does not decide between tokens
        model.head.mul_(40)
        for layer in model.layers:
            layer.blocks[0].get_parameter("attend.out.weight" if layer is model.layers[0] else "out.weight").mul_(10)
    return model


def ids(*shape, seed=0):
    return torch.randint(VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def greedy_from_scratch(model, tokens, count):
    for _ in range(count):
        with torch.no_grad():
            tokens = torch.cat([tokens, model(tokens).logits[:, -1:].argmax(-1)], dim=1)
    return tokens


def test_greedy_generation_equals_forward_on_all_tokens(model):
    prompt = ids(3, 7)
    gen = model.generate(prompt, 15)
    assert torch.equal(gen.tokens, greedy_from_scratch(model, prompt, 15))
    assert len(gen.tokens[:, 7:].unique()) > 3


@pytest.mark.parametrize("block", [MEMORY, CONTEXT, {"type": "attention", "heads": 2, "window": 6}, "ffn"])
def test_generation_under_autocast_equals_forward_under_autocast(block):
    with torch.device("meta"):
        model = LanguageModel(16, vocab=VOCAB, layers=[[block]])
    materialize(model, "cpu", torch.float32, 0)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        tokens = generate(model, ids(2, 7), max_new_tokens=4).tokens
        logits = model(tokens).logits[:, 6:-1].float()
    chosen = logits.gather(-1, tokens[:, 7:, None]).squeeze(-1)
    assert tokens.shape == (2, 11) and (logits.amax(-1) - chosen).max() < 0.05  # bfloat16 may round two to one number


def test_the_state_includes_all_returned_tokens(model):
    gen = model.generate(ids(2, 4), 9)
    out = model(gen.tokens)
    for (path, got), (_, expected) in zip(st.named_tensors(gen.state), st.named_tensors(out.state)):
        torch.testing.assert_close(got, expected.detach(), msg=path)
    torch.testing.assert_close(gen.logits, out.logits[:, -1].detach())
    more = ids(2, 3, seed=1)
    torch.testing.assert_close(
        model(more, state=gen.state).logits, model(torch.cat([gen.tokens, more], 1)).logits[:, -3:]
    )


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_continued_generation_equals_one_call(model, temperature):
    prompt = ids(2, 5)
    whole = model.generate(prompt, 12, temperature=temperature, seed=torch.Generator().manual_seed(3))
    generator = torch.Generator().manual_seed(3)
    first = model.generate(prompt, 5, temperature=temperature, seed=generator)
    rest = model.generate(
        first.tokens[:, :0], 7, state=first.state, logits=first.logits, temperature=temperature, seed=generator
    )
    assert torch.equal(torch.cat([first.tokens, rest.tokens], dim=1), whole.tokens)


def test_padded_rows_equal_single_rows(model):
    tokens = ids(3, 8)
    mask = torch.ones(3, 8, dtype=torch.bool)
    mask[0, :3] = False  # left
    mask[1, 5:] = False  # right
    mask[2, [1, 4, 7]] = False  # scattered
    gen = model.generate(tokens, 9, mask=mask)
    for row in range(3):
        alone = model.generate(tokens[row : row + 1, mask[row]], 9)
        assert torch.equal(gen.tokens[row, 8:], alone.tokens[0, -9:])
    assert torch.equal(gen.tokens[:, :8], tokens)


def test_a_row_without_a_prompt_starts_from_given_logits(model):
    first = model.generate(ids(2, 5), 4)
    tokens = ids(2, 3, seed=2)
    mask = torch.tensor([[False] * 3, [True] * 3])
    gen = model.generate(tokens, 6, state=first.state, mask=mask, logits=first.logits)
    silent = model.generate(first.tokens[:1, :0], 6, state=st.select(first.state, [0]), logits=first.logits[:1])
    spoken = model.generate(tokens[1:], 6, state=st.select(first.state, [1]))
    assert torch.equal(gen.tokens[0, 3:], silent.tokens[0])
    assert torch.equal(gen.tokens[1, 3:], spoken.tokens[0, 3:])


def test_seeds_are_reproducible_and_the_global_generator_is_not_used(model):
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    runs = [model.generate(ids(2, 4), 20, temperature=1.0, seed=seed).tokens for seed in (1, 1, 2, None, None)]
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])
    assert not torch.equal(runs[3], runs[4])


def test_gradients_are_not_tracked_and_the_state_can_be_trained_from(model):
    gen = model.generate(ids(1, 4), 3)
    assert not any(tensor.requires_grad for _, tensor in st.named_tensors(gen.state))
    tokens = ids(1, 4, seed=3)
    loss = model(tokens, state=gen.state, targets=tokens).loss
    loss.backward()
    model.zero_grad()
    assert loss.requires_grad


def test_zero_new_tokens(model):
    prompt = ids(2, 4)
    gen = model.generate(prompt, 0)
    assert torch.equal(gen.tokens, prompt)
    torch.testing.assert_close(gen.logits, model(prompt).logits[:, -1].detach())


def test_steps_yield_single_tokens(model):
    prompt = ids(1, 4)
    logits, state = read_prompt(model, prompt)
    seen = []
    for step in steps(model, logits, state, Sampler(), 100):
        seen.append(int(step.token))
        if len(seen) == 5:
            break
    assert seen == model.generate(prompt, 5).tokens[0, 4:].tolist()


def test_steps_can_be_continued_and_copies_can_be_trained_from(model):
    prompt, tokens = ids(1, 4), ids(1, 3, seed=4)
    logits, state = read_prompt(model, prompt)
    for step in steps(model, logits, state, Sampler(), 3):
        kept = step
    with torch.no_grad():
        expected = model(tokens, state=kept.state).logits
    copy = kept.trainable()
    assert not any(tensor.is_inference() for _, tensor in st.named_tensors(copy))
    out = model(tokens, state=copy.state, targets=tokens)
    out.loss.backward()
    model.zero_grad()
    torch.testing.assert_close(out.logits.detach(), expected)


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"max_new_tokens": -1}, ValueError, "max_new_tokens"),
        ({"max_new_tokens": 1.5}, ValueError, "max_new_tokens"),
        ({"seed": "x"}, ValueError, "seed: expected an integer of 64 bits, got 'x'"),
        ({"seed": 2**64}, ValueError, "seed: expected an integer of 64 bits"),
        ({"temperature": "hot"}, ValueError, "temperature: expected a number >= 0 .*, got 'hot'"),
        ({"top_k": 1.5}, ValueError, "top_k: expected an integer >= 1, got 1.5"),
        ({"top_p": "x"}, ValueError, "top_p: expected a probability .*, got 'x'"),
        ({"temperature": -0.1}, ValueError, "temperature"),
        ({"temperature": float("nan")}, ValueError, "temperature"),
        ({"top_k": 0}, ValueError, "top_k"),
        ({"top_p": 0.0}, ValueError, "top_p"),
        ({"top_p": 1.1}, ValueError, "top_p"),
        ({"mask": torch.tensor([[True, True], [False, False]])}, ValueError, "row 1 has no valid token"),
        ({"mask": torch.ones(2, 3, dtype=torch.bool)}, ValueError, "mask"),
        ({"logits": torch.zeros(2, 5)}, ValueError, r"logits: .*\[2, 13\]"),
        ({"logits": [1]}, TypeError, "logits: expected a tensor .*, got list"),
        ({"logits": torch.zeros(2, VOCAB).long()}, TypeError, "logits: expected a floating-point .* torch.int64"),
        ({"logits": torch.zeros(2, VOCAB, device="meta")}, ValueError, "logits: expected device cpu .* got meta"),
        ({"tokens": ids(2, 2).int()}, TypeError, "tokens"),
        ({"tokens": ids(2, 2) + VOCAB}, ValueError, "outside the vocabulary"),
        ({"tokens": ids(2, 0)}, ValueError, "row 0 has no valid token"),
    ],
)
def test_invalid_arguments_are_errors(model, arguments, error, message):
    with pytest.raises(error, match=message):
        generate(model, **({"tokens": ids(2, 2)} | arguments))


@pytest.mark.parametrize("settings", [{}, {"temperature": 1.0}, {"temperature": 1.0, "top_k": 2}, {"top_p": 0.5}])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_sampling_from_nonfinite_logits_is_an_error(settings, value):
    logits = torch.zeros(2, 4)
    logits[1, 2] = value
    with pytest.raises(ValueError, match=f"maximum of row 1 is {value}"):
        Sampler(**settings)(logits)
    with pytest.raises(ValueError, match="maximum of row 0 is -inf"):
        Sampler(**settings)(torch.full((1, 4), float("-inf")))


def test_tokens_at_minus_infinity_are_never_sampled():
    logits = torch.tensor([[float("-inf"), 0.0, float("-inf")]]).expand(50, -1)
    for settings in ({}, {"temperature": 1.0}, {"temperature": 1.0, "top_p": 0.9}):
        assert Sampler(seed=0, **settings)(logits).unique().tolist() == [1]


def test_a_diverged_model_is_an_error(model):
    state = model.init_state(1)
    logits = torch.full((1, VOCAB), float("nan"))
    for temperature in (0.0, 1.0):
        with pytest.raises(ValueError, match="not finite"):
            model.generate(ids(1, 0), 2, state=state, logits=logits, temperature=temperature)


def test_a_state_with_other_rows_is_an_error(model):
    with pytest.raises(ValueError, match="3 rows"):
        model.generate(ids(2, 3), 2, state=model.init_state(3))


def frequencies(sampler, logits, count=4000):
    drawn = sampler(torch.tensor(logits).expand(count, -1))
    return torch.bincount(drawn, minlength=len(logits)) / count


PROBABILITY = torch.tensor([0.4, 0.3, 0.2, 0.1])


@pytest.mark.parametrize(
    "settings, expected",
    [
        ({}, PROBABILITY),
        ({"temperature": 0.5}, PROBABILITY**2 / (PROBABILITY**2).sum()),
        ({"top_k": 2}, torch.tensor([4 / 7, 3 / 7, 0, 0])),
        ({"top_k": 9}, PROBABILITY),
        ({"top_p": 0.69}, torch.tensor([4 / 7, 3 / 7, 0, 0])),
        ({"top_p": 0.71}, torch.tensor([4 / 9, 3 / 9, 2 / 9, 0])),
        ({"top_p": 0.01}, torch.tensor([1.0, 0, 0, 0])),
        ({"top_p": 1.0}, PROBABILITY),
        ({"top_k": 2, "top_p": 0.5}, torch.tensor([1.0, 0, 0, 0])),
        ({"temperature": 1e-30}, torch.tensor([1.0, 0, 0, 0])),
    ],
)
def test_frequencies_of_sampled_tokens(settings, expected):
    # not sorted by probability, like a vocabulary
    order = torch.tensor([2, 0, 3, 1])
    got = frequencies(Sampler(**({"temperature": 1.0, "seed": 0} | settings)), PROBABILITY[order].log().tolist())
    torch.testing.assert_close(got, expected[order], atol=0.03, rtol=0)
    assert bool((got[expected[order] == 0] == 0).all())
