"""Comparing recipes: as large as each other, told apart by what was not trained on, and none run twice."""

from __future__ import annotations

import copy
import json
import math
import threading
from pathlib import Path
from typing import Any

import pytest
from tiny_runs import COPY, QUICK, TINY

import titans_build as tb
from titans_build.recipes import StorageError
from titans_build.registry import RecipeError
from titans_build.tools.train import main
from titans_build.tools.training import as_settings, compare, trials
from titans_build.tools.training.compare import fit, parameters_of
from titans_build.tools.training.trials import Trial, Workers

SETTINGS = {**QUICK, "steps": 2, "valid_every": 1, "valid_batches": 1}


def of(*layers: str) -> dict[str, Any]:
    """The tiny recipe, with some of its layers alone, and a feed-forward network behind each."""
    recipe = copy.deepcopy(TINY)
    recipe["layers"]["mag"].append("ffn")
    recipe["layers"] = {name: recipe["layers"][name] for name in layers}
    recipe["stack"] = list(layers)
    return recipe


def test_a_model_is_fitted_by_one_dial_wherever_it_stands() -> None:
    recipe = tb.load_recipe(of("mac", "mag"))
    larger = fit(recipe, 2 * parameters_of(recipe))
    assert larger.parameters == pytest.approx(2 * parameters_of(recipe), rel=0.01)
    assert larger.parameters == parameters_of(larger.recipe)
    assert set(larger.changes) == {"layers.mac.1.hidden", "layers.mag.1.hidden"}
    assert len(set(larger.changes.values())) == 1
    assert fit(recipe, parameters_of(recipe) + 1).changes == {}
    assert parameters_of(recipe) == parameters_of(tb.load_recipe(of("mac", "mag")))


def test_a_dial_may_be_a_field_of_a_block_inside_another() -> None:
    recipe = tb.load_recipe(of("mac"))
    found = fit(recipe, 2 * parameters_of(recipe), "memory.expansion")
    assert list(found.changes) == ["layers.mac.0.memory.expansion"]


def test_what_cannot_be_fitted_says_why() -> None:
    recipe = tb.load_recipe(of("mac"))
    with pytest.raises(RecipeError, match=r"cannot be fitted to 100 parameters with ffn.hidden: it has at least"):
        fit(recipe, 100)
    without = tb.load_recipe({**TINY, "layers": {"mag": TINY["layers"]["mag"]}, "stack": ["mag"]})
    with pytest.raises(RecipeError, match="no ffn to fit"):
        fit(without, 10**6)
    assert fit(without, parameters_of(without)).changes == {}
    with pytest.raises(RecipeError, match=r"did you mean 'hidden'"):
        fit(recipe, 10**5, "ffn.hiden")


def test_variants_have_equal_parameters_and_tokens_and_their_best_rate_is_kept(tmp_path: Path) -> None:
    found = compare({"a": of("mac"), "b": of("mag")}, COPY, SETTINGS, tmp_path, lrs=(1e-3, 1e-2), seeds=2)
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


def test_what_was_interrupted_goes_on_and_what_is_finished_is_not_run_again(tmp_path: Path) -> None:
    recipes = {"a": of("mac"), "b": of("mag")}
    whole = compare(recipes, COPY, SETTINGS, tmp_path / "whole")
    steps: list[tuple[str, int]] = []

    def interrupt(label: str, event: dict[str, Any]) -> None:
        if (label, event["event"], event.get("step")) == ("b", "valid", 1):
            raise KeyboardInterrupt

    settings = {**SETTINGS, "checkpoint_every": 1}
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


def test_side_by_side_is_the_same_as_one_after_the_other(tmp_path: Path) -> None:
    recipes = {"a": of("mac"), "b": of("mag")}
    heard: list[tuple[str, str]] = []
    one = compare(recipes, COPY, SETTINGS, tmp_path / "one")
    two = compare(
        recipes,
        COPY,
        SETTINGS,
        tmp_path / "two",
        jobs=2,
        told=lambda label, event: heard.append((label, event["event"])),
    )
    assert [v["test"]["loss"] for v in one["variants"]] == pytest.approx([v["test"]["loss"] for v in two["variants"]])
    assert {("a", "valid"), ("b", "valid"), ("a", "end"), ("b", "result")} <= set(heard)


def test_a_variant_that_fails_is_said_to_have_failed(tmp_path: Path) -> None:
    settings = {**SETTINGS, "steps": 8, "spike": 1e-6, "lr": 100.0, "clip": None, "valid_every": 8}
    found = compare({"a": of("mac")}, COPY, settings, tmp_path)
    assert "failed" in found["variants"][0] and found["variants"][0]["test"] is None
    again = compare({"a": of("mac")}, COPY, settings, tmp_path)
    assert again["variants"][0]["failed"] == found["variants"][0]["failed"]


