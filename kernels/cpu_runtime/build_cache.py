"""The folder of what was built: whole files only, and none that nobody uses any more.

Any number of processes share it. A file comes into it in one step, under a name that says all it was made from, and is
never changed. A process that finds one marks the day it did so; one that adds a new file removes those that nobody has
marked for a month, the leftovers of earlier versions. Who has already loaded a removed file keeps it.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
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


def folder() -> Path:
    """Where libraries wait: ``TITANS_BUILD_CACHE``, or the user's cache folder, or one of this process alone."""
    named = os.environ.get("TITANS_BUILD_CACHE")
    try:
        if named:
            place = Path(named)
        else:
            place = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "titans-build"
        place.mkdir(parents=True, exist_ok=True)
        if os.access(place, os.W_OK):
            return place
    except (OSError, RuntimeError):  # a file in its place, or a user without a home
        pass
    return _temporary()


def found(path: Path) -> bool:
    """Whether the library is there, and whole: a process that loads one cut short by a full disk is killed."""
    with contextlib.suppress(OSError):
        os.utime(path)  # marked before it is looked at, so that nobody removes it in between
    try:
        content = path.read_bytes()
    except OSError:
        return False
    return hashlib.sha256(content[:-32]).digest() == content[-32:]


@contextlib.contextmanager
def adding(path: Path) -> Iterator[Path]:
    """A new folder in which to build the library ``path``, under its name; it is put in place in the end."""
    with tempfile.TemporaryDirectory(prefix=_BUILDING, dir=path.parent) as scratch:
        made = Path(scratch) / path.name
        yield made
        with made.open("rb+") as file:
            # its hash, behind its end, where no loader looks
            digest = hashlib.sha256(file.read()).digest()
            file.write(digest)
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
