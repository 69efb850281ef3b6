"""The programs that train: each runs, on tiny shapes, and its tables say what it found."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import titans_build as tb
from titans_build.recipes.parse import read_file
from titans_build.tools.training import as_settings
from titans_build.tools.training.compare import fit, parameters_of

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Import a benchmark by its name, as its neighbors do."""
    import importlib

    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


def quick(tmp_path: Path, program: str, *words: str) -> tuple[dict[str, Any], str]:
    file = tmp_path / "results.json"
    command = [sys.executable, str(BENCHMARKS / f"{program}.py"), *words, "--quick", "--json", str(file)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False
    )
    assert done.returncode == 0, done.stderr
    results: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    assert results["quick"] is True
    return results, done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("task", ["copy", "language"])
def test_a_comparison_runs(task: str, tmp_path: Path, load: Any) -> None:
    results, out = quick(tmp_path, "variants", task, "--jobs", "1", "--plots", str(tmp_path / "plots"))
    assert results["comparison"]["variants"][0]["name"] == "mac"
    tables = load("variants").tables(results)
    assert tables["results"] in out and "| mac" in out
    assert ("test bits per byte" if task == "language" else "test accuracy") in out
    assert sorted(path.name for path in (tmp_path / "plots").iterdir()) == [f"{task}.png", f"{task}.svg"]


@pytest.mark.slow
def test_the_family_runs(tmp_path: Path, load: Any) -> None:
    results, out = quick(tmp_path, "variants", "family", "--jobs", "1", "--plots", str(tmp_path / "plots"))
    assert {cell["learner"] for cell in results["family"]["cells"]} == {"transformer", "titans", "titans_linear"}
    assert load("variants").tables(results)["results"] in out and "| titans " in out
    assert sorted(path.name for path in (tmp_path / "plots").iterdir()) == ["family.png", "family.svg"]


@pytest.mark.parametrize("task", ["copy", "mqar", "language"])
def test_variants_have_one_size_and_read_the_data(task: str, load: Any) -> None:
    settings = read_file(BENCHMARKS / "settings" / f"{task}.yaml")
    data = settings.pop("data")
    checked = as_settings(settings)
    variants = load("variants").TASKS[task]
    recipes = {name: tb.load_recipe(BENCHMARKS / "recipes" / f"{name}.yaml") for name in variants}
    target = parameters_of(next(iter(recipes.values())))
    for recipe in recipes.values():
        fitted = fit(recipe, target)
        assert fitted.parameters == pytest.approx(target, rel=0.01)
        assert fitted.recipe.vocab is not None
        tb.open_source(data, rows=checked.batch, length=checked.length, vocab=fitted.recipe.vocab)


@pytest.mark.slow
def test_the_needle_runs(tmp_path: Path, load: Any) -> None:
    results, out = quick(tmp_path, "needle", "--tasks", "needle_kv")
    (task,) = results["tasks"].values()
    assert [row["length"] for row in task["read"]] == [64, 256] and all(row["asked"] == 8 for row in task["read"])
    assert all(row["peak"] >= row["before"] > 0 for row in task["read"])
    for text in load("needle").tables(results).values():
        assert text in out


def test_a_failed_variant_has_a_row(load: Any) -> None:
    done = {"accuracy": 0.995, "loss": 0.1}
    good = {"name": "mac", "parameters": 1000, "steps": 10, "tokens": 10**6, "seconds": 3.0, "test": done}
    empty = dict.fromkeys(("steps", "tokens", "seconds", "test", "frozen"))
    bad = {"name": "mag", "parameters": 1000, **empty, "failed": "the loss is nan"}
    comparison = {"metric": "accuracy", "variants": [{**good, "frozen": done}, bad]}
    environment = load("measure").environment()
    results = {"program": "copy", "quick": False, "environment": environment, "skipped": {}, "seconds": 1}
    found = load("variants").tables({**results, "comparison": comparison, "done_before": ["mac"]})
    rows = found["results"].splitlines()
    assert "failed: the loss is nan" in rows[3] and rows[3].count("|") == rows[0].count("|") == 9
    assert "| done before, by this program | mac" in found["machine"]
