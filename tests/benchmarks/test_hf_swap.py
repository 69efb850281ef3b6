"""The benchmark of swaps runs, on tiny models."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.slow
def test_a_quick_run_writes_its_results_and_prints_their_tables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import hf_swap

    file = tmp_path / "hf_swap.json"
    command = [sys.executable, str(BENCHMARKS / "hf_swap.py"), "--quick", "--json", str(file)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr
    results: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    for table in hf_swap.tables(results).values():
        assert table in done.stdout
    assert [row["family"] for row in results["families"]] == list(hf_swap.FAMILIES)
    for row in results["families"]:
        assert row["memories"] == 1 and all(math.isfinite(value) for value in row["perplexity"].values())
        assert row["perplexity"]["live"] != row["perplexity"]["frozen"]
    assert {(row["kind"], row["case"]) for row in results["overhead"]} == {
        (kind, case) for kind in ("training step", "reading") for case in hf_swap.CASES
    }
