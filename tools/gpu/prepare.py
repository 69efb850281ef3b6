"""The folder that a GPU machine without network needs: wheels, references, and the program to start."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..terminal import CommandFailed
from . import parity
from .report import environment

WITH_NEEDS = ("pydantic", "einops", "packaging", "pyyaml", "safetensors", "rich")
ALONE = ("xformers>=0.0.35", "fla-core>=0.6,<0.7")
"""What needs PyTorch, which the machine has."""
PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in (28, 27, 24, 17)] + ["manylinux2014_x86_64"]
ANSWERS, ABOUT = "references.pt", "about.json"
ROOT = Path(__file__).resolve().parents[2]


def prepare(folder: Path, python: str, run: Callable[..., Any] = subprocess.run, small: bool = False) -> list[str]:
    """Fill ``folder`` and return the names of its files. Wheels that are there are not fetched again.

    Raises:
        CommandFailed: pip failed; the message is its last line.
    """
    folder.mkdir(parents=True, exist_ok=True)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    there = {file.name.partition("-")[0].lower().replace("_", "-") for file in folder.glob("*.whl")}
    place = [word for platform in PLATFORMS for word in ("--platform", platform)]
    place += ["--python-version", python, "--implementation", "cp", "--only-binary=:all:", "--dest", str(folder)]
    for asked, options in ((WITH_NEEDS, []), (ALONE, ["--no-deps"])):
        if any(name.partition(">")[0] not in there for name in asked):
            _ask(run, [*pip, "download", *options, *place, *asked])
    for old in folder.glob("titans_build-*.whl"):
        old.unlink()
    _ask(run, [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(ROOT)])
    parity.write_answers(folder / ANSWERS, small)
    about = environment(("titans-build", "torch"))
    (folder / ABOUT).write_text(json.dumps({**about, "for_python": python}, indent=1) + "\n", encoding="utf-8")
    shutil.copy(ROOT / "tools" / "gpu_check.py", folder)
    return sorted(file.name for file in folder.iterdir())


def _ask(run: Callable[..., Any], command: Sequence[str]) -> None:
    done = run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines()
        raise CommandFailed(f"pip {command[5]}: {said[-1] if said else 'failed'}")
