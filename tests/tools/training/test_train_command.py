"""``titans-train``: options, output and exit statuses."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

import titans_build as tb
from titans_build.tools.train import main

QUICK = ["--batch", 4, "-t", "log_every=2", "-t", "tensorboard=false"]


@pytest.fixture
def recipe(tiny: dict[str, Any], tmp_path: Path) -> Path:
    path = tmp_path / "tiny.json"
    path.write_text(json.dumps(tiny), encoding="utf-8")
    return path


def run(*words: object) -> int:
    return main([str(word) for word in words])


def test_train_command(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    words = (recipe, "--set", "dim=8", "--data", "copy:length=16", "--out", out, "--steps", 4, "--lr", "1e-2", *QUICK)
    assert run(*words) == 0
    said = capsys.readouterr()
    assert said.err == ""
    first, second, valid, done = said.out.splitlines()
    assert first.startswith("step       2  loss ") and "tokens/s" in first and second.startswith("step       4  loss ")
    assert valid.startswith("step       4  validation: loss ") and "accuracy" in valid and "exact" in valid
    assert done.startswith(f"done: 4 steps; saved to {out}/model; best validation: loss ") and done.endswith(
        " at step 4"
    )
    assert tb.load(out / "model").dim == 8
    assert json.loads((out / "run.json").read_text(encoding="utf-8"))["overrides"] == {"dim": 8}
    # again: there is a run
    assert run(*words) == 2
    assert "this folder has a run; resume it (--resume)" in capsys.readouterr().err
    assert run("--resume", "--out", out, "--steps", 6) == 0
    assert capsys.readouterr().out.startswith("resuming after step 4 of 6, with steps = 6\nstep       6  loss ")


def test_json_lines(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "train.yaml").write_text("data: {task: copy, length: 16}\nsteps: 9\nlog_every: 1\n", encoding="utf-8")
    words = (recipe, "--train", tmp_path / "train.yaml", "--out", tmp_path / "run", "--steps", 2)
    assert run(*words, "--batch", 4, "-t", "tensorboard=false", "--json") == 0
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [event["event"] for event in events] == ["start", "step", "step", "valid", "checkpoint", "end"]
    log = (tmp_path / "run/log.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in log] == events


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "expected a RECIPE; only --resume works without one"),
        (["mac"], "--data: expected training data"),
        (["mca", "--data", "copy"], "did you mean 'mac'"),
        (["mac", "--data", "cpoy"], "did you mean 'copy'"),
        (["mac", "--data", "copy", "-t", "stpes=3"], "did you mean 'steps'"),
        (["mac", "--data", "copy", "-t", "steps"], "-t steps: expected KEY=VALUE, as in -t lr=1e-3"),
        (["mac", "--data", "copy", "--steps", "many"], "steps: expected integer >= 1, got 'many'"),
        (["mac", "--data", "copy", "--train", "none.yaml"], "none.yaml: 1 problem\n  no such file"),
        (["mac", "--data", "copy", "-t", "device=abacus"], "abacus"),
        (["--resume"], "run: no run is there; a RECIPE and --data start one"),
        (
            ["--train", "recipe.yaml"],
            "recipe.yaml: 1 problem\n  this is a recipe, not settings: titans-train",
        ),
        (["mac", "--data", "a.md", "b.md"], "arguments: b.md\n  --data takes one SPEC: put a wildcard in quotes"),
        (["mac", "--data", "copy", "none"], "unrecognized arguments: none\n"),
        (["search", "mac", "--space", "s", "--data", "a.md", "b.md"], "put a wildcard in quotes"),
        (["compare", "mac", "--data", "a.md", "b.md"], "b.md: no recipe; --data takes one SPEC: put a wildcard in"),
        (["mac", "--data", "copy", "-t", "learning_rate=1"], "did you mean 'lr'?"),
        (["mac", "--data", "copy", "-t", "dtype=fp32"], "did you mean 'float32'?"),
        (["mac-200m", "--data", "copy"], "did you mean 'mac-170m'?"),
    ],
)
def test_bad_use(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a.md", "b.md"):
        Path(name).write_text("text", encoding="utf-8")
    Path("recipe.yaml").write_text(tb.load_recipe("mac").to_yaml(), encoding="utf-8")
    assert run(*words, "--out", tmp_path / "run") == 2
    said = capsys.readouterr()
    assert said.err.startswith("titans-train: error: ") and message in said.err and "Traceback" not in said.err
    assert not (tmp_path / "run/run.json").exists()


def test_tokenizer_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TITANS_BUILD_CACHE", str(tmp_path / "cache"))
    Path("a.txt").write_text("one of the texts " * 50, encoding="utf-8")
    Path("b.jsonl").write_text(json.dumps({"text": "another of the texts " * 50}) + "\n", encoding="utf-8")
    words = ("tokenizer", "a.txt", "b.jsonl", "--out", "tok.json")
    assert run(*words, "--vocab", 255) == 2 and "expected at least 256" in capsys.readouterr().err
    assert run(*words, "--vocab", 10**11) == 2 and "at most 1,000,000" in capsys.readouterr().err
    assert run(*words, "--vocab", 270) == 0
    assert capsys.readouterr().out.startswith(
        "270 tokens, written to tok.json\ntrain with it: titans-train RECIPE --set"
    )
    assert run(*words, "--vocab", 300) == 2 and "nothing is replaced" in capsys.readouterr().err
    given = ("mac", "--set", "dim=8", "--set", "vocab=270", "--data", "b.jsonl", "--out", "run", "--steps", 1, *QUICK)
    assert run(*given, "--length", 8) == 2 and "give --tokenizer FILE" in capsys.readouterr().err
    assert run(*given, "--length", 8, "--tokenizer", "tok.json") == 0
    assert json.loads(Path("run/run.json").read_text(encoding="utf-8"))["data"]["vocab"] == 270
    assert run("--resume", "--out", "run", "--tokenizer", "bytes") == 2
    assert "--tokenizer: the tokenizer of a run cannot be changed when it is resumed" in capsys.readouterr().err
    assert run("mac", "--data", "copy", "--tokenizer", "tok.json", "--out", "other") == 2
    assert "the tokens of copy are numbers, and need no tokenizer" in capsys.readouterr().err


def test_tasks_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("tasks") == 0
    assert all(name in capsys.readouterr().out for name in tb.list_tasks("copy"))
    assert run("tasks", "mq*", "--json") == 0
    (task,) = json.loads(capsys.readouterr().out)["tasks"]
    assert task["name"] == "mqar" and {field["name"] for field in task["fields"]} >= {"pairs", "length"}
    assert run("tasks", "cpoy") == 2
    assert "no task is called 'cpoy'; did you mean 'copy'?" in capsys.readouterr().err


def test_help_names_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--help") == 0
    said = capsys.readouterr().out
    assert "runs/copy" in said and "torchrun" in said
    assert all(name in said for name in ("accumulate", "recompute", "memory_loss", "stages", "on_bad"))


def seen_on_a_terminal(monkeypatch: pytest.MonkeyPatch, *words: object) -> str:
    """What a successful command writes to standard error where that is a terminal."""
    ours, theirs = os.openpty()
    seen: list[bytes] = []

    def read() -> None:
        with contextlib.suppress(OSError):  # the other end is closed
            while part := os.read(ours, 4096):
                seen.append(part)

    reader = threading.Thread(target=read)
    with open(theirs, "w", encoding="utf-8") as terminal, monkeypatch.context() as patch:
        reader.start()
        patch.setenv("COLUMNS", "120")
        patch.setenv("TERM", "xterm")
        patch.setattr(sys, "stderr", terminal)
        assert run(*words) == 0
    reader.join(timeout=60)
    os.close(ours)
    return b"".join(seen).decode()


def test_progress_bar_on_a_terminal(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = (recipe, "--data", "copy:length=16", "--steps", 3, *QUICK)
    bar = seen_on_a_terminal(monkeypatch, *words, "--out", tmp_path / "run")
    assert "loss 2." in bar and "3/3" in bar and "tokens/s" in bar and "0:00:00" in bar
    # it goes when it is done, and the lines are where they always are
    assert bar.endswith("\x1b[2K") and capsys.readouterr().out.startswith("step       2  loss ")
    assert seen_on_a_terminal(monkeypatch, *words, "--out", tmp_path / "json", "--json") == ""


def test_missing_tensorboard_is_a_warning_or_an_error_if_requested(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    words: list[Any] = [recipe, "--data", "copy:length=16", "--steps", 1, "--batch", 4]
    assert run(*words, "--out", tmp_path / "a") == 0
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "pip install 'titans-build[train]'" in said
    assert run(*words, "--out", tmp_path / "b", "-t", "tensorboard=true") == 2
    assert "pip install 'titans-build[train]'" in capsys.readouterr().err


def test_conflicting_options_are_refused(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = (recipe, "--data", "copy:length=16", "--out", tmp_path / "run", "--batch", 4)
    assert run(*words, "-t", "batch=5") == 2
    assert capsys.readouterr().err.endswith("error: --batch 4 and -t batch=5: expected one of them\n")
    assert run(*words, "-t", "batch=4", "--steps", 1, "-t", "tensorboard=false") == 0


def test_resume_with_fewer_steps_is_refused(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    assert run(recipe, "--data", "copy:length=16", "--out", out, "--steps", 4, *QUICK) == 0
    before = (out / "train.yaml").read_bytes()
    assert run("--resume", "--out", out, "-t", "steps=3") == 2
    assert "steps: expected at least the 4 steps that the run has done, got 3" in capsys.readouterr().err
    assert (out / "train.yaml").read_bytes() == before
    # a recipe of no name is called none
    assert run("mac", "--set", "vocab=16", "--resume", "--out", out) == 2
    assert "the run is of another recipe (" in capsys.readouterr().err


def test_unmatched_pattern_is_a_warning(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = (recipe, "--data", "copy:length=16", "--out", tmp_path / "run", "--steps", 1, *QUICK)
    assert run(*words, "-t", "no_decay=['*bias', 'heads']") == 0
    said = capsys.readouterr().err
    assert said == "titans-train: warning: no_decay.1: no parameter has such a name: 'heads'; did you mean 'head'?\n"
