"""The model of cost: what it counts, and that costs of a whole model follow from small ones."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest

from titans_build.kernels.memory import memory_flops

pytest.importorskip("triton")
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def estimate(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("kernel_estimate")


def test_flops_of_the_kernels_are_those_of_the_operation(estimate: Any) -> None:
    """Errors of a layer whose input is a key are not propagated, which the formula of kernels rounds up."""
    chunks, rows, b, d, width = 4, 2, 64, 64, 128
    arguments = dict(keys=(chunks, rows, b, d), d_in=d, width=width, d_out=d, LAYERS=2, PARTS=2)
    write, read = (sum(estimate.memory_flops(f"{name}_kernel", arguments)) for name in ("write", "read"))
    useful = chunks * rows * b * memory_flops([(width, d), (d, width)], b)
    assert write + read == pytest.approx(useful, rel=0.01)
    assert sum(estimate.memory_flops("write_backward_kernel", arguments)) == 2 * write
    assert estimate.memory_flops("forward_kernel", dict(x=(1, 2))) == (0, 0)
    arguments = dict(keys=(1, chunks * b, rows, d), width=d, d_out=d, b=b, LAYERS=1, PARTS=2, NORM=True)
    assert sum(estimate.memory_flops("linear_kernel", arguments)) == chunks * rows * b * memory_flops([(d, d)], b)


def test_one_launch_for_writes_and_reads_pays_from_few_rows_on(estimate: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rule of the fused schedule stays on the safe side of the estimate."""
    seconds = {}
    for schedule in ("resident", "fused"):
        monkeypatch.setenv("TITANS_BUILD_SCHEDULE", schedule)
        seconds[schedule] = estimate.operation("plain", 64, 1024, 64, 1)["device"]
    assert 1.5 * seconds["fused"] < seconds["resident"]


@pytest.mark.parametrize("recipe", ["lmm-30m", pytest.param("mac-30m", marks=pytest.mark.slow)])
def test_costs_are_linear_in_layers(estimate: Any, recipe: str) -> None:
    one, two, three = (estimate.step(recipe, layers, 512 if recipe.startswith("mac") else 128) for layers in (1, 2, 3))
    for name in estimate.COUNTS:
        assert three[name] == pytest.approx(2 * two[name] - one[name], rel=1e-9), name
    assert one["memory"] > 0 and one["casts"] > 0 and one["copies"] > 0 and one["launches"] > 100


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["mac", "lmm"])
def test_the_costs_of_a_model_are_those_of_counting_all_of_it(estimate: Any, recipe: str) -> None:
    found, counted = estimate.estimate(recipe, 1280), estimate.step(recipe, 4, 1280)
    for name in estimate.COUNTS:
        assert found[name] == pytest.approx(counted[name], rel=1e-9), name


@pytest.mark.slow
def test_the_costs_of_a_model_with_many_launches_follow_from_two_lengths(estimate: Any, tmp_path: Path) -> None:
    """The time of the device is not linear where kernels have few programs, nor are the bytes of partial sums."""
    recipe = tmp_path / "heads of 256.yaml"
    text = (BENCHMARKS.parent / "recipes" / "mac.yaml").read_text()
    recipe.write_text(text.replace("heads: 4, depth", "heads: 1, depth").replace("repeat: 4", "repeat: 2"))
    found, counted = estimate.estimate(recipe, 768, (512, 640)), estimate.step(recipe, 2, 768)
    assert counted["launches"] > 768 * estimate.MANY
    for name in estimate.COUNTS:
        assert found[name] == pytest.approx(counted[name], rel=2e-3 if name in ("other", "device") else 1e-9), name


def test_a_step_takes_as_long_as_the_slower_of_host_and_device(estimate: Any) -> None:
    row = estimate.estimate("transformer-30m", 256)
    assert row["seconds"] == max(row["device"], row["host"]) and row["waits"] * estimate.WAIT < row["host"]
    table = estimate.tables({
        "rows": [row], "seconds": 1, "skipped": {}, "quick": False,
        "environment": dict(date="", commit=None, modified=False, python="", versions={}, cpu="", instructions="",
                            cores=1, threads=1, load=[0.0]),
    })["steps"]  # fmt: skip
    assert "transformer-30m" in table and "tokens/s" in table
