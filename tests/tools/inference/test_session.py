"""A session: the model that is opened, the text that is read, and the state that is kept."""

from __future__ import annotations

import copy
import io
import os
import sys
from pathlib import Path

import pytest
import torch

import titans_build as tb
from titans_build.blocks.generation import Sampler
from titans_build.blocks.language_model import LanguageModel
from titans_build.tools.data.tokenizer import train_tokenizer
from titans_build.tools.inference import session
from titans_build.tools.inference.reading import PIECE
from titans_build.tools.inference.session import (
    BLOCK,
    Session,
    Text,
    check_state_file,
    find_model,
    open_model,
    reading_progress,
)
from titans_build.tools.inference.tokenizer import ByteTokenizer
from titans_build.tools.terminal import CommandFailed, UsageError


def test_a_saved_model_and_a_run(folder: Path, run_folder: Path) -> None:
    assert find_model(str(folder)) == folder
    assert find_model(str(run_folder)) == run_folder / "model"


def test_a_name_without_a_model_is_refused_with_a_hint(folder: Path, run_folder: Path, tmp_path: Path) -> None:
    for name, fragment in (
        (folder.parent / "smal", "no such folder; did you mean 'small'?"),
        (run_folder.parent / "runn", "no such folder; did you mean 'run'?"),
        (folder.parent, f"no saved model is in this folder (no model.json); did you mean '{folder}'?"),
        (folder / "model.json", f"a file; expected the folder of a saved model; its folder is '{folder}'"),
        (tmp_path / "no" / "where", "no such folder; expected a saved model, or the folder of a titans-train run"),
        ("mac", "a recipe, not a saved model: `titans-build mac --out DIR` saves one"),
        ("m" * 300, "File name too long"),
    ):
        with pytest.raises(UsageError) as refused:
            find_model(str(name))
        assert fragment in str(refused.value)


def test_a_run_without_a_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("{}", encoding="utf-8")
    with pytest.raises(UsageError, match="this run has not saved its model yet"):
        find_model(str(tmp_path))


def test_a_model_of_vectors_is_refused(tmp_path: Path) -> None:
    tb.save(tb.build(tb.load_recipe({"version": 1, "dim": 8, "layers": {"a": ["ffn"]}, "stack": ["a"]})), tmp_path)
    with pytest.raises(UsageError, match="a model of vectors"):
        open_model(str(tmp_path), None, "cpu", None)


def test_dtype_and_device(folder: Path) -> None:
    model, _ = open_model(str(folder), None, "cpu", "bfloat16")
    assert {str(parameter.dtype) for parameter in model.parameters()} == {"torch.bfloat16"}
    with pytest.raises(UsageError, match="unknown dtype"):
        open_model(str(folder), None, "cpu", "float23")


def test_the_tokenizer_of_a_run_is_used(run_folder: Path) -> None:
    assert open_model(str(run_folder), None, "cpu", None)[1].name == "bytes"
    (run_folder / "run.json").write_text('{"data": {"tokenizer": "other/file.json"}}', encoding="utf-8")
    with pytest.raises(tb.RecipeError, match=r"other/file.json: no such file"):
        open_model(str(run_folder), None, "cpu", None)
    (run_folder / "tokenizer.json").write_text("{}", encoding="utf-8")
    for name in (run_folder, run_folder / "model"):
        with pytest.raises(tb.RecipeError, match=r"run/tokenizer.json: not a file of the tokenizers package"):
            open_model(str(name), None, "cpu", None)
    assert open_model(str(run_folder), "bytes", "cpu", None)[1].name == "bytes"
    (run_folder / "tokenizer.json").unlink()
    (run_folder / "run.json").write_text('{"data": {"task": "mqar"}}', encoding="utf-8")
    assert open_model(str(run_folder), None, "cpu", None)[1].name == "bytes"


