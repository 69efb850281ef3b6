"""Building and loading the C kernels: the compiler, the cache, and why there may be none.

The C files of all folders are compiled together when a kernel is first used, for this machine's registers: once for
each of float32 and float64, and again for float32 with products of bfloat16 operands (``operands.h``). The result lies
in a cache under the hash of everything it was made from, so that a second process loads it at once and another machine
or version never finds it. Kernels for whole sequences share PyTorch's threads, or run on one thread where the
compiler's OpenMP is not the one PyTorch has loaded; kernels for a few tokens have threads of their own
(``thread_pool.h``). Where there is no compiler, operations run on their PyTorch backends.

Environment: ``CC`` names the compiler (default: the first of cc, gcc and clang); ``TITANS_BUILD_CACHE`` the cache's
folder (default: ``titans-build`` in the user's cache folder), which has to be writable by its owner alone.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import re
import shlex
import shutil
import signal
import struct
import subprocess
import time
from pathlib import Path
from typing import Any

import torch

from . import build_cache as cache

FLAGS = ("-std=gnu11", "-O3", "-fPIC", "-pthread", "-fno-math-errno", "-fno-trapping-math")
_ONE_THREAD = "static inline int omp_get_thread_num(void) { return 0; }\n"
"""Replaces ``omp.h`` where kernels are compiled without threads."""
_TEXT: dict[str, Any] = {"text": True, "errors": "replace"}  # compilers write in any language and encoding
BITS = {torch.float32: (32, 32), torch.float64: (64, 64), torch.bfloat16: (32, 16)}
"""Bits of the numbers, and of the operands of products. ``torch.bfloat16``: float32 tensors, bfloat16 operands."""

SECONDS = 180
"""For which a compiler may take to build a library; it takes 5 to 20."""

_log = logging.getLogger(__name__)


class NotBuilt(RuntimeError):
    """The kernels cannot be built or loaded here; the message says why."""


def library(dtype: torch.dtype) -> ctypes.CDLL:
    """The kernels whose products take operands of ``dtype``, built if necessary. Raises :class:`NotBuilt`."""
    found = _library(dtype)
    if found is None:
        raise NotBuilt(_failures[dtype])
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


_failures: dict[torch.dtype, str] = {}
"""Why there is no library."""


def _missing(dtype: torch.dtype) -> str | None:
    if not torch.compiler.is_compiling():  # a tracer cannot build it: the operator does, when it first runs
        _library(dtype)
    return _failures.get(dtype)


@functools.cache
def _library(dtype: torch.dtype) -> ctypes.CDLL | None:
    """Looked for once in a process."""
    try:
        return load(dtype)
    except NotBuilt as error:
        _failures[dtype] = str(error)
        return None


def load(dtype: torch.dtype) -> ctypes.CDLL:
    """The library from the cache, or built and put into it. Raises :class:`NotBuilt`, after a warning if one failed."""
    compiler = _compiler()
    if compiler is None:
        named = os.environ.get("CC")
        if named:
            raise NotBuilt(f"needs a C compiler: CC names {named!r}, which is not there")
        raise NotBuilt("needs a C compiler: install gcc or clang, or name one in CC")
    reasons: list[str] = []
    for threads in (True, False):
        try:
            found = _found_or_built(compiler, *BITS[dtype], threads)
        except subprocess.TimeoutExpired:
            reasons.insert(0, f"could not be built by {shlex.join(compiler)}: it takes too long")
            break
        except (OSError, subprocess.SubprocessError) as error:
            said = (getattr(error, "stderr", None) or str(error)).strip()
            first = said.splitlines()[0] if said else type(error).__name__
            reasons.append(f"could not be built by {shlex.join(compiler)}: {first}")
        except _Unusable as error:
            reasons.append(f"were built but cannot be loaded: {error}")
        else:
            if reasons:  # an OpenMP that PyTorch has not loaded (clang's), or a compiler without OpenMP
                _log.warning("the CPU kernels run on one thread, not on PyTorch's: with threads they %s", reasons[0])
            return found
    cache.warn_once(f"the CPU kernels {reasons[0]}; operations run on slower backends")
    raise NotBuilt(f"{reasons[0]}; TITANS_BUILD_CACHE names another folder, CC another compiler")


class _Unusable(Exception):
    """Why a library cannot be used."""


def _opened(path: Path, functions: list[str]) -> ctypes.CDLL:
    with path.open("rb") as file:
        header = file.read(64)
        if header[:5] == b"\x7fELF\x02" and len(header) == 64:
            # linkers write the table of sections last; a process that loads a file cut short is killed
            (table,), (size, sections) = struct.unpack_from("Q", header, 40), struct.unpack_from("HH", header, 58)
            if table + size * sections > file.seek(0, os.SEEK_END):
                raise _Unusable("a part of the file is missing")
    try:
        opened = ctypes.CDLL(str(path))
    except OSError as error:  # such as a folder mounted without the permission to execute
        raise _Unusable(str(error)) from None
    missing = [name for name in functions if not hasattr(opened, name)]
    if missing:
        raise _Unusable(f"it has no {', '.join(missing)}")
    return opened


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


def _found_or_built(compiler: list[str], bits: int, operand: int, threads: bool) -> ctypes.CDLL:
    here = Path(__file__).parents[1]
    sources = sorted([*here.rglob("*.c"), *here.rglob("*.h")])
    flags = [*FLAGS, "-mcpu=native" if platform.machine() in ("arm64", "aarch64") else "-march=native"]
    flags += ["-fopenmp"] if threads else []
    version = _run([[*compiler, "--version"]], SECONDS / 6)
    texts = [f"{s.relative_to(here)}\0{s.read_text()}" for s in sources] + ([] if threads else [_ONE_THREAD])
    functions = re.findall(r"^(?:int|void) (\w+)\(", "\n".join(texts), re.MULTILINE)
    made_from = "\0".join([version, _processor(), *flags, *texts])
    name = f"kernels-{bits}-{operand}-{hashlib.sha256(made_from.encode()).hexdigest()[:20]}.so"
    found = cache.find(name)
    if found is not None:
        return _opened(found, functions)
    what = f"float{bits}" + (f" with bfloat{operand} operands" if operand < bits else "")
    _log.warning("building the CPU kernels for %s with %s (once; a few seconds)", what, compiler[0])
    with cache.adding(cache.folder() / name) as made:
        scratch = made.parent
        if not threads:
            (scratch / "omp.h").write_text(_ONE_THREAD)
            flags += ["-I", str(scratch)]
        objects = {
            str(scratch / f"{'-'.join(source.relative_to(here).with_suffix('').parts)}.o"): str(source)
            for source in sources
            if source.suffix == ".c"
        }
        common = [*compiler, *flags, "-I", str(here), f"-DREAL={bits}", f"-DOPERAND={operand}", "-c"]
        _run([[*common, source, "-o", output] for output, source in objects.items()], SECONDS)
        # no -fopenmp here: its functions come from the library that PyTorch has loaded, and so do its threads
        _run([[*compiler, "-shared", "-pthread", *objects, "-lm", "-o", str(made)]], SECONDS)
        return _opened(made, functions)


def _run(commands: list[list[str]], seconds: float) -> str:
    """Run the commands, as many at a time as there are processors; what they print.

    Where one fails, or they take longer than ``seconds``, those that still run are killed with all their children.
    """
    end, running, printed = time.monotonic() + seconds, list[subprocess.Popen[str]](), ""

    def wait() -> str:
        process = running[0]
        output, errors = process.communicate(timeout=end - time.monotonic())
        running.pop(0)
        if process.returncode:
            raise subprocess.CalledProcessError(process.returncode, process.args, output, errors)
        return output

    try:
        for command in commands:
            if len(running) == (os.cpu_count() or 1):
                printed += wait()
            pipe = subprocess.PIPE
            running.append(
                subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, start_new_session=True, **_TEXT
                )
            )
        while running:
            printed += wait()
    except BaseException:
        for process in running:
            if os.name == "posix":
                os.killpg(process.pid, signal.SIGKILL)
            else:
                process.kill()
            process.wait()
        raise
    return printed


def _processor() -> str:
    """What ``-march=native`` depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return "\n".join(sorted({x for x in lines if x.startswith(("flags", "Features", "model name", "CPU part"))}))
