"""The family of learners: models of equal size, tests beyond the trained length, resuming, and the table."""

from __future__ import annotations

import importlib
import json
import math
import os
import signal
from pathlib import Path
from typing import Any

import pytest

import titans_build as tb
from titans_build.registry import RecipeError
from titans_build.tools.train import main
from titans_build.tools.training import reproduce_command, trials
from titans_build.tools.training.compare import parameters_of
from titans_build.tools.training.family import (
    BENCHMARKS,
    LEARNERS,
    MAD,
    MAD_AVERAGE,
    PUBLISHED,
    mad_average,
    recipe_of,
    with_bottleneck,
)
from titans_build.tools.training.reproduce import (
    CELLS,
    LONG,
    QUICK,
    RESULTS,
    benchmarks_named,
    columns_of,
    reproduce,
    verdict,
)

TINY = {"steps": 2, "batch": 2, "valid_batches": 1}
LINEAR = "linear={type: memory, depth: 1, heads: 2, expansion: 1}"


def tiny(out: Path, learners: tuple[str, ...] = ("transformer", LINEAR), tasks: tuple[str, ...] = ("parity",)) -> Any:
    return reproduce(out, quick=True, learners=learners, tasks=tasks, settings=TINY, dim=16)


@pytest.mark.parametrize("quick", [False, True])
def test_benchmarks_open_in_both_forms(quick: bool) -> None:
    names = (QUICK if quick else LONG).tasks
    assert len(names) == (5 if quick else 14)
    for benchmark in benchmarks_named(names, quick).values():
        source = tb.open_source(benchmark.data, rows=2, split="test")
        assert (source.batch(0).targets != -100).any()
        for multiple in benchmark.longer:
            longer = tb.open_source(benchmark.at(multiple), rows=2, split="test")
            assert longer.length == multiple * source.length and longer.vocab == source.vocab
            assert (longer.batch(0).targets != -100).nonzero()[:, 1].min() == source.length


def test_published_sizes_of_mad() -> None:
    sizes = {name: tb.open_source(BENCHMARKS[name].data, rows=1) for name in MAD}
    assert {name: (source.vocab, source.length) for name, source in sizes.items()} == {
        "recall": (16, 128), "noisy_recall": (32, 128), "fuzzy_recall": (16, 128), "selective_copy": (16, 256),
        "compression": (16, 62), "memorization": (256, 32),
    }  # fmt: skip
    assert {name: BENCHMARKS[name].data["examples"] for name in MAD} == {
        name: 256 if name == "memorization" else 12800 for name in MAD
    }
    assert LONG.dim == 128


def test_every_known_learner_has_a_name_a_kind_and_published_figures_of_tasks() -> None:
    assert set(QUICK.learners) <= set(LEARNERS) and len(QUICK.learners) >= 12
    assert {kind for kind, _ in LEARNERS.values()} == {"attention", "linear", "deep"}
    assert set(PUBLISHED) <= set(LEARNERS)
    tasks = {*BENCHMARKS, MAD_AVERAGE}
    assert all(set(figures) <= tasks for figures in PUBLISHED.values())
    assert all(0 <= figure <= 1 for figures in PUBLISHED.values() for figure in figures.values())
    # the published averages are those of the published columns
    for learner in ("transformer", "titans", "gated_delta_net"):
        average = mad_average(PUBLISHED[learner])
        assert average == pytest.approx(PUBLISHED[learner][MAD_AVERAGE], abs=1e-4)
    assert mad_average({"recall": 1.0}) is None


def test_recipe_of_a_learner() -> None:
    recipe = recipe_of({"type": "memory", "depth": 1}, 32)
    assert recipe.depth == 2 and recipe.layers["layer"][0]["heads"] == 4 and recipe.layers["layer"][1]["hidden"] == 128
    assert recipe_of("attention", 32).layers["layer"][0]["type"] == "attention"
    packaged = recipe_of("mac", 32)
    assert packaged.dim == 32 and packaged.depth == 2 and packaged.layers["mac"][0]["type"] == "context"
    with pytest.raises(RecipeError, match="no block or recipe of that name; did you mean 'memory'"):
        recipe_of("memorry", 32)


def test_bottleneck_keeps_the_learner_and_adds_as_many_parameters_to_each(bottleneck: None) -> None:
    recipes = [recipe_of(block, 16) for block in ("attention", "memory")]
    added = {parameters_of(with_bottleneck(recipe, 31)) - parameters_of(recipe) for recipe in recipes}
    assert len(added) == 1
    model = tb.build(tb.load_recipe(with_bottleneck(recipes[1], 31), {"vocab": 16}, allow_imports=True), seed=0)
    batch = tb.open_source("compression", rows=2).batch(0)
    changed = batch.tokens.clone()
    changed[:, 40] = 3
    # the decoder does not read what comes after the bottleneck, but at its own position
    differs = (model(changed).logits - model(batch.tokens).logits).abs().amax((0, 2)) > 0
    assert differs.nonzero().flatten().tolist() == [40]


