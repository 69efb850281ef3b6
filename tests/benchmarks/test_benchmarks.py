"""The benchmarks run, on tiny shapes and without what they compare with, and their page says what they measured."""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import titans_build as tb

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
PROGRAMS = {
    "memory": ["memory.py"],
    "model": ["model.py"],
    "streaming": ["streaming.py"],
    "generation": ["generation.py"],
    "overhead": ["steps.py", "overhead"],
    "packing": ["steps.py", "packing"],
    "torch_path": ["steps.py", "torch_path"],
    "learners": ["steps.py", "learners"],
    "stages": ["stages.py"],
    "long": ["long.py"],
    "parallel": ("parallel.py",),
    "estimate": ["kernel_estimate.py"],
}
"""The words of the command that measures each file of results."""
QUICKEST = "overhead"
"""The program that everyday tests run."""
# as `python benchmarks/NAME.py`, where titans-pytorch is not installed
WITHOUT = """
import runpy, sys
sys.modules["titans_pytorch"] = None
sys.path.insert(0, {folder!r})
sys.argv = {argv!r}
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def start(argv: list[str]) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", WITHOUT.format(folder=str(BENCHMARKS), argv=argv)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    # a shell's background jobs ignore the interrupt, and so would what they start
    listen = lambda: signal.signal(signal.SIGINT, signal.default_int_handler)  # noqa: E731
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    return subprocess.Popen(command, env=env, text=True, preexec_fn=listen, **pipes)


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Import a benchmark by its name, as its neighbors do."""
    import importlib

    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, str]]:
    """A program's result file and standard output, from a quick run."""

    @functools.cache
    def run(program: str) -> tuple[Path, str]:
        script, *words = PROGRAMS[program]
        file = tmp_path_factory.getbasetemp() / "results" / f"{program}.json"
        process = start([str(BENCHMARKS / script), *words, "--quick", "--json", str(file)])
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
        return file, out

    return run


@pytest.mark.parametrize(
    "program", [pytest.param(name, marks=() if name == QUICKEST else pytest.mark.slow) for name in PROGRAMS]
)
def test_a_quick_run_writes_its_results_and_prints_their_tables(program: str, quick: Any, load: Any) -> None:
    file, out = quick(program)
    results = json.loads(file.read_text(encoding="utf-8"))
    assert results["program"] == program and results["quick"] is True
    environment = results["environment"]
    assert environment["cores"] >= 1 and environment["cpu"] and environment["versions"]["torch"]
    for text in load(PROGRAMS[program][0].removesuffix(".py")).tables(results).values():
        assert text in out


@pytest.mark.slow
def test_without_titans_pytorch_its_rows_are_left_out(quick: Any) -> None:
    for program, part in (("memory", "times"), ("model", "training")):
        file, out = quick(program)
        results = json.loads(file.read_text(encoding="utf-8"))
        assert "pip install titans-pytorch" in results["skipped"]["titans-pytorch"]
        assert "left out: titans-pytorch" in out
        assert results[part] and all(row["kind"] != "package" for row in results[part])


@pytest.mark.slow
def test_every_case_is_measured(quick: Any) -> None:
    results = {program: json.loads(quick(program)[0].read_text(encoding="utf-8")) for program in PROGRAMS}
    kinds = {"op", "block", "medium op", "medium block", "attention"}
    assert {row["kind"] for row in results["memory"]["times"]} == kinds
    assert all(0 < row["seconds"]["low"] <= row["seconds"]["high"] for row in results["memory"]["times"])
    (peak,) = results["memory"]["peaks"]
    assert 0 < peak["imports"] <= peak["inputs"] <= peak["peak"]
    contexts = {(row["kind"], row["context"]) for row in results["model"]["generation"]}
    assert {("mac", 1_000), ("transformer", 1_000), ("plain", 16)} <= contexts and ("plain", 1_000) not in contexts
    assert [row["recipe"] for row in results["streaming"]["recipes"] if not row["finite"]] == []
    for program, cases in (
        ("overhead", {"window", "MAG"}),
        ("torch_path", {"torch", "compiled"}),
        ("learners", {"titans", "transformer"}),
    ):
        rows = results[program]["steps"]
        assert cases <= {row["case"] for row in rows} and all(row["seconds"] > 0 and row["ratio"] > 0 for row in rows)
    assert [row["kind"] for row in results["overhead"]["steps"]][::2] == ["training step", "reading", "one token"]