def test_a_model_of_more_tokens_than_bytes_needs_a_tokenizer(tmp_path: Path) -> None:
    model = tb.build({"version": 1, "dim": 8, "vocab": 300, "layers": {"a": ["memory"]}, "stack": ["a"]})
    run = tmp_path / "run"
    tb.save(model, run / "model")
    for name in (run, run / "model"):
        with pytest.raises(UsageError, match="300 tokens, and no tokenizer is saved with it: give --tokenizer FILE"):
            open_model(str(name), None, "cpu", None)
        assert open_model(str(name), "bytes", "cpu", None)[1].name == "bytes"
    # a run of an earlier version, which trained any model on bytes
    (run / "run.json").write_text('{"data": {"tokenizer": null, "tokens_are": "bytes"}}', encoding="utf-8")
    assert open_model(str(run), None, "cpu", None)[1].name == "bytes"
    model.tokenizer = train_tokenizer(["the cat sat on the mat"], 270).to_str()
    tb.save(model, run / "model")
    (run / "tokenizer.json").write_text("the model's own is used", encoding="utf-8")
    for name in (run, run / "model"):
        found = open_model(str(name), None, "cpu", None)[1]
        assert found.size == found.tokenizer.get_vocab_size() and found.name.endswith("model/tokenizer.json")
    model.tokenizer = train_tokenizer([str(number) for number in range(9999)], 400).to_str()
    tb.save(model, run / "model")
    with pytest.raises(UsageError, match="400 token ids are more than the model's vocabulary of 300"):
        open_model(str(run), None, "cpu", None)


def test_text_is_files_and_then_words(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"\xffa\r\n")
    (tmp_path / "b").write_bytes(b"")
    text = Text([str(tmp_path / "a"), str(tmp_path / "b"), str(tmp_path / "a")], ["two", "words"])
    assert text.size == 17
    assert b"".join(text) == b"\xffa\r\n\xffa\r\ntwo words"
    assert text.read == 17


def test_words_may_be_invalid_unicode() -> None:
    assert b"".join(Text([], [os.fsdecode(b"caf\xe9")])) == b"caf\xe9"


def test_long_files_are_read_in_blocks(tmp_path: Path) -> None:
    (tmp_path / "long").write_bytes(b"x" * (2 * BLOCK + 1))
    sizes = [len(block) for block in Text([str(tmp_path / "long")], [])]
    assert sum(sizes) == 2 * BLOCK + 1 and max(sizes) <= BLOCK


def test_the_size_of_standard_input_is_unknown() -> None:
    assert Text(["-"], ["x"]).size is None
    assert Text([], []).size == 0 and list(Text([], [])) == []


def test_unreadable_files_are_refused_before_any_is_read(tmp_path: Path) -> None:
    for names, fragment in (
        ([str(tmp_path / "none")], "none: No such file"),
        ([str(tmp_path)], "a folder; expected a file"),
        (["-", "-"], "standard input can be read once"),
        (["\0"], "--file \0: embedded null byte"),
    ):
        with pytest.raises(UsageError) as refused:
            Text(names, [])
        assert fragment in str(refused.value)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_is_shown_on_a_terminal_where_there_is_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", seen := Terminal())
    with reading_progress(Text([], []), "reading") as advance:
        advance(0)
    assert seen.getvalue() == ""
    with reading_progress(Text([], ["words"]), "reading") as advance:
        advance(5)
    assert "reading" in seen.getvalue()


