"""The options of ``titans-infer``: what goes together, what is refused, and that nothing is overwritten by mistake."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import titans_build as tb
from titans_build.blocks.language_model import LanguageModel
from titans_build.tools.infer import PROGRAM
from titans_build.tools.inference import script

Infer = Callable[..., Any]


def assert_refused(result: Any, fragment: str, status: int = 2) -> None:
    assert result.status == status and result.out == ""
    assert result.err.startswith("titans-infer: error: ") and fragment in result.err
    assert "Traceback" not in result.err


@pytest.mark.parametrize(
    ("words", "fragment"),
    [
        (("x", "--temperature", "-1"), "--temperature: expected a number >= 0"),
        (("x", "--temperature", "nan"), "--temperature: expected a number >= 0"),
        (("x", "--top-k", "0"), "--top-k: expected an integer >= 1"),
        (("x", "--top-p", "1.5"), "--top-p: expected a probability in (0, 1]"),
        (("x", "--top-k", "40"), "--top-k: is for drawing tokens, which needs --temperature above 0"),
        (("x", "--seed", "0"), "--seed: is for drawing tokens, which needs --temperature above 0"),
        (("x", "--dtype", "fp16"), "did you mean 'float16'?"),
        (("x", "--max-new-tokens", "-1"), "--max-new-tokens: expected an integer from 0"),
        (("x", "--seed", "1.5"), "--seed: expected an integer from 0"),
        (("x", "--stop", ""), "--stop: expected a text"),
        (("x", "--template", "no place"), "expected {line} in it"),
        (("x", "--fork"), "there is no --state"),
        (("x", "--state", ""), "--state: expected the name of a file"),
        (("x", "--state", "no/where/a.state"), "there is no folder"),
        (("x", "--state", "."), "a folder; expected the name of a file"),
        (("x", "--state", "none.state", "--fork"), "none.state: no such file, so there is nothing to continue from"),
        (("x", "--state", "none.state", "--save", "b.state"), "none.state: no such file"),
        (("x", "--buckets", "3"), "there is no --perplexity"),
        (("x", "--compare-frozen"), "there is no --perplexity"),
        (("x", "--plot", "a.svg"), "there is no --perplexity"),
        (("--perplexity", "text", "x"), "it takes no PROMPT"),
        (("--perplexity", "text", "--chat"), "it takes no --chat"),
        (("--perplexity", "text", "--plot", "a.png"), "expected a name that ends in .svg"),
        (("--perplexity", "text", "--buckets", "3,x"), "--buckets: expected positions as in 128,1k,1M"),
        (("--perplexity", "text", "--buckets", "3,3"), "expected increasing positions"),
        (("--perplexity", "text", "--compare-frozen", "--no-write"), "give one of them"),
        (("--perplexity", "-", "--compare-frozen"), "reads the text twice"),
        (("--perplexity", "pipe"), "--perplexity pipe: a named pipe; expected a file"),
        (("--perplexity", "records.parquet"), "--perplexity records.parquet: expected a text"),
        (("--file", "pipe"), "--file pipe: a named pipe; expected a file, or <(command)"),
        (("--perplexity", "text", "--plot", "no/where/a.svg"), "--plot no/where/a.svg: there is no folder"),
        (("--perplexity", "text", "--plot", "folder.svg"), "--plot folder.svg: a folder"),
        (("--perplexity", "none.txt"), "--perplexity none.txt: No such file"),
        (("--perplexity", "text", "--state", "none.state"), "none.state: no such file"),
        (("--chat", "--json"), "--chat prints no JSON document"),
        (("--chat", "--file", "-"), "cannot be a --file, too"),
        (("--file", "none.txt"), "none.txt: No such file"),
        (("x", "--device", "meta"), "--device meta"),
        (("x", "--dtyp", "float32"), "did you mean '--dtype'?"),
        (("x", "--tokenizer", "none.json"), "none.json: no such file"),
        (("300", "--tokenizer", "ids"), "token id 300 is outside of the model's vocabulary of 256 (0 to 255)"),
        (("",), "the prompt is empty"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_invalid_use_is_refused(
    words: tuple[str, ...], fragment: str, folder: Path, infer: Infer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("text").write_bytes(b"some text")
    os.mkfifo("pipe")
    Path("folder.svg").mkdir()
    Path("records.parquet").touch()
    result = infer(folder, *words)
    if "--json" in words:
        assert fragment in result.json["error"]["message"]
        result = result._replace(out="")
    assert_refused(result, fragment)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder.svg", "pipe", "records.parquet", "text"]


def test_only_the_model_is_required(infer: Infer) -> None:
    assert_refused(infer(), "the following arguments are required: MODEL\n")


def test_examples_in_the_documentation_parse() -> None:
    page = (Path(__file__).parents[3] / "docs" / "infer.md").read_text(encoding="utf-8")
    lines = [line for line in page.splitlines() if line.startswith("titans-infer ")]
    assert len(lines) >= 7
    for line in [*lines, *(example.partition("   ")[0] for example in script.EXAMPLES)]:
        words = shlex.split(line.rpartition("| ")[2], comments=True)
        assert PROGRAM.parse(words[1:]).model.partition("/")[0] in ("models", "runs")


def test_help(infer: Infer) -> None:
    out = infer("--help").out
    assert "usage: titans-infer" in out and "examples:\n  titans-infer models/mine" in out and "--json" in out


def test_a_state_of_another_model_is_refused_and_kept(
    folder: Path, infer: Infer, tmp_path: Path, model: LanguageModel
) -> None:
    other = tb.build(tb.load_recipe(model.recipe, overrides={"dim": 32}), seed=0)  # type: ignore[attr-defined]
    state = tmp_path / "other.state"
    tb.save_state(other.init_state(1), state, other)
    before = state.read_bytes()
    assert_refused(infer(folder, "x", "--state", state), "the state belongs to another recipe")
    assert state.read_bytes() == before


def test_a_state_of_several_rows_is_refused(folder: Path, infer: Infer, tmp_path: Path, model: LanguageModel) -> None:
    tb.save_state(model.init_state(3), tmp_path / "a.state", model)
    assert_refused(infer(folder, "x", "--state", tmp_path / "a.state"), "a state of 3 rows; a session is one row")


@pytest.mark.parametrize("content", [b"", b"not a state", None], ids=["empty", "text", "cut"])
def test_a_damaged_state_is_refused_and_kept(
    content: bytes | None, folder: Path, infer: Infer, tmp_path: Path, model: LanguageModel
) -> None:
    state = tmp_path / "a.state"
    tb.save_state(model.init_state(1), state, model)
    if content is None:
        content = state.read_bytes()[:-100]
    state.write_bytes(content)
    assert_refused(infer(folder, "x", "--state", state), "a.state")
    assert state.read_bytes() == content
    assert list(tmp_path.iterdir()) == [state]


def test_only_states_are_replaced(folder: Path, infer: Infer, tmp_path: Path) -> None:
    precious = tmp_path / "thesis.tex"
    precious.write_text("\\documentclass", encoding="utf-8")
    for option in ("--state", "--save"):
        assert_refused(infer(folder, "x", option, precious), "there is a file that is no saved state")
    assert precious.read_text(encoding="utf-8") == "\\documentclass"


def test_a_nonfinite_state_is_not_saved(folder: Path, infer: Infer, tmp_path: Path) -> None:
    model = tb.load(folder)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    tb.save(model, tmp_path / "diverged")
    result = infer(tmp_path / "diverged", "x", "--state", tmp_path / "a.state", "--max-new-tokens", "0")
    assert_refused(result, "not saved: the state holds NaN", status=1)
    assert not (tmp_path / "a.state").exists()
    assert_refused(infer(tmp_path / "diverged", "x"), "logits", status=1)


def test_a_growing_state_is_warned_about(infer: Infer, tmp_path: Path) -> None:
    recipe = {"version": 1, "dim": 8, "vocab": 256, "layers": {"a": ["attention"]}, "stack": ["a"]}
    tb.save(tb.build(tb.load_recipe(recipe), seed=0), tmp_path / "m")
    result = infer(tmp_path / "m", "x", "--no-write")
    assert result.status == 0
    assert "titans-infer: warning: attention without a window: the state" in result.err
    assert "warning: --no-write: this model has no memory" in result.err
