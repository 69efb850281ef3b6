"""Which files a user means: files, folders and wildcards, in an order that does not depend on the machine."""

from __future__ import annotations

import glob
import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from ...registry import Problem, RecipeError, nearest, show


class TextFile(NamedTuple):
    """A file that is one document."""

    path: Path
    name: str
    """The path from the folder that was asked for: the same wherever that folder is, and whatever is beside it."""
    size: int
    """Bytes."""
    modified: int
    """Nanoseconds since 1970."""


def find(patterns: Sequence[str]) -> list[TextFile]:
    """The files that the patterns name, each once, sorted by name; those without a byte in them are left out.

    A pattern is a file, a folder (all files under it but hidden ones) or a wildcard (``**`` for any folders).
    Raises ``RecipeError`` with all patterns that name nothing and all files that cannot be read.
    """
    problems: list[Problem] = []
    found: dict[Path, TextFile | Problem] = {}
    for pattern in patterns:
        root, paths = _expand(pattern)
        if not paths:
            problems.append(Problem(_quoted(pattern), _nothing(pattern)))
        for path in paths:
            if path not in found:
                found[path] = text_file(path, root)
    problems += [file for file in found.values() if isinstance(file, Problem)]
    if problems:
        raise RecipeError(problems, "data")
    files = [file for file in found.values() if isinstance(file, TextFile) and file.size]
    if not files:
        raise RecipeError([Problem(", ".join(map(_quoted, patterns)), "there is no text: every file is empty")], "data")
    return sorted(files, key=lambda file: (file.name, file.path))


def text_file(path: Path, root: Path) -> TextFile | Problem:
    """The file with its name from ``root``, or why it cannot be read."""
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            return Problem(_quoted(str(path)), "not a regular file")
        with open(path, "rb"):
            return TextFile(path, path.relative_to(root).as_posix(), status.st_size, status.st_mtime_ns)
    except OSError as error:
        return _unreadable(path, error)


def read(file: TextFile, start: int, stop: int) -> bytes:
    """Bytes ``start`` to ``stop`` of a file. Raises ``RecipeError`` when it is not the file any more that was found."""
    try:
        with open(file.path, "rb", buffering=0) as opened:
            if os.fstat(opened.fileno()).st_size != file.size:
                raise RecipeError([Problem(_quoted(str(file.path)), "has changed since it was opened as data")], "data")
            opened.seek(start)
            return opened.read(stop - start)
    except OSError as error:
        raise RecipeError([_unreadable(file.path, error)], "data") from None


def _expand(pattern: str) -> tuple[Path, list[Path]]:
    """The paths that a pattern names, and the folder from which they have their names."""
    path = Path(os.path.abspath(os.path.expanduser(pattern)))
    if path.is_dir():
        found = []
        for folder, folders, files in os.walk(path):
            folders[:] = [name for name in folders if not name.startswith(".")]
            found += [Path(folder, name) for name in files if not name.startswith(".")]
        return path, found
    if os.path.lexists(path):
        return path.parent, [path]
    root = _plain_part(path)
    if root == path:
        return root, []
    return root, [Path(match) for match in glob.glob(str(path), recursive=True) if not os.path.isdir(match)]


def _plain_part(path: Path) -> Path:
    """As much of a path as stands before the first wildcard."""
    while glob.has_magic(str(path)):
        path = path.parent
    return path


def _unreadable(path: Path, error: OSError) -> Problem:
    return Problem(_quoted(str(path)), f"cannot be read: {error.strerror or error}")


def _nothing(pattern: str) -> str:
    path = Path(os.path.abspath(os.path.expanduser(pattern)))
    if path.is_dir():
        return "there is no file in this folder"
    asked, path = path, _plain_part(path)
    if path.is_dir():
        return f"no file in {path} matches"
    while not path.parent.is_dir():
        path = path.parent
    near = nearest(path.name, sorted(os.listdir(path.parent)))
    return f"no such file or folder{near}" if path == asked else f"there is no folder {path}{near}"


def _quoted(text: str) -> str:
    return show(text, 200).strip("'")
