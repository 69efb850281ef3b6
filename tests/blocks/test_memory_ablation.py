"""``memory_check``: losses with memories live, frozen and reset, their standard errors, and the verdict."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import titans_build as tb
from titans_build.blocks.language_model import LanguageModel
from titans_build.blocks.memory_ablation import (
    Difference,
    mean_with_error,
    memories_of,
    next_tokens,
    with_memories_of,
    writing_memories,
)
from titans_build.blocks.state import named_tensors

LMM = {"type": "memory", "heads": 2, "expansion": 2, "chunk": 4, "conv": 0}
MAC = {
    "type": "context", "segment": 16, "persistent": 3, "memory": {**LMM, "conv": 3, "gates": "chunk"},
    "attend": {"type": "attention", "heads": 2},
}  # fmt: skip
MAG = {"type": "persistent", "tokens": 3, "of": {"type": "gate", "branches": [{"type": "attention", "window": 8}, LMM]}}


def model_of(block: Any, **recipe: Any) -> LanguageModel:
    given = {"version": 1, "dim": 16, "vocab": 20, "layers": {"a": [block, "ffn"]}, "stack": ["a"], **recipe}
    return tb.build(tb.load_recipe(given), seed=0)


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(20, (2, 96), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("block", [LMM, MAC, MAG], ids=["lmm", "mac", "mag"])
def test_live_and_frozen_losses_are_those_of_the_model(block: Any, tokens: Tensor) -> None:
    model = model_of(block)
    check = tb.memory_check(model, tokens, piece=20)
    targets = next_tokens(tokens)
    with torch.no_grad():
        live = model(tokens, targets=targets)
        with model.freeze_memory():
            frozen = model(tokens, targets=targets)
        assert check.live == pytest.approx(float(live.loss), abs=1e-5)
        assert check.frozen == pytest.approx(float(frozen.loss), abs=1e-5)
        first = {name: tensor.detach() for name, tensor in named_tensors(model.init_state(2))}
    last = dict(named_tensors(live.state))
    assert check.frozen - check.live == pytest.approx(check.writing.mean, abs=1e-9)
    assert check.reset - check.live == pytest.approx(check.reaching_back.mean, abs=1e-9)
    names = [name for name in first if ".weights." in name and "snapshot" not in name]
    far = sum(float((last[name] - first[name]).square().sum()) for name in names)
    norm = sum(float(first[name].square().sum()) for name in names)
    assert check.moved == pytest.approx(math.sqrt(far / norm), 1e-4)
    assert check.changes


def test_reset_losses_are_those_of_separate_texts(tokens: Tensor) -> None:
    # a model without attention and convolutions processes the parts between resets independently
    model = model_of(LMM)
    check = tb.memory_check(model, tokens, reset_every=24)
    targets = next_tokens(tokens)
    with torch.no_grad():
        logits = torch.cat([model(part).logits for part in tokens.split(24, dim=1)], dim=1)
    expected = cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100)
    assert check.reset == pytest.approx(float(expected), abs=1e-5)
    assert check.reset_every == 24


@pytest.mark.parametrize("block", [MAC, MAG], ids=["mac", "mag"])
def test_a_reset_changes_memories_only(block: Any, tokens: Tensor) -> None:
    model = model_of(block)
    with torch.no_grad():
        fresh, state = model.init_state(2), model(tokens).state
    reset = dict(named_tensors(with_memories_of(state, fresh)))
    before, first = dict(named_tensors(state)), dict(named_tensors(fresh))
    for name, tensor in reset.items():
        inside = ".weights." in name or ".momentum." in name or ".anchor." in name or name.endswith("gates")
        of_memory = inside or name.endswith(("memory.position", "1.memory.position"))
        assert torch.equal(tensor, first[name] if of_memory else before[name]), name
    assert len(memories_of(state)) == 1  # without the snapshot


def test_the_size_of_pieces_does_not_change_results(tokens: Tensor) -> None:
    model = model_of(MAC)
    one, many = tb.memory_check(model, tokens), tb.memory_check(model, tokens, piece=7)
    assert torch.allclose(one.losses, many.losses, atol=1e-5)
    assert one.writing.error == pytest.approx(many.writing.error, rel=1e-3)


def test_masked_tokens_are_ignored(tokens: Tensor) -> None:
    model = model_of(MAG)
    mask = torch.ones_like(tokens, dtype=torch.bool)
    mask[:, 64:] = False
    targets = next_tokens(tokens)
    targets[:, 63] = -100
    masked = tb.memory_check(model, tokens, targets=targets, mask=mask, reset_every=16)
    short = tb.memory_check(model, tokens[:, :64], targets=targets[:, :64], reset_every=16)
    assert (masked.live, masked.frozen) == pytest.approx((short.live, short.frozen), abs=1e-6)
    assert masked.counts.sum() == short.counts.sum() == 126
    assert masked.losses[:, -1].isnan().all()


def test_the_model_is_not_changed(tokens: Tensor) -> None:
    model = model_of(LMM)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    calls: list[None] = []
    frozen = model.freeze_memory()
    check = tb.memory_check(model, tokens, advance=lambda: calls.append(None), piece=50, reset_every=50)
    # a frozen model is thawed for the check, and frozen after it
    assert check.changes and len(calls) == 6
    assert writing_memories(model) == frozen.names
    with torch.no_grad():
        ((after,), (first,)) = (memories_of(state) for state in (model(tokens).state, model.init_state(2)))
    assert all(torch.equal(w, w_first) for w, w_first in zip(after.weights, first.weights))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_a_memory_that_does_not_change(tokens: Tensor) -> None:
    model = model_of({**LMM, "forgetting": False})
    memory: Any = model.get_submodule(writing_memories(model)[0])
    with torch.no_grad():
        memory.controls.weight.zero_()
        memory.controls.bias[:2] = -torch.inf  # theta = 0
    check = tb.memory_check(model, tokens)
    assert not check.changes and not check.helps
    assert check.writing == Difference(0.0, 0.0)
    assert "does not change" in str(check)


def test_a_trained_model_benefits_from_its_memory() -> None:
    # each row repeats its own permutation: only the memory can predict the next token
    def rows(count: int) -> Tensor:
        return torch.stack([torch.randperm(20, generator=random)[:6] for _ in range(count)]).repeat(1, 8)

    random = torch.Generator().manual_seed(0)
    plain = {"heads": 1, "depth": 1, "chunk": 1, "conv": 2, "norm": False, "momentum": False, "clip": None}
    model = model_of(LMM, dim=32, layers={"a": [{"type": "memory", "max_step": 1.0, **plain}]})
    memory: Any = model.get_submodule(writing_memories(model)[0])
    with torch.no_grad():  # initialized near a solution: keys are the queries of the previous token
        memory.qkv.weight[32:64] = memory.qkv.weight[:32]
        memory.convolution[32:64] = torch.tensor([1.0, 0.0])
        memory.initial_weights[0].zero_()
        memory.controls.bias[0] = 0
        model.embedding.normal_(generator=random)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(100):
        tokens = rows(8)[:, :20]
        optimizer.zero_grad()
        model(tokens[:, :-1], targets=tokens[:, 1:]).loss.backward()
        optimizer.step()
    check = tb.memory_check(model, rows(16))
    assert check.helps and check.writing.mean > 1 and check.writing.mean > 10 * check.writing.error, str(check)
    assert check.reaching_back.mean > 0 and check.reaching_back.is_certain
    assert "writing helps" in str(check) and "it reaches back" in str(check)


def test_verdicts(tokens: Tensor) -> None:
    check = tb.memory_check(model_of(LMM), tokens)
    nat = math.log(2)
    hurts = check._replace(live=5 * nat, writing=Difference(-3 * nat, nat), reaching_back=Difference(nat, nat))
    changes, writing, back = hurts.verdict("byte")
    assert changes.startswith("memory changes at test time")
    assert writing == "writing hurts, frozen beats live: frozen - live = -3.0000 ± 1.0000 bits per byte, of 5.0000"
    assert back.startswith("no difference shown between live and a reset every 16 tokens")
    helps = check._replace(writing=Difference(3 * nat, nat), reaching_back=Difference(-3 * nat, nat))
    assert helps.helps and not hurts.helps
    assert "writing helps" in str(helps) and "holds on too long" in str(helps)


def test_standard_error_of_a_mean_over_blocks() -> None:
    sums, counts = torch.tensor([[3.0, 5.0, 1.0, 0.0]]).double(), torch.tensor([[1.0, 1.0, 1.0, 0.0]]).double()
    mean, error = mean_with_error(sums, counts)
    assert mean == pytest.approx(3.0)
    assert error == pytest.approx(2 / math.sqrt(3))  # the standard deviation of the sample is 2
    assert mean_with_error(sums[:, :1], counts[:, :1]).error == math.inf
    # many rows are the observations
    rows = torch.arange(16.0).double()[:, None].expand(16, 5)
    assert mean_with_error(rows, torch.ones_like(rows)).error == pytest.approx(float(rows[:, 0].std()) / 4)


def test_correlated_blocks_have_a_larger_standard_error() -> None:
    # noise that is constant over eight blocks: with 64 observations the error would be three times too small
    random = torch.Generator().manual_seed(0)
    wrong = naive = 0
    for _ in range(200):
        noise = torch.randn(1, 8, generator=random).double().repeat_interleave(8, dim=1)
        found = mean_with_error(noise, torch.ones_like(noise))
        wrong += found.is_certain
        naive += abs(float(noise.mean())) > 2 * float(noise.std()) / 8
    assert wrong < 30 < 80 < naive  # the mean of 8 normal values is beyond two standard errors in one case of twelve
    independent = torch.randn(200, 1, 64, generator=random).double()
    assert sum(mean_with_error(x, torch.ones_like(x)).is_certain for x in independent) < 14


def test_invalid_arguments_are_errors(tokens: Tensor) -> None:
    with pytest.raises(ValueError, match="no memory that is both written and read"):
        tb.memory_check(model_of({"type": "attention", "window": 8}), tokens)
    with pytest.raises(ValueError, match="no vocabulary"):
        tb.memory_check(model_of(LMM, vocab=None), tokens)
    with pytest.raises(ValueError, match="31 tokens in a row: expected at least 32"):
        tb.memory_check(model_of(LMM), tokens[:, :31])
    with pytest.raises(ValueError, match="no target counts"):
        tb.memory_check(model_of(LMM), tokens, targets=torch.full_like(tokens, -100))
    with pytest.raises(ValueError, match="reset_every 96: expected 1 to 95"):
        tb.memory_check(model_of(LMM), tokens, reset_every=96)
