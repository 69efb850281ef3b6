from __future__ import annotations

import os
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest

from titans_build.registry import RecipeError
from titans_build.tools.data.files import find, read, standard_library

Write = Callable[..., None]


def names(*patterns: str) -> list[str]:
    return [file.name for file in find(patterns)]


def test_files_folders_and_wildcards(folder: Path, write: Write):
    write({"a.txt": "1", "b/c.txt": "22", "b/d.py": "333", "b/e/f.py": "4", ".hidden/x": "5", "b/.g": "6"})
    assert names("a.txt") == ["a.txt"]
    assert names(".") == ["a.txt", "b/c.txt", "b/d.py", "b/e/f.py"]
    assert names("**/*.py") == ["b/d.py", "b/e/f.py"]
    assert names("b/**/*.py") == ["d.py", "e/f.py"]
    assert names("b/[cd].*") == ["c.txt", "d.py"]
    # each once, whatever names it
    assert [file.path for file in find(["b", "b/*.py", str(folder / "b" / "d.py")])] == [
        folder / "b" / name for name in ("c.txt", "d.py", "e/f.py")
    ]
    assert names("b/.g") == [".g"]
    assert [(file.size, read(file, 1, 3)) for file in find(["b/d.py"])] == [(3, b"33")]


def test_file_name_with_wildcard_characters(write: Write):
    write({"a[1].txt": "x"})
    assert names("a[1].txt") == ["a[1].txt"]


def test_names_are_relative_to_the_folder(folder: Path, write: Write):
    write({"one/x/a": "1", "two/x/a": "1"})
    assert names("one") == names("two") == names("one/**") == ["x/a"]


def test_empty_files_are_left_out(write: Write):
    write({"a/empty": "", "a/full": "x", "b/empty": ""})
    assert names("a") == ["full"]
    with pytest.raises(RecipeError, match="b: there is no text: every file is empty"):
        find(["b"])


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("nots.txt", "nots.txt: no such file or folder; did you mean 'notes.txt'"),
        ("soruce/a.txt", r"soruce/a.txt: there is no folder .*/soruce; did you mean 'source'"),
        ("soruce/**/*.txt", r"there is no folder .*/soruce; did you mean 'source'"),
        ("source/*.py", r"source/\*.py: no file in .*/source matches"),
        ("nothing", "nothing: there is no file in this folder"),
    ],
)
def test_pattern_without_files(folder: Path, write: Write, pattern: str, message: str):
    write({"notes.txt": "x", "source/a.txt": "x"})
    (folder / "nothing").mkdir()
    with pytest.raises(RecipeError, match=message):
        find([pattern])


def test_all_problems_are_reported(folder: Path, write: Write):
    write({"a": "x", "saved/data.arrow": "x", "saved/texts.TAR.GZ": "x"})
    os.symlink(folder / "gone", folder / "link")
    os.mkfifo(folder / "pipe")
    with pytest.raises(RecipeError) as caught:
        find(["a", "b", "link", "pipe", "saved/*.arrow", "saved/*.GZ"])
    assert [problem.message.partition(";")[0] for problem in caught.value.problems] == [
        "no such file or folder",
        "cannot be read: No such file or directory",
        "not a regular file",
        "a file of the library `datasets`: write it as parquet, Dataset.to_parquet('texts.parquet')",
        "its bytes are no text: uncompress it, or compress the texts with gzip",
    ]


def test_unreadable_file(folder: Path, write: Write, monkeypatch: pytest.MonkeyPatch):
    write({"a": "x"})
    real = open

    def refuse(path, *rest, **more):
        if Path(path).name == "a":
            raise PermissionError(13, "Permission denied")
        return real(path, *rest, **more)

    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(RecipeError, match="a: cannot be read: Permission denied"):
        find(["a"])


def test_file_that_changes(folder: Path, write: Write):
    write({"a": "xyz"})
    (file,) = find(["a"])
    write({"a": "xyz and more"})
    with pytest.raises(RecipeError, match="a: has changed since it was opened as data"):
        read(file, 0, 2)
    (folder / "a").unlink()
    with pytest.raises(RecipeError, match="a: cannot be read: No such file"):
        read(file, 0, 2)


def test_standard_library_files():
    files = standard_library()
    names = [file.name for file in files]
    assert {"argparse.py", "json/decoder.py", "asyncio/events.py"} <= set(names)
    assert sum(file.size for file in files) > 5_000_000
    assert names == sorted(names) and all(name.endswith(".py") for name in names)
    left_out = {"site-packages", "dist-packages", "test", "tests", "encodings", "__pycache__"}
    assert not [name for name in names if left_out & set(name.split("/")) or name.startswith("_sysconfigdata")]


def test_python_without_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(RecipeError, match="stdlib: this Python has no sources in "):
        standard_library()
