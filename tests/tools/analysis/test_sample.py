"""Samples of files and of training data: tokens, targets and words, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from titans_build.tools.analysis.sample import from_data, from_file
from titans_build.tools.inference.tokenizer import ByteTokenizer, IdTokenizer
from titans_build.tools.terminal import UsageError


def test_a_file_is_read_up_to_the_limit(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(("é" + "abc " * 20).encode())
    whole = from_file(str(path), ByteTokenizer(), 256, 1000)
    assert (whole.tokens.shape, whole.unit, whole.truncated) == ((1, 82), "byte", False)
    assert torch.equal(whole.targets[0, :-1], whole.tokens[0, 1:]) and whole.targets[0, -1] == -100
    # a character of several bytes is at its last
    assert whole.words(0, 4) == ["", "é", "a", "b"]
    assert whole.words(1, 3) == ["é", "a"]
    part = from_file(str(path), ByteTokenizer(), 256, 40)
    assert part.tokens.shape == (1, 40) and part.truncated
    exact = from_file(str(path), ByteTokenizer(), 256, 82)
    assert exact.tokens.shape == (1, 82) and not exact.truncated


def test_invalid_files_are_refused(tmp_path: Path) -> None:
    short, ids = tmp_path / "short.txt", tmp_path / "ids.txt"
    short.write_text("too short")
    ids.write_text("1 2 3 " * 20 + "99")
    with pytest.raises(UsageError, match=r"short.txt: 9 bytes: expected at least 32"):
        from_file(str(short), ByteTokenizer(), 256, 100)
    with pytest.raises(UsageError, match=r"nothing\.txt: No such file"):
        from_file(str(tmp_path / "nothing.txt"), ByteTokenizer(), 256, 100)
    with pytest.raises(UsageError, match=r"token id 99 is outside of the model's vocabulary of 10 \(0 to 9\)"):
        from_file(str(ids), IdTokenizer(), 10, 100)
    assert from_file(str(ids), IdTokenizer(), 100, 100).words(59, 61) == ["3 ", "99 "]


def test_a_generated_task_gives_rows_of_numbers() -> None:
    given = from_data("mqar:pairs=4,length=64", 8192, 10_000)
    assert given.tokens.shape == given.targets.shape == (32, 64)
    assert given.unit == "token" and not given.truncated
    assert bool((given.targets == -100).any()) and bool((given.targets >= 0).any())
    assert given.words(0, 2) == [f"{token} " for token in given.tokens[0, :2].tolist()]
    assert from_data("mqar:pairs=4,length=64", 8192, 40).tokens.shape == (32, 40)
    assert from_data("mqar:pairs=4,length=64", 8192, 10_000, length=32).tokens.shape == (32, 32)


@pytest.mark.parametrize("documents", [{"documents": "ordered"}, {"pack": "documents"}])
def test_ordered_documents_are_one_row(tmp_path: Path, documents: dict[str, str]) -> None:
    for index in range(3):
        (tmp_path / f"{index}.txt").write_text(f"document {index}: " + "some words and more " * 200)
    spec = {"text": str(tmp_path / "*.txt"), "length": 128, "valid": 0.4, "test": 0.2, **documents}
    given = from_data(spec, 256, 1000)
    assert given.tokens.shape == (1, 1000) and given.truncated and given.unit == "byte"
    assert "".join(given.words(0, 1000)).encode() == bytes(given.tokens[0].tolist())
