"""States in the cache of a transformers model follow every operation on the cache."""

import copy
import functools
import pickle

import pytest
import torch
from torch.testing import assert_close

import titans_build as tb
from titans_build.tools.swapping import SwapError

MEMORY = {"type": "memory", "heads": 2, "chunk": 4}

transformers = pytest.importorskip("transformers", reason="the extra hf")
SIZES = dict(
    vocab_size=37, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, max_position_embeddings=64, pad_token_id=0, eos_token_id=None,
)  # fmt: skip
PLACES = ["model.layers.*.self_attn", "model.layers.*", "model.layers.*.mlp"]


@pytest.fixture
def llama(randomised):
    """``llama(where, how, seed=0, **settings)``: a model with memories in it."""

    def make(where=PLACES[0], how="beside", seed=0, **settings):
        torch.manual_seed(seed)
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).eval()
        tb.swap(model, where, MEMORY, how, **settings)
        return randomised(model)

    return make


@pytest.fixture
def text(tokens):
    """``text(rows=2, time=9, seed=0)``: ids of the model's vocabulary."""
    return functools.partial(tokens, vocab=37)


@torch.no_grad()
@pytest.mark.parametrize("how", ["beside", "before", "after", "replace"])
@pytest.mark.parametrize("where", PLACES)
def test_streaming_equals_recomputation(llama, text, where, how):
    model, t = llama(where, how), text()
    whole = model(t).logits
    out = model(t[:, :4], use_cache=True)
    logits = [out.logits]
    for part in t[:, 4:].split([1, 3, 1], dim=1):
        out = model(part, past_key_values=out.past_key_values)
        logits.append(out.logits)
    assert_close(torch.cat(logits, dim=1), whole, atol=1e-4, rtol=1e-4)
    assert out.past_key_values.get_seq_length() == 9


@torch.no_grad()
@pytest.mark.parametrize("how", ["beside", "replace"])
@pytest.mark.parametrize("more", [{}, {"num_beams": 3}, {"cache_implementation": "static"}], ids=str)
def test_generate_with_left_padding(llama, text, how, more):
    model, t = llama(how=how), text(1, 5)
    padded = torch.cat([torch.cat([torch.zeros(1, 4, dtype=torch.long), t], dim=1), text(1, 9, seed=1)])
    options = {"max_new_tokens": 5, "do_sample": False, **more}
    together = model.generate(padded, attention_mask=(padded != 0).long(), **options)
    again = model.generate(padded, attention_mask=(padded != 0).long(), **{**options, "use_cache": False})
    assert torch.equal(together, again)
    assert torch.equal(together[:1, 9:], model.generate(t, **options)[:, 5:])


@torch.no_grad()
def test_a_cache_that_creates_its_layers_lazily(llama, text):
    model, t = llama(how="replace", every=2), text()
    for cache in (transformers.DynamicCache(), transformers.DynamicCache(config=model.config)):
        model(t[:, :4], past_key_values=cache)
        assert_close(model(t[:, 4:], past_key_values=cache).logits, model(t).logits[:, 4:])


@torch.no_grad()
@pytest.mark.parametrize("where", ["model.embed_tokens", "model.norm"])
def test_a_cache_found_only_in_the_output(llama, text, where):
    model, t = llama(where, "after"), text()
    out = model(t[:, :4], use_cache=True)
    rest = model(t[:, 4:], past_key_values=out.past_key_values).logits
    assert_close(rest, model(t).logits[:, 4:])


@torch.no_grad()
@pytest.mark.parametrize("how", ["beside", "replace"])
def test_cache_rows_and_states_move_together(llama, text, how):
    model, t = llama(how=how), text(3)
    whole = model(t).logits[:, 4:]

    def read():
        return model(t[:, :4], use_cache=True).past_key_values

    def goes_on(cache, rows):
        assert_close(model(t[rows, 4:], past_key_values=cache).logits, whole[rows])

    cache = read()
    fork = copy.deepcopy(cache)
    cache.reorder_cache(torch.tensor([2, 0, 0]))
    goes_on(cache, [2, 0, 0])
    goes_on(fork, [0, 1, 2])
    cache = read()
    cache.batch_select_indices(torch.tensor([1]))
    goes_on(cache, [1])
    cache = read()
    cache.batch_repeat_interleave(2)
    goes_on(cache, [0, 0, 1, 1, 2, 2])
    cache = read()
    cache.reset()
    assert_close(model(t, past_key_values=cache).logits[:, 4:], whole)


