"""What every console script shares: parsing, exit statuses, error messages, ``--json`` and ``--help``."""

from __future__ import annotations

import argparse
import errno
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from titans_build import __version__
from titans_build.kernels.dispatch import BackendError
from titans_build.recipes import StorageError
from titans_build.registry import Problem, RecipeError
from titans_build.tools.command_line import Command, Program
from titans_build.tools.extras import from_extra
from titans_build.tools.terminal import CommandFailed, UsageError, complain, say_json


def command(run: Callable[[argparse.Namespace], int]) -> Command:
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("file", metavar="FILE")
        parser.add_argument("rest", nargs="*", metavar="WORD")
        parser.add_argument("--limit", type=int, metavar="N")

    return Command("Count words.", ("titans-count README.md   how many there are",), add_arguments, run)


def count(arguments: argparse.Namespace) -> int:
    say_json({"file": arguments.file, "rest": arguments.rest, "limit": arguments.limit})
    return 0


def program(run: Callable[[argparse.Namespace], int] = count, **settings: Any) -> Program:
    return Program("titans-count", lambda: {"": command(run)}, **settings)


def failing(error: BaseException, **settings: Any) -> Program:
    def fail(arguments: argparse.Namespace) -> int:
        raise error

    return program(fail, **settings)


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
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: ...\nand more"),
            1,
            "DefaultCPUAllocator: can't allocate memory: ...\nnot enough memory: try fewer words",
        ),
    ],
)
def test_each_error_has_its_status_and_one_message(
    error: BaseException, status: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    count = failing(error, saving_memory="try fewer words")
    assert count.main(["a.txt"]) == status
    assert capsys.readouterr() == ("", f"titans-count: error: {message}\n")
    assert count.main(["a.txt", "--json"]) == status
    out, err = capsys.readouterr()
    assert json.loads(out) == {"error": {"message": message, "status": status}}
    assert err == f"titans-count: error: {message}\n"


def test_problems_of_a_recipe_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    count = failing(RecipeError([Problem("dim", "expected an integer")], "my.yaml"))
    assert count.main(["my.yaml", "--json"]) == 2
    (problem,) = json.loads(capsys.readouterr().out)["error"]["problems"]
    assert problem == {"path": "dim", "message": "expected an integer"}


def test_a_full_disk_behind_a_storage_error_is_a_failure(capsys: pytest.CaptureFixture[str]) -> None:
    error = StorageError("a.state: cannot be written: No space left on device")
    error.__cause__ = OSError(errno.ENOSPC, "No space left on device")
    assert failing(error).main(["a.txt"]) == 1
    assert capsys.readouterr().err == f"titans-count: error: {error}\n"


def test_a_bug_shows_its_stack_trace(capsys: pytest.CaptureFixture[str]) -> None:
    assert failing(ZeroDivisionError("a bug")).main(["a.txt"]) == 1
    err = capsys.readouterr().err
    assert "Traceback" in err and "ZeroDivisionError: a bug" in err and "titans-count: error: " in err


def test_errors_are_one_line_with_json_lines(capsys: pytest.CaptureFixture[str]) -> None:
    assert failing(UsageError("no"), json_lines=True).main(["a.txt", "--json"]) == 2
    out = capsys.readouterr().out
    assert out.count("\n") == 1 and json.loads(out)["error"]["status"] == 2


def test_options_may_stand_between_positionals(capsys: pytest.CaptureFixture[str]) -> None:
    for words, rest in (
        (["a", "b", "--limit", "3", "c"], ["b", "c"]),
        (["--limit", "3", "a"], []),
        (["a", "--limit", "3", "--", "--json"], ["--json"]),
        (["a", "--limit", "3", "b", "--", "--x", "c"], ["b", "--x", "c"]),
    ):
        assert program().main(words) == 0
        assert json.loads(capsys.readouterr().out) == {"file": "a", "rest": rest, "limit": 3}


@pytest.mark.parametrize(
    ("words", "fragment"),
    [
        ([], "FILE"),
        (["a", "--limit", "x"], "argument --limit"),
        (["a", "--limmit", "3"], "--limmit 3; did you mean '--limit'?"),
        (["a", "--lim", "3"], "--lim"),
    ],
)
def test_bad_use_shows_the_usage(words: list[str], fragment: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert program().main(words) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("titans-count: error: ") and fragment in err
    assert "usage: titans-count [-h] [--version] [--limit N] [--json] FILE [WORD ...]" in err
    assert err.endswith("\ntry: titans-count --help\n")


def test_subcommands(capsys: pytest.CaptureFixture[str]) -> None:
    def compare(arguments: argparse.Namespace) -> int:
        complain("compare ran", "warning")
        return 1

    both = Program("titans-count", lambda: {"": command(count), "compare": command(compare)})
    assert both.main(["compare", "a"]) == 1
    assert capsys.readouterr().err == "titans-count: warning: compare ran\n"
    assert both.main(["--json", "compare", "a"]) == 1
    assert both.main(["--help"]) == 0
    out = capsys.readouterr().out
    assert "titans-count compare" in out and "exit status: 0" in out
    assert both.main(["--version"]) == 0
    assert capsys.readouterr().out == f"titans-count {__version__}\n"
    for words, fragment in (
        (["compar", "a", "--x"], "there is no command 'compar'; did you mean 'compare'?\n"),
        (["count", "a", "--x"], "titans-count a --x"),
        (["--x", "compare", "a"], "titans-count compare ..."),
    ):
        assert both.main(words) == 2
        assert fragment in capsys.readouterr().err


def test_the_programs_name_is_reset_when_it_ends(capsys: pytest.CaptureFixture[str]) -> None:
    failing(UsageError("no")).main(["a"])
    complain("something")
    assert capsys.readouterr().err == "titans-count: error: no\ntitans-build: error: something\n"


def test_a_missing_extra_is_named() -> None:
    assert from_extra("json", "plots", "--plot") is json
    with pytest.raises(UsageError) as refused:
        from_extra("no_such_package.inner", "plots", "--plot")
    assert "--plot needs no_such_package" in str(refused.value)
    assert "pip install 'titans-build[plots]'" in str(refused.value)


def test_a_file_in_the_place_of_an_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "some_extra.py").touch()  # imported, but not the package
    (tmp_path / "some_folder").mkdir()
    for module in ("some_extra", "some_extra.part", "some_folder", "some_folder.part"):
        place = tmp_path / ("some_extra.py" if "extra" in module else "some_folder")
        with pytest.raises(UsageError, match=f"needs {place.stem}, but Python finds {place} in its place: rename"):
            from_extra(module, "plots", "--plot")


INTERRUPTED = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it

class Interrupting:
    def find_spec(self, name, *rest):
        if name == "torch":
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Interrupting())
"""


@pytest.mark.parametrize(
    ("module", "name"),
    [("cli", "titans-build"), ("train", "titans-train"), ("infer", "titans-infer"), ("analyze", "titans-analyze")],
)
def test_an_interruption_while_pytorch_is_imported_is_one_line(module: str, name: str, tmp_path: Path) -> None:
    script = f"{INTERRUPTED}\nfrom titans_build.tools.{module} import run\nrun()\n"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", f"{name}: error: interrupted\n")


def test_importing_the_package_installs_no_signal_handler_and_loads_no_torch() -> None:
    script = (
        "import signal, sys; before = signal.getsignal(signal.SIGINT); sys.argv[0] = 'titans-build'\n"
        "import titans_build, titans_build.tools.cli\n"
        "assert signal.getsignal(signal.SIGINT) is before and 'torch' not in sys.modules\n"
        "assert {'build', 'train', 'swap'} <= set(dir(titans_build)) and callable(titans_build.train)\n"
        "from titans_build import list_blocks\n"
        "assert 'memory' in list_blocks()\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
