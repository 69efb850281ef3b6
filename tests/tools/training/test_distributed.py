"""Two processes against one: the same losses, and checkpoints that either number of processes resumes."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import titans_build as tb
from titans_build.recipes.loading import base_names
from titans_build.tools.terminal import CommandFailed
from titans_build.tools.train import main
from titans_build.tools.training import train
from titans_build.tools.training.distributed import Processes, process_errors, to_local


@pytest.fixture
def settings(quick: dict[str, Any]) -> dict[str, Any]:
    """Adam's first steps are as large for a gradient of 1e-9 as for one of 1: a larger epsilon keeps rounding small.

    The rate is the same at every step, however many there are.
    """
    evaluation = {"checkpoint_every": 3, "valid_every": 3, "valid_batches": 2}
    return {**quick, **evaluation, "eps": 1e-3, "warmup": 0.0, "final_lr": 1.0}


def test_process_that_has_ended_is_named_as_such() -> None:
    error = RuntimeError("[third_party/gloo/gloo/transport/tcp/pair.cc:537] Connection closed. A hint\nand a page more")
    two = Processes()
    two.world = 2
    with (
        pytest.raises(
            CommandFailed, match=r"another process of this run has ended.* \(Connection closed\): resume .*: RESUME"
        ) as caught,
        process_errors(two, "RESUME"),
    ):
        raise error
    assert "a page more" not in str(caught.value)
    two.store = torch.distributed.HashStore()
    with pytest.raises(CommandFailed), process_errors(two, "RESUME"):
        raise error
    with pytest.raises(SystemExit), process_errors(two, "RESUME"):  # another process has said it
        raise error
    for processes, other in ((Processes(), error), (two, RuntimeError("shapes"))):
        with pytest.raises(RuntimeError, match=r"closed|shapes"), process_errors(processes, "RESUME"):
            raise other


@pytest.mark.parametrize(
    "words", [["--lengths", "8"], ["-t", "mesh={ctx: 2}"], ["-t", "mesh={context: 2}", "-t", "compile=true"]]
)
def test_errors_of_processes_that_have_not_met_come_from_the_first(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, words: list[str]
) -> None:
    waited: list[float] = []
    monkeypatch.setattr("titans_build.tools.terminal.time", SimpleNamespace(sleep=waited.append))
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", "2")
        assert main(["mac", "--data", "copy", "--out", str(tmp_path / "run"), *words]) == 2
        assert "Traceback" not in capsys.readouterr().err
        assert len(waited) == int(rank)


def together(tmp_path: Path, out: str, *words: object, processes: int = 2) -> subprocess.CompletedProcess[str]:
    """``titans-train ... --out OUT`` in several processes."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [*torchrun, "-m", "titans_build.tools.train", *map(str, words), "--out", str(tmp_path / out)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)