def test_progress_is_lines_in_a_log_file(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    text = Text([], ["some words"])
    with reading_progress(text, "reading") as update:
        update(5)
        assert capsys.readouterr().err == ""
        monkeypatch.setattr(session, "LINE_SECONDS", 0.0)
        list(text)
        update(10)
    said = capsys.readouterr().err
    assert said.startswith("reading: 10 tokens, 100%, ") and said.endswith("/s\n")


@pytest.mark.parametrize("size", [7, PIECE, PIECE + 1, 3000])
def test_blocks_of_any_size_become_pieces(model: LanguageModel, size: int) -> None:
    text = bytes(range(256)) * 12
    pieces = list(Session(model, ByteTokenizer()).pieces(text[at : at + size] for at in range(0, len(text), size)))
    assert bytes(torch.cat(pieces, dim=1)[0].tolist()) == text
    assert [piece.shape[1] for piece in pieces] == [PIECE] * 3


def test_a_session_reads_as_one_pass_of_the_model(model: LanguageModel) -> None:
    model = copy.deepcopy(model).double()  # an untrained memory multiplies the rounding of float32
    text = bytes(range(256)) * 5
    session = Session(model, ByteTokenizer())
    for part in (text[:100], b"", text[100:]):
        session.read([part])
    with torch.no_grad():
        logits = model(torch.tensor([list(text)])).logits[:, -1]
    assert session.reading.logits is not None and session.reading.tokens == len(text)
    torch.testing.assert_close(session.reading.logits, logits, atol=1e-9, rtol=1e-9)


def test_position_counts_all_sessions(model: LanguageModel, tmp_path: Path) -> None:
    session = Session(model, ByteTokenizer())
    calls: list[int] = []
    assert session.read([b"x" * 1500], calls.append) == 1500 and calls == [PIECE, 1500]
    list(session.generate(5, Sampler()))
    assert session.position == session.reading.tokens == 1505
    session.save(tmp_path / "a.state")
    later = Session(model, ByteTokenizer())
    later.load(tmp_path / "a.state")
    assert later.position == 1505 and later.read([b"yz"]) == 2
    assert later.position == 1507 and later.reading.tokens == 2
    later.reset()
    assert later.position == 0


def test_generation_needs_a_prompt(model: LanguageModel, tmp_path: Path) -> None:
    session = Session(model, ByteTokenizer())
    assert session.read([b""]) == 0
    with pytest.raises(UsageError, match="the prompt is empty"):
        next(session.generate(1, Sampler()))
    session.save(tmp_path / "a.state")  # a fresh state is a state
    tb.load_state(tmp_path / "a.state", model)
    session.load(tmp_path / "a.state")
    with pytest.raises(UsageError, match=r"without what comes next: give it at least a line end, \$'\\n'"):
        next(session.generate(1, Sampler()))


def test_a_state_replaces_only_a_state(tmp_path: Path, model: LanguageModel) -> None:
    tb.save_state(model.init_state(1), tmp_path / "a.state", model)
    check_state_file(tmp_path / "a.state", "--save")
    check_state_file(tmp_path / "new.state", "--save")
    tb.save(model, tmp_path / "model")
    weights = next((tmp_path / "model").glob("*.safetensors"))
    for path in (tmp_path, tmp_path / "no" / "a.state", weights, tmp_path / ("x" * 300)):
        with pytest.raises(UsageError, match="--save"):
            check_state_file(path, "--save")


def test_a_state_that_another_session_has_saved_is_kept(model: LanguageModel, tmp_path: Path) -> None:
    state = tmp_path / "a.state"
    first, second = Session(model, ByteTokenizer(), state), Session(model, ByteTokenizer(), state)
    first.read([b"first"])
    first.save(state)
    first.save(state)  # its own
    second.read([b"the second"])
    with pytest.raises(CommandFailed, match=r"another session .* is saved to .*a.state.other"):
        second.save(state)
    for path, tokens in ((state, 5), (tmp_path / "a.state.other", 10)):
        later = Session(model, ByteTokenizer(), state)
        later.load(path)
        assert later.position == tokens
    # one that has read the state may replace it, until the other one has
    first.load(state)
    second.load(state)
    second.save(state)
    with pytest.raises(CommandFailed, match=r"a.state.other.other"):
        first.save(state)
    second.save(tmp_path / "b.state")
    first.save(tmp_path / "b.state")  # a name that is given


def test_a_state_of_another_model_is_not_replaced(tmp_path: Path, model: LanguageModel) -> None:
    other = tb.build(tb.load_recipe(model.recipe, {"layers.mac.0.segment": 8}))  # type: ignore[attr-defined]
    tb.save_state(model.init_state(1), tmp_path / "a.state", model)
    with pytest.raises(tb.StorageError, match="the state in this file belongs to another recipe"):
        tb.save_state(other.init_state(1), tmp_path / "a.state", other)
    (tmp_path / "notes").write_text("mine", encoding="utf-8")
    with pytest.raises(tb.StorageError, match="there is a file that is no saved state"):
        tb.save_state(model.init_state(1), tmp_path / "notes", model)
    tb.save_state(other.init_state(1), tmp_path / "a.state", other, overwrite=True)
    tb.load_state(tmp_path / "a.state", other)