@torch.no_grad()
def test_two_caches_used_alternately(llama, text):
    model, t = llama(), text(2)
    whole = model(t).logits
    caches = [model(t[row : row + 1, :3], use_cache=True).past_key_values for row in range(2)]
    for start in range(3, 9, 2):
        for row, cache in enumerate(caches):
            part = slice(start, start + 2)
            assert_close(model(t[row : row + 1, part], past_key_values=cache).logits[0], whole[row, part])


@torch.no_grad()
def test_a_new_cache_starts_from_the_carried_state(llama, text):
    model, t = llama("model.layers.*.self_attn", "replace"), text()
    whole = model(t).logits
    with tb.memory(model) as m:
        out = model(t[:, :4])
        kept = m.state
        assert_close(model(t[:, 4:], past_key_values=out.past_key_values).logits, whole[:, 4:])
        after = m.state
        m.state = kept
        assert_close(model.model(t[:, 4:]).last_hidden_state, model_hidden(model, t)[:, 4:])
    for mine, other in zip(*[[x for _, x in tb.state.named_tensors(state)] for state in (after, m.state)]):
        assert_close(mine, other)


def model_hidden(model, t):
    with tb.memory(model):
        return model.model(t).last_hidden_state


@torch.no_grad()
def test_a_cache_of_another_model_is_refused(llama, text):
    model, t = llama(), text()
    for how, place in (("beside", PLACES[0]), ("replace", PLACES[1])):
        other = llama(place, how, seed=1)
        cache = other(t[:, :4], use_cache=True).past_key_values
        with pytest.raises(SwapError, match=r"cache.* is of another model"):
            model(t[:, 4:], past_key_values=cache)
    tb.unswap(other)
    cache = other(t[:, :4], use_cache=True).past_key_values
    with pytest.raises(SwapError, match="the cache has read 4 tokens without the memory"):
        model(t[:, 4:], past_key_values=cache)


@torch.no_grad()
@pytest.mark.parametrize("how", ["beside", "before", "replace"])
def test_a_cropped_cache_is_that_of_the_first_tokens(llama, text, how):
    model, t = llama(how=how).double(), text(2, 12)
    mask = torch.ones_like(t)
    mask[0, :3] = mask[1, 6:8] = 0

    def read(cache, start, end):
        return model(t[:, start:end], attention_mask=mask[:, :end], past_key_values=cache).logits

    whole = read(transformers.DynamicCache(), 0, 12)
    for cuts in ([7], [2, 7], [2, 3, 4, 5, 7], [1, 2, 3]):
        for crop in range(cuts[-1] + 1):
            cache = transformers.DynamicCache()
            for start, end in zip([0, *cuts], cuts):
                read(cache, start, end)
            if len(cuts) == 5:
                cache = copy.deepcopy(cache)
            cache.crop(-crop)
            assert cache.get_seq_length() == cuts[-1] - crop
            for start in range(cuts[-1] - crop, 9, 3):  # and again, and on
                got = read(cache, start, start + 3)
                assert_close(got, whole[:, start : start + 3], atol=1e-10, rtol=1e-10)
                cache.crop(-2)
                got = read(cache, start + 1, start + 3)
                assert_close(got, whole[:, start + 1 : start + 3], atol=1e-10, rtol=1e-10)


