"""Searches: samplers, results and resuming."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import titans_build as tb
from titans_build.registry import RecipeError
from titans_build.tools.train import main
from titans_build.tools.training import as_settings, search
from titans_build.tools.training.search import draw, grid, read_space

COPY = "copy:length=16"
SPACE = {"recipe": {"layers.mac.0.segment": [4, 8]}, "train": {"lr": [1e-3, 1e-2]}}
RANGES = {"train": {"lr": {"low": 1e-4, "high": 1e-2, "log": True}, "batch": {"low": 2, "high": 6, "step": 2}}}


@pytest.fixture
def settings(quick: dict[str, Any]) -> dict[str, Any]:
    return {**quick, "steps": 2, "valid_every": 2, "valid_batches": 1}


def test_grid_search(tiny: dict[str, Any], settings: dict[str, Any], tmp_path: Path) -> None:
    ranked = search(tiny, COPY, settings, SPACE, tmp_path)
    choices = {tuple(result["choice"].values()) for result in ranked}
    assert choices == {(4, 1e-3), (4, 1e-2), (8, 1e-3), (8, 1e-2)}
    losses = [result["loss"] for result in ranked]
    assert losses == sorted(losses) and losses[0] < losses[-1]
    best = tb.load_recipe(tmp_path / "best-recipe.yaml")
    assert best.layers["mac"][0]["segment"] == ranked[0]["choice"]["recipe.layers.mac.0.segment"]
    words = [str(tmp_path / "best-recipe.yaml"), "--train", str(tmp_path / "best-train.yaml")]
    assert main([*words, "--out", str(tmp_path / "again")]) == 0
    events = [json.loads(line) for line in (tmp_path / "again" / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    (valid,) = [event for event in events if event["event"] == "valid"]
    assert valid["loss"] == ranked[0]["loss"]


def test_random_choices_are_reproducible(tmp_path: Path) -> None:
    space = read_space(RANGES)
    choices = [draw(space, 0, number) for number in range(300)]
    assert choices == [draw(space, 0, number) for number in range(300)] != [draw(space, 1, n) for n in range(300)]
    assert all(1e-4 <= choice["train.lr"] <= 1e-2 for choice in choices)
    # evenly in its logarithm: half of them are below the geometric mean
    assert 100 < sum(choice["train.lr"] < 1e-3 for choice in choices) < 200
    assert {choice["train.batch"] for choice in choices} == {2, 4, 6}


def test_grid_of_a_range() -> None:
    space = read_space({"train": {"batch": RANGES["train"]["batch"]}})
    assert [choice["train.batch"] for choice in grid(space)] == [2, 4, 6]
    with pytest.raises(RecipeError, match=r"train.lr: a grid needs a list of values"):
        grid(read_space(RANGES))


@pytest.mark.parametrize("sampler", ["random", "optuna"])
def test_search_resumes(tiny: dict[str, Any], settings: dict[str, Any], sampler: Any, tmp_path: Path) -> None:
    if sampler == "optuna":
        pytest.importorskip("optuna")
    whole = search(tiny, COPY, settings, RANGES, tmp_path / "whole", sampler=sampler, trials=3)
    search(tiny, COPY, settings, RANGES, tmp_path / "parts", sampler=sampler, trials=2)
    run: list[str] = []
    parts = search(
        tiny,
        COPY,
        settings,
        RANGES,
        tmp_path / "parts",
        sampler=sampler,
        trials=3,
        told=lambda label, event: run.append(label),
    )
    assert set(run) == {"trial-0002"}
    assert [(r["trial"], r["choice"], r["loss"]) for r in whole] == [
        (r["trial"], r["choice"], r["loss"]) for r in parts
    ]
    lines = (tmp_path / "parts" / "trials.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["trial"] for line in lines] == [0, 1, 2]


def test_optuna_with_lists_and_failed_trials(tiny: dict[str, Any], settings: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    space = {"train": {"betas": [[0.9, 0.95], [0.8, 0.9]], "spike": [1e-9, 5.0]}}
    settings = {**settings, "steps": 8, "valid_every": 8, "lr": 10.0, "clip": None}
    ranked = search(tiny, COPY, settings, space, tmp_path, sampler="optuna", trials=3, seed=1)
    assert all(as_settings({**settings, "betas": result["choice"]["train.betas"]}) for result in ranked)
    assert [result["loss"] is None for result in ranked] == sorted(result["loss"] is None for result in ranked)


def test_invalid_combination_of_optuna_is_a_failed_trial(
    tiny: dict[str, Any], settings: dict[str, Any], tmp_path: Path
) -> None:
    pytest.importorskip("optuna")
    space = {"train": {"batch": [4, 6], "accumulate": [2, 3]}}  # four rows cannot be parted in three
    ranked = search(tiny, COPY, settings, space, tmp_path, sampler="optuna", trials=5, seed=7)
    wrong = [result for result in ranked if result["choice"] == {"train.batch": 4, "train.accumulate": 3}]
    assert wrong and all(result["failed"] == "accumulate: expected a divisor of batch = 4, got 3" for result in wrong)
    assert [result["loss"] is None for result in ranked] == [False] * (5 - len(wrong)) + [True] * len(wrong)


def test_optuna_refuses_a_space_without_valid_choices(
    tiny: dict[str, Any], settings: dict[str, Any], tmp_path: Path
) -> None:
    pytest.importorskip("optuna")
    with pytest.raises(RecipeError, match="stepz: unknown field of settings"):
        search(tiny, COPY, settings, {"train": {"stepz": [1]}}, tmp_path, sampler="optuna", trials=2)


def test_grid_with_an_invalid_combination_is_refused(
    tiny: dict[str, Any], settings: dict[str, Any], tmp_path: Path
) -> None:
    space = {"train": {"batch": [4, 6], "accumulate": [2, 3]}}
    with pytest.raises(RecipeError, match="expected a divisor of batch = 4, got 3"):
        search(tiny, COPY, settings, space, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("options", [{"jobs": 0}, {"trials": 0}])
def test_invalid_jobs_and_trials(
    tiny: dict[str, Any], settings: dict[str, Any], options: dict[str, int], tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match="expected jobs and trials >= 1"):
        search(tiny, COPY, settings, SPACE, tmp_path, **options)  # type: ignore[arg-type]


def test_search_command(tiny: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "tiny.yaml").write_text(json.dumps(tiny), encoding="utf-8")
    (tmp_path / "space.yaml").write_text("train: {lr: [0.001, 0.01]}\n", encoding="utf-8")
    words = ["search", str(tmp_path / "tiny.yaml"), "--data", COPY, "--space", str(tmp_path / "space.yaml")]
    words += ["--out", str(tmp_path / "out"), "--steps", "2", "--batch", "4", "--valid-every", "2"]
    words += ["-t", "valid_batches=1", "-t", "tensorboard=false"]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "train.lr" in out and "validation loss" in out and "best-train.yaml" in out
    assert main([*words, "--json"]) == 0
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last["event"] == "search" and len(last["trials"]) == 2
    assert main([*words, "--sampler", "random"]) == 2
    assert "--trials: expected a number" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({"recpe": {}}, "did you mean 'recipe'"),
        ({}, "expected at least one value to search"),
        ({"train": {"lr": []}}, "train.lr: expected a list of values"),
        ({"train": {"lr": {"low": 1, "hi": 2}}}, "train.lr.hi: unknown field"),
        ({"train": {"lr": {"low": 2, "high": 1}}}, "expected low under high"),
        ({"train": {"lr": {"low": 0, "high": 1, "log": True}}}, "log: expected low > 0"),
        ({"train": {"lr": {"low": 0, "high": 1, "step": 0}}}, "train.lr.step: expected integer > 0"),
    ],
)
def test_invalid_spaces(space: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        read_space(space)
