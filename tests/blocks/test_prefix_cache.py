"""The prefix cache: the results are those without it, it is bounded, and it notices changes of the model."""

import random
import threading

import pytest
import torch

import titans_build as tb
from titans_build.blocks import state as st
from titans_build.blocks.build import materialize
from titans_build.blocks.language_model import LanguageModel
from titans_build.blocks.prompt import read_prompt

VOCAB = 13
MEMORY = {"type": "memory", "heads": 2, "chunk": 4}
ATTENTION = {"type": "attention", "heads": 2}
CONTEXT = {"type": "context", "segment": 5, "persistent": 2, "memory": MEMORY, "attend": ATTENTION}
STACKS = {
    "context": [[CONTEXT], [ATTENTION | {"window": 6}]],
    "growing": [[ATTENTION], [MEMORY]],
}


def make(layers=STACKS["context"], seed=0):
    with torch.device("meta"):
        model = LanguageModel(16, vocab=VOCAB, layers=layers)
    materialize(model, "cpu", torch.float64, seed)
    with torch.no_grad():
        model.head.mul_(20)  # confident predictions, so that rounding does not decide between tokens
    return model.requires_grad_(False)


@pytest.fixture(scope="module", params=STACKS)
def model(request):
    return make(STACKS[request.param])


def ids(*shape, seed=0):
    return torch.randint(VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def same(got, expected):
    torch.testing.assert_close(got.logits, expected.logits, rtol=1e-8, atol=1e-8)
    assert torch.equal(got.tokens, expected.tokens)
    for (path, one), (_, two) in zip(st.named_tensors(got.state), st.named_tensors(expected.state), strict=True):
        if one.shape == two.shape:  # padding may have enlarged a growing state
            torch.testing.assert_close(one, two, rtol=1e-8, atol=1e-8, msg=path)


def test_questions_about_one_text(model):
    cache, text = tb.PrefixCache(), ids(1, 700)
    for number, length in enumerate((40, 90, 3, 0)):
        prompt = torch.cat([text, ids(1, length, seed=number + 1)], dim=1)
        before = cache.statistics.tokens_read
        same(model.generate(prompt, 5, prefix_cache=cache), model.generate(prompt, 5))
        if number:
            assert cache.statistics.tokens_read - before <= 2 * 40 + 64 + length
    assert cache.statistics[:2] == (3, 1)
    assert cache.statistics.tokens_saved + cache.statistics.tokens_read == 4 * 700 + 133


def test_a_prompt_that_goes_on_from_an_answer_reads_only_what_is_new(model):
    cache = tb.PrefixCache()
    first = model.generate(ids(1, 30), 7, prefix_cache=cache)
    more = torch.cat([first.tokens, ids(1, 4, seed=2)], dim=1)
    same(model.generate(more, 5, prefix_cache=cache), model.generate(more, 5))
    assert cache.statistics.tokens_read == 30 + 4


def test_the_whole_prompt_may_be_stored(model):
    cache = tb.PrefixCache()
    for _ in range(2):
        same(model.generate(ids(2, 30), 5, prefix_cache=cache), model.generate(ids(2, 30), 5))
    assert cache.statistics.tokens_read == 60


def test_a_common_beginning_of_the_rows_is_read_once(model):
    cache = tb.PrefixCache()
    tokens = torch.cat([ids(1, 80).expand(4, -1), ids(4, 9, seed=1)], dim=1)
    tokens[:, 80] = torch.arange(4)
    mask = torch.ones_like(tokens, dtype=torch.bool)
    mask[0, :3], mask[1, -5:], tokens[0, 3:] = False, False, tokens[1, :-3]
    tokens[0, 83:] = 7
    same(model.generate(tokens, 5, mask=mask, prefix_cache=cache), model.generate(tokens, 5, mask=mask))
    assert cache.statistics.tokens_read == 80 + (int(mask.sum()) - 4 * 80)
    same(model.generate(tokens[2:], 5, prefix_cache=cache), model.generate(tokens[2:], 5))


@pytest.mark.parametrize("seed", range(8))
def test_any_sequence_of_prompts_gives_the_results_without_a_cache(seed):
    model, cache, drawn = make(), tb.PrefixCache(max_bytes=100_000), random.Random(seed)
    prompts = [(drawn.randrange(3), drawn.randrange(151), drawn.randrange(1, 30)) for _ in range(5)]
    texts = [ids(1, 150, seed=0), ids(1, 150, seed=1), ids(1, 150, seed=0)]
    texts[2][:, 70:] += 1
    for number, (text, shared, own) in enumerate(prompts):
        prompt = torch.cat([texts[text][:, :shared] % VOCAB, ids(1, own, seed=9 + number)], dim=1)
        logits, state = cache.read(model, prompt)
        expected, after = read_prompt(model, prompt)
        torch.testing.assert_close(logits, expected, rtol=1e-8, atol=1e-8)
        for (path, one), (_, two) in zip(st.named_tensors(state), st.named_tensors(after)):
            torch.testing.assert_close(one, two, rtol=1e-8, atol=1e-8, msg=path)
        assert cache.statistics.nbytes <= 100_000


def test_the_least_recently_used_states_are_removed_first():
    model = make()
    one = tb.PrefixCache()
    one.read(model, ids(1, 10))
    cache = tb.PrefixCache(max_bytes=2 * one.statistics.nbytes)
    for seed in (0, 1, 0, 2, 0):
        cache.read(model, ids(1, 10, seed=seed))
    assert cache.statistics == (2, 3, 20, 30, 2, 2 * one.statistics.nbytes)
    cache.read(model, ids(1, 10, seed=1))
    assert cache.statistics.misses == 4


def test_a_state_larger_than_the_cache_is_not_stored():
    model, cache = make(), tb.PrefixCache(max_bytes=10)
    for _ in range(2):
        same(model.generate(ids(3, 10), 5, prefix_cache=cache), model.generate(ids(3, 10), 5))
    assert cache.statistics[4:] == (0, 0)


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.head.data.add_(1e-9),
        lambda model: model.layers[0].blocks[0].memory.qkv.weight.add_(torch.eye(48, 16, dtype=torch.float64)),
        lambda model: model.embedding.data.copy_(model.embedding.data.roll(1, 0)),
        lambda model: model.freeze_memory(),
        lambda model: model.layers[1].register_forward_hook(lambda module, given, out: (2 * out[0], out[1])),
        lambda model: setattr(model.layers[1].blocks[0], "rope", 100.0),
        lambda model: model.float(),
    ],
    ids=["head", "one weight", "rows in another order", "frozen", "hook", "setting", "dtype"],
)
def test_a_changed_model_reads_anew(change):
    model, cache = make(), tb.PrefixCache()
    model.generate(ids(1, 90), 3, prefix_cache=cache)
    change(model)
    got, expected = model.generate(ids(1, 90), 3, prefix_cache=cache), model.generate(ids(1, 90), 3)
    assert torch.equal(got.tokens, expected.tokens)
    torch.testing.assert_close(got.logits, expected.logits, rtol=1e-5, atol=1e-5)
    assert cache.statistics.hits == 0


