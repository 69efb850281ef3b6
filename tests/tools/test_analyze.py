"""``titans-analyze`` from the outside: what it writes and prints, and what it refuses."""

from __future__ import annotations

import json
import os
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import titans_build as tb
from titans_build.tools.analyze import main

RECIPE = """
version: 1
name: tiny
dim: 16
vocab: 256
layers:
  mag: [{type: gate, branches: [{type: attention, window: 8}, {type: memory, heads: 2, expansion: 2, chunk: 4}]}]
stack: [mag]
"""


Run = Callable[..., Any]


@pytest.fixture
def analyze(run_command: Run) -> Run:
    return partial(run_command, main)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tb.save(tb.build(tb.load_recipe(RECIPE), seed=0), folder)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("a memory that learns while it reads. " * 10, encoding="utf-8")
    return path


def test_page_plots_and_numbers(analyze: Run, model: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "what"
    done = analyze(model, text, "--out", out, "--tokens", 256, "--pairs", 2, "--reset", 100)
    assert done.status == 0 and done.err == ""
    assert "memory changes at test time" in done.out and "a reset every 100 tokens" in done.out
    assert f"open {out / 'index.html'}" in done.out and "counted from 0" in done.out
    assert "counted from 0" in (out / "index.html").read_text(encoding="utf-8")
    numbers = json.loads((out / "analysis.json").read_text(encoding="utf-8"))
    assert (numbers["format"], numbers["version"]) == ("titans-build analysis", 1)
    assert numbers["model"]["name"] == "tiny" and numbers["text"]["tokens"] == 256 and numbers["text"]["goes_on"]
    assert [len(row) for row in numbers["tokens"]["surprise"]["mean"][0]] == [256, 256]
    assert numbers["text"]["bin"] == 1 and "max" not in numbers["tokens"]["surprise"]
    assert "".join(numbers["text"]["excerpts"]).startswith("a memory that learns")
    assert numbers["check"]["verdict"][0] in done.out
    page = (out / "index.html").read_text(encoding="utf-8")
    assert page.startswith("<!DOCTYPE html>")
    plots = {path.name for path in (out / "plots").iterdir()}
    stems = {
        "loss", "saved", "surprise", "error", "step", "momentum", "forgetting", "recall-kept", "recall-cosine",
        "recall-relative_error", "drift-distance", "drift-norm", "gates", "branches",
    }  # fmt: skip
    assert plots == {f"{stem}.{ending}" for stem in stems for ending in ("png", "svg")}
    for path in (out / "plots").iterdir():
        if path.suffix == ".svg":
            assert ElementTree.parse(path).getroot().tag.endswith("svg")
        else:
            assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    # what is there is only replaced when asked
    again = analyze(model, text, "--out", out, "--no-plots")
    assert again.status == 2 and "--force replaces it" in again.err
    assert analyze(model, text, "--out", out, "--no-plots", "--force", "--pairs", 2, "--tokens", 64).status == 0
    assert json.loads((out / "analysis.json").read_text(encoding="utf-8"))["text"]["tokens"] == 64
    assert not [path for path in out.rglob("*") if path.name.endswith(".tmp")]


def test_json_alone_writes_nothing(
    analyze: Run, model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = analyze(model, text, "--json", "--pairs", 2)
    found: dict[str, Any] = json.loads(done.out)
    assert done.status == 0 and not list(tmp_path.iterdir())
    assert found["check"]["changes"] is True and found["check"]["unit"] == "bits per byte"
    check = found["check"]
    assert check["frozen"] - check["live"] == pytest.approx(check["writing"]["mean"], abs=1e-3)
    (memory,) = found["memories"]
    assert memory["heads"] == 2 and len(memory["mean"]["surprise"]) == len(memory["moved"]) == 2
    assert found["gates"][0]["branches"] == ["attention", "memory"] and 0 < found["gates"][0]["mean_gate"] < 1
    assert found["text"]["tokens"] == 370 and not found["text"]["goes_on"]


def test_a_generated_task(analyze: Run, model: Path, tmp_path: Path) -> None:
    done = analyze(model, "--data", "copy", "--out", tmp_path / "what", "--no-plots", "--pairs", 2)
    assert done.status == 0, done.err
    assert "bits per token" in done.out
    numbers = json.loads((tmp_path / "what" / "analysis.json").read_text(encoding="utf-8"))
    assert numbers["text"]["rows"] == 32 and numbers["text"]["unit"] == "token"


def test_data_of_a_run(analyze: Run, model: Path, text: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    tb.save(tb.load(model), run / "model")
    alone = analyze(run, "--json")
    assert alone.status == 2 and "give a TEXTFILE or --data SPEC" in alone.err
    (run / "run.json").write_text("{}", encoding="utf-8")
    (run / "train.yaml").write_text("data: {task: copy}\nlength: 32\n", encoding="utf-8")
    done = analyze(run, "--json", "--pairs", 2)
    assert done.status == 0, done.err
    text_read = json.loads(done.out)["text"]
    assert (text_read["rows"], text_read["tokens"]) == (32, 32)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["MODEL", "TEXT"], "--out DIR: where the page is written to is missing"),
        (["MODEL", "--json"], "a saved model, not a titans-train run: give a TEXTFILE or --data SPEC"),
        (["MODEL", "TEXT", "--data", "copy", "--json"], "a TEXTFILE and --data: expected one of them"),
        (["MODEL", "TEXT", "--json", "--tokens", "20"], "20 bytes: expected at least 32"),
        (["MODEL", "TEXT", "--json", "--tokens", "0"], "--tokens: expected at least 1"),
        (["MODEL", "TEXT", "--json", "--pairs", "1"], "--pairs: expected at least 2"),
        (["MODEL", "TEXT", "--json", "--pairs", "1001"], "--pairs 1001: expected at most 1,000"),
        (["MODEL", "PIPE", "--json"], "a named pipe; expected a file"),
        (["MODEL", "TEXT", "--json", "--reset", "370"], "--reset 370: expected 1 to 369"),
        (["MODEL", "TEXT", "--json", "--force"], "--force: lets --out DIR replace an analysis, and there is no --out"),
        (["MODEL", "nothing.txt", "--json"], "nothing.txt: No such file"),
        (["MODEL", "TEXT", "--out", "TEXT"], "is a file, not a folder"),
        (["MODEL", "TEXT", "--out", ""], "--out: expected the name of a folder"),
        (["MODEL", "--data", "copyy", "--json"], "did you mean 'copy'?"),
        (["mac", "TEXT", "--json"], "mac: a recipe, not a saved model"),
        (["MODEL", "TEXT", "--jsn"], "--json"),
    ],
)
def test_invalid_use_is_refused(
    analyze: Run, model: Path, text: Path, tmp_path: Path, words: list[str], message: str
) -> None:
    os.mkfifo(tmp_path / "pipe")
    done = analyze(*[{"MODEL": model, "TEXT": text, "PIPE": tmp_path / "pipe"}.get(word, word) for word in words])
    assert done.status == 2
    assert message in done.err and "Traceback" not in done.err
    assert done.err.startswith("titans-analyze: error: ")


