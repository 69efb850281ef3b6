"""The training loop: update, validate, save; stop or skip at a bad step; stop when interrupted; load a checkpoint."""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import time
from dataclasses import dataclass, field
from types import FrameType
from typing import Annotated, Any

import torch
from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, ValidationError
from torch import Tensor

from ...blocks.language_model import LanguageModel
from ...blocks.state import State, map_state, named_tensors
from ...recipes import Recipe, StorageError
from ...registry import Problem, RecipeError, show
from ..data import Batch, Source
from ..signals import TERMINATION, Terminated, handling
from ..terminal import CommandFailed
from . import checkpoint
from .checkpoint import CheckpointManager
from .diagnostics import RECENT, Surprise, find_fault, largest_gradient, largest_growth, memory_surprise
from .distributed import Processes, full_tensor, to_local
from .log import EventLog
from .optimizer import WeightAverage, learning_rate, make_optimizer, stage_at, trainable_parameters
from .settings import Settings
from .train_step import AUXILIARY, TrainStep
from .validation import validate

MAX_SKIPPED = 10
"""Bad steps in a row that are skipped before the run stops."""


class Interrupt:
    """Records the first Ctrl-C, SIGTERM or SIGHUP of a ``with`` block; the second one ends the process at once."""

    def __init__(self) -> None:
        self.number = 0
        """The signal, or 0."""
        self._handling = handling(self._handle, (signal.SIGINT, *TERMINATION))

    def __enter__(self) -> Interrupt:
        self._handling.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._handling.__exit__(*exception)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.number:
            os._exit(128 + number)
        self.number = number


Count = Annotated[int, Field(ge=0)]


def _with(*keys: str) -> AfterValidator:
    """Expects these keys of a dictionary."""

    def check(given: dict[str, Any]) -> dict[str, Any]:
        if missing := [key for key in keys if key not in given]:
            raise ValueError(f"expected {', '.join(missing)}")
        return given

    return AfterValidator(check)


@dataclass
class Progress:
    """The part of the training state that JSON holds exactly."""

    __pydantic_config__ = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    step: Count = 0
    tokens: Count = 0
    seconds: float = 0.0
    losses: list[float] = field(default_factory=list)
    """The latest losses of good steps, which ``find_fault`` compares with."""
    best: Annotated[dict[str, int | float], _with("step", "loss")] | None = None
    """The best validation: ``step``, ``loss`` and other metrics."""
    surprise: dict[str, Annotated[dict[str, float], _with("mean", "peak", "weights")]] = field(default_factory=dict)
    """The latest finite surprise of each memory."""
    skipped: Count = 0
    """Bad steps skipped since the last good one."""


@dataclass
class Facts:
    """What a checkpoint records besides its tensors; other values are for readers."""

    progress: Progress
    fingerprint: str
    processes: Count
    tensors: list[str]
    device: str = "cpu"


FACTS = TypeAdapter(Facts)


