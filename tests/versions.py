"""Run a part of the tests with the oldest and the newest versions that the package allows, and print a table.

    python tests/versions.py [--python 3.10 3.13] [--torch oldest] [--transformers newest] [--keep] [--folder FOLDER]

For each Python on the PATH and each torch, an environment is made in FOLDER, removed after its tests unless ``--keep``
is given, and used again where it is there. The oldest version is the lower bound in pyproject.toml. The newest is what
pip chooses: PIP_CONSTRAINT and PIP_EXTRA_INDEX_URL have their usual effect, such as to choose builds of torch for CPUs,
without which an environment takes several GB. What cannot be installed is a line of the table, with the reason.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PYTHONS = ("3.10", "3.11", "3.12", "3.13")
TESTS = (
    *(
        "tests/test_imports.py",
        "tests/blocks/foreign",
        "tests/blocks/test_generation.py",
        "tests/recipes/test_storage.py",
        "tests/kernels/test_every_backend.py",
        "tests/kernels/test_triton_runtime.py",
    ),
    *("tests/tools/swapping/test_cache.py", "tests/tools/swapping/test_state_context.py"),
    *(f"tests/tools/huggingface/test_{name}.py" for name in ("generate", "cache", "model", "loading", "swapped")),
)
"""What depends on other libraries most, and needs no package beyond the extras and pytest."""
CORE = (
    *("tests/test_imports.py", "tests/blocks/test_generation.py", "tests/recipes/test_storage.py"),
    *("tests/kernels/test_every_backend.py", "tests/kernels/test_triton_runtime.py"),
    "tests/blocks/foreign/test_fla.py",
)
"""What does not need transformers of these versions, which Python 3.10 cannot have."""
SHOWN = ("torch", "transformers", "peft", "flash-linear-attention", "triton")
REPORT = f"""import json, importlib.metadata as m
found = {{d.name: d.version for d in m.distributions()}}
print(json.dumps([found.get(name, "") for name in {SHOWN}]))"""


def requirement(package: str, which: str) -> str:
    """The oldest version of a package that pyproject.toml allows, or the newest."""
    found = re.search(rf'"{package}>=([\d.]+)', (ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert found is not None, package
    return f"{package}=={found[1]}.*" if which == "oldest" else f"{package}>={found[1]}"


def run(*command: str | Path) -> tuple[int, str]:
    environment = {"OMP_NUM_THREADS": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1", **os.environ}
    done = subprocess.run(
        list(map(str, command)), cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    return done.returncode, done.stdout


def install(python: Path, *requirements: str) -> str | None:
    """Why ``requirements`` cannot be installed beside pytest, or ``None`` if they are."""
    code, output = run(python, "-m", "pip", "install", "-q", "--upgrade", "pytest", *requirements)
    lines = [line for line in output.splitlines() if line.startswith("ERROR")] or output.splitlines()
    return None if code == 0 else lines[-1]


def test(python: Path, tests: Sequence[str]) -> tuple[list[str], str]:
    """The versions in an environment, and the last line of the tests. Failures are printed."""
    versions: list[str] = json.loads(run(python, "-c", REPORT)[1])
    started = time.perf_counter()
    _, output = run(python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests)
    print(*(line for line in output.splitlines() if line.startswith(("FAILED", "ERROR"))), sep="\n", flush=True)
    counts = output.splitlines()[-1].partition(" in ")[0] if output else "nothing ran"
    return versions, f"{counts} in {time.perf_counter() - started:.0f} s"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", nargs="+", default=PYTHONS)
    for package in ("torch", "transformers"):
        parser.add_argument(f"--{package}", nargs="+", choices=("oldest", "newest"), default=("oldest", "newest"))
    parser.add_argument("--keep", action="store_true", help="keep the environments, each of several GB")
    parser.add_argument("--folder", type=Path, default=ROOT / ".venv" / "versions")
    given = parser.parse_args()
    rows: list[list[str]] = []
    for python in given.python:
        for torch in given.torch:
            place = given.folder.resolve() / f"python{python}-torch-{torch}"
            for transformers in given.transformers:
                print(f"Python {python}, {torch} torch, {transformers} transformers ...", flush=True)
                asked = [f"{torch} torch", f"{transformers} transformers"]
                rows.append([python, *test_in(place, python, torch, transformers, asked)])
            if not given.keep:
                shutil.rmtree(place, ignore_errors=True)
    header = ["Python", *SHOWN, "tests"]
    for row in [header, ["---"] * len(header), *rows]:
        print("| " + " | ".join(row) + " |")
    return int(any("failed" in row[-1] or "error" in row[-1] for row in rows))


def test_in(place: Path, python: str, torch: str, transformers: str, asked: list[str]) -> list[str]:
    """The columns of one row, after the version of Python."""
    blank = asked + [""] * (len(SHOWN) - len(asked))
    interpreter = shutil.which(f"python{python}")
    if interpreter is None or run(interpreter, "--version")[0] != 0:
        return [*blank, f"not installed: no python{python} is found"]
    if not place.is_dir():
        code, output = run(interpreter, "-m", "venv", place)
        if code:
            return [*blank, f"not installed: {output.splitlines()[-1]}"]
    interpreter = place / "bin/python"
    wanted = requirement("torch", torch)
    reason = install(interpreter, "-e", ".[hf,fla]", wanted, requirement("transformers", transformers))
    if reason is None:
        versions, outcome = test(interpreter, TESTS)
        return [*versions, outcome]
    without = install(interpreter, "-e", ".[fla]", wanted)
    if without is not None:
        return [*blank, f"not installed: {without}"]
    versions, outcome = test(interpreter, CORE)
    return [*versions, f"{outcome}, without hf: {reason}"]


if __name__ == "__main__":
    sys.exit(main())
