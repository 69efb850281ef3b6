"""Measure how much code there is, and how much of it runs in a forward pass.

    python tests/structure.py [FOLDER] [--against FOLDER] [--json]

FOLDER is a checkout, or a folder that titans_build is installed in; without one, the checkout that this file is in.
What is measured, each in a process of its own with one thread:

- Files and functions of the package that run in one forward pass on a CPU, after a first pass: those for which
  ``sys.setprofile`` reports a call. Functions are distinct pairs of file and qualified name, with lambdas and
  comprehensions. ``mac`` is the packaged recipe over 512 tokens, ``memory`` a block of width 64 over 128 tokens.
- Seconds after ``import torch``, with bytecode cached, until ``titans_build`` is imported, until ``tb.build`` is there,
  and until every public name is: medians of five.
- Lines and files of code (py, c, h, js, css, html) by folder, without tests, docs and results.
- Public names: the length of ``titans_build.__all__``.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SUFFIXES = (".py", ".c", ".h", ".js", ".css", ".html")
LEFT_OUT = {"tests", "docs", "results", "build", "dist", "runs", "shared"}
IMPORTS = 5
IMPORTED = ("titans_build", "build", "all names")
FACE = "tools/titans_build"  # where versions before the repository was the package had its __init__.py


# -- in a process that has the package ---------------------------------------------------------------------------------


def running(forward: Callable[[], Any], package: str) -> dict[str, int]:
    """Files and functions below the folder ``package`` that a second call of ``forward`` runs."""
    found: set[tuple[str, str]] = set()

    def profile(frame: Any, event: str, argument: Any) -> None:
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(package):
            found.add((code.co_filename, getattr(code, "co_qualname", code.co_name)))  # qualified from Python 3.11 on

    forward()
    sys.setprofile(profile)
    try:
        forward()
    finally:
        sys.setprofile(None)
    return {"files": len({file for file, _ in found}), "functions": len(found)}


def measure_forward() -> dict[str, Any]:
    import torch

    import titans_build as tb

    torch.set_num_threads(1)
    package = os.path.dirname(tb.__file__) + os.sep
    model = tb.build(tb.load_recipe("mac"), seed=0)
    block = tb.build_block("memory", dim=64)
    tokens, x = torch.randint(model.vocab, (1, 512)), torch.randn(1, 128, 64)
    result: dict[str, Any] = {"public names": len(tb.__all__)}
    for mode, grad in (("no_grad", False), ("grad", True)):
        with torch.set_grad_enabled(grad):
            result[f"mac, {mode}"] = running(lambda: model(tokens), package)
            result[f"memory, {mode}"] = running(lambda: block(x), package)
    return result


def measure_import() -> list[float]:
    import torch  # noqa: F401

    began = time.perf_counter()
    import titans_build as tb

    moments = [time.perf_counter()]
    for names in (["build", "load_recipe"], tb.__all__):
        for name in names:
            getattr(tb, name)
        moments.append(time.perf_counter())
    return [moment - began for moment in moments]


# -- in this process ---------------------------------------------------------------------------------------------------


def importable(folder: Path, place: Path) -> Path:
    """The folder to put on PYTHONPATH: ``folder`` itself, or ``place`` with a link to the checkout in ``folder``."""
    if (folder / "titans_build/__init__.py").is_file():
        return folder
    place.mkdir()
    package = place / "titans_build"
    if (folder / "__init__.py").is_file():
        package.symlink_to(folder)
    elif (folder / FACE).is_dir():
        package.mkdir()
        for path in [*(folder / FACE).iterdir(), *(p for p in folder.iterdir() if p.is_dir())]:
            if path.name != "__pycache__":
                (package / path.name).symlink_to(path)
    else:
        sys.exit(f"structure.py: error: {folder}: neither a checkout nor a folder that titans_build is installed in")
    return place


def call(task: str, path: Path, bytecode: str) -> Any:
    """What ``task`` measures in a new process that imports the package from ``path``, and keeps its bytecode apart."""
    settings = {"PYTHONPATH": str(path), "PYTHONPYCACHEPREFIX": bytecode, "OMP_NUM_THREADS": "1"}
    environment = {**os.environ, **settings}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    done = subprocess.run([sys.executable, __file__, "--task", task], env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"structure.py: error: {path}: {done.stderr.strip()[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def code_files(folder: Path) -> Iterator[tuple[str, Path]]:
    """Each file of code with the name of its top folder; ``.`` for files at the top."""
    for directory, names, files in os.walk(folder):
        names[:] = [
            name
            for name in names
            if name not in LEFT_OUT and not name.startswith((".", "__pycache__")) and not name.endswith("-info")
        ]
        top = Path(directory).relative_to(folder).parts[:1] or (".",)
        yield from ((top[0], Path(directory, name)) for name in files if name.endswith(SUFFIXES))


def measure(folders: list[Path]) -> list[dict[str, Any]]:
    """Everything about the versions in ``folders``; their imports are timed in turn."""
    with tempfile.TemporaryDirectory() as place:
        bytecode = str(Path(place, "bytecode"))
        paths = [importable(folder, Path(place, str(number))) for number, folder in enumerate(folders)]
        results = [call("forward", path, bytecode) for path in paths]
        seconds = [[call("import", path, bytecode) for path in paths] for _ in range(1 + IMPORTS)][1:]
    for result, folder, taken in zip(results, folders, zip(*seconds)):
        result["import seconds"] = dict(zip(IMPORTED, map(statistics.median, zip(*taken))))
        installed = folder / "titans_build"
        code: dict[str, dict[str, int]] = {}
        for top, file in code_files(installed if installed.is_dir() else folder):
            counted = code.setdefault(top, {"files": 0, "lines": 0})
            counted["files"] += 1
            counted["lines"] += file.read_bytes().count(b"\n")
        total = {key: sum(counted[key] for counted in code.values()) for key in ("files", "lines")}
        result["code"] = {**dict(sorted(code.items())), "total": total}
    return results


def rows(result: dict[str, Any]) -> dict[str, str]:
    """A measured version as the rows of a table."""
    table = {}
    for name in (name for name in result if name.startswith(("mac", "memory"))):
        table[f"{name}: files that run"] = f"{result[name]['files']}"
        table[f"{name}: functions that run"] = f"{result[name]['functions']}"
    for name, seconds in result["import seconds"].items():
        table[f"import after torch: {name}"] = f"{seconds:.2f} s"
    table["public names"] = f"{result['public names']}"
    for name, counted in result["code"].items():
        table[f"{name}: files of code"] = f"{counted['files']:,}"
        table[f"{name}: lines of code"] = f"{counted['lines']:,}"
    return table


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, usage="%(prog)s [options] [FOLDER]"
    )
    parser.add_argument("folder", nargs="?", type=Path, default=ROOT, help=argparse.SUPPRESS)
    parser.add_argument("--against", type=Path, metavar="FOLDER", help="another version, to be shown beside")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--task", choices=("forward", "import"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.task:
        print(json.dumps(measure_forward() if given.task == "forward" else measure_import()))
        return
    folders = [folder.resolve() for folder in (given.folder, given.against) if folder is not None]
    results = measure(folders)
    if given.json:
        print(json.dumps(dict(zip(("measured", "against"), results)), indent=1))
        return
    columns = [rows(result) for result in results]
    names = list(dict.fromkeys(name for column in columns for name in column))
    print(f"{'':34}" + "".join(f"{head:>12}" for head in ("measured", "against")[: len(columns)]))
    for name in names:
        print(f"{name:34}" + "".join(f"{column.get(name, '-'):>12}" for column in columns))


if __name__ == "__main__":
    main()
