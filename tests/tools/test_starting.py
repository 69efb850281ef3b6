"""Ctrl-C while a command is being loaded."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from titans_build.tools.starting import COMMANDS

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

SCRIPT = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it

class Interrupting:
    def find_spec(self, name, *rest):
        if name == "torch":
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Interrupting())
from titans_build.tools.cli import run
"""


def interrupted(path: Path) -> subprocess.CompletedProcess[str]:
    """What a script of this name does that is interrupted when it comes to import PyTorch."""
    path.write_text(SCRIPT, encoding="utf-8")
    return subprocess.run([sys.executable, str(path)], capture_output=True, text=True, check=False, timeout=60)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_that_is_interrupted_while_it_is_loaded_says_one_line(name: str, tmp_path: Path) -> None:
    done = interrupted(tmp_path / name)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", f"{name}: error: interrupted\n")


def test_other_programs_are_interrupted_as_ever(tmp_path: Path) -> None:
    done = interrupted(tmp_path / "program.py")
    assert done.returncode == -signal.SIGINT and done.stderr.endswith("KeyboardInterrupt\n")


def test_every_console_script_is_known() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))
    assert sorted(COMMANDS) == sorted(project["project"]["scripts"])


def test_a_command_that_runs_is_interrupted_by_an_exception() -> None:
    """So that it can save what it has done."""
    script = (
        "import sys; sys.argv[0] = 'titans-build'\n"
        "import signal\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from titans_build.tools import starting\n"
        "assert signal.getsignal(signal.SIGINT) is starting._leave\n"
        "starting.over()\n"
        "assert signal.getsignal(signal.SIGINT) is signal.default_int_handler\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, env=os.environ)
    assert done.returncode == 0, done.stderr
