"""Comparisons: models of equal size, tests on held-out data, resuming, and parallel runs."""

from __future__ import annotations

import copy
import json
import math
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import titans_build as tb
from titans_build.recipes import StorageError
from titans_build.registry import RecipeError
from titans_build.tools.train import main
from titans_build.tools.training import as_settings, compare, search, trials
from titans_build.tools.training.compare import fit, parameters_of
from titans_build.tools.training.trials import Trial, Workers

COPY = "copy:length=16"


@pytest.fixture
def settings(quick: dict[str, Any]) -> dict[str, Any]:
    return {**quick, "steps": 2, "valid_every": 1, "valid_batches": 1}


@pytest.fixture
def of(tiny: dict[str, Any]) -> Callable[..., dict[str, Any]]:
    """``of("mac")``: the tiny recipe with some of its layers alone, and a feed-forward network behind each."""

    def recipe(*layers: str) -> dict[str, Any]:
        made = copy.deepcopy(tiny)
        made["layers"]["mag"].append("ffn")
        made["layers"] = {name: made["layers"][name] for name in layers}
        return {**made, "stack": list(layers)}

    return recipe


@pytest.fixture
def recipe_files(of: Any, tmp_path: Path) -> list[str]:
    """Two recipes as files, as the command takes them."""
    paths = [tmp_path / f"{name}.yaml" for name in ("mac", "mag")]
    for path in paths:
        path.write_text(json.dumps(of(path.stem)), encoding="utf-8")
    return list(map(str, paths))


def test_fit_sets_one_field_in_all_blocks(of: Any) -> None:
    recipe = tb.load_recipe(of("mac", "mag"))
    larger = fit(recipe, 2 * parameters_of(recipe))
    assert larger.parameters == pytest.approx(2 * parameters_of(recipe), rel=0.01)
    assert larger.parameters == parameters_of(larger.recipe)
    assert set(larger.changes) == {"layers.mac.1.hidden", "layers.mag.1.hidden"}
    assert len(set(larger.changes.values())) == 1
    assert fit(recipe, parameters_of(recipe) + 1).changes == {}
    assert parameters_of(recipe) == parameters_of(tb.load_recipe(of("mac", "mag")))


def test_fit_of_a_nested_block(of: Any) -> None:
    recipe = tb.load_recipe(of("mac"))
    found = fit(recipe, 2 * parameters_of(recipe), "memory.expansion")
    assert list(found.changes) == ["layers.mac.0.memory.expansion"]


def test_fit_errors(tiny: dict[str, Any], of: Any) -> None:
    recipe = tb.load_recipe(of("mac"))
    with pytest.raises(RecipeError, match=r"cannot be fitted to 100 parameters with ffn.hidden: it has at least"):
        fit(recipe, 100)
    without = tb.load_recipe({**tiny, "layers": {"mag": tiny["layers"]["mag"]}, "stack": ["mag"]})
    with pytest.raises(RecipeError, match="no ffn to fit"):
        fit(without, 10**6)
    assert fit(without, parameters_of(without)).changes == {}
    with pytest.raises(RecipeError, match=r"did you mean 'hidden'"):
        fit(recipe, 10**5, "ffn.hiden")


def test_variants_have_equal_size_and_the_best_rate_is_kept(settings: dict[str, Any], of: Any, tmp_path: Path) -> None:
    found = compare({"a": of("mac"), "b": of("mag")}, COPY, settings, tmp_path, lrs=(1e-3, 1e-2), seeds=2)
    first, second = found["variants"]
    assert found["metric"] == "accuracy"
    assert second["parameters"] == pytest.approx(first["parameters"], rel=0.01)
    assert first["changes"] == {}
    assert first["tokens"] == second["tokens"] == 2 * 4 * 16
    for variant in (first, second):
        assert len(variant["runs"]) == 4
        losses = {
            lr: sum(run["valid"]["loss"] for run in variant["runs"] if run["lr"] == lr) / 2 for lr in (1e-3, 1e-2)
        }
        assert variant["lr"] == min(losses, key=lambda lr: losses[lr])
        tests = [run["test"]["loss"] for run in variant["runs"] if run["lr"] == variant["lr"]]
        assert variant["test"]["loss"] == pytest.approx(sum(tests) / 2)
        assert variant["spread"]["loss"] == pytest.approx(max(tests) - min(tests)) and tests[0] != tests[1]
        assert [point["tokens"] for point in variant["curve"]] == [64, 128]
        assert variant["frozen"]["loss"] != variant["test"]["loss"]
    assert json.loads((tmp_path / "comparison.json").read_text(encoding="utf-8")) == found


