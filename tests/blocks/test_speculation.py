"""Speculative decoding: greedy tokens are those of plain decoding, and sampled ones have their distribution."""

import copy
import itertools
import math

import pytest
import torch

import titans_build as tb
from titans_build.blocks import state as st
from titans_build.blocks.build import materialize
from titans_build.blocks.generation import Sampler, read_prompt
from titans_build.blocks.language_model import LanguageModel
from titans_build.blocks.speculation import ModelDraft, PromptLookup, Proposal, speculate

VOCAB = 13
MEMORY = {"type": "memory", "heads": 2, "chunk": 4}
ATTENTION = {"type": "attention", "heads": 2}
WINDOW = ATTENTION | {"window": 6}
CONTEXT = {"type": "context", "segment": 5, "persistent": 2, "memory": MEMORY, "attend": ATTENTION}
STACKS = {
    "context": [[CONTEXT, "ffn"], [WINDOW]],
    "gate": [[{"type": "persistent", "tokens": 2, "of": {"type": "gate", "branches": [WINDOW, MEMORY]}}]],
    "growing": [[ATTENTION, "ffn"], [MEMORY]],
}


def make(layers, vocab=VOCAB, dim=16, seed=0, sharp=40.0):
    with torch.device("meta"):
        model = LanguageModel(dim, vocab=vocab, layers=layers)
    materialize(model, "cpu", torch.float64, seed)
    with torch.no_grad():
        model.head.mul_(sharp)  # confident predictions, so that rounding does not decide between tokens
    return model.requires_grad_(False)


@pytest.fixture(scope="module", params=STACKS)
def model(request):
    return make(STACKS[request.param])


@pytest.fixture(scope="module")
def small():
    return make([[MEMORY]], dim=8, seed=1)


def ids(*shape, vocab=VOCAB, seed=0):
    return torch.randint(vocab, shape, generator=torch.Generator().manual_seed(seed))


def same_states(got, expected):
    for (path, one), (_, two) in zip(st.named_tensors(got), st.named_tensors(expected), strict=True):
        if one.shape == two.shape:  # padding may have enlarged a growing state
            torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-9, msg=path)


class Scripted:
    """Proposes the given tokens of each row, of which some are wrong."""

    def __init__(self, rows, seed=0):
        self.rows, self.at = rows, [0] * len(rows)
        self.generator = torch.Generator().manual_seed(seed)

    def propose(self, limits):
        tokens = []
        for row, at, limit in zip(self.rows, self.at, limits):
            count = min(limit, int(torch.randint(8, (), generator=self.generator)))
            wrong = int(torch.randint(12, (), generator=self.generator))
            tokens.append([(t + (i == wrong)) % VOCAB for i, t in enumerate(row[at : at + count])])
        return Proposal(tokens) if any(tokens) else None

    def extend(self, tokens, accepted=None):
        self.at = [at + len(new) for at, new in zip(self.at, tokens)]


@pytest.mark.parametrize("rows", [1, 3])
def test_rows_accept_different_numbers_of_tokens(model, rows):
    plain = model.generate(ids(rows, 7), 60)
    logits, state = read_prompt(model, ids(rows, 7))
    got = speculate(model, logits, state, Sampler(), 60, Scripted(plain.tokens[:, 7:].tolist()))
    assert torch.equal(got.tokens, plain.tokens[:, 7:])
    torch.testing.assert_close(got.logits, plain.logits)
    same_states(got.state, plain.state)
    assert got.drafted.proposed > got.drafted.accepted > 0
    assert got.drafted.calls < 60


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("draft", ["prompt", "small", "itself"])
def test_greedy_tokens_are_those_of_plain_decoding(model, small, draft, padded):
    tokens = ids(3, 6).repeat(1, 4)
    mask = torch.ones(3, 24, dtype=torch.bool)
    if padded:
        mask[0, :5], mask[1, 20:], mask[2, [1, 4, 7]] = False, False, False
    plain = model.generate(tokens, 50, mask=mask)
    got = model.generate(tokens, 50, mask=mask, draft={"small": small, "itself": model}.get(draft, draft))
    assert torch.equal(got.tokens, plain.tokens)
    torch.testing.assert_close(got.logits, plain.logits)
    same_states(got.state, plain.state)
    more = [model.generate(tokens[:, :0], 9, g.state, logits=g.logits).tokens for g in (plain, got)]
    assert torch.equal(*more)
    assert plain.drafted is None and len(got) == 3
    if draft == "itself":
        assert got.drafted.accepted == got.drafted.proposed > 0 and got.drafted.calls < 10