def test_the_overhead_baseline_is_mag_without_memory(load: Any) -> None:
    built = load("steps").mag_and_window(quick=False)
    mag, window = (tb.build(built[name], device="meta") for name in ("MAG", "window"))
    assert not any("controls" in name for name, _ in window.named_parameters())
    assert window.recipe.dim == mag.recipe.dim and window.recipe.depth == mag.recipe.depth


def test_every_packaged_recipe_is_streamed(load: Any) -> None:
    files = {file.stem for file in (BENCHMARKS.parent / "recipes").glob("*.yaml")} - {"sizes"}
    assert sorted(load("streaming").RECIPES) == sorted(files)


def test_each_result_is_drawn_by_the_program_that_writes_it(load: Any) -> None:
    programs = load("render").PROGRAMS
    assert {name: f"{program}.py" for name, program in programs.items() if name in PROGRAMS} == {
        name: script for name, (script, *_) in PROGRAMS.items()
    }
    assert {file.stem for file in (BENCHMARKS / "results").glob("*.json")} <= set(programs)


def test_the_page_is_filled_from_the_result_files(quick: Any, load: Any) -> None:
    render = load("render").render
    page = (BENCHMARKS / "README.md").read_text(encoding="utf-8")
    file, _ = quick(QUICKEST)
    filled = render(page, file.parent)
    assert f"Not measured yet: `make bench-{QUICKEST}`" not in filled
    assert "quick run: not figures to quote" in filled
    assert render(filled, file.parent) == filled
    emptied = render(filled, file.parent / "none")
    assert f"Not measured yet: `make bench-{QUICKEST}`" in emptied


def test_the_pages_match_the_result_files(load: Any) -> None:
    render = load("render")
    assert (BENCHMARKS / "README.md", BENCHMARKS.parent / "README.md") == render.PAGES
    for file in render.PAGES:
        page = file.read_text(encoding="utf-8")
        assert render.PLACE.search(page) and render.render(page, BENCHMARKS / "results") == page, file


def test_ctrl_c_stops_a_run_without_a_trace_or_a_file(tmp_path: Path) -> None:
    process = start([str(BENCHMARKS / "memory.py"), "--json", str(tmp_path / "memory.json")])
    assert process.stderr is not None
    assert "minutes" in process.stderr.readline()
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "stopped" in err and "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


def test_cases_take_turns_in_both_directions(load: Any) -> None:
    calls: list[str] = []
    samples = load("measure").interleave({name: lambda name=name: calls.append(name) for name in "abc"}, 0, least=2)
    assert "".join(calls) == "abc" + "abc" + "cba"
    assert {name: len(taken) for name, taken in samples.items()} == {"a": 2, "b": 2, "c": 2}


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory by stage is read from /proc")
def test_peak_memory(tmp_path: Path, load: Any) -> None:
    script = tmp_path / "case.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(BENCHMARKS)!r})\n"
        "import measure, torch\n"
        "def make():\n"
        "    held = torch.ones(5_000_000)\n"
        "    def case(): (torch.ones(20_000_000).sum(), torch.ones(10_000_000).sum(), held.sum())\n"
        "    return case\n"
        "alone = lambda case, quick: measure.peak_memory(make)\n"
        "measure.benchmark('case', '', '', None, None, alone=alone)\n",
        encoding="utf-8",
    )
    stages = load("measure").alone(str(script), None, False)
    assert stages["inputs"] - stages["imports"] == pytest.approx(20e6, abs=4e6)
    assert stages["peak"] - stages["inputs"] == pytest.approx(80e6, abs=8e6)