def test_interrupted_comparison_resumes(settings: dict[str, Any], of: Any, tmp_path: Path) -> None:
    recipes = {"a": of("mac"), "b": of("mag")}
    whole = compare(recipes, COPY, settings, tmp_path / "whole")
    steps: list[tuple[str, int]] = []

    def interrupt(label: str, event: dict[str, Any]) -> None:
        if (label, event["event"], event.get("step")) == ("b", "valid", 1):
            raise KeyboardInterrupt

    settings = {**settings, "checkpoint_every": 1}
    with pytest.raises(KeyboardInterrupt, match="run the same command to resume"):
        compare(recipes, COPY, settings, tmp_path / "parts", told=interrupt)

    def note(label: str, event: dict[str, Any]) -> None:
        if event["event"] == "step":
            steps.append((label, event["step"]))

    parts = compare(recipes, COPY, settings, tmp_path / "parts", told=note)
    assert {label for label, _ in steps} == {"b"}
    for one, other in zip(whole["variants"], parts["variants"]):
        assert one["test"] == other["test"]
    with pytest.raises(StorageError, match=r"this folder has a different run \(lr = 0.001\)"):
        compare(recipes, COPY, {**settings, "lr": 0.5}, tmp_path / "parts")


def test_comparison_of_an_earlier_data_order_is_not_continued(settings: Any, of: Any, tmp_path: Path) -> None:
    whole = compare({"a": of("mag")}, COPY, settings, tmp_path)
    path = tmp_path / "a/run.json"
    run = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**run, "data_order": None}), encoding="utf-8")
    assert compare({"a": of("mag")}, COPY, settings, tmp_path) == whole
    with pytest.raises(RecipeError, match="begun by an earlier version"):
        compare({"a": of("mag"), "b": of("mac")}, COPY, settings, tmp_path, parameters=None)


