"""Gradients of a step: accumulated and over windows, and their flow through a carried state."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import titans_build as tb
from titans_build.blocks.language_model import LanguageModel
from titans_build.blocks.state import named_tensors, select
from titans_build.tools.data import Batch
from titans_build.tools.training.distributed import Processes
from titans_build.tools.training.settings import as_settings
from titans_build.tools.training.train_step import StepResult, TrainStep, activation_checkpointing

ROWS, TIME = 4, 12


@pytest.fixture
def model(tiny: dict[str, Any]) -> LanguageModel:
    return tb.build(tiny, dtype=torch.float64)


def batch(seed: int = 0, *, fresh: bool = True, uneven: bool = False) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(16, (ROWS, TIME + 1), generator=generator)
    targets, mask = tokens[:, 1:].clone(), None
    if uneven:
        for row in range(ROWS):
            targets[row, : 2 * row] = -100
        mask = torch.arange(TIME).expand(ROWS, TIME) < torch.tensor([[12], [7], [9], [3]])
        targets[~mask] = -100
    return Batch(tokens[:, :-1], targets, mask, torch.full((ROWS,), fresh))


def read(
    model: LanguageModel, windows: list[Batch], state: Any = None, **settings: Any
) -> tuple[StepResult, dict[str, Tensor]]:
    model.zero_grad()
    done = TrainStep(model, as_settings({"batch": ROWS, **settings}), Processes()).gradients(windows, state)
    return done, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(
            a[name], b[name], rtol=1e-9, atol=1e-12, msg=lambda said, name=name: f"{name}: {said}"
        )


@pytest.mark.parametrize("memory_loss", [0.0, 0.3])
@pytest.mark.parametrize("parts", [2, 4])
def test_accumulated_gradients_equal_those_of_the_batch(model: LanguageModel, parts: int, memory_loss: float) -> None:
    uneven = batch(uneven=True)
    whole, expected = read(model, [uneven], memory_loss=memory_loss)
    done, found = read(model, [uneven], memory_loss=memory_loss, accumulate=parts)
    same(found, expected)
    assert done.loss == pytest.approx(whole.loss, rel=1e-12)
    assert done.auxiliary == pytest.approx(whole.auxiliary, rel=1e-12)
    assert sorted(done.auxiliary) == (["memory_loss"] if memory_loss else [])
    for (path, a), (_, b) in zip(named_tensors(whole.state), named_tensors(done.state)):
        torch.testing.assert_close(a, b, msg=path)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_packed_documents_equal_documents_apart(model: LanguageModel, accumulate: int) -> None:
    lengths = [[5, 4, 3], [12], [1, 1, 10], [2, 7, 3]]
    ids = torch.tensor([[i for i, length in enumerate(row) for _ in range(length)] for row in lengths])
    given = batch()._replace(documents=ids)
    packed, found = read(model, [given], accumulate=accumulate)
    model.zero_grad()
    losses = []
    for row, sizes in enumerate(lengths):
        parts = zip(given.tokens[row].split(sizes), given.targets[row].split(sizes))
        losses += [model(t[None], targets=y[None]).loss * len(t) for t, y in parts]
    loss = torch.stack(losses).sum() / (ROWS * TIME)
    loss.backward()
    same(found, {name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert packed.loss == pytest.approx(loss.item(), rel=1e-12)
    # a row whose document goes on carries its state, and others begin
    following = batch(1, fresh=False)._replace(documents=torch.tensor([[2], [1], [2], [3]]).expand(ROWS, TIME))
    step = TrainStep(model, as_settings({"batch": ROWS, "carry": 2}), Processes())
    rows = step.forward(following, packed.state).hidden
    for row, goes_on in enumerate([True, False, True, False]):
        state = select(packed.state, [row]) if goes_on else None
        torch.testing.assert_close(rows[row : row + 1], model(following.tokens[row : row + 1], state).hidden)


@pytest.mark.parametrize("name", ["memory_loss", "write_cost"])
def test_losses_equal_those_of_the_model_and_its_memories(model: LanguageModel, name: str) -> None:
    given = batch(uneven=True)
    done, found = read(model, [given], **{name: 0.3})
    model.zero_grad()
    with getattr(tb, name)(model) as auxiliary:
        loss = model(given.tokens, mask=given.mask, targets=given.targets).loss
        missed = auxiliary.value()
        (loss + 0.3 * missed).backward()
    assert done.loss == pytest.approx(loss.item()) and done.auxiliary == {name: pytest.approx(missed.item())}
    same(found, {name: p.grad for name, p in model.named_parameters() if p.grad is not None})


def test_gradients_of_windows_equal_those_of_one_long_row(model: LanguageModel) -> None:
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(16, (ROWS, 3 * TIME + 1), generator=generator)
    fresh = torch.tensor([True] * ROWS)
    windows = [
        Batch(tokens[:, i : i + TIME], tokens[:, i + 1 : i + TIME + 1], None, fresh if i == 0 else ~fresh)
        for i in range(0, 3 * TIME, TIME)
    ]
    whole = Batch(tokens[:, :-1], tokens[:, 1:], None, fresh)
    expected, gradients = read(model, [whole])
    done, found = read(model, windows, carry=3)
    same(found, gradients)
    assert done.loss == pytest.approx(expected.loss, rel=1e-12)
    # cut behind each window they are not
    cut: dict[str, Tensor] = {}
    state = None
    for window in windows:
        part, gradient = read(model, [window], state, carry="detach")
        state = part.state
        cut = {name: cut.get(name, 0) + gradient[name] / 3 for name in gradient}
    assert any(not torch.allclose(cut[name], gradients[name]) for name in gradients)
    for (path, a), (_, b) in zip(named_tensors(expected.state), named_tensors(state)):
        torch.testing.assert_close(a, b, msg=path)
        assert not b.requires_grad


def test_fresh_rows_start_from_the_initial_state(model: LanguageModel) -> None:
    before, _ = read(model, [batch(1)])
    mixed = batch(2, fresh=False)._replace(fresh=torch.tensor([False, True, False, True]))
    done, _ = read(model, [mixed], before.state)
    new, _ = read(model, [batch(2)])
    old, _ = read(model, [batch(2, fresh=False)], before.state)
    for (path, a), (_, b), (_, c) in zip(*map(named_tensors, (done.state, new.state, old.state))):
        torch.testing.assert_close(a[[1, 3]], b[[1, 3]], msg=path)
        torch.testing.assert_close(a[[0, 2]], c[[0, 2]], msg=path)
    assert old.loss != new.loss


def test_initial_state_gets_gradients_from_some_fresh_rows(model: LanguageModel) -> None:
    before, _ = read(model, [batch(1)])
    learned = "layers.0.blocks.0.memory.initial_weights.0"
    _, old = read(model, [batch(2, fresh=False)], before.state)
    assert learned not in old or not old[learned].any()
    _, mixed = read(
        model, [batch(2, fresh=False)._replace(fresh=torch.tensor([False, True, False, False]))], before.state
    )
    assert mixed[learned].any()


@pytest.mark.parametrize("memory_loss", [0.0, 0.3])
def test_activation_checkpointing_gives_the_same_gradients(model: LanguageModel, memory_loss: float) -> None:
    windows = [batch(1), batch(2, fresh=False)]
    expected, gradients = read(model, windows, carry=2, memory_loss=memory_loss)
    calls: list[int] = []
    handles = [layer.blocks[0].register_forward_pre_hook(lambda *_: calls.append(1)) for layer in model.layers]
    with activation_checkpointing(model):
        done, found = read(model, windows, carry=2, memory_loss=memory_loss)
    assert len(calls) == 2 * len(windows) * len(model.layers)
    for handle in handles:
        handle.remove()
    assert done.loss == expected.loss and done.auxiliary == expected.auxiliary
    same(found, gradients)
    assert all("forward" not in vars(layer) for layer in model.layers)


def test_activation_checkpointing_saves_memory(model: LanguageModel) -> None:

    def kept(context: Callable[[], Any]) -> int:
        numbers = 0

        def pack(x: Tensor) -> Tensor:
            nonlocal numbers
            numbers += x.numel()
            return x

        with context(), torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            model(batch().tokens, targets=batch().targets)
        return numbers

    import contextlib

    assert kept(lambda: activation_checkpointing(model)) < kept(contextlib.nullcontext) / 2


def test_autocast(tiny: dict[str, Any]) -> None:
    model = tb.build(tiny)
    exact, _ = read(model, [batch()])
    done, gradients = read(model, [batch()], autocast="bfloat16")
    assert done.loss != exact.loss and done.loss == pytest.approx(exact.loss, rel=0.02)
    assert {gradient.dtype for gradient in gradients.values()} == {torch.float32}
    again, _ = read(model, [batch(fresh=False)], done.state, autocast="bfloat16")
    assert again.loss == pytest.approx(exact.loss, rel=0.2)


def test_batch_without_targets_has_zero_loss(model: LanguageModel) -> None:
    given = batch()
    done, gradients = read(model, [given._replace(targets=torch.full_like(given.targets, -100))])
    assert done.loss == 0
    assert not any(gradient.any() for gradient in gradients.values())


def test_inputs_are_not_modified(model: LanguageModel) -> None:
    given = batch(uneven=True)
    before, _ = read(model, [batch(1)])
    kept = copy.deepcopy((given, before.state))
    read(model, [given._replace(fresh=torch.tensor([True, False, False, True]))], before.state, accumulate=2)
    for a, b in zip(kept[0], given):
        assert (a is None and b is None) or torch.equal(a, b)
    for (_, a), (_, b) in zip(named_tensors(kept[1]), named_tensors(before.state)):
        assert torch.equal(a, b)


@pytest.mark.slow
def test_compiled_gradients(tiny: dict[str, Any]) -> None:
    model = tb.build({**tiny, "stack": ["mag"], "layers": {"mag": tiny["layers"]["mag"]}})
    settings = as_settings({"batch": ROWS})
    expected = TrainStep(model, settings, Processes()).gradients([batch()], None)
    plain = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    done = TrainStep(model, settings, Processes(), torch.compile(model)).gradients([batch()], None)
    assert done.loss == pytest.approx(expected.loss, rel=1e-5)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, plain[name], rtol=1e-3, atol=1e-5, msg=name)
