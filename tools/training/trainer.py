"""The training loop: read, update, validate, save; stop or skip at a bad step; stop when interrupted."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import threading
import time
from types import FrameType
from typing import Any

import torch

from ...blocks.language_model import LanguageModel
from ...blocks.state import State
from ...recipes import StorageError
from ...registry import show
from ..data import Batch, Source
from ..terminal import CommandFailed
from . import checkpoint
from .checkpoint import CheckpointManager
from .diagnostics import FaultDetector, finite_only, largest_gradient, largest_growth, memory_surprise
from .distributed import Processes, full_tensor
from .log import EventLog
from .optimizer import WeightAverage, learning_rate, make_optimizer, stage_at, trainable_parameters
from .settings import Settings
from .train_state import Progress, TrainState, random_names
from .train_step import AUXILIARY, StepResult, TrainStep, validate

MAX_SKIPPED = 10
"""Bad steps in a row that are skipped before the run stops."""


class Interrupt:
    """Records the first Ctrl-C or SIGTERM of a ``with`` block; the second one ends the process at once.

    Only the main thread handles signals; in others this does nothing.
    """

    def __init__(self) -> None:
        self.requested = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interrupt:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            os._exit(128 + number)
        self.requested = True


class Trainer:
    """A run from its current step to its last. ``resume``: the command that resumes it, for messages."""

    def __init__(
        self,
        model: LanguageModel,
        source: Source,
        valid: Source | None,
        settings: Settings,
        processes: Processes,
        log: EventLog,
        checkpoints: CheckpointManager,
        resume: str,
    ) -> None:
        self.model, self.source, self.valid, self.settings = model, source, valid, settings
        self.processes, self.log, self.checkpoints, self.resume = processes, log, checkpoints, resume
        self.trainable = trainable_parameters(model, settings)
        processes.shard(model, reshard_after_forward=not any(getattr(settings, name) for name in AUXILIARY))
        self.step = TrainStep(model, settings, processes, torch.compile(model) if settings.compile else None)
        self.optimizer = make_optimizer(model, settings, fused=processes.world == 1)
        self.average = None if settings.ema is None else WeightAverage(model, settings.ema)
        self.carries = source.carries and settings.carry != "off"
        self.state: State = None
        self.progress = Progress()
        self.saved: int | None = None
        self.faults = FaultDetector(settings.spike)

    # -- checkpoints -----------------------------------------------------------------------------------------------

    def _train_state(self) -> TrainState:
        rows = self.settings.batch // self.processes.world
        return TrainState(self.model, self.optimizer, self.average, self.state, rows, self.processes)

    def save(self) -> None:
        """Write a checkpoint, unless this step has one: while it was replaced there would be none."""
        progress = self.progress
        if self.saved == progress.step:
            return
        progress.losses = list(self.faults.losses)
        tensors = self._train_state().tensors()
        facts = {
            "progress": vars(progress),
            "fingerprint": self.model.recipe.fingerprint,  # type: ignore[union-attr]
            "processes": self.processes.world,
            "device": self.processes.device.type,
            "batch": progress.step * self.settings.windows,
            "tensors": sorted(name for name in tensors if not name.startswith("random.")),
        }
        folder = self.checkpoints.path(progress.step)
        checkpoint.write(folder, tensors, facts, self.processes)
        if self.processes.main:
            best = None if progress.best is None else int(progress.best["step"])
            self.checkpoints.prune(progress.step, best, self.settings.keep)
        self.saved = progress.step
        self.log.emit("checkpoint", step=progress.step, path=str(folder))

    def load(self, step: int, facts: dict[str, Any]) -> None:
        """Resume from the checkpoint of a step, which has been verified."""
        folder = self.checkpoints.path(step)
        try:
            progress, names = Progress(**facts["progress"]), set(facts["tensors"])
            names |= random_names(facts["processes"], facts.get("device", "cpu"))
        except (KeyError, TypeError) as error:
            raise StorageError(f"{folder}: expected the facts of a run in its index: {error}") from None
        if progress.step != step:
            raise StorageError(f"{folder}: expected a checkpoint of step {step}, got one of {show(progress.step)}")
        fingerprint = self.model.recipe.fingerprint  # type: ignore[union-attr]
        if facts.get("fingerprint") != fingerprint:
            # a later version may give a block a field that it had not
            found = show(facts.get("fingerprint"))
            raise StorageError(f"{folder}: it is of another recipe: expected {fingerprint}, got {found}")
        train_state = self._train_state()
        tensors = train_state.prepare(names)
        checkpoint.read(folder, tensors, self.processes)
        train_state.restore(tensors)
        self.state, self.progress, self.saved = train_state.state, progress, step
        self.faults = FaultDetector(self.settings.spike, progress.losses)

    # -- the loop --------------------------------------------------------------------------------------------------

    def run(self, interrupt: Interrupt) -> None:
        """Train to the last step. Raises ``CommandFailed`` at a bad step, and ``KeyboardInterrupt`` on request."""
        settings, progress = self.settings, self.progress
        self.model.train()
        stage = -1
        while progress.step < settings.steps:
            position = stage_at(progress.step, settings)
            if position.number != stage:
                stage = position.number
                self._begin_stage(stage, first_step=position.step == 0 and stage > 0)
            started = time.perf_counter()
            windows = [self.source.batch(progress.step * settings.windows + i) for i in range(settings.windows)]
            progress.skipped = self._step(windows, started)
            if settings.valid_every and self.valid and self._due(settings.valid_every):
                self._validate()
            last = progress.step == settings.steps
            best = progress.best is not None and progress.best["step"] == progress.step
            (interrupted,) = self.processes.sum(interrupt.requested)
            if interrupted or last or best or (settings.checkpoint_every and self._due(settings.checkpoint_every)):
                self.save()
            if interrupted and not last:
                step = progress.step
                self.log.emit("stop", step=step, message="interrupted")
                raise KeyboardInterrupt(f"interrupted; saved after step {step:,} of {settings.steps:,}: {self.resume}")

    def _due(self, every: int) -> bool:
        return self.progress.step % every == 0 or self.progress.step == self.settings.steps

    def _begin_stage(self, index: int, first_step: bool) -> None:
        stage = self.settings.all_stages[index]
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(name in self.trainable[index])
            parameter.grad = None
        if first_step and stage.optimizer == "fresh":
            self.optimizer.state.clear()
        if self.settings.stages:
            self.log.emit("stage", step=self.progress.step, number=index, train=stage.train, steps=stage.steps)

    def _step(self, windows: list[Batch], started: float) -> int:
        """One update, or none if the step is bad. Returns the number of consecutive bad steps."""
        settings, progress = self.settings, self.progress
        memories = {}
        if settings.surprise_every and (progress.step + 1) % settings.surprise_every == 0:
            memories = memory_surprise(self.step, windows[0], self.state)
            if memories:
                self.log.emit("surprise", step=progress.step + 1, memories=memories)
        rate = learning_rate(progress.step, settings)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        result = self.step.gradients(windows, self.state)
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        total = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        norm = float(full_tensor(total))
        fault = self.faults.check(result.loss, norm)
        if fault is not None:
            return self._bad_step(fault, windows)
        if settings.clip is not None:
            torch.nn.utils.clip_grads_with_norm_(parameters, settings.clip, total)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.average is not None:
            self.average.update()
        self.state = result.state if self.carries else None
        progress.surprise |= finite_only(memories)
        self._log_step(result, rate, norm, windows, started)
        return 0

    def _log_step(self, result: StepResult, rate: float, norm: float, windows: list[Batch], started: float) -> None:
        progress = self.progress
        progress.step += 1
        tokens = sum(batch.tokens.numel() for batch in windows) * self.processes.world
        seconds = time.perf_counter() - started
        progress.tokens += tokens
        progress.seconds += seconds
        numbers = {"loss": result.loss, "tokens_per_second": tokens / seconds}
        self.log.emit("tick", step=progress.step, steps=self.settings.steps, **numbers)
        if self._due(self.settings.log_every):
            numbers |= result.auxiliary
            self.log.emit("step", step=progress.step, **numbers, lr=rate, gradient=norm, tokens=progress.tokens)

    def _validate(self) -> None:
        assert self.valid is not None
        progress = self.progress
        with self.average if self.average is not None else contextlib.nullcontext():
            found = validate(
                TrainStep(self.model, self.settings, self.processes), self.valid, self.settings.valid_batches
            )
        if math.isfinite(found["loss"]) and (progress.best is None or found["loss"] < progress.best["loss"]):
            progress.best = {"step": progress.step, **found}
        self.log.emit("valid", step=progress.step, **found)

    def _bad_step(self, fault: str, windows: list[Batch]) -> int:
        """Log a bad step and its likely cause. The parameters and the carried state stay as before the step."""
        number = self.progress.step + 1
        surprise = memory_surprise(self.step, windows[0], self.state)
        reasons = [largest_growth(surprise, self.progress.surprise), largest_gradient(self.model)]
        why = "; ".join(reason for reason in reasons if reason)
        self.optimizer.zero_grad(set_to_none=True)
        skipped = self.progress.skipped + 1
        if self.settings.on_bad == "skip" and skipped <= MAX_SKIPPED:
            self.progress.step = number
            self.log.emit("skip", step=number, message=f"step {number:,} is skipped: {fault}", why=why)
            return skipped
        self.save()
        many = f" (after {MAX_SKIPPED} skipped steps)" if skipped > MAX_SKIPPED else ""
        message = f"step {number:,}{many}: {fault}; {why}"
        self.log.emit("stop", step=self.progress.step, message=message)
        raise CommandFailed(
            f"{message}\nsaved before that step: {self.resume} -t lr=... resumes with a lower rate, "
            "-t on_bad=skip without the step"
        )
