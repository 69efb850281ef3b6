"""Cases as processes: what is left when one crashes, hangs or fails, and when the time is up."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from titans_build.tools.gpu import runner
from titans_build.tools.gpu.runner import Case, Stage


def counts(start, pause=0.0):
    """A case."""
    for n in range(start, start + 3):
        yield {"n": n}
        time.sleep(pause)


def crashes():
    yield {"n": 0}
    print("the last words", flush=True)
    os.abort()


def hangs(folder):
    """With a process of its own, which has to end, too."""
    yield {"n": 0}
    child = os.fork()
    if not child:
        time.sleep(60)
        os._exit(0)
    (folder / "child").write_text(str(child))
    time.sleep(60)


def fails():
    yield {"n": float("nan")}
    raise ValueError("a reason\nand more")


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "PRELOADED", __name__)

    def run(stages, seconds=20.0, background=None):
        results = runner.Results(tmp_path, lambda line: None)
        runner.run(stages, results, time.monotonic() + seconds, background)
        assert [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()] == results.rows
        return results

    return run


def case(name, function, limit=15.0, **arguments):
    return Case("some", name, function, arguments, limit)


def of(results, name, key="n"):
    return [row[key] for row in results.rows if row["case"] == name and key in row]


def test_one_red_case_takes_only_its_own_rows(run, tmp_path):
    faulty = [case("crash", crashes), case("hang", hangs, 3.0, folder=tmp_path), case("fail", fails)]
    good = [case(str(n), counts, start=n) for n in range(3)]
    results = run(
        [Stage("some", 20, [good[0], *faulty, *good[1:]], 3), Stage("more", 20, [case("last", counts, start=9)])]
    )
    assert [of(results, name) for name in "012"] == [[0, 1, 2], [1, 2, 3], [2, 3, 4]]
    assert of(results, "last") == [9, 10, 11] and not results.left_out
    assert of(results, "crash") == [0] and of(results, "hang") == [0] and of(results, "fail") == [None]
    assert of(results, "crash", "failed") == ["its process ended with -6"]
    assert of(results, "crash", "output") == ["the last words\n"]
    assert of(results, "hang", "failed") == ["took longer than 3 s"]
    assert of(results, "fail", "failed") == ["ValueError: a reason"]
    status = Path("/proc", (tmp_path / "child").read_text(), "stat")
    assert not status.exists() or status.read_text().split()[2] == "Z"  # it waits for its parent to notice its end


def test_a_run_ends_at_its_time_and_names_what_it_left_out(run):
    slow = [case(f"slow {n}", counts, start=0, pause=0.6) for n in range(4)]
    began = time.monotonic()
    results = run([Stage("some", 60, slow)], seconds=3.0)
    assert time.monotonic() - began < 6
    assert of(results, "slow 0") == [0, 1, 2]
    assert results.left_out and set(results.left_out) <= {f"some: slow {n}" for n in range(4)}
    assert len(of(results, "slow 0", "failed")) == 0


def test_a_stage_leaves_cases_for_the_end_and_others_run_beside(run):
    slow = [case(f"slow {n}", counts, start=0, pause=0.2) for n in range(2)]
    beside = Stage("beside", 0, [case("beside", counts, start=5)], 2)
    results = run([Stage("some", 0.1, slow), Stage("more", 10, [case("more", counts, start=1)])], background=beside)
    order = [row["case"] for row in results.rows if row["case"] != "beside"]
    assert order == [*["slow 0"] * 3, *["more"] * 3, *["slow 1"] * 3]
    assert of(results, "beside") == [5, 6, 7] and not results.left_out
