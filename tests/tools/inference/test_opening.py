"""Which folder is meant, and what is said of a name that means none."""

from __future__ import annotations

from pathlib import Path

import pytest

import titans_build as tb
from titans_build.tools.inference.opening import find_model, open_model
from titans_build.tools.terminal import UsageError


def test_a_saved_model_and_a_run(folder: Path, run_folder: Path) -> None:
    assert find_model(str(folder)) == folder
    assert find_model(str(run_folder)) == run_folder / "model"


def test_names_that_mean_no_model(folder: Path, run_folder: Path, tmp_path: Path) -> None:
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


def test_a_run_that_has_not_ended(tmp_path: Path) -> None:
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


def test_the_tokenizer_is_the_runs_own(run_folder: Path) -> None:
    assert open_model(str(run_folder), None, "cpu", None)[1].name == "bytes"
    (run_folder / "run.json").write_text('{"data": {"tokenizer": "other/file.json"}}', encoding="utf-8")
    with pytest.raises(UsageError, match=r"--tokenizer other/file.json: No such file"):
        open_model(str(run_folder), None, "cpu", None)
    (run_folder / "tokenizer.json").write_text("{}", encoding="utf-8")
    for name in (run_folder, run_folder / "model"):
        with pytest.raises(UsageError, match=r"run/tokenizer.json: expected a file of the tokenizers package"):
            open_model(str(name), None, "cpu", None)
    assert open_model(str(run_folder), "bytes", "cpu", None)[1].name == "bytes"
    (run_folder / "tokenizer.json").unlink()
    (run_folder / "run.json").write_text('{"data": {"task": "mqar"}}', encoding="utf-8")
    assert open_model(str(run_folder), None, "cpu", None)[1].name == "bytes"