def test_parallel_runs_equal_sequential_ones(
    settings: dict[str, Any], of: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # files of the current folder are not run
    (tmp_path / "hostile/torch").mkdir(parents=True)
    for name in ("numpy.py", "torch/__init__.py", "titans_build.py", "sitecustomize.py"):
        (tmp_path / "hostile" / name).write_text("raise SystemExit('the current folder was run')", encoding="utf-8")
    monkeypatch.chdir(tmp_path / "hostile")
    recipes = {"a": of("mac"), "b": of("mag")}
    heard: list[tuple[str, str]] = []
    one = compare(recipes, COPY, settings, tmp_path / "one")
    two = compare(
        recipes,
        COPY,
        settings,
        tmp_path / "two",
        jobs=2,
        told=lambda label, event: heard.append((label, event["event"])),
    )
    assert [v["test"]["loss"] for v in one["variants"]] == pytest.approx([v["test"]["loss"] for v in two["variants"]])
    assert {("a", "valid"), ("b", "valid"), ("a", "end"), ("b", "result")} <= set(heard)


def test_folder_of_a_run_is_refused(settings: dict[str, Any], of: Any, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("{}", encoding="utf-8")
    with pytest.raises(StorageError, match="this is the folder of a run: choose another one"):
        compare({"a": of("mac")}, COPY, settings, tmp_path)
    with pytest.raises(StorageError, match="this is the folder of a run: choose another one"):
        search(of("mac"), COPY, settings, {"train": {"lr": [1e-3]}}, tmp_path)


def test_failed_variant(settings: dict[str, Any], of: Any, tmp_path: Path) -> None:
    settings = {**settings, "steps": 8, "spike": 1e-6, "lr": 100.0, "clip": None, "valid_every": 8}
    found = compare({"a": of("mac")}, COPY, settings, tmp_path)
    assert "failed" in found["variants"][0] and found["variants"][0]["test"] is None
    again = compare({"a": of("mac")}, COPY, settings, tmp_path)
    assert again["variants"][0]["failed"] == found["variants"][0]["failed"]


def test_nonfinite_test_loss_is_a_failure(
    settings: dict[str, Any], of: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trials, "validate", lambda *rest: {"loss": math.nan, "accuracy": 0.0})
    found = compare({"a": of("mac")}, COPY, settings, tmp_path)
    assert found["variants"][0]["failed"] == "the test loss is not finite"


def test_comparison_of_a_memory_that_cannot_be_frozen(settings: dict[str, Any], of: Any, tmp_path: Path) -> None:
    recipe = of("mag")
    recipe["layers"]["mag"][0] = {"type": "memory", "heads": 2, "chunk": 4, "use": "write"}
    (variant,) = compare({"a": recipe}, COPY, settings, tmp_path)["variants"]
    assert variant["frozen"] is None and variant["test"]["loss"] > 0


def test_all_trials_are_checked_before_the_first_runs(
    settings: dict[str, Any], of: Any, tmp_path: Path, ordered_text: dict[str, Any]
) -> None:
    """A recipe that cannot be trained would otherwise end the comparison when the others have been."""
    everywhere = of("mag")
    everywhere["vocab"] = 256
    window = copy.deepcopy(everywhere)
    del everywhere["layers"]["mag"][0]["of"]["branches"][0]["window"]
    recipes = {"window": window, "everywhere": everywhere}
    with pytest.raises(RecipeError, match=r"everywhere: settings: 1 problem\n  carry: the model's state grows"):
        compare(recipes, ordered_text, settings, tmp_path / "out")
    alone = of("mag")
    alone["layers"]["mag"] = ["attention", "ffn"]
    stages = [{"steps": 1, "train": ["*"]}, {"steps": 1, "train": ["@memory"]}]
    settings = {**{key: value for key, value in settings.items() if key != "steps"}, "stages": stages}
    with pytest.raises(RecipeError, match=r"b: settings: 1 problem\n  stages.1.train.0: no block of this type"):
        compare({"a": of("mac"), "b": alone}, COPY, settings, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_changed_data_is_refused(
    settings: dict[str, Any], of: Any, tmp_path: Path, ordered_text: dict[str, Any]
) -> None:
    recipe = of("mac")
    recipe["vocab"] = 256
    compare({"a": recipe}, ordered_text, settings, tmp_path / "out")
    (tmp_path / "document-7.txt").write_text("one more", encoding="utf-8")
    with pytest.raises(RecipeError, match="has changed: restore it"):
        compare({"a": recipe}, ordered_text, settings, tmp_path / "out")


@pytest.mark.parametrize(
    ("recipes", "options", "message"),
    [
        ({}, {}, "expected at least one recipe"),
        ({"../a": "mac"}, {}, "'../a': expected a name that a folder can have"),
        ({"comparison.json": "mac"}, {}, "expected a name that a folder can have"),
        ({"a": "mac"}, {"jobs": 0}, "expected seeds and jobs >= 1"),
        ({"a": "mac"}, {"lrs": (1e-3, 1e-2)}, "valid_every: expected a number"),
        ({"a": "mac"}, {"dial": "ffn.hiden"}, "did you mean 'hidden'"),
    ],
)
def test_invalid_arguments(
    settings: dict[str, Any], recipes: dict[str, str], options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=message):
        compare(recipes, COPY, {**settings, "valid_every": None}, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_terminated_workers_save_a_checkpoint(settings: dict[str, Any], of: Any, tmp_path: Path) -> None:
    settings = {**settings, "steps": 100_000, "valid_every": 100_000, "checkpoint_every": None}
    trial = Trial("a", tb.load_recipe(of("mac")), COPY, as_settings(settings), tmp_path / "a")
    begun = threading.Event()

    def told(label: str, event: dict[str, Any]) -> None:
        if event["event"] == "step":
            begun.set()

    with Workers(2, told) as processes:
        ended = processes.start(trial)
        assert begun.wait(120)
    assert "interrupted; saved after step" in str(ended.result())
    assert (tmp_path / "a" / "checkpoints" / "index.json").is_file()


def test_worker_ends_when_its_listener_fails(settings: dict[str, Any], of: Any, tmp_path: Path) -> None:
    settings = {**settings, "steps": 100_000, "valid_every": 100_000}
    trial = Trial("a", tb.load_recipe(of("mac")), COPY, as_settings(settings), tmp_path / "a")

    def deaf(label: str, event: dict[str, Any]) -> None:
        if event["event"] == "step":
            raise BrokenPipeError

    with Workers(2, deaf) as processes, pytest.raises(BrokenPipeError):
        processes.start(trial).result(120)


def test_compare_command(recipe_files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, other = recipe_files
    words = ["compare", one, f"renamed={other}", "--task", COPY, "--out", str(tmp_path / "out"), "--steps", "2"]
    words += ["--batch", "4", "--valid-every", "1", "-t", "valid_batches=1", "-t", "tensorboard=false"]
    # a path that only one of them has
    words += ["--set", "layers.mac.0.segment=4"]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "renamed" in out and "test accuracy" in out and "memory frozen" in out
    assert (tmp_path / "out" / "comparison.svg").read_text(encoding="utf-8").count("renamed") >= 1
    assert (tmp_path / "out" / "comparison.png").read_bytes()[:4] == b"\x89PNG"
    assert main([*words, "--json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert lines[-1]["event"] == "comparison" and len(lines[-1]["variants"]) == 2
    assert all(line["event"] != "step" for line in lines)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--set", "layers.nowhere.0.segment=4"], "no recipe has this path"),
        (["--lr", "1e-3,x"], "expected numbers > 0"),
        (["--parameters", "many"], "expected a number >= 1, first or none"),
        (["--jobs", "0"], "expected an integer >= 1"),
        (["--lr", "1e-3,.inf"], "--lr: 1 problem\n  expected a finite number, got inf"),
        (["--fit", "nowhere.hidden"], "--fit: 1 problem\n  unknown block 'nowhere'"),
        (["--parameters", "100"], "mac: 1 problem\n  cannot be fitted to 100 parameters with ffn.hidden"),
        (["--lr", "1e-3,1e-2", "-t", "lr=0.1"], "--lr 1e-3,1e-2 and -t lr=...: expected one of them"),
    ],
)
def test_invalid_options(
    recipe_files: list[str], words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compare", *recipe_files, "--data", COPY, "--out", str(tmp_path / "out"), *words]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_comparison_without_success_fails(
    recipe_files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["compare", recipe_files[0], "--data", COPY, "--out", str(tmp_path / "out"), "--steps", "8"]
    words += ["--batch", "4", "-t", "spike=1e-9", "--lr", "100", "-t", "clip=null", "-t", "tensorboard=false"]
    assert main([*words, "--valid-every", "8"]) == 1
    assert "every recipe failed; the first: step" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["compare", "search"])
def test_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    out = capsys.readouterr().out
    assert "--jobs N" in out and "%%" not in out
