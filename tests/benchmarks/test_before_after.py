"""The comparison of two versions: each process imports its own, and the result has a ratio for each case."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import titans_build as tb

PROGRAM = Path(__file__).parents[2] / "benchmarks/before_after.py"


def compare(*words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(PROGRAM), *map(str, words)]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )


@pytest.fixture
def other(tmp_path: Path) -> Path:
    """A folder with this package in it, where it says which folder it was imported from."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site/titans_build").symlink_to(Path(str(tb.__file__)).parent)
    return tmp_path / "site"


@pytest.mark.slow
def test_each_case_has_a_ratio(other: Path, tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    words = ("--quick", "--pairs", 1, "--json", file, "--cases", "operation f*", "generate lmm one row")
    done = compare("--against", other, *words)
    assert done.returncode == 0, done.stderr
    cases: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))["cases"]
    assert list(cases) == ["operation forward", "operation forward and backward", "generate lmm one row"]
    for name, row in cases.items():
        assert row["lowest"] == row["ratio"] == row["highest"] == row["now"] / row["before"], name
        assert name in done.stdout


@pytest.mark.slow
def test_a_folder_without_the_package_is_refused(tmp_path: Path) -> None:
    done = compare("--against", tmp_path, "--quick", "--pairs", 1)
    assert done.returncode == 1 and "no titans_build in it" in done.stderr


def test_a_case_that_there_is_not_is_refused(other: Path) -> None:
    done = compare("--against", other, "--cases", "sleep")
    assert done.returncode == 2 and "operation one token" in done.stderr


def test_the_operation_does_not_overflow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(PROGRAM.parent))
    import before_after

    assert before_after.operation(512, backward=False)().isfinite().all()
