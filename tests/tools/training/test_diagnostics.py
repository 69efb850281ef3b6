"""Bad steps: detected, explained, and stopped at or skipped."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import titans_build as tb
from titans_build.tools.terminal import CommandFailed
from titans_build.tools.training import TrainedRun, train
from titans_build.tools.training.diagnostics import FEWEST, find_fault, largest_growth
from titans_build.tools.training.train_step import TrainStep
from titans_build.tools.training.trainer import Trainer

Train = Callable[..., TrainedRun]
MEMORY = "layers.0.blocks.0.memory"
COPY = "copy:length=16"


def test_spike_over_the_median_of_recent_losses() -> None:
    losses = [9.0, *[2.0] * (FEWEST - 1)]
    assert find_fault(3.5, 1.0, losses, 1.0) == "the loss is 3.5, the median of recent losses 2 (spike: 1.0)"
    assert find_fault(3.0, 1.0, losses, 1.0) is None
    assert find_fault(1e9, 1.0, losses, None) is None
    assert find_fault(1e9, 1.0, losses[1:], 1.0) is None


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_nonfinite_loss_or_gradient_is_a_fault(number: float) -> None:
    assert find_fault(number, 1.0, [], None) == f"the loss is {number}"
    assert find_fault(2.0, number, [], None) == f"the gradient norm is {number} (the loss is 2)"


def test_memory_with_the_largest_growth_is_named() -> None:
    before = {"a": {"mean": 1.0, "peak": 2.0, "weights": 1.0}, "b": {"mean": 1.0, "peak": 8.0, "weights": 1.0}}
    now = {"a": {"mean": 1.0, "peak": 6.0, "weights": 4.0}, "b": {"mean": 1.0, "peak": 9.0, "weights": 1.0}}
    said = "the inner update of a has grown most: surprise up to 6 (was 2), weights of norm 4 (was 1)"
    assert largest_growth(now, before) == said
    now["b"]["peak"] = math.nan
    assert str(largest_growth(now, before)).startswith("the inner update of b has grown most: surprise up to nan")
    assert largest_growth({}, before) is None


def spoil(monkeypatch: pytest.MonkeyPatch, *steps: int) -> None:
    """Let what the first memory is to learn be no number while these steps are taken."""
    step = Trainer._step

    def spoilt(self: Trainer, *given: Any) -> int:
        if self.progress.step + 1 not in steps:
            return step(self, *given)
        learned: Any = self.model.layers[0].blocks[0].memory
        hook = learned.qkv.register_forward_hook(lambda module, given, made: made * math.nan)
        try:
            return step(self, *given)
        finally:
            hook.remove()

    monkeypatch.setattr(Trainer, "_step", spoilt)


def test_run_stops_at_a_bad_step_and_resumes_before_it(
    losses: Any, quick_train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = quick_train(surprise_every=2, out="whole")
    with monkeypatch.context() as patch:
        # a step at which surprise is looked at anyway, behind one that was saved anyway
        spoil(patch, 6)
        with pytest.raises(CommandFailed) as caught:
            quick_train(surprise_every=2, checkpoint_every=5)
    said = str(caught.value)
    assert "step 6: the loss is nan; " in said and f"the inner update of {MEMORY} has grown most" in said
    assert " (was " in said and "the gradient of " in said
    assert f"saved before that step: titans-train --resume --out {tmp_path / 'run'} -t lr=..." in said
    run = train(None, None, None, tmp_path / "run", resume=True)
    assert losses(run.history) == losses(whole.history)
    assert [event["step"] for event in run.history if event["event"] == "stop"] == [5]
    assert [event["step"] for event in run.history if event["event"] == "checkpoint"] == [5, 6]


def test_skip_a_bad_step(losses: Any, quick_train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil(monkeypatch, 3)
    run = quick_train(on_bad="skip")
    assert sorted(losses(run.history)) == [1, 2, 4, 5, 6]
    (skip,) = (event for event in run.history if event["event"] == "skip")
    assert skip["step"] == 3 and "step 3 is skipped: the loss is nan" in skip["message"] and MEMORY in skip["why"]
    assert run.model is not None and all(bool(p.isfinite().all()) for p in run.model.parameters())


def test_too_many_skipped_steps_stop_the_run(quick_train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil(monkeypatch, *range(3, 100))
    with pytest.raises(CommandFailed, match=r"step 13 \(after 10 skipped steps\): the loss is nan"):
        quick_train(on_bad="skip", steps=50)


def test_bad_step_of_a_model_without_memories(quick_train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = {
        "version": 1,
        "dim": 16,
        "vocab": 16,
        "layers": {"t": [{"type": "attention", "window": 8}]},
        "stack": ["t"],
    }
    gradients = TrainStep.gradients

    def spoilt(self: TrainStep, *given: Any) -> Any:
        read = gradients(self, *given)
        assert self.model.head.grad is not None
        self.model.head.grad[0, 0] = math.inf
        return read

    monkeypatch.setattr(TrainStep, "gradients", spoilt)
    with pytest.raises(CommandFailed, match=r"the gradient norm is inf .*; the gradient of head has norm inf"):
        quick_train(recipe=plain)


def test_nonfinite_validation_is_not_the_best(quick_train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    from titans_build.tools.training import trainer

    validate = trainer.validate

    def spoilt(*given: Any) -> dict[str, float]:
        found = validate(*given)
        return {**found, "loss": math.nan} if len(seen) == 1 else found

    seen: list[dict[str, Any]] = []
    monkeypatch.setattr(trainer, "validate", spoilt)
    run = quick_train(
        valid_every=2, valid_batches=1, on_event=lambda event: seen.append(event) if event["event"] == "valid" else None
    )
    assert [event["loss"] is None for event in seen] == [False, True, False]
    assert run.best is not None and math.isfinite(run.best["loss"])


def test_surprise_under_autocast(quick_train: Train) -> None:
    run = quick_train(steps=1, surprise_every=1, autocast="bfloat16")
    exact = quick_train(steps=1, surprise_every=1, out="exact")
    found, expected = (
        next(event["memories"][MEMORY]["mean"] for event in each.history if event["event"] == "surprise")
        for each in (run, exact)
    )
    assert found == pytest.approx(expected, rel=0.05)


def test_measuring_surprise_changes_nothing(losses: Any, quick_train: Train) -> None:
    looked, not_looked = quick_train(surprise_every=1), quick_train(out="blind")
    assert losses(looked.history) == losses(not_looked.history)
    (first, *_) = (event["memories"] for event in looked.history if event["event"] == "surprise")
    # the same numbers as `tb.observe`
    batch = tb.open_source(COPY, rows=4).batch(0)
    model = tb.build(tb.load_recipe(looked.out / "recipe.yaml"))
    with torch.no_grad(), tb.observe(model) as seen:
        model(batch.tokens)
    assert first[MEMORY]["mean"] == pytest.approx(float(seen.memories[MEMORY].surprise.mean()))
    assert first[MEMORY]["peak"] == pytest.approx(float(seen.memories[MEMORY].surprise.max()))
