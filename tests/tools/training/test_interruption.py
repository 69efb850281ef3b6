"""Runs in their own process that are killed, interrupted, or run out of disk space, and are resumed exactly."""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import titans_build as tb
from titans_build.tools.train import main
from titans_build.tools.training import TrainedRun, train
from titans_build.tools.training.checkpoint import CheckpointManager
from titans_build.tools.training.trainer import Interrupt


@pytest.fixture(autouse=True)
def ctrl_c() -> Iterator[None]:
    """SIGINT is not ignored, as it is in a shell's background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


class Command:
    """A command line that starts or resumes a run, in processes that can be stopped."""

    def __init__(self, in_process: Any, folder: Path, recipe: Any, data: Any, settings: dict[str, Any]) -> None:
        self.in_process = in_process
        self.folder, self.recipe, self.data, self.settings = folder, recipe, data, settings
        (folder / "recipe.json").write_text(json.dumps(recipe), encoding="utf-8")
        (folder / "train.json").write_text(json.dumps({"data": data, **settings}), encoding="utf-8")
        self.words = [folder / "recipe.json", "--json", "--train", folder / "train.json"]
        self.words += ["--out", folder / "run", "--resume"]

    def stop(self, steps: int, number: signal.Signals, delay: float = 0.0) -> tuple[int, str, str]:
        """Start it, send it a signal after so many logged steps, and wait for its end: status, output, errors."""
        process = self.in_process.start("train", *self.words, pipe="stdout")
        with (self.in_process.folder / "stdout").open(encoding="utf-8") as out:
            for line in iter(out.readline, ""):
                steps -= json.loads(line)["event"] == "step"
                if not steps:
                    break
            time.sleep(delay)
            os.kill(process, number)
            rest = out.read()
        ((status, _),) = self.in_process.end()
        return status, rest, (self.in_process.folder / "stderr").read_text()

    def expect_exact(self, losses: Any, logged: Any) -> None:
        """The run's log and model equal those of a run that is not interrupted."""
        whole = train(self.recipe, self.data, self.settings, self.folder / "whole")
        events = logged(self.folder / "run")
        assert losses(events) == losses(whole.history)
        valid = [[event for event in each if event["event"] == "valid"] for each in (events, whole.history)]
        assert valid[0] == valid[1]
        assert whole.model is not None
        for name, value in tb.load(self.folder / "run/model").state_dict().items():
            assert torch.equal(value, whole.model.state_dict()[name]), name


@pytest.fixture
def command(
    tmp_path: Path, tiny: dict[str, Any], quick: dict[str, Any], ordered_text: dict[str, Any], in_process: Any
) -> Command:
    settings = {**quick, "steps": 24, "carry": 2, "ema": 0.9, "checkpoint_every": 3}
    settings |= {"valid_every": 7, "valid_batches": 2, "surprise_every": 5}
    return Command(in_process, tmp_path, {**tiny, "vocab": 256}, ordered_text, settings)


def test_killed_and_interrupted_run_is_resumed_exactly(
    command: Command, tmp_path: Path, losses: Any, logged: Any
) -> None:
    killed, _, _ = command.stop(5, signal.SIGKILL, delay=0.02)
    assert killed == -signal.SIGKILL
    interrupted, out, err = command.stop(4, signal.SIGINT)
    assert interrupted == 130
    (step,) = (event["step"] for line in out.splitlines() if (event := json.loads(line)).get("event") == "stop")
    assert CheckpointManager(tmp_path / "run/checkpoints").steps()[-1] == step < 24
    resume = f"titans-train --resume --out {tmp_path / 'run'}"
    assert err.endswith(f"after step {step} of 24: {resume}\n") and err.count("\n") == 1
    assert main(resume.split()[1:]) == 0
    command.expect_exact(losses, logged)


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGHUP, marks=pytest.mark.slow)])
def test_terminated_run_has_a_checkpoint_and_the_status_of_the_signal(
    command: Command, tmp_path: Path, number: signal.Signals
) -> None:
    terminated, _, err = command.stop(4, number)
    assert terminated == 128 + number
    (step, *_) = reversed(CheckpointManager(tmp_path / "run/checkpoints").steps())
    resume = f"titans-train --resume --out {tmp_path / 'run'}"
    assert err == f"titans-train: error: interrupted; saved after step {step} of 24: {resume}\n"


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 5))
def test_run_killed_many_times_is_resumed_exactly(command: Command, seed: int, losses: Any, logged: Any) -> None:
    chance, killed = random.Random(seed), 0
    for _ in range(6):
        # at any moment of a step, of a checkpoint that is being written, ...
        status, _, _ = command.stop(chance.randint(2, 9), signal.SIGKILL, delay=chance.uniform(0, 0.1))
        killed += status == -signal.SIGKILL
    assert killed
    assert command.in_process("train", *command.words)[0].status == 0
    command.expect_exact(losses, logged)


def test_second_ctrl_c_ends_the_process() -> None:
    child = os.fork()
    if not child:
        with Interrupt() as interrupt:
            os.kill(os.getpid(), signal.SIGINT)
            if interrupt.number:
                os.kill(os.getpid(), signal.SIGINT)
        os._exit(1)  # not reached
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 130


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGHUP, marks=pytest.mark.slow)])
def test_signals_that_are_ignored_stay_ignored(number: signal.Signals) -> None:
    before = signal.signal(number, signal.SIG_IGN)
    try:
        with Interrupt() as interrupt:
            os.kill(os.getpid(), number)
            assert not interrupt.number
        assert signal.getsignal(number) == signal.SIG_IGN
        signal.signal(number, signal.SIG_DFL)
        with Interrupt() as interrupt:
            os.kill(os.getpid(), number)
            assert interrupt.number
    finally:
        signal.signal(number, before)


def test_signal_handlers_are_restored() -> None:
    before = signal.getsignal(signal.SIGINT)
    with Interrupt() as interrupt:
        assert signal.getsignal(signal.SIGINT) != before
    assert signal.getsignal(signal.SIGINT) == before and not interrupt.number


def test_full_disk_keeps_the_previous_checkpoint(
    quick_train: Callable[..., TrainedRun], tmp_path: Path, capsys: pytest.CaptureFixture[str], losses: Any
) -> None:
    quick_train(steps=4, checkpoint_every=2)
    (shard,) = (tmp_path / "run/checkpoints/step-00000004").glob("*.safetensors")
    limit, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (shard.stat().st_size - 1, most))
    try:
        status = main(["--resume", "--out", str(tmp_path / "run"), "--steps", "8"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, most))
    folder = tmp_path / "run/checkpoints"
    assert status == 1
    error = f"{folder}/step-00000006: the checkpoint cannot be written: File too large"
    assert capsys.readouterr().err == f"titans-train: error: {error}\n"
    assert sorted(path.name for path in folder.iterdir()) == ["index.json", "step-00000002", "step-00000004"]
    run = train(None, None, None, tmp_path / "run", resume=True)
    assert len(losses(run.history)) == 8 and CheckpointManager(folder).steps() == [6, 8]