@torch.no_grad()
@pytest.mark.parametrize("how", ["beside", "replace"])
def test_cropping_after_a_long_call(llama, text, how):
    model, t = llama(how=how, seed=2).double(), text(1, 310)
    model.config.max_position_embeddings = 400
    whole = model(t, use_cache=False).logits
    for crop in (1, 100, 255, 256, 300):
        cache = model(t[:, :300], use_cache=True).past_key_values
        assert_close(
            model(t[:, 300:], past_key_values=copy.deepcopy(cache)).logits, whole[:, 300:], atol=1e-9, rtol=1e-9
        )
        cache.crop(-crop)
        got = model(t[:, 300 - crop :], past_key_values=cache).logits
        assert_close(got, whole[:, 300 - crop :], atol=1e-9, rtol=1e-9)
    cache = model(t[:, :300], use_cache=True).past_key_values
    with pytest.raises(SwapError, match=r"crop\(-257\): only the last 256 tokens of a call can be removed"):
        cache.crop(-257)


@torch.no_grad()
def test_the_carried_state_is_cropped_with_the_cache(llama, text):
    model, t = llama().double(), text()
    whole = model(t).logits
    with tb.memory(model) as m:
        model(t[:, :3])
        cache = model(t[:, 3:5], use_cache=True).past_key_values
        expected = m.state
        cache.crop(0)
        model(t[:, 5:], past_key_values=cache)
        cache.crop(-3)
        model(t[:, 6:8], past_key_values=cache)
        cache.crop(-3)
        for mine, other in zip(*[[x for _, x in tb.state.named_tensors(state)] for state in (m.state, expected)]):
            assert_close(mine, other, atol=1e-12, rtol=1e-12)
        for start in range(5, 8):
            model(t[:, start : start + 1], past_key_values=cache)
            cache.crop(0)
        with pytest.raises(SwapError, match=r"crop: tb\.memory cannot go back so far"):
            cache.crop(-5)
    with tb.memory(model) as m:
        cache = model(t[:, :3], use_cache=True).past_key_values
        cache.crop(-3)  # all, to a fresh state
        assert_close(model(t[:, :5], past_key_values=cache).logits, whole[:, :5])


@torch.no_grad()
def test_a_cropped_cache_without_attention(llama, text):
    model, t = llama("model.layers.*", "replace").double(), text()
    tb.swap(model, "model.norm", MEMORY, "after", gate=0.5)
    whole = model(t, use_cache=False).logits
    for cache in (transformers.DynamicCache(), transformers.DynamicCache(config=model.config)):
        model(t[:, :4], past_key_values=cache)
        model(t[:, 4:6], past_key_values=cache)
        cache.crop(-3)
        assert cache.get_seq_length() == 3
        assert_close(model(t[:, 3:], past_key_values=cache).logits, whole[:, 3:], atol=1e-10, rtol=1e-10)


def test_what_cannot_be_cropped(llama, text):
    model, t = llama(how="beside"), text()
    for change, message in (
        (lambda cache: cache.batch_select_indices(torch.tensor([1, 0])), r"can forget the last 0 of the 4 tokens"),
        (lambda cache: None, "with gradients"),
        (lambda cache: copy.copy(cache), "with gradients"),
    ):
        with torch.set_grad_enabled("gradients" in message):
            cache = model(t[:, :4], use_cache=True).past_key_values
        change(cache)
        cache.crop(0)
        with pytest.raises(SwapError, match=rf"crop\(-1\): .*{message}"):
            cache.crop(-1)
        with (
            torch.no_grad(),
            pytest.raises(SwapError, match="holds 3 tokens, and the memory's states in it have read 4"),
        ):
            model(t[:, 3:], past_key_values=cache)  # its keys have been cropped by then
    with torch.no_grad():
        cache = model(t[:, :4], use_cache=True).past_key_values
    with pytest.raises((SwapError, ValueError), match=r"crop|positive"):
        cache.crop(2)


@torch.no_grad()
@pytest.mark.parametrize("block", [lambda dim: torch.nn.Linear(dim, dim), {"type": "attention", "heads": 2}, "ffn"])
@pytest.mark.parametrize("alone", [False, True])
def test_cropping_other_blocks(llama, text, block, alone):
    model, t = llama(how="after"), text(1, 12)
    if alone:
        tb.unswap(model)
    tb.swap(model, "model.layers.*.mlp", block, "beside", gate=0.5)
    model.double()
    whole = model(t, use_cache=False).logits
    cache = model(t[:, :6], use_cache=True).past_key_values
    cache.crop(-2)
    assert_close(model(t[:, 4:], past_key_values=cache).logits, whole[:, 4:], atol=1e-10, rtol=1e-10)