def test_a_model_without_a_memory(analyze: Run, text: Path, tmp_path: Path) -> None:
    recipe = RECIPE.replace("{type: memory, heads: 2, expansion: 2, chunk: 4}", "{type: attention, window: 4}")
    tb.save(tb.build(tb.load_recipe(recipe), seed=0), tmp_path / "none")
    done = analyze(tmp_path / "none", text, "--json")
    assert done.status == 2
    assert "the model has no memory; of the packaged recipes these have one: " in done.err
    assert "lmm, mac, mag, mal" in done.err and "transformer" not in done.err
    assert "transformer" not in done.err
    frozen = RECIPE.replace("chunk: 4", "chunk: 4, use: read")
    tb.save(tb.build(tb.load_recipe(frozen), seed=0), tmp_path / "frozen")
    done = analyze(tmp_path / "frozen", text, "--json")
    assert done.status == 2 and "its memories are only read or only written" in done.err


@pytest.mark.parametrize(
    ("module", "options", "status"),
    [
        ("matplotlib", ["--out", "OUT"], 2),
        ("matplotlib", ["--out", "OUT", "--no-plots"], 0),
        ("plotly", ["--out", "OUT", "--no-plots"], 2),
        ("plotly", ["--json"], 0),
    ],
)
def test_a_missing_extra_is_named(
    analyze: Run,
    model: Path,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    module: str,
    options: list[str],
    status: int,
) -> None:
    for name in [module, *(name for name in sys.modules if name.startswith(f"{module}."))]:
        monkeypatch.setitem(sys.modules, name, None)
    out = tmp_path / "what"
    given = [{"OUT": out}.get(option, option) for option in options]
    done = analyze(model, text, "--tokens", 64, "--pairs", 2, *given)
    assert done.status == status
    if status:
        assert f"needs {module}" in done.err and "pip install 'titans-build[analyze]'" in done.err
    assert out.exists() == (status == 0 and "OUT" in options)


def test_help_has_examples(analyze: Run) -> None:
    done = analyze("--help")
    assert done.status == 0
    assert "titans-analyze models/mine book.txt --out what" in done.out and "--no-plots" in done.out


def test_the_name_is_that_of_the_recipe_and_file_names_need_not_be_text(
    analyze: Run, model: Path, text: Path, tmp_path: Path
) -> None:
    folder, odd = model.parent / "saved", tmp_path / os.fsdecode(b"caf\xe9.txt")
    if not folder.exists():
        folder.symlink_to(model)
    try:
        odd.write_bytes(text.read_bytes())
    except OSError:
        pytest.skip("the file system takes no such name")
    out = tmp_path / "what"
    done = analyze(folder, odd, "--out", out, "--tokens", 64, "--pairs", 2, "--no-plots")
    assert done.status == 0, done.err
    page = (out / "index.html").read_text(encoding="utf-8")
    assert f"tiny in {folder}" in page and "caf\\udce9.txt" in page
    assert json.loads((out / "analysis.json").read_text(encoding="utf-8"))["model"]["name"] == "tiny"


def test_a_model_whose_loss_is_not_finite(analyze: Run, model: Path, text: Path, tmp_path: Path) -> None:
    diverged = tb.load(model)
    next(iter(diverged.parameters())).data.fill_(float("nan"))
    tb.save(diverged, tmp_path / "diverged")
    done = analyze(tmp_path / "diverged", text, "--json", "--pairs", 2)
    assert done.status == 1 and json.loads(done.out)["error"]["status"] == 1
    assert done.err == "titans-analyze: error: the loss is not finite: the model has diverged on this text\n"
