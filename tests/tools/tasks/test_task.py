from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import numpy as np
import pytest
from pydantic import Field

import titans_build as tb
from titans_build.registry import RecipeError, lookup
from titans_build.tools import tasks
from titans_build.tools.randomness import Draws
from titans_build.tools.tasks import IGNORED, TASKS, Rows, Task, list_tasks, make_task, register_task

BUILT_IN = [
    "automaton", "compression", "copy", "forecast", "memorization", "mqar", "needle", "needle_kv", "recall", "repeat",
    "selective_copy", "state_tracking",
]  # fmt: skip


class Parity(Task):
    """Say whether the row's sum is odd."""

    def __init__(self, *, length: Annotated[int, Field(ge=1, description="tokens of a row")] = 8) -> None:
        self.vocab, self.length = 2, length

    def rows(self, draws: Draws) -> Rows:
        bits = draws.integers("bits", self.length, 2)
        targets = np.full_like(bits, IGNORED)
        targets[:, -1] = bits.sum(1) % 2
        return Rows(bits, targets)

    def references(self) -> dict[str, float]:
        return {"always even": 0.5}


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    with tasks.scratch():
        yield


def test_register_task():
    assert tb.register_task is register_task and tb.list_tasks is list_tasks
    assert register_task("parity")(Parity) is Parity
    assert "parity" in list_tasks() and list_tasks("par*") == ["parity"]
    source = tb.open_source("parity:length=5", rows=3)
    assert source.vocab == 2 and source.length == 5
    batch = source.batch(0)
    assert (batch.targets[:, -1] == batch.tokens.sum(1) % 2).all()
    # the next piece of a row whose task makes it whole is a part of it
    _, last = source.stream(0, 3)
    assert (last.tokens == batch.tokens[:, 3:]).all() and last.tokens.shape == (3, 2)


def test_taken_name_error_names_both_places():
    with pytest.raises(ValueError, match=r"the task name 'mqar' is taken by MultiQueryRecall .*recall.py.*; Parity \("):
        register_task("mqar")(Parity)
    register_task("mqar", replace=True)(Parity)
    assert isinstance(make_task("mqar", {})[0], Parity)


def test_registering_something_else():
    with pytest.raises(TypeError, match="is no task: it has no rows and no piece and no references and no problems"):
        register_task("number")(int)

    class Untyped(Parity):
        def __init__(self, length=8) -> None: ...  # type: ignore[no-untyped-def]

    with pytest.raises(TypeError, match="length has no annotation"):
        register_task("untyped")(Untyped)


def test_tasks_and_blocks_have_separate_names():
    with pytest.raises(RecipeError, match="unknown block 'mqar'"):
        lookup("mqar")
    with pytest.raises(RecipeError, match="unknown task 'memory'"):
        make_task("memory", {})
    assert "mqar" not in tb.list_blocks()


def test_all_problems_are_reported():
    with pytest.raises(RecipeError) as caught:
        make_task("mqar", {"pair": 3, "vocab": "many", "length": 8.0})
    assert str(caught.value).splitlines() == [
        "mqar: 3 problems",
        "  pair: unknown field of mqar; did you mean 'pairs'? (fields: vocab, length, pairs, power)",
        "  vocab: expected integer from 4 to 2147483648 (a multiple of 2), got 'many'",
        "  length: expected integer >= 4 (a multiple of 2), got 8.0",
    ]
    with pytest.raises(RecipeError, match="unknown task 'mqra'; did you mean 'mqar'"):
        make_task("mqra", {})


def test_value_error_of_a_task_is_a_recipe_error():
    class Picky(Parity):
        def __init__(self, *, length: int = 8) -> None:
            raise ValueError("length: it is a bad day")

    register_task("picky")(Picky)
    with pytest.raises(RecipeError, match="picky: 1 problem\n  length: it is a bad day"):
        make_task("picky", {})