@torch.no_grad()
def test_a_pickled_cache(llama, text):
    model, t = llama(), text()
    cache = pickle.loads(pickle.dumps(model(t[:, :4], use_cache=True).past_key_values))
    with pytest.raises(SwapError, match="can forget the last 0 of the 4 tokens"):
        copy.deepcopy(cache).crop(-1)
    assert_close(model(t[:, 4:], past_key_values=cache).logits, model(t).logits[:, 4:])


@torch.no_grad()
def test_a_cache_of_a_failed_call_is_refused(llama, text, monkeypatch):
    model, t = llama(), text()
    cache = model(t[:, :4], use_cache=True).past_key_values
    monkeypatch.setattr(model.model.layers[1].mlp, "forward", lambda x: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(t[:, 4:6], past_key_values=cache)
    monkeypatch.undo()
    with pytest.raises(SwapError, match="holds 6 tokens, and the memory's states in it have read 4"):
        model(t[:, 4:], past_key_values=cache)


@torch.no_grad()
def test_a_cache_with_another_number_of_rows_is_refused(llama, text):
    model, t = llama("model.layers.*.self_attn", "replace"), text()
    cache = model(t[:, :4], use_cache=True).past_key_values
    with pytest.raises(SwapError, match=r"self_attn: the cache has 2 rows and the call 1"):
        model(t[:1, 4:], past_key_values=cache)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_with_padding(llama, text, reentrant):
    model, t = llama().train(), text()
    padded = t.index_fill(1, torch.tensor([0, 1]), 0)

    def gradients():
        model.zero_grad()
        losses = [model(ids, attention_mask=(ids != 0).long(), labels=ids).loss for ids in (padded, t)]
        sum(losses).backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    expected = gradients()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    for got, gradient in zip(gradients(), expected):
        assert_close(got, gradient, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_forward_called_directly(llama, text):
    # as adapters of weights do, which call the forward of the model that they hold
    model, t = llama(), text()
    mask = torch.ones_like(t).index_fill(1, torch.tensor([0, 1]), 0)
    assert torch.equal(model.forward(t, attention_mask=mask).logits, model(t, attention_mask=mask).logits)
    cache = transformers.DynamicCache(config=model.config)
    model.forward(t[:, :4], past_key_values=cache)
    assert_close(model.forward(t[:, 4:], past_key_values=cache).logits, model(t).logits[:, 4:])


@torch.no_grad()
def test_an_encoder_decoder_model(text, randomised):
    torch.manual_seed(0)
    config = transformers.BartConfig(
        vocab_size=37, d_model=16, encoder_layers=1, decoder_layers=2, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, max_position_embeddings=64,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1, forced_eos_token_id=None,
    )  # fmt: skip
    model, t = transformers.BartForConditionalGeneration(config).eval(), text(2, 7)
    t = t.clamp(min=3)
    expected = model.generate(t, max_new_tokens=5, min_new_tokens=5, do_sample=False)
    tb.swap(model, "model.*coder.layers.*.self_attn", MEMORY, "beside")
    assert torch.equal(model.generate(t, max_new_tokens=5, min_new_tokens=5, do_sample=False), expected)
    randomised(model)
    padded = torch.cat([t[:1, :4], torch.zeros(1, 3, dtype=torch.long)], dim=1)
    mask = (torch.cat([padded, t[1:]]) != 0).long()
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "num_beams": 2}
    together = model.generate(torch.cat([padded, t[1:]]), attention_mask=mask, **options)
    assert torch.equal(
        together, model.generate(torch.cat([padded, t[1:]]), attention_mask=mask, use_cache=False, **options)
    )
    assert torch.equal(together[:1], model.generate(t[:1, :4], **options))
