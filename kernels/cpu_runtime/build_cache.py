"""The folder of what was built: whole files only, and none that nobody uses any more.

Any number of processes share it. A file comes into it in one step, under a name that says all it was made from, and is
never changed. A process that finds one marks the day it did so; one that adds a new file removes those that nobody has
marked for a month, the leftovers of earlier versions. Who has already loaded a removed file keeps it.

A library is code, so only folders and files that belong to the user or to root, and that nobody else may write, are
read. Such a cache may be read-only.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

UNUSED_SECONDS = 30 * 24 * 3600
"""Age of the last mark at which a file is taken for one that nobody uses."""

_BUILDING = "building-"
_OURS = re.compile(rf"kernels-[0-9a-z-]+\.so|{_BUILDING}\w+")

_log = logging.getLogger(__name__)


def folder() -> Path:
    """A folder for new files: the cache, or one of this process alone where it cannot be written or trusted."""
    with contextlib.suppress(OSError, RuntimeError):  # a file in its place, or a user without a home
        place = _named()
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
        if os.access(place, os.W_OK) and _is_trusted(place):
            return place
    return _temporary()


def find(name: str) -> Path | None:
    """The library of that name in the cache, if it is there, can be trusted, and is whole.

    A process that loads one cut short by a full disk is killed.
    """
    with contextlib.suppress(OSError, RuntimeError):
        path = _named() / name
        if path.is_file() and _is_trusted(path.parent) and _is_trusted(path):
            with contextlib.suppress(OSError):
                os.utime(path)  # marked before it is looked at, so that nobody removes it in between
            content = path.read_bytes()
            if hashlib.sha256(content[:-32]).digest() == content[-32:]:
                return path
    return None


def _named() -> Path:
    """``TITANS_BUILD_CACHE``, or ``titans-build`` in the user's cache folder; ``RuntimeError`` without a home."""
    named = os.environ.get("TITANS_BUILD_CACHE")
    return Path(named or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "titans-build")


def _is_trusted(path: Path) -> bool:
    """Whether nobody but this user and root can have written the file, or the folder's list of files."""
    if os.name != "posix":
        return True
    status = path.stat()
    if status.st_uid not in (0, os.geteuid()):
        warn_once(f"{path} belongs to another user, so nothing is loaded from it: TITANS_BUILD_CACHE names a folder")
    elif status.st_mode & 0o022:
        warn_once(f"{path} is writable by other users, so nothing is loaded from it: chmod go-w {path}")
    else:
        return True
    return False


@functools.cache
def warn_once(message: str) -> None:
    """Log a warning, the first time that this process has it."""
    _log.warning(message)


@contextlib.contextmanager
def adding(path: Path) -> Iterator[Path]:
    """A new folder in which to build the library ``path``, under its name; it is put in place at the end.

    An exception, or the end of the process, leaves nothing under that name.
    """
    with tempfile.TemporaryDirectory(prefix=_BUILDING, dir=path.parent) as scratch:
        made = Path(scratch) / path.name
        yield made
        with made.open("rb+") as file:
            # its hash, behind its end, where no loader looks
            digest = hashlib.sha256(file.read()).digest()
            file.write(digest)
        made.chmod(0o644)  # compilers add what the umask allows
        os.replace(made, path)
    _remove_unused(path.parent)


def _remove_unused(place: Path) -> None:
    with contextlib.suppress(OSError):  # another process may remove the same ones
        for path in place.iterdir():
            if not _OURS.fullmatch(path.name):
                continue
            with contextlib.suppress(OSError):
                if path.stat().st_mtime < time.time() - UNUSED_SECONDS:
                    if path.is_dir():
                        shutil.rmtree(path, ignore_errors=True)
                    else:
                        path.unlink()


@functools.cache
def _temporary() -> Path:
    """Where the cache cannot be written: a folder of this process alone, so that nobody else can have put it there."""
    made = tempfile.TemporaryDirectory(prefix="titans-build-")
    _held.append(made)
    return Path(made.name)


_held: list[tempfile.TemporaryDirectory[str]] = []
