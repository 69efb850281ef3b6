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
"""Age from which the temporary files of a process count as those of a killed one, where the system has no locks."""
TEMPORARY = re.compile(r"\.(?P<target>.+)\.[0-9a-f]{16}\.tmp", re.DOTALL)
"""Names of the folders of temporary files. In earlier versions they were files."""


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
    it. What killed processes left beside ``target`` is removed.
    """
    target = target.resolve()
    # in a folder of its own, since writers such as that of safetensors make temporary files beside the file
    if target.exists() and not target.is_file():
        with tempfile.TemporaryDirectory() as folder:
            temporary = Path(folder, "content")
            yield temporary
            with open(temporary, "rb") as content, open(target, "wb", opener=_without_waiting) as device:
                os.set_blocking(device.fileno(), True)
                shutil.copyfileobj(content, device)
        return
    with _temporary_folder(target) as private:
        temporary = private / "content"
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, _mode(target))
        os.replace(temporary, target)
    sync_folder(target.parent)
    remove_stale(target.parent, target.name[:200])


@contextlib.contextmanager
def _temporary_folder(target: Path) -> Iterator[Path]:
    """A folder beside ``target``, which is locked as long as this process lives, and removed afterwards."""
    while True:
        folder = target.parent / f".{target.name[:200]}.{secrets.token_hex(8)}.tmp"
        folder.mkdir()
        with locked_folder(folder):
            if not folder.exists():  # removed before it was locked
                continue
            try:
                yield folder
            finally:
                shutil.rmtree(folder, ignore_errors=True)
            return


@contextlib.contextmanager
def locked_folder(folder: Path, *, wait: bool = True) -> Iterator[bool]:
    """Keep other processes out of a ``with`` block of the same folder. Waits for them, unless ``wait=False``.

    Yields whether the folder is locked, which it is not where the system has no such locks. Raises ``BlockingIOError``
    if another process is inside, with ``wait=False``.
    """
    with contextlib.ExitStack() as stack:
        locked = False
        try:
            import fcntl

            handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
            stack.callback(os.close, handle)
            fcntl.flock(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
            locked = True
        except BlockingIOError:
            raise
        except (ImportError, OSError):
            pass
        yield locked


def remove_stale(folder: Path, target: str | None = None) -> None:
    """Remove the temporary files of killed processes in ``folder``, or only those of the file ``target``."""
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            found = TEMPORARY.fullmatch(entry.name)
            if found is None or target not in (None, found["target"]):
                continue
            with contextlib.suppress(OSError), locked_folder(Path(entry.path), wait=False) as locked:
                is_folder = entry.is_dir(follow_symlinks=False)
                if (locked and is_folder) or is_old(entry.stat(follow_symlinks=False)):
                    shutil.rmtree(entry.path) if is_folder else os.unlink(entry.path)


def is_old(found: os.stat_result) -> bool:
    """Whether a file has not changed for ``STALE_SECONDS``."""
    return found.st_mtime <= time.time() - STALE_SECONDS


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
