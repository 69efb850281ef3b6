"""Building and loading the C kernels: the compiler, the cache, and why there may be none.

The C files of all folders are compiled together when a kernel is first used, for this machine's registers: once for
each of float32 and float64, and again for float32 with products of bfloat16 operands (``operands.h``). The result lies
in a cache under the hash of everything it was made from, so that a second process loads it at once and another machine
or version never finds it. Kernels for whole sequences share PyTorch's threads, or run on one thread where the
compiler's OpenMP is not the one PyTorch has loaded; kernels for a few tokens have threads of their own
(``thread_pool.h``). Where there is no compiler, operations run on their PyTorch backends.

Environment: ``CC`` names the compiler (default: the first of cc, gcc and clang); ``TITANS_BUILD_CACHE`` the cache's
folder (default: ``titans-build`` in the user's cache folder).
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

from ..custom_op import constant
from . import build_cache as cache

FLAGS = ("-std=gnu11", "-O3", "-fPIC", "-pthread", "-fno-math-errno", "-fno-trapping-math")
_ONE_THREAD = "static inline int omp_get_thread_num(void) { return 0; }\n"
"""Replaces ``omp.h`` where kernels are compiled without threads."""
_TEXT: dict[str, Any] = {"text": True, "errors": "replace"}  # compilers write in any language and encoding
BITS = {torch.float32: (32, 32), torch.float64: (64, 64), torch.bfloat16: (32, 16)}
"""Bits of the numbers, and of the operands of products. ``torch.bfloat16``: float32 tensors, bfloat16 operands."""

_log = logging.getLogger(__name__)


class NotBuilt(RuntimeError):
    """The kernels cannot be built or loaded here; the message says why."""


def library(dtype: torch.dtype) -> ctypes.CDLL:
    """The kernels whose products take operands of ``dtype``, built if necessary. Raises :class:`NotBuilt`."""
    found = _library(dtype)
    if isinstance(found, str):
        raise NotBuilt(found)
    return found


def refuse(*, device: str, dtype: torch.dtype, plain: bool = True, same: bool = True, **facts: object) -> str | None:
    """Why the kernels cannot run, or ``None``; the first call with a device and dtype that fit builds them.

    ``plain``: ``is_plain_cpu_tensor`` of the tensors. ``same``: they all have one dtype.
    """
    if device != "cpu":
        return f"runs on a CPU, not on {device}"
    if dtype not in (torch.float32, torch.float64):
        return f"takes float32 and float64, not {dtype}"
    if not plain:
        return "takes ordinary CPU tensors that nothing traces or transforms"
    if not same:
        return "takes one dtype"
    return _missing(dtype)


@constant
def _missing(dtype: torch.dtype) -> str | None:
    found = _library(dtype)
    return found if isinstance(found, str) else None


@functools.cache
def _library(dtype: torch.dtype) -> ctypes.CDLL | str:
    """The library, or why there is none; looked for once in a process."""
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
        if reasons:  # an OpenMP that PyTorch has not loaded (clang's), or a compiler without OpenMP
            _log.warning("the CPU kernels run on one thread, not on PyTorch's: with threads they %s", reasons[0])
        return found
    return f"{reasons[0]}; TITANS_BUILD_CACHE names another folder, CC another compiler"


class _Failed(Exception):
    """Why building or loading failed; the message continues a sentence that begins with "the kernels"."""


def _loaded(path: Path) -> ctypes.CDLL:
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:  # such as a folder mounted without the permission to execute
        raise _Failed(f"were built but cannot be loaded: {error}") from None


def _compiler() -> list[str] | None:
    named = os.environ.get("CC")
    if named:
        try:
            command = shlex.split(named)
        except ValueError:  # an unclosed quotation
            return None
        return command if command and shutil.which(command[0]) else None
    found = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    return [found] if found else None


def _built(compiler: list[str], bits: int, operand: int, threads: bool) -> Path:
    """The path of the library, compiled if it is not in the cache. Raises :class:`_Failed`."""
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
            defined = ["-I", str(here), f"-DREAL={bits}", f"-DOPERAND={operand}"]
            command = [*compiler, *flags, *defined, "-c", str(source), "-o", output]
            subprocess.run(command, capture_output=True, check=True, **_TEXT)
            return output

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(compiled, [source for source in sources if source.suffix == ".c"]))
        # no -fopenmp here: its functions come from the library that PyTorch has loaded, and so do its threads
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