def test_cells_have_equal_parameters_and_tests_beyond_the_length(tmp_path: Path) -> None:
    found = tiny(tmp_path)
    first, second = found["cells"]
    assert (first["learner"], second["learner"]) == ("transformer", "linear")
    assert second["parameters"] == pytest.approx(first["parameters"], rel=0.02) and second["ffn"] != first["ffn"]
    for cell in found["cells"]:
        assert cell["metric"] == "accuracy" and cell["chance"] == 0.5
        assert cell["longer"].keys() == {"2", "4"} and all(0 < value < 1 for value in cell["longer"].values())
        assert 0 < cell["test"]["accuracy"] < 1 and math.isfinite(cell["test"]["loss"])
    lines = [json.loads(line) for line in (tmp_path / CELLS).read_text(encoding="utf-8").splitlines()]
    assert lines == found["cells"]
    assert json.loads((tmp_path / RESULTS).read_text(encoding="utf-8")) == found


def test_finished_cells_are_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    began: list[tuple[str, int]] = []
    plans: list[dict[str, tuple[int, float]]] = []
    reproduce(
        tmp_path, quick=True, learners=["transformer"], tasks=["parity"], settings=TINY, dim=16, lrs=[1e-3, 3e-3],
        seeds=2, begins=lambda task, runs: began.append((task, runs)), planned=plans.append,
    )  # fmt: skip
    assert began == [("parity", 4)]
    assert plans[0]["parity"][0] == 4 and plans[0]["parity"][1] > 0
    monkeypatch.setattr(trials, "train", lambda *args, **named: pytest.fail("a finished run was trained"))
    monkeypatch.setattr(trials, "validate", lambda *args, **named: pytest.fail("a finished run was tested"))
    again = {"quick": True, "learners": ["transformer"], "tasks": ["parity"], "settings": TINY, "dim": 16, "seeds": 2}
    with monkeypatch.context() as patch:
        module = importlib.import_module("titans_build.tools.training.reproduce")
        patch.setattr(module, "validate", lambda *a, **n: pytest.fail("a finished cell was tested again"))
        found = reproduce(tmp_path, lrs=[1e-3, 3e-3], planned=plans.append, **again)
    assert plans[1] == {"parity": (0, 0)}
    (cell,) = found["cells"]
    assert len(cell["runs"]) == 4 and cell["lr"] in (1e-3, 3e-3)
    losses = {lr: sum(r["valid"]["loss"] for r in cell["runs"] if r["lr"] == lr) for lr in (1e-3, 3e-3)}
    assert cell["lr"] == min(losses, key=lambda lr: losses[lr])


@pytest.mark.slow
def test_killed_command_goes_on(tmp_path: Path, in_process: Any) -> None:
    learners, tasks = ("transformer", LINEAR), ("parity", "S3")
    words = [*learners, "--quick", "--tasks", ",".join(tasks), "--dim", "16", "--jobs", "1", "--out", tmp_path / "out"]
    words += ["--json", *(word for name, value in TINY.items() for word in ("-t", f"{name}={value}"))]
    process = in_process.start("train", "reproduce", *words, pipe="stdout")
    with (in_process.folder / "stdout").open(encoding="utf-8") as out:
        runs = [json.loads(out.readline())["run"] for _ in range(3)]  # the third is the first of the second task
        os.kill(process, signal.SIGKILL)
    in_process.end()
    assert len(runs) == 3
    trained: list[str] = []
    whole = tiny(tmp_path / "whole", learners, tasks)
    found = reproduce(
        tmp_path / "out", quick=True, learners=learners, tasks=tasks, settings=TINY, dim=16,
        told=lambda label, event: trained.append(label) if event["event"] == "result" else None,
    )  # fmt: skip
    assert len(trained) <= 2  # the run in progress, and the one whose result was not printed yet

    def figures(cells: list[Any]) -> Any:
        return [[cell["task"], cell["learner"], cell["test"], cell["longer"], cell["parameters"]] for cell in cells]

    assert figures(found["cells"]) == figures(whole["cells"])