def test_autocast_reads_anew():
    model, cache = make().float(), tb.PrefixCache()
    cache.read(model, ids(1, 9))
    with torch.autocast("cpu", torch.bfloat16):
        cache.read(model, ids(1, 9))
    assert cache.statistics.hits == 0


def test_several_threads():
    model, cache, failures = make(), tb.PrefixCache(max_bytes=200_000), []
    prompts = [torch.cat([ids(1, 60), ids(1, 20, seed=seed)], dim=1) for seed in range(6)]
    expected = [model.generate(prompt, 2).tokens for prompt in prompts]

    def ask():
        for prompt, tokens in zip(prompts, expected):
            if not torch.equal(model.generate(prompt, 2, prefix_cache=cache).tokens, tokens):
                failures.append(prompt)

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert cache.statistics.hits + cache.statistics.misses == 18
    assert cache.statistics.nbytes <= 200_000


def test_drafts_and_caches_together(model):
    cache, prompt = tb.PrefixCache(), ids(2, 6).repeat(1, 8)
    for _ in range(2):
        same(model.generate(prompt, 30, prefix_cache=cache, draft="prompt"), model.generate(prompt, 30))


def test_invalid_uses_are_errors():
    model, cache = make(), tb.PrefixCache()
    for max_bytes in (0, -1, 1.5, True, None):
        with pytest.raises(ValueError, match="max_bytes: expected an integer >= 1"):
            tb.PrefixCache(max_bytes)
    with pytest.raises(TypeError, match="prefix_cache: expected a PrefixCache, got dict"):
        model.generate(ids(1, 4), 2, prefix_cache={})
    with pytest.raises(ValueError, match="prefix_cache: its states begin with the first token"):
        model.generate(ids(1, 4), 2, state=model.init_state(1), prefix_cache=cache)
    with pytest.raises(ValueError, match="tokens: row 1 has no valid token"):
        model.generate(ids(2, 4), 2, mask=torch.tensor([[True] * 4, [False] * 4]), prefix_cache=cache)
    with pytest.raises(ValueError, match="id 13 is outside the vocabulary"):
        model.generate(torch.tensor([[1, 13]]), 2, prefix_cache=cache)
    with pytest.raises(TypeError, match=r"tokens: expected torch\.int64"):
        model.generate(ids(1, 4).int(), 2, prefix_cache=cache)
    with pytest.raises(TypeError, match="tokens: expected a tensor, got list"):
        model.generate([[1]], 2, prefix_cache=cache)
    with pytest.raises(TypeError, match=r"mask: expected torch\.bool"):
        model.generate(ids(1, 4), 2, mask=torch.ones(1, 4), prefix_cache=cache)
    with tb.observe(model), pytest.raises(RuntimeError, match="prefix_cache: an observer would not see"):
        model.generate(ids(1, 4), 2, prefix_cache=cache)
    model.generate(ids(1, 4), 2, prefix_cache=cache)
    with pytest.raises(ValueError, match="prefix_cache: it has states of another model"):
        make().generate(ids(1, 4), 2, prefix_cache=cache)
