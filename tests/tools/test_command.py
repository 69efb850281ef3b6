"""What every console script shares: parsing, what ends a command, exit statuses, the name that speaks."""

from __future__ import annotations

import argparse
import errno
import json
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from titans_build import __version__
from titans_build.kernels.dispatch import BackendError
from titans_build.recipes import StorageError
from titans_build.registry import Problem, RecipeError
from titans_build.tools.command import Command, Program
from titans_build.tools.extras import from_extra
from titans_build.tools.terminal import CommandFailed, UsageError, complain, say_json


def command(work: Callable[[argparse.Namespace], int]) -> Command:
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("file", metavar="FILE")
        parser.add_argument("rest", nargs="*", metavar="WORD")
        parser.add_argument("--limit", type=int, metavar="N")

    examples = ("titans-count README.md   how many there are",)
    made: Any = SimpleNamespace(SUMMARY="Count words.", EXAMPLES=examples, add_arguments=add_arguments, run=work)
    return made


def count(arguments: argparse.Namespace) -> int:
    say_json({"file": arguments.file, "rest": arguments.rest, "limit": arguments.limit})
    return 0


def ending(error: BaseException, **settings: Any) -> Program:
    def end(arguments: argparse.Namespace) -> int:
        raise error

    return Program("titans-count", command(end), **settings)


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (UsageError("a.txt: no such file"), 2, "a.txt: no such file"),
        (StorageError("a.txt: not a model"), 2, "a.txt: not a model"),
        (BackendError("no such backend"), 2, "no such backend"),
        (CommandFailed("the loss is NaN"), 1, "the loss is NaN"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (KeyboardInterrupt("interrupted; saved to run/"), 130, "interrupted; saved to run/"),
        (MemoryError(), 1, "out of memory\nnot enough memory: try fewer words"),
    ],
)
def test_every_end_has_its_status_and_one_message(
    error: BaseException, status: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    program = ending(error, saving_memory="try fewer words")
    assert program.main(["a.txt"]) == status
    assert capsys.readouterr() == ("", f"titans-count: error: {message}\n")
    assert program.main(["a.txt", "--json"]) == status
    out, err = capsys.readouterr()
    assert json.loads(out) == {"error": {"message": message, "status": status}}
    assert err == f"titans-count: error: {message}\n"


def test_problems_of_a_recipe_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    program = ending(RecipeError([Problem("dim", "expected an integer")], "my.yaml"))
    assert program.main(["my.yaml", "--json"]) == 2
    (problem,) = json.loads(capsys.readouterr().out)["error"]["problems"]
    assert problem == {"path": "dim", "message": "expected an integer"}


def test_a_full_disk_behind_a_storage_error_is_a_failure(capsys: pytest.CaptureFixture[str]) -> None:
    error = StorageError("a.state: cannot be written: No space left on device")
    error.__cause__ = OSError(errno.ENOSPC, "No space left on device")
    assert ending(error).main(["a.txt"]) == 1
    assert capsys.readouterr().err == f"titans-count: error: {error}\n"


def test_a_fault_shows_where(capsys: pytest.CaptureFixture[str]) -> None:
    assert ending(ZeroDivisionError("a fault")).main(["a.txt"]) == 1
    err = capsys.readouterr().err
    assert "Traceback" in err and "ZeroDivisionError: a fault" in err and "this is a fault in titans-count" in err


def test_errors_are_a_line_where_json_is_lines(capsys: pytest.CaptureFixture[str]) -> None:
    assert ending(UsageError("no"), json_lines=True).main(["a.txt", "--json"]) == 2
    out = capsys.readouterr().out
    assert out.count("\n") == 1 and json.loads(out)["error"]["status"] == 2


def test_options_may_stand_between_positionals(capsys: pytest.CaptureFixture[str]) -> None:
    program = Program("titans-count", command(count))
    for words, rest in (
        (["a", "b", "--limit", "3", "c"], ["b", "c"]),
        (["--limit", "3", "a"], []),
        (["a", "--limit", "3", "--", "--json"], ["--json"]),
        (["a", "--limit", "3", "b", "--", "--x", "c"], ["b", "--x", "c"]),
    ):
        assert program.main(words) == 0
        assert json.loads(capsys.readouterr().out) == {"file": "a", "rest": rest, "limit": 3}


@pytest.mark.parametrize(
    ("words", "fragment"),
    [
        ([], "required: FILE"),
        (["a", "--limit", "x"], "argument --limit: invalid int value: 'x'"),
        (["a", "--limmit", "3"], "unrecognized arguments: --limmit 3; did you mean '--limit'?"),
        (["a", "--lim", "3"], "unrecognized arguments: --lim"),
    ],
)
def test_bad_use_shows_the_usage(words: list[str], fragment: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert Program("titans-count", command(count)).main(words) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("titans-count: error: ") and fragment in err
    assert "usage: titans-count [-h] [--version] [--limit N] [--json] FILE [WORD ...]" in err
    assert err.endswith("\ntry: titans-count --help\n")


def test_commands_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    def other(arguments: argparse.Namespace) -> int:
        complain("other ran", "warning")
        return 1

    program = Program("titans-count", command(count), {"compare": command(other)})
    assert program.main(["compare", "a"]) == 1
    assert capsys.readouterr().err == "titans-count: warning: other ran\n"
    assert program.main(["--json", "compare", "a"]) == 1
    assert program.main(["--help"]) == 0
    out = capsys.readouterr().out
    assert "titans-count compare" in out and "exit status: 0 done, 1 it failed, 2 bad use" in out
    assert program.main(["--version"]) == 0
    assert capsys.readouterr().out == f"titans-count {__version__}\n"
    for words, fragment in (
        (["compar", "a", "--x"], "did you mean 'compare'?"),
        (["count", "a", "--x"], "there is no command 'count': titans-count a --x"),
        (["--x", "compare", "a"], "the command comes first: titans-count compare ..."),
    ):
        assert program.main(words) == 2
        assert fragment in capsys.readouterr().err


def test_complaints_are_titans_builds_outside_of_a_program(capsys: pytest.CaptureFixture[str]) -> None:
    ending(UsageError("no")).main(["a"])
    complain("something")
    assert capsys.readouterr().err == "titans-count: error: no\ntitans-build: error: something\n"


def test_a_missing_extra_is_named() -> None:
    assert from_extra("json", "plots", "--plot") is json
    with pytest.raises(UsageError) as refused:
        from_extra("no_such_package.inner", "plots", "--plot")
    assert str(refused.value) == (
        "--plot needs no_such_package, which is not installed: pip install 'titans-build[plots]'"
    )
