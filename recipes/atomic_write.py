"""Writing files so that whoever reads them finds the old one or the new one, whole, whatever happens meanwhile."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def atomic_write(target: Path) -> Iterator[Path]:
    """Yield a temporary file that replaces ``target`` when the block succeeds.

    Of a link, what it points to is replaced. What is no file, such as a device, gets a copy and stays what it is.
    """
    target = target.resolve()
    if target.exists() and not target.is_file():
        # never handed out itself: a writer such as safetensors' puts a file of its own in the place of what it is given
        with tempfile.TemporaryDirectory() as folder:
            temporary = Path(folder, "content")
            yield temporary
            with open(temporary, "rb") as content, open(target, "wb") as device:
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


def _mode(target: Path) -> int:
    """The permissions that the target has, or that any new file gets: nobody's alone, unless it was before."""
    with contextlib.suppress(FileNotFoundError):
        return stat.S_IMODE(target.stat().st_mode)
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask


@contextlib.contextmanager
def making_folder(folder: Path) -> Iterator[None]:
    """The folder is there; it, and what had to be made above it, is gone again if the block fails with it empty."""
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
    """Make a rename in ``folder`` outlast a power cut, where the system can."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
