"""The loop: read, update, look, save; and stop, or go on, where a step is bad."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from typing import Any

import torch

from ...blocks.language_model import LanguageModel
from ...blocks.state import State
from ...recipes import StorageError
from ...registry import show
from ..data import Batch, Source
from ..terminal import CommandFailed
from . import checkpoint
from .distributed import Processes, whole
from .journal import Journal
from .keeping import Checkpoints
from .measuring import validate
from .optimiser import Average, make_optimizer, trained
from .schedule import learning_rate, place_of
from .settings import Settings
from .snapshot import Snapshot, random_names
from .stepping import AUXILIARY, Read, Reader
from .stopping import Stopping
from .watching import Watch, finite, grown, surprises, wildest

MOST_SKIPPED = 10
"""Bad steps in a row that are skipped; then the run stops all the same."""


@dataclass
class Progress:
    """How far a run is, in numbers that JSON holds exactly. With the tensors of a ``Snapshot``, all that it needs."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    losses: list[float] = field(default_factory=list)
    best: dict[str, float] | None = None
    surprise: dict[str, dict[str, float]] = field(default_factory=dict)
    skipped: int = 0


class Loop:
    """A run from the step it is at to the last. Made by ``train``."""

    def __init__(
        self,
        model: LanguageModel,
        source: Source,
        valid: Source | None,
        settings: Settings,
        processes: Processes,
        journal: Journal,
        checkpoints: Checkpoints,
        resume: str,
    ) -> None:
        self.model, self.source, self.valid, self.settings = model, source, valid, settings
        self.processes, self.journal, self.checkpoints, self.resume = processes, journal, checkpoints, resume
        self.trained = trained(model, settings)
        processes.shard(model, keep=any(getattr(settings, name) for name in AUXILIARY))
        run = torch.compile(model) if settings.compile else None
        self.reader = Reader(model, settings, processes, run)
        self.optimizer = make_optimizer(model, settings, fused=processes.world == 1)
        self.average = None if settings.ema is None else Average(model, settings.ema)
        self.state: State = None
        self.progress = Progress()
        self.saved: int | None = None
        self.watch = Watch(settings.spike)

    # -- saving and going on ---------------------------------------------------------------------------------------

    def _snapshot(self) -> Snapshot:
        rows = self.settings.batch // self.processes.world
        return Snapshot(self.model, self.optimizer, self.average, self.state, rows, self.processes)

    def save(self) -> None:
        """A checkpoint of the run as it is, unless there is one: for a moment, replacing it would leave none."""
        progress = self.progress
        if self.saved == progress.step:
            return
        progress.losses = list(self.watch.losses)
        tensors = self._snapshot().tensors()
        facts = {
            "progress": vars(progress),
            "fingerprint": self.model.recipe.fingerprint,  # type: ignore[union-attr]
            "processes": self.processes.world,
            "device": self.processes.device.type,
            "batch": progress.step * self.settings.windows,
            "tensors": sorted(name for name in tensors if not name.startswith("random.")),
        }
        checkpoint.write(self.checkpoints.path(progress.step), tensors, facts, self.processes)
        if self.processes.main:
            best = None if progress.best is None else int(progress.best["step"])
            self.checkpoints.settle(progress.step, best, self.settings.keep)
        self.saved = progress.step
        self.journal.say("checkpoint", step=progress.step, path=str(self.checkpoints.path(progress.step)))

    def load(self, step: int, facts: dict[str, Any]) -> None:
        """Go on from the checkpoint of a step, which has been verified."""
        folder = self.checkpoints.path(step)
        try:
            progress, names = Progress(**facts["progress"]), set(facts["tensors"])
            names |= random_names(facts["processes"], facts.get("device", "cpu"))
        except (KeyError, TypeError) as error:
            raise StorageError(f"{folder}: the facts of its index are not those of a run: {error}") from None
        if progress.step != step:
            raise StorageError(f"{folder}: expected a checkpoint of step {step}, got one of {show(progress.step)}")
        fingerprint = self.model.recipe.fingerprint  # type: ignore[union-attr]
        if facts.get("fingerprint") != fingerprint:
            # a later version may give a block a field that it had not
            came = show(facts.get("fingerprint"))
            raise StorageError(f"{folder}: it is of another recipe: expected {fingerprint}, got {came}")
        snapshot = self._snapshot()
        tensors = snapshot.prepare(names)
        checkpoint.read(folder, tensors, self.processes)
        snapshot.restore(tensors)
        self.state, self.progress, self.saved = snapshot.state, progress, step
        self.watch = Watch(self.settings.spike, progress.losses)

    # -- running ---------------------------------------------------------------------------------------------------

    def run(self, stopping: Stopping) -> None:
        """To the last step. Raises ``CommandFailed`` at a bad step and ``KeyboardInterrupt`` when asked to stop."""
        settings, progress = self.settings, self.progress
        self.model.train()
        stage = -1
        while progress.step < settings.steps:
            place = place_of(progress.step, settings)
            if place.number != stage:
                stage = place.number
                self._enter(stage, new=place.step == 0 and stage > 0)
            started = time.perf_counter()
            windows = [self.source.batch(progress.step * settings.windows + i) for i in range(settings.windows)]
            progress.skipped = self._step(windows, started)
            if settings.valid_every and self.valid and self._due(settings.valid_every):
                self._validate()
            last = progress.step == settings.steps
            best = progress.best is not None and progress.best["step"] == progress.step
            (asked,) = self.processes.total(stopping.asked)
            if asked or last or best or (settings.checkpoint_every and self._due(settings.checkpoint_every)):
                self.save()
            if asked and not last:
                self._interrupted()

    def _due(self, every: int) -> bool:
        return self.progress.step % every == 0 or self.progress.step == self.settings.steps

    def _enter(self, number: int, new: bool) -> None:
        stage, trained = self.settings.parts[number], self.trained[number]
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(name in trained)
            parameter.grad = None
        if new and stage.optimizer == "fresh":
            self.optimizer.state.clear()
        if self.settings.stages:
            self.journal.say("stage", step=self.progress.step, number=number, train=stage.train, steps=stage.steps)

    def _step(self, windows: list[Batch], started: float) -> int:
        """One update, or none where the step is bad; the number of bad ones in a row."""
        settings, progress = self.settings, self.progress
        memories = {}
        if settings.surprise_every and (progress.step + 1) % settings.surprise_every == 0:
            memories = surprises(self.reader, windows[0], self.state)
            if memories:
                self.journal.say("surprise", step=progress.step + 1, memories=memories)
        rate = learning_rate(progress.step, settings)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        before = self.state if self.source.carries and settings.carry != "off" else None
        read = self.reader.gradients(windows, before)
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        total = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        norm = float(whole(total))
        fault = self.watch.fault(read.loss, norm)
        if fault is not None:
            return self._bad(fault, windows, before)
        if settings.clip is not None:
            torch.nn.utils.clip_grads_with_norm_(parameters, settings.clip, total)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.average is not None:
            self.average.update()
        self.state = read.state if self.source.carries and settings.carry != "off" else None
        progress.surprise |= finite(memories)
        self._note(read, rate, norm, windows, started)
        return 0

    def _note(self, read: Read, rate: float, norm: float, windows: list[Batch], started: float) -> None:
        progress = self.progress
        progress.step += 1
        tokens = sum(batch.tokens.numel() for batch in windows) * self.processes.world
        seconds = time.perf_counter() - started
        progress.tokens += tokens
        progress.seconds += seconds
        numbers = {"loss": read.loss, "tokens_per_second": tokens / seconds}
        self.journal.say("tick", step=progress.step, steps=self.settings.steps, **numbers)
        if self._due(self.settings.log_every):
            extra = read.auxiliary
            self.journal.say(
                "step", step=progress.step, **numbers, **extra, lr=rate, gradient=norm, tokens=progress.tokens
            )

    def _validate(self) -> None:
        assert self.valid is not None
        progress = self.progress
        reader = Reader(self.model, self.settings, self.processes)
        if self.average is not None:
            with self.average:
                found = validate(reader, self.valid, self.settings.valid_batches)
        else:
            found = validate(reader, self.valid, self.settings.valid_batches)
        if math.isfinite(found["loss"]) and (progress.best is None or found["loss"] < progress.best["loss"]):
            progress.best = {"step": progress.step, **found}
        self.journal.say("valid", step=progress.step, **found)

    # -- what stops a run ------------------------------------------------------------------------------------------

    def _bad(self, fault: str, windows: list[Batch], before: State) -> int:
        """Say what happened and why; the parameters and the carried state are those of before the step."""
        number = self.progress.step + 1
        reasons = [grown(surprises(self.reader, windows[0], before), self.progress.surprise), wildest(self.model)]
        why = "; ".join(reason for reason in reasons if reason)
        self.optimizer.zero_grad(set_to_none=True)
        skipped = self.progress.skipped + 1
        if self.settings.on_bad == "skip" and skipped <= MOST_SKIPPED:
            self.progress.step = number
            self.journal.say("skip", step=number, message=f"step {number:,} is skipped: {fault}", why=why)
            return skipped
        self.save()
        many = f" ({MOST_SKIPPED} steps before it were skipped)" if skipped > MOST_SKIPPED else ""
        message = f"step {number:,}{many}: {fault}; {why}"
        self.journal.say("stop", step=self.progress.step, message=message)
        raise CommandFailed(
            f"{message}\nsaved as it was before that step: {self.resume} -t lr=... goes on with a smaller rate, "
            "-t on_bad=skip without the step"
        )

    def _interrupted(self) -> None:
        step = self.progress.step
        self.journal.say("stop", step=step, message="interrupted")
        raise KeyboardInterrupt(f"interrupted; saved after step {step:,} of {self.settings.steps:,}: {self.resume}")
