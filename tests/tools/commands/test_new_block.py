"""``titans-build new-block``: what it writes works as it is, and nothing that is there is touched."""

from __future__ import annotations

import keyword
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import titans_build as tb
from titans_build.registry import scratch
from titans_build.tools.commands.new_block import Names, names_of, write_plugin
from titans_build.tools.terminal import UsageError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Run = Callable[..., Any]
FILES = [
    "README.md",
    "pyproject.toml",
    "recipe.yaml",
    "src/fading_mean_block/__init__.py",
    "tests/test_fading_mean_block.py",
]


@pytest.fixture(scope="module")
def plugin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, _ = write_plugin(names_of("fading_mean"), tmp_path_factory.mktemp("plugins"))
    return folder


def files_under(folder: Path) -> list[str]:
    return sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())


def test_new_block_writes_a_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, titans_build: Run) -> None:
    monkeypatch.chdir(tmp_path)
    result = titans_build("new-block", "fading_mean")
    assert (result.status, result.err) == (0, "")
    assert files_under(tmp_path / "fading_mean") == FILES
    assert all(file in result.out for file in FILES)
    assert "pip install -e './fading_mean[test]'" in result.out
    assert "titans-build ./fading_mean/recipe.yaml" in result.out
    assert [path.name for path in tmp_path.iterdir()] == ["fading_mean"]


def test_new_block_json_and_into(tmp_path: Path, titans_build: Run) -> None:
    made = titans_build("new-block", "fading_mean", "--into", tmp_path / "a" / "b", "--json").json
    assert sorted(made.pop("files")) == FILES
    assert made == {
        "block": "fading_mean",
        "package": "fading-mean-block",
        "module": "fading_mean_block",
        "class": "FadingMean",
        "folder": str(tmp_path / "a" / "b" / "fading_mean"),
    }
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE(os.stat(made["folder"]).st_mode) == 0o777 & ~mask


@pytest.mark.parametrize("what", ["folder", "file", "link"])
def test_existing_files_are_not_replaced(what: str, tmp_path: Path, titans_build: Run) -> None:
    place = tmp_path / "fading_mean"
    if what == "folder":
        place.mkdir()
    elif what == "file":
        place.write_text("mine", encoding="utf-8")
    else:
        place.symlink_to(tmp_path / "nowhere")
    result = titans_build("new-block", "fading_mean", "--into", tmp_path)
    assert (result.status, result.out) == (2, "")
    assert result.err.startswith(f"titans-build: error: {place}: is there already; nothing was written")
    assert [path.name for path in tmp_path.iterdir()] == ["fading_mean"]
    assert files_under(tmp_path) == (["fading_mean"] if what == "file" else [])


@pytest.mark.parametrize(
    ("words", "fragment"),
    [
        ([], "required: NAME"),
        (["1st"], "NAME '1st': a name starts with a letter"),
        (["memory"], "NAME memory: there is a block of that name (from titans_build;"),
        (["null"], "NAME null: a recipe would read that as null"),
        (["fading_mean", "--into", "/dev/null/plugins"], "/dev/null/plugins/fading_mean: cannot be made: "),
        (["fading_mean", "--into", "m" * 300], "cannot be made: File name too long"),
        (["fading_mean", "--into", "a\0b"], "cannot be made: "),
    ],
)
def test_bad_use_is_refused(words: list[str], fragment: str, titans_build: Run) -> None:
    result = titans_build("new-block", *words)
    assert (result.status, result.out) == (2, "")
    assert fragment in result.err and "Traceback" not in result.err


def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = Path.write_text

    def refuse_tests(self: Path, *arguments: Any, **named: Any) -> int:
        if self.name.startswith("test_"):
            raise OSError(28, "No space left on device")
        return write(self, *arguments, **named)

    monkeypatch.setattr(Path, "write_text", refuse_tests)
    with pytest.raises(UsageError, match="fading_mean: cannot be made: No space left on device"):
        write_plugin(names_of("fading_mean"), tmp_path / "plugins")
    assert list(tmp_path.iterdir()) == []


def test_the_plugins_pyproject_names_the_block(plugin: Path) -> None:
    settings = tomllib.loads((plugin / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert settings["entry-points"]["titans_build.blocks"] == {"fading_mean": "fading_mean_block:FadingMean"}
    assert settings["dependencies"] == [f"titans-build>={tb.__version__}"]
    assert not any("$" in (plugin / file).read_text(encoding="utf-8") for file in FILES)


def test_the_plugins_tests_pass(plugin: Path) -> None:
    with scratch():
        for file in FILES[3:]:
            scope: dict[str, Any] = {"__name__": "plugin", "__file__": str(plugin / file)}
            exec(compile((plugin / file).read_text(encoding="utf-8"), plugin / file, "exec", dont_inherit=True), scope)
        tests = [value for name, value in scope.items() if name.startswith("test_")]
        assert len(tests) == 3
        for test in tests:
            test()


def test_the_plugin_passes_ruff(plugin: Path) -> None:
    pytest.importorskip("ruff")
    for words in (["check", "--isolated"], ["format", "--isolated", "--check", "--line-length", "120"]):
        command = [sys.executable, "-m", "ruff", *words, str(plugin)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("block", "names"),
    [
        ("moving_average", Names("moving_average", "moving-average-block", "moving_average_block", "MovingAverage")),
        ("gla-2", Names("gla-2", "gla-2-block", "gla_2_block", "Gla2")),
        ("A__b-", Names("A__b-", "a-b-block", "a_b_block", "AB")),
        ("json", Names("json", "json-block", "json_block", "Json")),
        ("none", Names("none", "none-block", "none_block", "NoneBlock")),
        ("exception", Names("exception", "exception-block", "exception_block", "ExceptionBlock")),
        ("field", Names("field", "field-block", "field_block", "FieldBlock")),
    ],
)
def test_names_derived_from_the_block(block: str, names: Names) -> None:
    assert names_of(block) == names
    assert names.module.isidentifier() and names.cls.isidentifier()
    assert not keyword.iskeyword(names.module) and not keyword.iskeyword(names.cls)


@pytest.mark.parametrize("block", ["", "1st", "a b", "a.b", "a/b", "../a", "_a", "ä", "x" * 101, "-x"])
def test_invalid_names_are_refused(block: str) -> None:
    with pytest.raises(UsageError, match=r"^NAME .*: a name starts with a letter and has only letters, digits"):
        names_of(block)


@pytest.mark.parametrize("block", ["null", "true", "False"])
def test_yaml_constants_are_refused_as_names(block: str) -> None:
    with pytest.raises(UsageError, match=f"NAME {block}: a recipe would read that as (null|true|false), not as a name"):
        names_of(block)


def test_taken_names_are_refused() -> None:
    with pytest.raises(UsageError, match=r"NAME memory: there is a block of that name \(from titans_build; .*describe"):
        names_of("memory")
    with scratch():

        @tb.register("mine")
        class Mine(tb.Block):
            """A block of one's own."""

        with pytest.raises(UsageError, match=r"NAME mine: there is a block of that name \(from tests"):
            names_of("mine")
    assert names_of("mine").cls == "Mine"