def test_learners_that_cannot_run_are_left_out_with_the_reason(tmp_path: Path) -> None:
    found = tiny(tmp_path, ("transformer", "unheard_of", "wide={type: memory, depth: 4, expansion: 64}"))
    assert [cell["learner"] for cell in found["cells"]] == ["transformer"]
    assert "no block or recipe of that name" in found["left_out"]["unheard_of"]
    assert "cannot be fitted to" in found["left_out"]["wide"]
    with pytest.raises(RecipeError, match="parrity: no such task; did you mean 'parity'"):
        tiny(tmp_path, tasks=("parrity",))


def cells(task: str, metric: str = "accuracy", chance: float | None = 0.1, **values: float | None) -> list[Any]:
    return [
        {"task": task, "learner": name, "metric": metric, "chance": chance, "longer": {}, "parameters": 10}
        | ({"failed": "no"} if value is None else {"test": {metric: value}, "spread": {metric: 0.0}})
        for name, value in values.items()
    ]


def result(**tasks: list[Any]) -> Any:
    kinds = {"gla": "linear", "kda": "linear", "titans": "deep", "atlas": "deep", "transformer": "attention"}
    every = [cell for group in tasks.values() for cell in group]
    facts = {
        "settings": {"steps": 2, "batch": 2, "valid_batches": 1},
        "dim": 16,
        "lrs": [1e-3],
        "seeds": 1,
        "left_out": {},
    }
    return {"tasks": dict.fromkeys(tasks), "learners": kinds, "cells": every, **facts}


def test_verdict_says_where_a_linear_memory_is_as_good_as_a_deep_one() -> None:
    text = verdict(
        result(
            recall=cells("recall", gla=0.5, kda=0.995, titans=1.0, atlas=0.7),
            A5=cells("A5", gla=0.3, kda=None, titans=0.9, atlas=0.2),
            mqar=cells("mqar", gla=0.15, titans=0.12),
            el_nino=cells("el_nino", "mse", None, kda=0.2, titans=0.3, transformer=0.1),
            S3=cells("S3", transformer=1.0, titans=0.5),
        )
    )
    assert text == (
        "A linear memory is as good as the best deep one, or better, on recall (kda 99.5, titans 100.0), "
        "el_nino (kda 0.200, titans 0.300). A deep memory is better on A5 (gla 30.0, titans 90.0). "
        "No memory is more than 10 points above chance on mqar."
    )
    assert verdict(result(S3=cells("S3", transformer=1.0, titans=0.5))).startswith("No task has both")


def test_table_has_the_published_figure_beside_ours() -> None:
    found = result(
        compression=cells("compression", titans=0.5, gla=None),
        **{task: cells(task, titans=0.9) for task in MAD if task != "compression"},
    )
    columns = columns_of(found)
    assert [column.heading for column in columns][-1] == MAD_AVERAGE
    titans, gla, chance = reproduce_command.rows_of(found, columns)
    assert titans[2] == "50.0 [49.6]" and gla[2] == "failed" and chance[2] == "10.0"
    assert titans[-1] == f"{100 * (0.5 + 4 * 0.9) / 5:.1f} [76.4]" and chance[-1] == ""
    page = reproduce_command.markdown(found)
    assert "| titans | 10 | 50.0 [49.6] |" in page and "In brackets: published" in page
    assert reproduce_command.picture(found, columns)["svg"].count(b"[49.6]") == 1


def test_reproduce_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["reproduce", "transformer", LINEAR, "--tasks", "S3", "--quick", "--dim", "16", "--steps", "2"]
    command += ["-t", "batch=2", "-t", "valid_batches=1", "--jobs", "1", "--out", str(tmp_path)]
    assert main(command) == 0
    out = capsys.readouterr().out
    assert "S3: linear/lr-0.005: loss" in out and "without solving it" in out and "S3 x4" in out
    assert {file.name for file in tmp_path.iterdir()} == {"S3", CELLS, RESULTS, "table.md", "table.png", "table.svg"}
    assert main([*command, "--json"]) == 0
    (line,) = capsys.readouterr().out.splitlines()  # the runs are finished, and are no events
    document = json.loads(line)
    assert document["event"] == "reproduction" and len(document["cells"]) == 2 and document["verdict"]


def test_reproduce_command_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["reproduce", "--out", str(tmp_path)]
    assert main([*command, "unheard_of", "--tasks", "parity", "--quick"]) == 1
    assert "no learner was trained" in capsys.readouterr().err
    for words, message in (
        (["--tasks", "no"], "no: no such task"),
        (["--lr", "0"], "numbers > 0"),
        (["--dim", "0"], "integer >= 1"),
    ):
        assert main([*command, *words]) == 2
        assert message in capsys.readouterr().err
