"""Runs in processes of their own that are killed, interrupted, or run into a full disk, and are gone on with."""

from __future__ import annotations

import json
import random
import resource
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import PROGRAM, QUICK, TINY, environment, logged, losses

import titans_build as tb
from titans_build.tools.train import main
from titans_build.tools.training import TrainedRun, train, trainer
from titans_build.tools.training.checkpoint import CheckpointManager

STEPS = 30
SETTINGS = {
    **QUICK,
    "steps": STEPS,
    "carry": 2,
    "ema": 0.9,
    "checkpoint_every": 3,
    "valid_every": 7,
    "valid_batches": 2,
    "surprise_every": 5,
}
RECIPE = {**TINY, "vocab": 256}


@pytest.fixture
def command(tmp_path: Path, lines_of_text: dict[str, Any]) -> list[str]:
    """The command line that begins a run in ``run``, or goes on with it."""
    settings = {"data": lines_of_text, **SETTINGS}
    (tmp_path / "recipe.json").write_text(json.dumps(RECIPE), encoding="utf-8")
    (tmp_path / "train.json").write_text(json.dumps(settings), encoding="utf-8")
    words = [tmp_path / "recipe.json", "--train", tmp_path / "train.json", "--out", tmp_path / "run", "--resume"]
    return [*PROGRAM, *map(str, words)]


def started(command: list[str], **options: Any) -> subprocess.Popen[str]:
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([*command, "--json"], text=True, env=environment(), **pipes, **options)


def after_steps(process: subprocess.Popen[str], count: int) -> None:
    """Wait until the process has said so many steps."""
    assert process.stdout is not None
    for line in process.stdout:
        count -= json.loads(line)["event"] == "step"
        if not count:
            return


def uninterrupted(tmp_path: Path, data: Any) -> TrainedRun:
    return train(RECIPE, data, SETTINGS, tmp_path / "whole")


def expect_the_same(run: Path, whole: TrainedRun) -> None:
    assert losses(logged(run)) == losses(whole.history)
    valid = [[event for event in events if event["event"] == "valid"] for events in (logged(run), whole.history)]
    assert valid[0] == valid[1]
    assert whole.model is not None
    for name, value in tb.load(run / "model").state_dict().items():
        assert torch.equal(value, whole.model.state_dict()[name]), name


def kill_over_and_over(command: list[str], seed: int, times: int) -> list[int]:
    """Kill the run ``times`` times at random moments, then let it end; the steps it had come to."""
    chance, killed = random.Random(seed), []
    for _ in range(times):
        process = started(command)
        after_steps(process, chance.randint(2, 9))
        time.sleep(chance.uniform(0, 0.1))  # anywhere in a step, in a checkpoint that is being written, ...
        process.kill()
        out, _ = process.communicate()
        if process.returncode != -signal.SIGKILL:
            break
        killed.append(out.count('"step"'))
    process = started(command)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return killed


def test_a_run_that_is_killed_has_the_same_losses_bit_for_bit(
    command: list[str], tmp_path: Path, lines_of_text: dict[str, Any]
) -> None:
    assert len(kill_over_and_over(command, seed=0, times=1)) == 1
    expect_the_same(tmp_path / "run", uninterrupted(tmp_path, lines_of_text))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 5))
def test_a_run_that_is_killed_many_times(command: list[str], tmp_path: Path, lines_of_text: Any, seed: int) -> None:
    assert kill_over_and_over(command, seed, times=6)
    expect_the_same(tmp_path / "run", uninterrupted(tmp_path, lines_of_text))


def test_ctrl_c_saves_says_how_to_go_on_and_leaves_with_130(
    command: list[str], tmp_path: Path, lines_of_text: dict[str, Any]
) -> None:
    process = started(command)
    after_steps(process, 4)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 130
    (step,) = (event["step"] for line in out.splitlines() if (event := json.loads(line)).get("event") == "stop")
    assert CheckpointManager(tmp_path / "run/checkpoints").steps()[-1] == step < STEPS
    said = f"interrupted; saved after step {step} of {STEPS}: titans-train --resume --out {tmp_path / 'run'}"
    assert err == f"titans-train: error: {said}\n"
    # what it says to type
    train(None, None, None, tmp_path / "run", resume=True)
    expect_the_same(tmp_path / "run", uninterrupted(tmp_path, lines_of_text))


def test_the_second_ctrl_c_leaves_at_once() -> None:
    script = (
        "import os, signal\n"
        "from titans_build.tools.training.trainer import Interrupt\n"
        "with Interrupt() as interrupt:\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    assert interrupt.requested\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    print('still here')\n"
    )
    done = subprocess.run([PROGRAM[0], "-c", script], capture_output=True, text=True, env=environment(), check=False)
    assert (done.returncode, done.stdout) == (130, "")


def test_handlers_are_put_back() -> None:
    before = signal.getsignal(signal.SIGINT)
    with trainer.Interrupt() as noted:
        assert signal.getsignal(signal.SIGINT) != before
    assert signal.getsignal(signal.SIGINT) == before and not noted.requested


def test_a_disk_without_room_is_one_error_and_the_checkpoint_before_stays(
    quick_train: Callable[..., TrainedRun], tmp_path: Path, capsys: pytest.CaptureFixture[str]
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
    assert status == 1 and capsys.readouterr().err == (
        f"titans-train: error: {folder}/step-00000006: the checkpoint cannot be written: File too large\n"
    )
    assert sorted(path.name for path in folder.iterdir()) == ["index.json", "step-00000002", "step-00000004"]
    run = train(None, None, None, tmp_path / "run", resume=True)
    assert len(losses(run.history)) == 8 and CheckpointManager(folder).steps() == [6, 8]