def test_the_result_can_be_trained_from(model):
    got = model.generate(ids(2, 4), 9, draft="prompt")
    assert not any(tensor.is_inference() for _, tensor in st.named_tensors((got.tokens, got.state, got.logits)))


def test_a_repeated_answer_takes_fewer_calls():
    """A constant model: whatever follows, it repeats itself."""
    model = make([["ffn"]], vocab=5)
    with torch.no_grad():
        model.head.zero_()
        model.head[3] = 0.0  # ties are decided for the first token
    got = model.generate(ids(1, 5, vocab=5), 200, draft="prompt")
    assert got.tokens[0, 5:].tolist() == [0] * 200
    assert got.drafted.calls < 40


# -- the distribution --------------------------------------------------------------------------------------------------


class Fixed:
    """Proposes the same tokens in every row, with certainty or drawn from ``offered``."""

    def __init__(self, tokens, rows, offered=None):
        self.tokens, self.at, self.offered = tokens, [0] * rows, offered
        self.generator = torch.Generator().manual_seed(5)

    def propose(self, limits):
        if self.offered is None:
            return Proposal([self.tokens[at : at + limit] for at, limit in zip(self.at, limits)])
        q = torch.tensor(self.offered, dtype=torch.float64).expand(len(limits), max(limits), 3)
        drawn = torch.multinomial(q.flatten(0, 1), 1, generator=self.generator).view(q.shape[:2])
        return Proposal([row[:limit] for row, limit in zip(drawn.tolist(), limits)], q)

    def extend(self, tokens, accepted=None):
        self.at = [at + len(new) for at, new in zip(self.at, tokens)]


class Lying(Fixed):
    """States other probabilities than it has."""

    def propose(self, limits):
        return Proposal(super().propose(limits).tokens, torch.full((len(limits), max(limits), 3), 0.4))


def chi_square(counts, probabilities):
    """The statistic in standard deviations from its mean under the hypothesis. Rare outcomes are taken together."""
    expected = probabilities * counts.sum()
    rare = expected < 5
    groups = [(float(counts[i]), float(expected[i])) for i in (~rare).nonzero().flatten()]
    groups.append((float(counts[rare].sum()), float(expected[rare].sum())))
    groups = [(n, e) for n, e in groups if e > 0]
    assert not counts[(expected == 0)].any()
    freedom = len(groups) - 1
    return (sum((n - e) ** 2 / e for n, e in groups) - freedom) / math.sqrt(2 * freedom)


def sampled(settings, draft, rows):
    """Counts of all continuations by 4 tokens, sampled with ``draft``, and their exact probabilities."""
    model, prompt, count = make([[WINDOW, "ffn"]], vocab=3, sharp=3.0), torch.tensor([[0, 2, 1, 1]]), 4
    outcomes = torch.tensor(list(itertools.product(range(3), repeat=count)))
    logits = model(torch.cat([prompt.expand(len(outcomes), -1), outcomes], dim=1)).logits[:, 3:-1]
    exact = Sampler(**settings).probabilities(logits).gather(2, outcomes.unsqueeze(2)).prod(dim=1).squeeze(1)
    torch.testing.assert_close(exact.sum(), torch.ones((), dtype=torch.float64))
    sampler = Sampler(**settings, seed=3)
    logits, state = read_prompt(model, prompt.expand(rows, -1))
    if isinstance(draft, LanguageModel):
        draft = ModelDraft(draft, read_prompt(draft, prompt.expand(rows, -1))[1], rows, sampler, prompt.device)
    got = speculate(model, logits, state, sampler, count, draft)
    assert 0 < got.drafted.accepted < got.drafted.proposed
    place = (got.tokens * 3 ** torch.arange(count - 1, -1, -1)).sum(dim=1)
    return torch.bincount(place, minlength=3**count), exact


@pytest.mark.parametrize(
    "kind, settings",
    [
        ("model", {"temperature": 1.0}),
        ("model", {"temperature": 1.7, "top_p": 0.9}),
        ("certain", {"temperature": 1.0}),
        ("certain", {"temperature": 1.0, "top_k": 2}),
        ("uncertain", {"temperature": 1.7, "top_p": 0.9}),
    ],
    ids=str,
)
def test_sampled_tokens_have_the_distribution_of_plain_sampling(kind, settings):
    rows = 2000
    drafts = {
        "model": make([[WINDOW]], vocab=3, dim=8, seed=1, sharp=6.0),
        "certain": Fixed([1, 0, 0, 2], rows),
        "uncertain": Fixed([], rows, [0.6, 0.3, 0.1]),
    }
    assert abs(chi_square(*sampled(settings, drafts[kind], rows))) < 3.5


