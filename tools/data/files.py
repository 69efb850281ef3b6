"""Text files: those that patterns name, in an order that does not depend on the machine, and the standard library's."""

from __future__ import annotations

import glob
import os
import stat
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from ...registry import Problem, RecipeError, nearest, show

EXCLUDED = ("site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "__pycache__")
"""Folders of the standard library without text, or that some distributions leave out."""

UNCOMPRESS = "its bytes are no text: uncompress it, or compress the texts with gzip"
NOT_READ = {
    ".arrow": "a file of the library `datasets`: write it as parquet, Dataset.to_parquet('texts.parquet')",
    **dict.fromkeys((".tar", ".tar.gz", ".tgz", ".zip", ".7z", ".zst", ".xz", ".bz2", ".lz4"), UNCOMPRESS),
}
"""Why files whose names end like this are not read."""


class TextFile(NamedTuple):
    """A file with one document, or several. ``name``: its path relative to the folder that was given."""

    path: Path
    name: str
    size: int
    """Bytes."""
    modified: int
    """Nanoseconds since 1970."""
    lines: bool = False
    """Whether each line is a document."""


def find(patterns: Sequence[str]) -> list[TextFile]:
    """The nonempty files that the patterns name, each once, sorted by name.

    A pattern is a file, a folder (all files in it, hidden ones excepted) or a wildcard (``**`` for any folders).
    Raises ``RecipeError`` with all patterns that name nothing and all files that cannot be read.
    """
    problems: list[Problem] = []
    found: dict[Path, TextFile | Problem] = {}
    for pattern in patterns:
        root, paths = _expand(pattern)
        if not paths:
            problems.append(Problem(label(pattern), _why_none(pattern)))
        for path in paths:
            if path not in found:
                found[path] = _text_file(path, root)
    problems += [file for file in found.values() if isinstance(file, Problem)]
    if problems:
        raise RecipeError(problems, "data")
    files = _nonempty(list(found.values()))
    if not files:
        raise RecipeError([Problem(", ".join(map(label, patterns)), "there is no text: every file is empty")], "data")
    return files


def standard_library() -> list[TextFile]:
    """The ``.py`` files of Python's standard library. Raises ``RecipeError`` if this Python has no sources."""
    root = Path(sysconfig.get_path("stdlib")).resolve()
    found = []
    for folder, folders, files in os.walk(root):
        # config-... and _sysconfigdata... describe how this Python was built
        folders[:] = [name for name in folders if name not in EXCLUDED and not name.startswith((".", "config-"))]
        for name in files:
            if name.endswith(".py") and not name.startswith("_sysconfigdata"):
                found.append(_text_file(Path(folder, name), root))
    sources = _nonempty(found)
    if not sources:
        raise RecipeError([Problem("stdlib", f"this Python has no sources in {root}")], "data")
    return sources


def read(file: TextFile, start: int, stop: int) -> bytes:
    """Bytes ``start`` to ``stop`` of a file. Raises ``RecipeError`` if its size has changed since it was found."""
    try:
        with open(file.path, "rb", buffering=0) as opened:
            if os.fstat(opened.fileno()).st_size != file.size:
                raise changed(file)
            opened.seek(start)
            return opened.read(stop - start)
    except OSError as error:
        raise RecipeError([unreadable(file.path, error)], "data") from None


def changed(file: TextFile) -> RecipeError:
    """The error about a file whose size is no longer that with which it was found."""
    return RecipeError([Problem(label(str(file.path)), "has changed since it was opened as data")], "data")


def _text_file(path: Path, root: Path) -> TextFile | Problem:
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            return Problem(label(str(path)), "not a regular file")
        if reason := next((why for end, why in NOT_READ.items() if path.name.lower().endswith(end)), None):
            return Problem(label(str(path)), reason)
        with open(path, "rb"):
            return TextFile(path, path.relative_to(root).as_posix(), status.st_size, status.st_mtime_ns)
    except OSError as error:
        return unreadable(path, error)


def _nonempty(files: Sequence[TextFile | Problem]) -> list[TextFile]:
    found = [file for file in files if isinstance(file, TextFile) and file.size]
    return sorted(found, key=lambda file: (file.name, file.path))


def _expand(pattern: str) -> tuple[Path, list[Path]]:
    """The paths that a pattern names, and the folder that their names are relative to."""
    path = Path(os.path.abspath(os.path.expanduser(pattern)))
    if path.is_dir():
        found = []
        for folder, folders, files in os.walk(path):
            folders[:] = [name for name in folders if not name.startswith(".")]
            found += [Path(folder, name) for name in files if not name.startswith(".")]
        return path, found
    if os.path.lexists(path):
        return path.parent, [path]
    root = _before_wildcard(path)
    if root == path:
        return root, []
    return root, [Path(match) for match in glob.glob(str(path), recursive=True) if not os.path.isdir(match)]


def _before_wildcard(path: Path) -> Path:
    """The part of a path before its first wildcard."""
    while glob.has_magic(str(path)):
        path = path.parent
    return path


def _why_none(pattern: str) -> str:
    """Why a pattern names no file."""
    given = Path(os.path.abspath(os.path.expanduser(pattern)))
    path = _before_wildcard(given)
    if given.is_dir():
        return "there is no file in this folder"
    if path.is_dir():
        return f"no file in {path} matches"
    while not path.parent.is_dir():
        path = path.parent
    near = nearest(path.name, sorted(os.listdir(path.parent)))
    return f"no such file or folder{near}" if path == given else f"there is no folder {path}{near}"


def unreadable(path: Path, error: OSError) -> Problem:
    """The problem of a file that the system does not let be read."""
    return Problem(label(str(path)), f"cannot be read: {error.strerror or error}")


def label(text: str) -> str:
    """A path as it stands in a message."""
    return show(text, 200).strip("'")