class Trainer:
    """A run from its current step to the step ``stop``: its last, or the last one with the recipe of ``model``.

    ``resume``: the command that resumes the run, for messages.

    The training state is the model, the optimizer, the averaged weights, the carried ``state``, ``progress`` and the
    random number generators. ``save`` and ``load`` know all of it.
    """

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
        stop: int,
    ) -> None:
        self.model, self.source, self.valid, self.settings = model, source, valid, settings
        self.processes, self.log, self.checkpoints, self.resume = processes, log, checkpoints, resume
        self.stop = stop
        self.trainable = trainable_parameters(model, settings)
        reshard = not any(getattr(settings, name) for name in AUXILIARY)
        context = 1 if settings.mesh is None else settings.mesh.context
        processes.shard(model, reshard_after_forward=reshard, recompute=settings.recompute and context > 1)
        self.step = TrainStep(model, settings, processes)
        self.optimizer = make_optimizer(model, settings, fused=processes.world == 1)
        self.average = None if settings.ema is None else WeightAverage(model, settings.ema)
        self.carries = source.carries and settings.carry != "off"
        self.state: State = None
        self.progress = Progress()
        self.saved: int | None = None

    # -- the loop --------------------------------------------------------------------------------------------------

    def run(self, interrupt: Interrupt) -> None:
        """Train to the step ``stop``, and save a checkpoint.

        Raises ``CommandFailed`` at a bad step, ``KeyboardInterrupt`` or ``Terminated`` on request,
        ``BrokenPipeError`` if the output of the listener was closed, and, with one process, ``RecipeError`` for data
        that have changed; each after a checkpoint.
        """
        try:
            self._run(interrupt)
        except RecipeError as error:  # a step that reads no data has changed nothing
            if self.processes.world == 1:
                self.save()
                step = self.progress.step
                self.log.emit("stop", step=step, message=f"interrupted: {error}")
                place = f"saved after step {step:,}; {self.resume}"
                raise RecipeError([*error.problems, Problem("", place)], error.source) from None
            raise

    def _run(self, interrupt: Interrupt) -> None:
        settings, progress = self.settings, self.progress
        self.model.train()
        stage = -1
        while progress.step < self.stop:
            position = stage_at(progress.step, settings)
            if position.number != stage:
                stage = position.number
                self._begin_stage(stage, first_step=position.step == 0 and stage > 0)
            self._step()
            if settings.valid_every and self.valid and self._due(settings.valid_every):
                self._validate(self.valid)
            best = progress.best is not None and progress.best["step"] == progress.step
            stop = bool(interrupt.number) or self.log.unheard
            ended = [interrupt.number == number for number in TERMINATION]
            unheard, interrupted, *ended_by = self.processes.sum(self.log.unheard, stop, *ended)
            if interrupted or best or self._due(settings.checkpoint_every or self.stop):
                self.save()
            if interrupted and progress.step < settings.steps:
                step = progress.step
                why = "interrupted: the output was closed" if unheard else "interrupted"
                self.log.emit("stop", step=step, message=why)
                message = f"{why}; saved after step {step:,} of {settings.steps:,}: {self.resume}"
                if unheard:
                    raise BrokenPipeError(message)
                for number, received in zip(TERMINATION, ended_by):
                    if received:
                        raise Terminated(number, message)
                raise KeyboardInterrupt(message)

    def _due(self, every: int) -> bool:
        return self.progress.step % every == 0 or self.progress.step == self.stop

    def _begin_stage(self, index: int, first_step: bool) -> None:
        stage = self.settings.all_stages[index]
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(name in self.trainable[index])
            parameter.grad = None
        if first_step and stage.optimizer == "fresh":
            self.optimizer.state.clear()
        if self.settings.stages:
            more = {"recipe": stage.recipe} if stage.recipe else {}
            described = {"number": index, "train": stage.train, "steps": stage.steps, **more}
            self.log.emit("stage", step=self.progress.step, **described)

    def _step(self) -> None:
        """Read the next batches and update the parameters, unless the step is bad."""
        settings, progress, started = self.settings, self.progress, time.perf_counter()
        windows = [self.source.batch(progress.step * settings.windows + i) for i in range(settings.windows)]
        surprise: Surprise = {}
        if settings.surprise_every and (progress.step + 1) % settings.surprise_every == 0:
            surprise = memory_surprise(self.step, windows[0], self.state)
            if surprise:
                self.log.emit("surprise", step=progress.step + 1, memories=surprise)
        rate = learning_rate(progress.step, settings)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        loss, auxiliary, state = self.step.gradients(windows, self.state)
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        total = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        norm = float(full_tensor(total))
        fault = find_fault(loss, norm, progress.losses, settings.spike)
        if fault is not None:
            self._bad_step(fault, windows)
            return
        if settings.clip is not None:
            torch.nn.utils.clip_grads_with_norm_(parameters, settings.clip, total)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.average is not None:
            self.average.update()
        self.state = state if self.carries else None

        tokens = sum(batch.tokens.numel() for batch in windows) * self.processes.groups
        seconds = time.perf_counter() - started
        progress.step += 1
        progress.tokens += tokens
        progress.seconds += seconds
        progress.losses = [*progress.losses, loss][-RECENT:]
        progress.surprise |= {
            path: norms for path, norms in surprise.items() if all(map(math.isfinite, norms.values()))
        }
        progress.skipped = 0
        numbers: dict[str, Any] = {"loss": loss, "tokens_per_second": tokens / seconds}
        if settings.stages:
            numbers["stage"] = stage_at(progress.step - 1, settings).number
        self.log.emit("tick", step=progress.step, steps=settings.steps, **numbers)
        if self._due(settings.log_every):
            numbers |= auxiliary
            self.log.emit("step", step=progress.step, **numbers, lr=rate, gradient=norm, tokens=progress.tokens)

    def _bad_step(self, fault: str, windows: list[Batch]) -> None:
        """Log a bad step and its likely cause. The parameters and the carried state stay as before the step."""
        progress, number = self.progress, self.progress.step + 1
        surprise = memory_surprise(self.step, windows[0], self.state)
        reasons = [largest_growth(surprise, progress.surprise), largest_gradient(self.model)]
        why = "; ".join(reason for reason in reasons if reason)
        self.optimizer.zero_grad(set_to_none=True)
        if self.settings.on_bad == "skip" and progress.skipped < MAX_SKIPPED:
            progress.step = number
            progress.skipped += 1
            self.log.emit("skip", step=number, message=f"step {number:,} is skipped: {fault}", why=why)
            return
        self.save()
        many = f" (after {MAX_SKIPPED} skipped steps)" if progress.skipped >= MAX_SKIPPED else ""
        message = f"step {number:,}{many}: {fault}; {why}"
        self.log.emit("stop", step=progress.step, message=message)
        raise CommandFailed(
            f"{message}\nsaved before that step: {self.resume} -t lr=... resumes with a lower rate, "
            "-t on_bad=skip without the step"
        )

    def _validate(self, source: Source) -> None:
        progress, documents = self.progress, list[dict[str, Any]]()
        with self.average if self.average is not None else contextlib.nullcontext():
            found = validate(self.step, source, self.settings.valid_batches, documents)
        if math.isfinite(found["loss"]) and (progress.best is None or found["loss"] < progress.best["loss"]):
            progress.best = {"step": progress.step, **found}
        self.log.emit("valid", step=progress.step, **found)
        if documents:
            self.log.emit("documents", step=progress.step, documents=documents)

    # -- checkpoints -----------------------------------------------------------------------------------------------

    def save(self) -> None:
        """Write a checkpoint, unless this step has one: while it was replaced there would be none."""
        progress = self.progress
        if self.saved == progress.step:
            return
        tensors = self._tensors()
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

    def load(self, step: int, facts: dict[str, Any], of: Recipe) -> None:
        """Resume from the checkpoint of a step, whose model was ``of`` a recipe. ``facts``: from ``checkpoint.verify``.

        The carried state of another recipe is not taken over: rows begin anew.
        """
        folder = self.checkpoints.path(step)
        try:
            known = FACTS.validate_json(json.dumps(facts), strict=True)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"]))
            raise StorageError(f"{folder}: expected the facts of a run in its index: {place}: {first['msg']}") from None
        progress, names = known.progress, set(known.tensors)
        if progress.step != step:
            raise StorageError(f"{folder}: expected a checkpoint of step {step}, got one of {show(progress.step)}")
        if known.fingerprint not in (of.fingerprint, of.earlier_fingerprint):
            # a later version may give a block a field that it had not
            found = show(known.fingerprint)
            raise StorageError(f"{folder}: it is of another recipe: expected {of.fingerprint}, got {found}")
        if of != self.model.recipe:
            names = {name for name in names if not name.startswith("state.")}
        for name, parameter in self.model.named_parameters():
            if f"optimizer.{name}.exp_avg" in names:
                count = torch.zeros((), device=parameter.device if self.optimizer.defaults.get("fused") else "cpu")
                moments = {key: torch.zeros_like(parameter.detach()) for key in ("exp_avg", "exp_avg_sq")}
                self.optimizer.state[parameter] = {"step": count, **moments}
        if any(name.startswith("state.") for name in names):
            with torch.no_grad():
                rows = self.settings.batch // self.processes.groups
                self.state = map_state(_contiguous_copy, self.model.init_state(rows))
        if self.processes.rank < known.processes:  # of fewer processes it has no generator states for the others
            names |= {f"random.{self.processes.rank}.{kind}" for kind in ("cpu", known.device)}
        # runs of earlier versions have no state.document
        absent = {name for name in ("state.document", *self._generators()) if name not in names}
        tensors = {name: x for name, x in self._tensors().items() if name not in absent}
        # fills the weights, the moments and the averages in place; the others are copies
        checkpoint.read(folder, tensors, self.processes)
        if self.state is not None:
            carried = iter([to_local(tensors.get(f"state.{path}", x)) for path, x in named_tensors(self.state)])
            self.state = map_state(lambda _: next(carried), self.state)
        for name, generator in self._generators().items():
            if name in tensors:
                generator.set_rng_state(tensors[name])
        self.progress, self.saved = progress, step

    def _tensors(self) -> dict[str, Tensor]:
        """The tensors of the training state by name; with several processes, this one's shards."""
        # parameters, and the buffers that are saved
        found = {f"model.{name}": tensor.detach() for name, tensor in self.model.state_dict(keep_vars=True).items()}
        for name, parameter in self.model.named_parameters():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                found[f"optimizer.{name}.{key}"] = value
        if self.average is not None:
            found |= {f"average.{name}": tensor for name, tensor in self.average.tensors.items()}
        for path, tensor in named_tensors(self.state):
            # a state tensor may be a view of a larger one
            found[f"state.{path}"] = self.processes.shard_rows(_contiguous_copy(tensor))
        return found | {name: generator.get_rng_state() for name, generator in self._generators().items()}

    def _generators(self) -> dict[str, Any]:
        """This process's random number generators, as the modules that get and set their states."""
        kind, rank = self.processes.device.type, self.processes.rank
        found = {f"random.{rank}.cpu": torch.random}
        return found if kind == "cpu" else found | {f"random.{rank}.{kind}": torch.get_device_module(kind)}


def _contiguous_copy(tensor: Tensor) -> Tensor:
    return tensor.detach().clone(memory_format=torch.contiguous_format)
