"""Atomic replacement of files: a reader finds the complete old file or the complete new one at any time.

Reading and writing do not wait at a named pipe where a file is expected.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

STALE_SECONDS = 3600
"""Age from which the temporary file of a killed process is removed. A younger one may belong to a running one."""
TEMPORARY = re.compile(r"\.(?P<target>.+)\.[0-9a-f]{16}\.tmp", re.DOTALL)
"""Names of temporary files."""


def read_regular(path: Path, limit: int = -1) -> bytes:
    """The first ``limit`` bytes of a file, or all of them. Raises ``OSError``, also for what is not a regular file."""
    with open(path, "rb", opener=_without_waiting) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(errno.EINVAL, "not a regular file")
        return file.read(limit)


def _without_waiting(path: str, flags: int) -> int:
    """Open a file. A named pipe is opened, or refused if nothing reads it, without waiting for its other end."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


@contextlib.contextmanager
def atomic_write(target: Path) -> Iterator[Path]:
    """Yield a temporary file that replaces ``target`` when the block succeeds.

    For a link, the file it points to is replaced. For a device or a pipe that is being read, the content is copied to
    it. Temporary files that killed processes left beside ``target`` are removed once they are old.
    """
    target = target.resolve()
    if target.exists() and not target.is_file():
        # not yielded itself: writers such as that of safetensors replace the file at the path they are given
        with tempfile.TemporaryDirectory() as folder:
            temporary = Path(folder, "content")
            yield temporary
            with open(temporary, "rb") as content, open(target, "wb", opener=_without_waiting) as device:
                os.set_blocking(device.fileno(), True)
                shutil.copyfileobj(content, device)
        return
    temporary = target.parent / f".{target.name[:200]}.{secrets.token_hex(8)}.tmp"
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, _mode(target))
        os.replace(temporary, target)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    sync_folder(target.parent)
    remove_stale(target.parent, target.name[:200])


def remove_stale(folder: Path, target: str | None = None, seconds: float = STALE_SECONDS) -> None:
    """Remove temporary files older than ``seconds`` in ``folder``, or only those of the file ``target``."""
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            found = TEMPORARY.fullmatch(entry.name)
            if found is not None and target in (None, found["target"]):
                with contextlib.suppress(OSError):
                    if entry.stat(follow_symlinks=False).st_mtime <= time.time() - seconds:
                        os.unlink(entry.path)


def _mode(target: Path) -> int:
    """The permissions of the target, or those of a new file."""
    with contextlib.suppress(FileNotFoundError):
        return stat.S_IMODE(target.stat().st_mode)
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask


@contextlib.contextmanager
def making_folder(folder: Path) -> Iterator[None]:
    """Create ``folder`` and its parents. If the block fails, those that were created and are empty are removed."""
    missing = [place for place in (folder, *folder.parents) if not place.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for place in missing:
            with contextlib.suppress(OSError):
                place.rmdir()
        raise


def sync_folder(folder: Path) -> None:
    """Make a rename in ``folder`` durable, where the system supports it."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