def test_the_statistic_finds_a_wrong_distribution():
    assert chi_square(*sampled({"temperature": 1.0}, Lying([1, 0, 0, 2], 2000), 2000)) > 10


def test_seeds_are_reproducible(model, small):
    runs = [model.generate(ids(2, 4), 20, temperature=1.0, seed=s, draft=small).tokens for s in (1, 1, 2)]
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])


# -- prompt look-up ----------------------------------------------------------------------------------------------------


def test_a_lookup_takes_the_longest_recent_occurrence():
    phrase = list(range(1, 11))
    text = [*phrase, 20, 0, *phrase[1:], 21, 0, *phrase[1:], 22, *phrase]
    assert PromptLookup([text]).propose([4]).tokens == [[20, 0, 2, 3]]
    assert PromptLookup([text[1:-10] + phrase[1:]]).propose([4]).tokens == [[22, *phrase[1:4]]]


def test_a_lookup_goes_on_with_an_overlapping_occurrence():
    assert PromptLookup([[7, 8, 9] * 4]).propose([100]).tokens == [[7, 8, 9] * 6]


def test_a_lookup_requires_longer_occurrences_after_failures():
    lookup = PromptLookup([[1, 2] * 6])
    assert lookup.propose([10]) is not None
    lookup.extend([[5]], [0])
    lookup.extend([[1, 2] * 6])
    assert lookup.propose([10]) is None  # 12 tokens agree, and 16 are needed
    lookup.extend([[1, 2] * 6])
    assert lookup.propose([10]) is not None


def test_a_lookup_finds_nothing_in_text_without_repetitions():
    assert PromptLookup([list(range(100)), []]).propose([9, 9]) is None


# -- invalid drafts ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "draft, error, message",
    [
        ("promt", ValueError, r"draft: 'promt'; did you mean 'prompt'\?: expected 'prompt' or a smaller model"),
        (torch.nn.Linear(2, 2), TypeError, "draft: expected 'prompt' or a model of this library, got Linear"),
        (5, TypeError, "draft: expected 'prompt' or a model of this library, got int"),
        (LanguageModel(8, vocab=7, layers=[["ffn"]]), ValueError, "draft: a vocabulary of 7 tokens: expected 13"),
        (LanguageModel(8, layers=[["ffn"]]), ValueError, "draft: a vocabulary of None tokens: expected 13"),
        (LanguageModel(8, vocab=13, layers=[["ffn"]]).to("meta"), ValueError, "draft: it is on meta: expected cpu"),
    ],
)
def test_an_invalid_draft_is_an_error(model, draft, error, message):
    with pytest.raises(error, match=message):
        model.generate(ids(1, 4), 5, draft=draft)


def test_observers_are_not_shown_tokens_that_are_not_accepted(model):
    with tb.observe(model), pytest.raises(RuntimeError, match="draft: an observer would see tokens"):
        model.generate(ids(1, 4), 5, draft="prompt")


def test_a_draft_whose_logits_are_not_finite_is_an_error(model, small):
    broken = copy.deepcopy(small)
    for parameter in broken.parameters():
        parameter.data.fill_(torch.nan)
    for temperature in (0.0, 1.0):
        with pytest.raises(ValueError, match="draft: its logits are not finite"):
            model.generate(ids(1, 8), 8, temperature=temperature, draft=broken)


def test_no_new_tokens_are_drafted_in_no_calls(model, small):
    for draft in ("prompt", small):
        assert model.generate(ids(1, 8), 0, draft=draft).drafted == (0, 0, 0)


def test_logits_that_are_not_finite_are_an_error():
    model = make([["ffn"]], vocab=5)
    with torch.no_grad():
        model.embedding[2] = math.nan
        model.head.zero_()
    logits = torch.tensor([[0.0, 0.0, 9.0, 0.0, 0.0]], dtype=torch.float64)
    with pytest.raises(ValueError, match="logits: the maximum of row 0 is nan"):
        model.generate(torch.zeros(1, 0, dtype=torch.int64), 5, logits=logits, draft="prompt")