def test_rows_of_the_wrong_shape():
    class Longer(Parity):
        def rows(self, draws: Draws) -> Rows:
            return Rows(draws.integers("x", self.length + 1, 2), draws.integers("y", self.length, 2))

    register_task("longer")(Longer)
    with pytest.raises(
        ValueError, match=r"'longer' made tokens and targets of \(3, 9\) and \(3, 8\), expected \(3, 8\)"
    ):
        tb.open_source("longer", rows=3).batch(0)


def test_listing():
    rows = {row.name: row for row in TASKS.rows()}
    assert list(rows) == BUILT_IN
    assert rows["mqar"].summary.startswith("Recall the values of many keys") and rows["mqar"].problem is None
    assert list(TASKS.lookup("copy").fields) == ["vocab", "length"]
    assert all(field.description for name in rows for field in TASKS.lookup(name).fields.values())
    assert all(row.summary.endswith(".") and row.source == "titans_build" for row in rows.values())


def test_installed_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    info = tmp_path / "plug_task-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: plug_task\nVersion: 1.0\n")
    points = "plugged = plug_task:Zeros\nmqar = plug_task:Zeros\nbroken = plug_task_missing\n"
    (info / "entry_points.txt").write_text(f"[titans_build.tasks]\n{points}")
    (tmp_path / "plug_task.py").write_text(
        "import numpy as np\n"
        "from titans_build.tools.tasks import Rows, Task\n"
        "class Zeros(Task):\n"
        "    def __init__(self, *, length: int = 4) -> None: self.vocab, self.length = 1, length\n"
        "    def rows(self, draws):\n"
        "        return Rows(*np.zeros((2, draws.rows, self.length), np.int64))\n"
        "    def references(self): return {}\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    try:
        assert "plugged" in list_tasks() and "plug_task" not in sys.modules
        assert tb.open_source("mqar", rows=1).vocab == 256
        assert "plug_task" not in sys.modules
        assert tb.open_source("plugged:length=2", rows=1).batch(0).tokens.tolist() == [[0, 0]]
        with pytest.raises(RecipeError, match=r"the installed task 'broken' \(plug_task\) cannot be used: ModuleNotFo"):
            tb.open_source("broken", rows=1)
        problems = {row.problem for row in TASKS.rows("broken")} | {row.problem for row in TASKS.rows("mqar")}
        assert "ignored: 'mqar' is built in" in problems and len(problems) == 3
    finally:
        sys.modules.pop("plug_task", None)


@pytest.mark.parametrize("name", BUILT_IN)
def test_contract_of_tasks(name: str):
    task, _ = make_task(name, {})
    tokens, targets = task.rows(Draws(1, np.arange(64)))
    assert tokens.shape == targets.shape == (64, task.length)
    assert tokens.min() >= 0 and tokens.max() < task.vocab
    counted = targets[targets != IGNORED]
    assert counted.size and counted.min() >= 0 and counted.max() < task.vocab
    # each row is one of its own (but a real series has few), and the same one whatever stands beside it
    assert len(np.unique(tokens, axis=0)) == 64 or name == "forecast"
    alone = task.rows(Draws(1, np.array([5])))
    assert (alone.tokens[0] == tokens[5]).all() and (alone.targets[0] == targets[5]).all()
    for first, last in ((0, 10), (task.length - 3, task.length)):
        piece = task.piece(Draws(1, np.array([5])), first, last)
        assert (piece.tokens[0] == tokens[5, first:last]).all() and (piece.targets[0] == targets[5, first:last]).all()
    assert all(0 < accuracy < 1 for accuracy in task.references().values())
    doc = type(task).__doc__ or ""
    assert "tokens " in doc and "targets " in doc, "a task's format is shown by an example row"


@pytest.mark.parametrize("name", BUILT_IN)
def test_speed_of_making_rows(name: str):
    task, _ = make_task(name, {})
    draws = Draws(1, np.arange(256))
    task.rows(draws)
    started = time.process_time()
    for _ in range(5):
        task.rows(draws)
    assert 5 * 256 * task.length / (time.process_time() - started) > 1e6