def together_without_torchrun(in_process: Any, out: Path, *words: object, processes: int = 2) -> Any:
    """``titans-train ... --out OUT`` in several processes with the environment that torchrun gives them."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        place = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": str(processes)}
    ranks = tuple({**place, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes))
    return in_process("train", *words, "--out", out, environment=ranks)


def written(tmp_path: Path, recipe: Any, data: Any, settings: dict[str, Any]) -> list[str]:
    (tmp_path / "recipe.json").write_text(json.dumps(recipe), encoding="utf-8")
    (tmp_path / "train.json").write_text(json.dumps({"data": data, **settings}), encoding="utf-8")
    return [str(tmp_path / "recipe.json"), "--train", str(tmp_path / "train.json")]


def close(a: dict[int, float], b: dict[int, float]) -> None:
    assert a.keys() == b.keys()
    for step in a:
        assert a[step] == pytest.approx(b[step], abs=2e-5), step


def test_two_processes_equal_one_and_resume_its_checkpoints(
    tiny: Any, settings: Any, losses: Any, logged: Any, tmp_path: Path, ordered_text: Any, in_process: Any
) -> None:
    recipe = {**tiny, "vocab": 256}
    settings |= {"carry": 2, "ema": 0.9, "accumulate": 2, "memory_loss": 0.1, "recompute": True, "surprise_every": 3}
    whole = train(recipe, ordered_text, {**settings, "steps": 9}, tmp_path / "whole")
    # 1 -> 2
    train(recipe, ordered_text, {**settings, "steps": 3}, tmp_path / "run")
    first, other = together_without_torchrun(in_process, tmp_path / "run", "--resume", "--steps", 6, "--json")
    assert (first.status, other.status) == (0, 0), first.err + other.err
    assert other.out == b""  # only one of them speaks
    events = [json.loads(line) for line in first.out.splitlines()]
    assert [event["event"] for event in events].count("end") == 1
    assert sorted(path.suffix for path in (tmp_path / "run/checkpoints/step-00000006").iterdir()) == [
        ".json",
        ".safetensors",
        ".safetensors",
    ]
    expected = losses(whole.history)
    close(losses(logged(tmp_path / "run")), {step: expected[step] for step in range(1, 7)})
    surprises = [
        [e for e in events if e["event"] == "surprise"] for events in (logged(tmp_path / "run"), whole.history)
    ]
    assert [e["step"] for e in surprises[0]] == [3, 6]  # of which the second is that of the rows of two processes
    assert numbers(surprises[0]) == pytest.approx(numbers(surprises[1][:2]), rel=1e-4) and numbers(surprises[0])
    # 2 -> 1
    alone = train(None, None, {"steps": 9}, tmp_path / "run", resume=True)
    close(losses(alone.history), expected)
    values = [[e["loss"] for e in run.history if e["event"] == "valid"] for run in (alone, whole)]
    assert values[0] == pytest.approx(values[1], abs=2e-5)
    assert alone.model is not None and whole.model is not None
    for a, b in zip(alone.model.parameters(), whole.model.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


EXACT = {
    "dtype": "float64", "steps": 4, "valid_every": 2, "checkpoint_every": 2, "surprise_every": 2, "accumulate": 2,
    "ema": 0.9, "length": 12, "recompute": True, "carry": 2,
}  # fmt: skip


def numbers(events: Any, after: int = 0) -> list[float]:
    """Every number of the losses, validations and surprises."""
    found = []
    for event in events:
        if event["event"] in ("step", "valid", "surprise") and event["step"] > after:
            found += [event[name] for name in ("loss", "gradient", "accuracy", "document_loss") if name in event]
            found += [x for norms in event.get("memories", {}).values() for x in norms.values()]
    return found


def same_weights(model: Any, other: Any) -> None:
    for a, b in zip(model.parameters(), other.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dimension", "memory"), [("context", None), ("tensor", None), ("context", "gated_delta_net"), ("context", "lact")]
)
def test_two_processes_that_share_tokens_or_heads_equal_one_exactly(
    tiny: Any,
    settings: Any,
    logged: Any,
    tmp_path: Path,
    ordered_text: Any,
    in_process: Any,
    dimension: str,
    memory: str | None,
) -> None:
    recipe, settings = {**tiny, "vocab": 256}, {**settings, **EXACT}
    if memory is not None:  # whose tokens two ranks write side by side
        recipe |= {"layers": {"a": [{"type": memory, "heads": 2}]}, "stack": ["a"]}
    whole = train(recipe, ordered_text, settings, tmp_path / "whole")
    words = written(tmp_path, recipe, ordered_text, {**settings, "mesh": {dimension: 2}})
    for end in together_without_torchrun(in_process, tmp_path / "run", *words):
        assert end.status == 0, end.err
        assert b"redistributing" not in end.err and b"Warning" not in end.err, end.err
    for name, rounding in (
        ("surprise", 1e-6),
        ("", 1e-11),
    ):  # surprises are float32, and norms are of each rank's heads
        found, expected = (
            [event for event in events if (event["event"] == "surprise") == bool(name)]
            for events in (logged(tmp_path / "run"), whole.history)
        )
        assert numbers(found) == pytest.approx(numbers(expected), rel=rounding) and numbers(found)
    same_weights(tb.load(tmp_path / "run"), whole.model)


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
def test_one_process_gives_a_message_when_another_is_killed(
    tiny: Any, settings: Any, tmp_path: Path, killed: int
) -> None:
    settings |= {"steps": 100_000, "mesh": {"context": 4}}
    words = [sys.executable, "-m", "titans_build.tools.train", *written(tmp_path, tiny, "copy:length=16", settings)]
    store = torch.distributed.TCPStore("localhost", 0, is_master=True)  # as torchrun has one
    place = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(store.port), "WORLD_SIZE": "4"}
    place |= {"TORCHELASTIC_USE_AGENT_STORE": "True"}
    processes = [
        subprocess.Popen(
            [*words, "--out", str(tmp_path / "run")],
            env=os.environ | place | {"RANK": str(rank)},
            stderr=subprocess.PIPE,
        )
        for rank in range(4)
    ]
    log = tmp_path / "run" / "log.jsonl"
    while not (log.exists() and len(log.read_text().splitlines()) > 3):
        time.sleep(0.1)
    processes[killed].kill()
    said = [process.communicate(timeout=30)[1] for process in processes]
    del processes[killed], said[killed]
    assert [process.returncode for process in processes] == [1, 1, 1]
    lines = b"".join(said).splitlines()
    assert len(lines) == 1 and b"another process of this run has ended" in lines[0], said


@pytest.mark.slow
@pytest.mark.parametrize(
    "change", [{"mesh": {"data": 3}}, {"mesh": {"context": 2}, "length": 15}, {"mesh": {"tensor": 2}}]
)
def test_one_process_says_what_does_not_divide(
    tiny: Any, settings: Any, tmp_path: Path, in_process: Any, change: dict[str, Any], ordered_text: Any
) -> None:
    tiny["layers"]["mac"][0]["attend"]["heads"] = 1
    words = written(tmp_path, {**tiny, "vocab": 256}, ordered_text, {**settings, **change})
    ends = together_without_torchrun(in_process, tmp_path / "run", *words)
    assert [end.status for end in ends] == [2, 2]
    expected = {
        "data": b"data 3 x context 1 x tensor 1 are 3 processes, and there are 2",
        "context": b"15 tokens of a row cannot be shared by context: 2 processes",
        "tensor": b"mesh: layers.0.blocks.0.attend.heads: 1 cannot be shared by the 2 ranks",
    }
    assert expected[next(iter(change["mesh"]))] in ends[0].err and b"Traceback" not in ends[0].err


@pytest.mark.slow
@pytest.mark.parametrize("data, four, two", [
    ("ordered", {"data": 2, "context": 2}, {"context": 2}), ("packed", {"data": 2, "context": 2}, {"context": 2}),
    ("ordered", {"data": 2, "tensor": 2}, {"tensor": 2}), ("packed", {"context": 2, "tensor": 2}, {"tensor": 2}),
    ("ordered", {"context": 2, "tensor": 2}, {"data": 2}),
])  # fmt: skip
def test_checkpoints_of_four_processes_are_resumed_by_two_and_by_one(
    tiny: Any,
    settings: Any,
    logged: Any,
    tmp_path: Path,
    packed_text: Any,
    in_process: Any,
    data: str,
    four: dict[str, int],
    two: dict[str, int],
    ordered_text: Any,
) -> None:
    recipe, settings = {**tiny, "vocab": 256}, {**settings, **EXACT, "recompute": False, "surprise_every": None}
    if data == "packed":
        ordered_text = {**packed_text, "documents": "ordered"}
        settings |= {"length": packed_text.get("length", 24)}
    whole = train(recipe, ordered_text, {**settings, "steps": 6}, tmp_path / "whole")
    words = written(tmp_path, recipe, ordered_text, {**settings, "steps": 2, "mesh": four})
    ends = together_without_torchrun(in_process, tmp_path / "run", *words, processes=4)
    more = ["--resume", "--steps", 4, "-t", f"mesh={json.dumps(two)}"]
    ends += together_without_torchrun(in_process, tmp_path / "run", *more)
    for end in ends:
        assert end.status == 0, end.err
        assert b"redistributing" not in end.err
    alone = train(None, None, {"steps": 6}, tmp_path / "run", resume=True)
    assert numbers(alone.history) == pytest.approx(numbers(whole.history), rel=1e-11)
    same_weights(alone.model, whole.model)


@pytest.mark.slow
@pytest.mark.parametrize("name", base_names())
def test_two_processes_train_every_packaged_recipe(
    settings: Any, losses: Any, logged: Any, tmp_path: Path, name: str
) -> None:
    recipe = tb.load_recipe(name, {"dim": 32, "stack.0.repeat": 1})
    whole = train(recipe, "copy:length=80", settings, tmp_path / "one")
    done = together(tmp_path, "two", *written(tmp_path, recipe.to_dict(), "copy:length=80", settings))
    assert done.returncode == 0, done.stderr
    close(losses(logged(tmp_path / "two")), losses(whole.history))


@pytest.mark.slow
@pytest.mark.parametrize("order", ["shuffled", "ordered"])
def test_two_processes_train_packed_documents(
    tiny: Any, settings: Any, losses: Any, logged: Any, tmp_path: Path, packed_text: dict[str, Any], order: str
) -> None:
    recipe, data = {**tiny, "vocab": 256}, {**packed_text, "documents": order}
    settings |= {"surprise_every": 2}
    whole = train(recipe, data, settings, tmp_path / "one")
    done = together(tmp_path, "two", *written(tmp_path, recipe, data, settings))
    assert done.returncode == 0, done.stderr
    events = logged(tmp_path / "two")
    close(losses(events), losses(whole.history))
    for a, b in zip(*([e for e in log if e["event"] == "documents"] for log in (events, whole.history)), strict=True):
        for found, expected in zip(a["documents"], b["documents"], strict=True):
            assert found == {**expected, "loss": pytest.approx(expected["loss"], abs=2e-5)}


@pytest.mark.slow
def test_stages_in_two_processes(tiny: Any, settings: Any, losses: Any, logged: Any, tmp_path: Path) -> None:
    changes = {"layers.mac.0.memory.chunk": 2, "layers.mac.0.segment": 4}
    second = {"steps": 3, "train": ["@memory"], "optimizer": "fresh", "recipe": changes}
    stages = [{"steps": 3, "train": ["!@memory"]}, second]
    settings = {**{key: value for key, value in settings.items() if key != "steps"}, "stages": stages}
    whole = train(tiny, "copy:length=16", settings, tmp_path / "one")
    done = together(tmp_path, "two", *written(tmp_path, tiny, "copy:length=16", settings))
    assert done.returncode == 0, done.stderr
    close(losses(logged(tmp_path / "two")), losses(whole.history))
    assert whole.model is not None
    for a, b in zip(tb.load(tmp_path / "two/model").parameters(), whole.model.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
    assert tb.load(tmp_path / "two/model").recipe == whole.model.recipe != tb.load_recipe(tiny)
    start = tb.build(tiny)
    for (name, a), b in zip(tb.load(tmp_path / "two/model").named_parameters(), start.parameters()):
        assert not torch.equal(a, b), name


@pytest.mark.slow
def test_rows_that_two_processes_cannot_share(tiny: Any, settings: Any, tmp_path: Path) -> None:
    done = together(tmp_path, "odd", *written(tmp_path, tiny, "copy:length=16", {**settings, "batch": 3}))
    assert done.returncode == 1  # torchrun's own
    assert "3 rows of a batch cannot be shared by 2 processes: give a multiple of 2" in done.stderr
    assert "titans_build/tools" not in done.stderr and not (tmp_path / "odd/run.json").exists()


@pytest.mark.slow
def test_one_of_two_processes_says_why_a_run_has_stopped(tiny: Any, settings: Any, tmp_path: Path) -> None:
    settings |= {"lr": 1e30, "clip": None, "mesh": {"tensor": 2}}
    done = together(tmp_path, "run", *written(tmp_path, tiny, "copy:length=16", settings))
    assert done.returncode == 1  # torchrun's own
    assert done.stderr.count("the gradient of") == 1 and done.stderr.count("saved before that step") == 1, done.stderr


def test_single_process() -> None:
    one = Processes()
    assert one.main and (one.rank, one.world) == (0, 1) and one.sum(1.5, 2) == [1.5, 2]
    tensor = torch.ones(2)
    assert one.shard_rows(tensor) is tensor and to_local(tensor) is tensor