def test_a_loss_that_is_no_number_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trials, "validate", lambda *rest: {"loss": math.nan, "accuracy": 0.0})
    found = compare({"a": of("mac")}, COPY, SETTINGS, tmp_path)
    assert found["variants"][0]["failed"] == "the test loss is not finite"


def test_a_memory_that_cannot_be_frozen_is_compared_all_the_same(tmp_path: Path) -> None:
    recipe = of("mag")
    recipe["layers"]["mag"][0] = {"type": "memory", "heads": 2, "chunk": 4, "use": "write"}
    (variant,) = compare({"a": recipe}, COPY, SETTINGS, tmp_path)["variants"]
    assert variant["frozen"] is None and variant["test"]["loss"] > 0


def test_everything_is_looked_at_before_anything_is_run(tmp_path: Path, lines_of_text: dict[str, Any]) -> None:
    """A recipe that cannot be trained would otherwise end the comparison when the others have been."""
    everywhere = of("mag")
    everywhere["vocab"] = 256
    window = copy.deepcopy(everywhere)
    del everywhere["layers"]["mag"][0]["of"]["branches"][0]["window"]
    recipes = {"window": window, "everywhere": everywhere}
    with pytest.raises(RecipeError, match=r"everywhere: settings: 1 problem\n  carry: the model's state grows"):
        compare(recipes, lines_of_text, SETTINGS, tmp_path / "out")
    alone = of("mag")
    alone["layers"]["mag"] = ["attention", "ffn"]
    stages = [{"steps": 1, "train": ["*"]}, {"steps": 1, "train": ["@memory"]}]
    settings = {**{key: value for key, value in SETTINGS.items() if key != "steps"}, "stages": stages}
    with pytest.raises(RecipeError, match=r"b: settings: 1 problem\n  stages.1.train.0: no block of this type"):
        compare({"a": of("mac"), "b": alone}, COPY, settings, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_data_that_have_changed_are_not_compared_with_what_was_read_before(
    tmp_path: Path, lines_of_text: dict[str, Any]
) -> None:
    recipe = of("mac")
    recipe["vocab"] = 256
    compare({"a": recipe}, lines_of_text, SETTINGS, tmp_path / "out")
    (tmp_path / "document-7.txt").write_text("one more", encoding="utf-8")
    with pytest.raises(RecipeError, match="has changed: restore it"):
        compare({"a": recipe}, lines_of_text, SETTINGS, tmp_path / "out")


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
def test_what_is_wrong_is_said_at_once(
    recipes: dict[str, str], options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=message):
        compare(recipes, COPY, {**SETTINGS, "valid_every": None}, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_processes_that_run_when_the_comparison_is_left_save_themselves(tmp_path: Path) -> None:
    settings = {**SETTINGS, "steps": 100_000, "valid_every": 100_000, "checkpoint_every": None}
    trial = Trial("a", tb.load_recipe(of("mac")), COPY, as_settings(settings), tmp_path / "a")
    begun = threading.Event()

    def told(label: str, event: dict[str, Any]) -> None:
        if event["event"] == "step":
            begun.set()

    with Workers(2, told) as processes:
        ended = processes.start(trial)
        assert begun.wait(120)
    assert ended.result().status == 130 and "interrupted; saved after step" in ended.result().error
    assert (tmp_path / "a" / "checkpoints" / "index.json").is_file()


def test_a_process_ends_when_nobody_listens(tmp_path: Path) -> None:
    settings = {**SETTINGS, "steps": 100_000, "valid_every": 100_000}
    trial = Trial("a", tb.load_recipe(of("mac")), COPY, as_settings(settings), tmp_path / "a")

    def deaf(label: str, event: dict[str, Any]) -> None:
        if event["event"] == "step":
            raise BrokenPipeError

    with Workers(2, deaf) as processes, pytest.raises(BrokenPipeError):
        processes.start(trial).result(120)


def files(folder: Path) -> list[str]:
    """Recipes as files, as the command takes them."""
    paths = []
    for name in ("mac", "mag"):
        path = folder / f"{name}.yaml"
        path.write_text(json.dumps(of(name)), encoding="utf-8")
        paths.append(str(path))
    return paths


def test_the_command_prints_a_table_and_draws_a_plot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, other = files(tmp_path)
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
def test_what_cannot_be_is_refused(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compare", *files(tmp_path), "--data", COPY, "--out", str(tmp_path / "out"), *words]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_comparison_of_nothing_but_failures_has_failed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["compare", files(tmp_path)[0], "--data", COPY, "--out", str(tmp_path / "out"), "--steps", "8"]
    words += ["--batch", "4", "-t", "spike=1e-9", "--lr", "100", "-t", "clip=null", "-t", "tensorboard=false"]
    assert main([*words, "--valid-every", "8"]) == 1
    assert "every recipe failed; the first: step" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["compare", "search"])
def test_the_command_says_how_it_is_used(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    out = capsys.readouterr().out
    assert "--jobs N" in out and "%%" not in out
