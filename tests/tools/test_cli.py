"""Exit statuses, and what a user sees when something is wrong: one message, never a stack trace."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from titans_build import __version__
from titans_build.tools.cli import PROGRAM, main
from titans_build.tools.terminal import prepare_streams

Run = Callable[..., Any]
COMMANDS = [name for name in PROGRAM.commands() if name]


def assert_refused(result: Any, fragment: str, status: int = 2) -> None:
    assert result.status == status
    assert result.out == ""
    assert result.err.startswith("titans-build: error: ")
    assert fragment in result.err
    assert "Traceback" not in result.err


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_has_examples_and_exit_statuses(command: str, titans_build: Run) -> None:
    result = titans_build(*command.split(), "--help")
    assert result.status == 0
    assert f"usage: titans-build {command}".strip() in result.out
    assert "examples:\n  " in result.out and "exit status: 0" in result.out
    assert "--json" in result.out
    assert command or all(f"titans-build {name}" in result.out for name in COMMANDS)


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_fits_the_terminal(command: str, titans_build: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def letters(text: str) -> str:
        return "".join(text.partition("usage:")[2].partition("\n\n")[2].split())

    monkeypatch.setenv("COLUMNS", "200")
    wide = titans_build(*command.split(), "--help").out
    for width in (40, 60, 80, 120):
        monkeypatch.setenv("COLUMNS", str(width))
        out = titans_build(*command.split(), "--help").out
        # nothing is lost, and below the usage only a word that is longer than its column is wider than the terminal
        assert letters(out) == letters(wide)
        below = out.partition("\n\n")[2].splitlines()
        assert all(len(line) <= width or len(line.split()) == 1 for line in below)


def test_version(titans_build: Run) -> None:
    assert titans_build("--version") == (0, f"titans-build {__version__}\n", "")
    command = [sys.executable, "-m", "titans_build", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout == f"titans-build {__version__}\n"


@pytest.mark.parametrize(
    ("words", "fragment"),
    [
        ((), "required: RECIPE"),
        (("mac", "--sett", "dim=3"), "unrecognized arguments: --sett"),
        (("mac", "extra"), "unrecognized arguments: extra"),
        (("mcc",), "no packaged recipe and no file of that name; did you mean 'mac'?"),
        (("lst",), "there is no command 'lst'; did you mean 'list'?\n"),
        (("chek", "mac"), "there is no command 'chek'; did you mean 'check'?\n"),
        (("check.yaml",), "check.yaml: 1 problem\n  no such file"),
        (("--set", "dim=64", "check", "mac"), "the command comes first: titans-build check ..."),
        (("build", "mac", "--seed", "3"), "there is no command 'build': titans-build mac --seed 3"),
        (("help", "check"), "titans-build check --help"),
        (("help",), "try: titans-build --help"),
        (("m" * 5000,), "no packaged recipe and no file of that name"),
        (("m" * 300 + ".yaml",), "File name too long"),
        (("check", "m" * 300 + "/" + "x" * 5000), "File name too long"),
        (("memory",), "a block, not a recipe; see titans-build describe memory"),
        (("check", "memory"), "a block, not a recipe"),
        (("nowhere/file.yaml",), "no such file"),
        (("mac", "--set", "dim"), "expected PATH=VALUE"),
        (("mac", "--set", "=3"), "expected PATH=VALUE"),
        (("mac", "--set", "dim=64", "--set", "dim=32"), "--set dim: given twice"),
        (("mac", "--set", "dim=[1"), "--set: 1 problem\n  dim: not valid YAML"),
        (("mac", "--set", "a=[", "--set", "b={"), "--set: 2 problems\n  a: not valid YAML"),
        (("mac", "--set", "a={b: !!int 3}"), "  a.b: tags are not allowed"),
        (("mac", "--set", "dim=wide"), "dim: expected an integer"),
        (("mac", "--set", "layers.mac.0.segmnt=3"), "did you mean 'segment'?"),
        (("mac", "--set", "segment=64"), "did you mean 'layers.mac.0.segment'?"),
        (("mac", "--set", "segmnt=64"), "did you mean 'layers.mac.0.segment'?"),
        (("mac", "--set", "mac.0.segment=64"), "did you mean 'layers.mac.0.segment'?"),
        (("mac", "--set", "layers.mac.segment=64"), "did you mean 'layers.mac.0.segment'?"),
        (("mac", "--set", "layers.mac.0.chunk=64"), "did you mean 'layers.mac.0.memory.chunk'?"),
        (("mac", "--set", "heads=4"), "did you mean 'layers.mac.0.memory.heads' or 'layers.mac.0.attend.heads'?"),
        (("mac-200m",), "did you mean 'mac-170m'?"),
        (("mca-1b",), "did you mean 'mac-1.3b'?"),
        (("mac", "--set", "layers.mca.0.segment=3"), "layers.mca"),
        (("mac", "--set", "layers.mac.1.kind.x=3"), "layers.mac.1.kind is 'swiglu', which has nothing inside"),
        (("mac", "--seed", "-1"), "--seed: expected an integer from 0"),
        (("mac", "--seed", "1.5"), "--seed: expected an integer from 0"),
        (("mac", "--dtype", "float23"), "did you mean 'float32'?"),
        (("mac", "--dtype", "fp16"), "did you mean 'float16'?"),
        (("mac", "--dtype", "int64"), "int64"),
        (("mac", "--dtype", ""), "unknown dtype ''"),
        (("mac", "--device", "gpu"), "unknown device 'gpu'; did you mean 'cuda'? (devices: cpu, cuda, cuda:1, mps)\n"),
        (("mac", "--device", "cdua"), "did you mean 'cuda'?"),
        (("mac", "--device", "fpga"), "from the 'FPGA' backend\n"),
        (("mac", "--force"), "--force: lets --out DIR replace a saved model, and there is no --out"),
        (("mac", "--device", "meta"), "titans-build check"),
        (("mac", "--device", "cuda:99"), "cuda"),
        (("mac", "--try", "nowhere.txt"), "--try nowhere.txt: No such file or directory"),
        (("mac", "--set", "vocab=100", "--try", "nowhere.txt"), "vocab >= 256, it has 100"),
        (("mac", "--out", ""), "--out: expected the name of a folder, got none"),
        (("mac", "--out", "m" * 300), "File name too long"),
        (("mac", "--out", "/dev/null/model"), "/dev/null is a file, not a folder"),
        (("describe",), "required: BLOCK"),
        (("describe", "memry"), "did you mean 'memory'?"),
        (("describe", "mac"), "'mac' is a recipe, not a block: `titans-build mac` shows its parts"),
        (("describe", "my.yaml"), "'my.yaml' is a recipe"),
        (("schema", "mac-170m"), "'mac-170m' is a recipe, not a block"),
        (("check",), "required: RECIPE"),
        (("check", "mcc"), "did you mean 'mac'?"),
        (("schema", "memry"), "did you mean 'memory'?"),
        (("kernels", "--device", "cuda:99"), "cuda"),
        (("diagram", "mcc"), "did you mean 'mac'?"),
        (("diagram", "mac", "--out", "mac.png"), "ends in .svg"),
        (("diagram", "mac", "--out", "/dev/null/mac.svg"), "/dev/null/mac.svg: Not a directory"),
    ],
    ids=" ".join,
)
def test_bad_use_is_refused(words: tuple[str, ...], fragment: str, titans_build: Run) -> None:
    assert_refused(titans_build(*words), fragment)


def test_wrong_recipes_are_refused(wrong_recipe: tuple[str, Any, str], tmp_path: Path, titans_build: Run) -> None:
    _, text, fragment = wrong_recipe
    path = tmp_path / "wrong.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    assert_refused(titans_build(path), fragment)
    checked = titans_build("check", path)
    assert checked.status == 2 and fragment in checked.err and "Traceback" not in checked.err


def test_errors_as_json(tmp_path: Path, titans_build: Run) -> None:
    result = titans_build("mac", "--set", "layers.mac.0.segmnt=3", "--set", "dim=63", "--json")
    assert result.status == 2
    error = result.json["error"]
    assert error["status"] == 2
    assert [problem["path"] for problem in error["problems"]] == [
        "layers.mac.0.segmnt",
        "layers.mac.0.memory.heads",
        "layers.mac.0.attend.heads",
    ]
    assert titans_build("--json").json["error"]["status"] == 2


def test_json_may_come_first(titans_build: Run) -> None:
    assert titans_build("--json", "check", "mac").json == titans_build("check", "mac", "--json").json


def test_a_damaged_model_is_refused(tmp_path: Path, titans_build: Run) -> None:
    (tmp_path / "model.json").write_text("{", encoding="utf-8")
    assert_refused(titans_build(tmp_path), "model.json")


def test_a_bad_backend_is_refused(monkeypatch: pytest.MonkeyPatch, small: Path, text: Path, titans_build: Run) -> None:
    monkeypatch.setenv("TITANS_BUILD_BACKEND", "attention=magic")
    result = titans_build(small, "--try", text)
    assert result.status == 2
    assert "attention" in result.err and "magic" in result.err and "Traceback" not in result.err


def test_a_model_too_large_for_the_machine_is_described_but_not_built(titans_build: Run, tmp_path: Path) -> None:
    words = ["transformer", "--set", "dim=131072", "--set", "stack.0.repeat=2"]
    assert titans_build(*words).status == 0
    assert_refused(titans_build(*words, "--out", tmp_path / "model"), "GiB")
    assert_refused(titans_build(*words, "--try", __file__), "GiB")


def test_imports_need_to_be_allowed(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, titans_build: Run
) -> None:
    module = tmp_path / "imported_by_a_recipe.py"
    module.write_text("open(__file__ + '.ran', 'w').close()\n", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    small.write_text(small.read_text() + "imports: [imported_by_a_recipe]\n", encoding="utf-8")
    assert_refused(titans_build(small), "--allow-imports")
    assert not Path(f"{module}.ran").exists()
    assert titans_build("check", small, "--allow-imports").status == 0
    assert Path(f"{module}.ran").exists()


def cpu_seconds(*command: str) -> float:
    """CPU time rather than wall time: other processes may be busy. The lesser of two runs: the first fills caches."""

    def once() -> float:
        before = os.times()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
        after = os.times()
        return after.children_user + after.children_system - before.children_user - before.children_system

    return min(once(), once())


@pytest.mark.slow
def test_start_up_takes_little_longer_than_importing_torch() -> None:
    torch_alone = cpu_seconds(sys.executable, "-c", "import torch")
    check = cpu_seconds(sys.executable, "-c", "from titans_build.tools.cli import run; run()", "check", "mac")
    assert check < 1.6 * torch_alone + 0.5


def test_no_colors_in_a_pipe_and_none_with_no_color(titans_build: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    for no_color in (None, "1"):
        if no_color is not None:
            monkeypatch.setenv("NO_COLOR", no_color)
        result = titans_build("list")
        assert result.status == 0 and "memory" in result.out
        assert "\x1b" not in result.out + result.err


@pytest.mark.parametrize(
    ("words", "stderr", "reader", "status", "output"),
    [
        ("schema", "err", "head -n 1", 0, b"{\n"),
        ("list", "err", "head -n 1", 0, None),
        ("list --json", "err", "true", 0, b""),
        ("check mac nowhere.yaml mag", "/dev/null", "true", 2, b""),
        ("nowhere.yaml --json", "out", "true", 2, b""),
    ],
)
def test_the_status_does_not_depend_on_the_reader(
    words: str, stderr: str, reader: str, status: int, output: bytes | None, in_process: Any
) -> None:
    (done,) = in_process("cli", *words.split(), stderr=stderr, reader=reader)
    assert (done.status, done.err) == (status, b"")
    assert done.out.startswith(b"block ") if output is None else done.out == output


def test_no_control_character_of_a_file_reaches_the_terminal(tmp_path: Path, titans_build: Run) -> None:
    path = tmp_path / "red\x1b[31m\x9b31m\u202e.yaml"
    path.write_text("version: 1\ndim: 32\nlayers: {a: [ffn]}\nstack: [a]\n", encoding="utf-8")
    for words in ((path,), ("check", path), (f"{path}x",)):
        result = titans_build(*words)
        assert "\\x1b[31m\\x9b31m\\u202e" in result.out + result.err
        assert not {"\x1b", "\x9b", "\u202e"} & set(result.out + result.err)


@pytest.mark.parametrize("words", [["list"], ["diagram", "lmm"], ["lmm", "--json"]], ids=str)
def test_output_that_cannot_be_written(words: list[str], in_process: Any) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("there is no full device here")
    (full,) = in_process("cli", *words, stdout="/dev/full")
    assert full.status == 1
    assert full.err == b"titans-build: error: the output cannot be written: No space left on device\n"
    (closed,) = in_process("cli", *words, stdout=None)
    assert (closed.status, closed.err) == (0, b"")


@pytest.fixture
def run_with_encoding(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str]]:
    """``run_with_encoding("ascii", "check", "mac")`` -> status and what a standard output of that encoding received."""

    def run(encoding: str, *words: str) -> tuple[int, str]:
        stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", stream)
            prepare_streams()
            status = main(words)
        return status, stream.buffer.getvalue().decode(encoding)  # type: ignore[attr-defined]

    return run


def test_characters_outside_of_the_encoding_are_escaped(
    tmp_path: Path, run_with_encoding: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = str(tmp_path / "größe.yaml")
    text = "version: 1\ndim: 32\nlayers: {a: [ffn]}\nstack: [{repeat: 2, of: [a]}]\n"
    Path(recipe).write_text(text, encoding="utf-8")
    status, out = run_with_encoding("ascii", recipe)
    assert status == 0 and "gr\\xf6\\xdfe.yaml: dim 32" in out and "\na x2 " in out and "\n` ffn " in out
    assert json.loads(run_with_encoding("ascii", recipe, "--json")[1])["recipe"]["name"] == recipe
    picture = run_with_encoding("ascii", "diagram", recipe)[1]
    assert picture.isascii() and ElementTree.fromstring(picture)[0].text == recipe
    assert capsys.readouterr().err == ""


def test_file_names_that_are_not_valid_text(
    tmp_path: Path, run_with_encoding: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    name = os.fsdecode(b"caf\xe9.yaml")
    try:
        (tmp_path / name).write_text("version: 1\ndim: 32\nlayers: {a: [ffn]}\nstack: [a]\n", encoding="utf-8")
    except OSError:
        pytest.skip("the file system takes no such name")
    for words in ((), ("check",), ("diagram",)):
        status, out = run_with_encoding("utf-8", *words, str(tmp_path / name))
        assert status == 0
    ElementTree.fromstring(out)
    assert capsys.readouterr().err == ""


def test_an_error_about_a_file_name_that_is_not_valid_text(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="backslashreplace")  # as Python's own
    monkeypatch.setattr(sys, "stderr", stream)
    prepare_streams()
    assert main(["check", os.fsdecode(b"caf\xe9.yaml")]) == 2
    assert stream.buffer.getvalue().startswith(b"titans-build: error: caf")  # type: ignore[attr-defined]


def test_main_reads_the_command_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["titans-build", "--version"])
    assert main() == 0
    assert capsys.readouterr().out.startswith("titans-build ")
