"""Building and loading the C kernels: the compiler, the cache, and why there may be none.

The sources lie next to this file and are compiled when a kernel is first wanted, for this machine's registers, once
for each of float32 and float64. What was built waits in a cache under the hash of everything it was made from, so a
second process loads it at once, and another machine or version never finds it. Nothing is linked but the C library:
the kernels share PyTorch's threads. Where there is no compiler the operations run on their PyTorch paths.

Environment: ``CC`` names the compiler (default: cc, gcc or clang, whichever is found); ``TITANS_BUILD_CACHE`` the
folder of what was built (default: ``titans-build`` in the user's cache folder).
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

FLAGS = ("-std=gnu11", "-O3", "-fPIC", "-fopenmp", "-fno-math-errno", "-fno-trapping-math")
_TEXT: dict[str, Any] = {"text": True, "errors": "replace"}  # compilers speak the user's language, in any encoding
BITS = {torch.float32: 32, torch.float64: 64}

_log = logging.getLogger(__name__)


class NotBuilt(RuntimeError):
    """The kernels cannot be had here; the message says why."""


def library(dtype: torch.dtype) -> ctypes.CDLL:
    """The kernels for ``dtype``, built if need be. Raises :class:`NotBuilt`."""
    found = _library(dtype)
    if isinstance(found, str):
        raise NotBuilt(found)
    return found


def refuse(*, device: str, dtype: torch.dtype, plain: bool = True, **facts: object) -> str | None:
    """Why the kernels cannot run, or ``None``; the first question with a right device and dtype builds them.

    ``plain``: what ``kernel.plain`` says of the tensors.
    """
    if device != "cpu":
        return f"runs on a CPU, not on {device}"
    if dtype not in BITS:
        return f"takes float32 and float64, not {dtype}"
    if not plain:
        return "takes ordinary CPU tensors that nothing traces or transforms"
    if torch.compiler.is_compiling():
        return "cannot be traced by torch.compile"
    found = _library(dtype)
    return found if isinstance(found, str) else None


@functools.cache
def _library(dtype: torch.dtype) -> ctypes.CDLL | str:
    """The library, or why there is none: asked for once in a process."""
    compiler = _compiler()
    if compiler is None:
        named = os.environ.get("CC")
        if named:
            return f"needs a C compiler: CC names {named!r}, which is not there"
        return "needs a C compiler: install gcc or clang, or name one in CC"
    try:
        built = _built(compiler, BITS[dtype])
    except (OSError, subprocess.SubprocessError) as error:
        _log.debug("the C kernels: %s", error)
        said = (getattr(error, "stderr", None) or str(error)).strip()
        return f"could not be built by {shlex.join(compiler)}: {said.splitlines()[0] if said else type(error).__name__}"
    try:
        found = ctypes.CDLL(str(built))
        found.large_pages.argtypes = [ctypes.c_void_p, ctypes.c_int64]
        return found
    except OSError as error:  # an OpenMP that PyTorch has not loaded (clang's), or a folder nothing may run from
        return f"were built but cannot be loaded: {error}; TITANS_BUILD_CACHE names another folder, CC another compiler"


def _compiler() -> list[str] | None:
    named = os.environ.get("CC")
    if named:
        try:
            command = shlex.split(named)
        except ValueError:  # a quotation that is not closed
            return None
        return command if command and shutil.which(command[0]) else None
    found = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    return [found] if found else None


def _built(compiler: list[str], bits: int) -> Path:
    """The path of the library, compiled now if nobody did before."""
    here = Path(__file__).parent
    sources = sorted([*here.glob("*.c"), *here.glob("*.h")])
    flags = [*FLAGS, "-mcpu=native" if platform.machine() in ("arm64", "aarch64") else "-march=native"]
    version = subprocess.run([*compiler, "--version"], capture_output=True, check=True, **_TEXT).stdout
    made_from = "\0".join([version, _processor(), *flags, *(f"{s.name}\0{s.read_text()}" for s in sources)])
    name = f"kernels-{bits}-{hashlib.sha256(made_from.encode()).hexdigest()[:20]}.so"
    folder = _cache()
    target = folder / name
    if _sealed(target):
        return target
    _log.warning("building the CPU kernels for float%d with %s (once; a few seconds)", bits, compiler[0])
    with tempfile.TemporaryDirectory(dir=folder) as scratch:

        def compiled(source: Path) -> str:
            made = f"{scratch}/{source.stem}.o"
            command = [*compiler, *flags, f"-DREAL={bits}", "-c", str(source), "-o", made]
            subprocess.run(command, capture_output=True, check=True, **_TEXT)
            return made

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(compiled, [source for source in sources if source.suffix == ".c"]))
        # without -fopenmp here: its functions are those of the library that PyTorch has loaded, and so are its threads
        made = f"{scratch}/{name}"
        subprocess.run([*compiler, "-shared", *objects, "-lm", "-o", made], capture_output=True, check=True, **_TEXT)
        _seal(Path(made))
        os.replace(made, target)
    return target


def _seal(path: Path) -> None:
    """Writes the hash of a library behind its end, where no loader looks."""
    with path.open("rb+") as file:
        digest = hashlib.sha256(file.read()).digest()
        file.write(digest)


def _sealed(path: Path) -> bool:
    """Whether the library is there, and whole: a process that loads one cut short by a full disk is killed."""
    try:
        content = path.read_bytes()
    except OSError:
        return False
    return hashlib.sha256(content[:-32]).digest() == content[-32:]


def _processor() -> str:
    """What ``-march=native`` depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return "\n".join(sorted({x for x in lines if x.startswith(("flags", "Features", "model name", "CPU part"))}))


def _cache() -> Path:
    named = os.environ.get("TITANS_BUILD_CACHE")
    try:
        if named:
            folder = Path(named)
        else:
            folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "titans-build"
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    except (OSError, RuntimeError):  # a file in its place, or a user without a home
        pass
    return _temporary()


@functools.cache
def _temporary() -> Path:
    """Where the cache cannot be written: a folder of this process alone, so that nobody else can have put it there."""
    folder = tempfile.TemporaryDirectory(prefix="titans-build-")
    _held.append(folder)
    return Path(folder.name)


_held: list[tempfile.TemporaryDirectory[str]] = []
