"""Building and loading the C kernels: the compiler, the cache, and why there may be none.

The sources lie next to this file and are compiled when a kernel is first wanted, for this machine's registers, once
for each of float32 and float64, and again for float32 where products take bfloat16 operands (``operands.py``). What was
built waits in a cache under the hash of everything it was made from, so a second process loads it at once, and another
machine or version never finds it. Nothing is linked but the C library: the kernels for whole sequences share PyTorch's
threads, or run on one where the compiler's OpenMP is not the one that PyTorch has loaded; those for a token have their
own (``pool.h``), as many as PyTorch is told to use. Where there is no compiler the operations run on their PyTorch
paths.

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
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from ..constant import constant
from . import build_cache as cache

FLAGS = ("-std=gnu11", "-O3", "-fPIC", "-pthread", "-fno-math-errno", "-fno-trapping-math")
_ONE_THREAD = "static inline int omp_get_thread_num(void) { return 0; }\n"
"""What stands in for ``omp.h`` where nothing is compiled for threads."""
_TEXT: dict[str, Any] = {"text": True, "errors": "replace"}  # compilers speak the user's language, in any encoding
BITS = {torch.float32: (32, 32), torch.float64: (64, 64), torch.bfloat16: (32, 16)}
"""Bits of the numbers and of the operands of products: of the kernels for float32 and float64 tensors, and of those for
float32 tensors whose products take bfloat16 operands."""

_log = logging.getLogger(__name__)


class NotBuilt(RuntimeError):
    """The kernels cannot be had here; the message says why."""


def library(dtype: torch.dtype) -> ctypes.CDLL:
    """The kernels with operands of ``dtype``, built if need be. Raises :class:`NotBuilt`."""
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
    if dtype not in (torch.float32, torch.float64):
        return f"takes float32 and float64, not {dtype}"
    if not plain:
        return "takes ordinary CPU tensors that nothing traces or transforms"
    return _missing(dtype)


@constant
def _missing(dtype: torch.dtype) -> str | None:
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
    reasons = []
    for threads in (True, False):
        try:
            found = _loaded(_built(compiler, *BITS[dtype], threads))
        except _Failed as error:
            _log.debug("the C kernels: %s", error)
            reasons.append(str(error))
            continue
        if reasons:  # an OpenMP that PyTorch has not loaded (clang's), or a compiler without any
            _log.warning("the CPU kernels run on one thread, not on PyTorch's: with threads they %s", reasons[0])
        return found
    return f"{reasons[0]}; TITANS_BUILD_CACHE names another folder, CC another compiler"


class _Failed(Exception):
    """What was tried and did not work: the rest of a sentence that begins with the kernels."""


def _loaded(path: Path) -> ctypes.CDLL:
    try:
        found = ctypes.CDLL(str(path))
        found.large_pages.argtypes = [ctypes.c_void_p, ctypes.c_int64]
        return found
    except OSError as error:  # above, or a folder nothing may run from
        raise _Failed(f"were built but cannot be loaded: {error}") from None


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


def _built(compiler: list[str], bits: int, operand: int, threads: bool) -> Path:
    """The path of the library, compiled now if nobody did before. Raises :class:`_Failed`."""
    try:
        return _build(compiler, bits, operand, threads)
    except (OSError, subprocess.SubprocessError) as error:
        said = (getattr(error, "stderr", None) or str(error)).strip()
        first = said.splitlines()[0] if said else type(error).__name__
        raise _Failed(f"could not be built by {shlex.join(compiler)}: {first}") from None


def _build(compiler: list[str], bits: int, operand: int, threads: bool) -> Path:
    here = Path(__file__).parents[1]
    sources = sorted([*here.rglob("*.c"), *here.rglob("*.h")])
    flags = [*FLAGS, "-mcpu=native" if platform.machine() in ("arm64", "aarch64") else "-march=native"]
    flags += ["-fopenmp"] if threads else []
    version = subprocess.run([*compiler, "--version"], capture_output=True, check=True, **_TEXT).stdout
    texts = [f"{s.relative_to(here)}\0{s.read_text()}" for s in sources] + ([] if threads else [_ONE_THREAD])
    made_from = "\0".join([version, _processor(), *flags, *texts])
    name = f"kernels-{bits}-{operand}-{hashlib.sha256(made_from.encode()).hexdigest()[:20]}.so"
    target = cache.folder() / name
    if cache.found(target):
        return target
    what = f"float{bits}" + (f" with bfloat{operand} operands" if operand < bits else "")
    _log.warning("building the CPU kernels for %s with %s (once; a few seconds)", what, compiler[0])
    with cache.adding(target) as made:
        scratch = made.parent
        if not threads:
            (scratch / "omp.h").write_text(_ONE_THREAD)
            flags += ["-I", str(scratch)]

        def compiled(source: Path) -> str:
            output = str(scratch / f"{'-'.join(source.relative_to(here).with_suffix('').parts)}.o")
            command = [
                *compiler,
                *flags,
                "-I",
                str(here),
                f"-DREAL={bits}",
                f"-DOPERAND={operand}",
                "-c",
                str(source),
                "-o",
                output,
            ]
            subprocess.run(command, capture_output=True, check=True, **_TEXT)
            return output

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(compiled, [source for source in sources if source.suffix == ".c"]))
        # without -fopenmp here: its functions are those of the library that PyTorch has loaded, and so are its threads
        link = [*compiler, "-shared", "-pthread", *objects, "-lm", "-o", str(made)]
        subprocess.run(link, capture_output=True, check=True, **_TEXT)
    return target


def _processor() -> str:
    """What ``-march=native`` depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return "\n".join(sorted({x for x in lines if x.startswith(("flags", "Features", "model name", "CPU part"))}))
