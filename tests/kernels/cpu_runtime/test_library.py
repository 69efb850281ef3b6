"""Building the C kernels: the compiler there is, the cache, and every way in which there may be none."""

import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from titans_build.kernels.cpu_runtime import library

built = pytest.mark.skipif(library._compiler() is None, reason="no C compiler")

MEMORY = """
import torch
from titans_build.kernels.memory import MemoryState, titans_memory
x, gate = torch.ones(1, 3, 1, 2), torch.full((1, 3, 1), 0.1)
y, _ = titans_memory(x, x, x, gate, gate, gate, MemoryState.fresh((torch.ones(1, 1, 2, 2),)), chunk=2)
print(y.sum().item())
"""


def python(code, **environment):
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done


def test_other_devices_and_dtypes_are_refused_without_building():
    assert "runs on a CPU, not on cuda" in library.refuse(device="cuda", dtype=torch.float32)
    assert "float32 and float64, not torch.bfloat16" in library.refuse(device="cpu", dtype=torch.bfloat16)


@pytest.mark.parametrize(
    "compiler,said",
    [
        ("/nowhere/cc", "CC names '/nowhere/cc', which is not there"),
        ('gcc "', "CC names"),
        ("false", "could not be built by false"),
    ],
)
def test_without_a_compiler_the_operation_runs_on_another_path(tmp_path, compiler, said):
    reason = (
        "import torch; from titans_build.kernels.cpu_runtime import library;"
        "print(library.refuse(device='cpu', dtype=torch.float32))"
    )
    environment = dict(CC=compiler, TITANS_BUILD_CACHE=str(tmp_path))
    assert said in python(reason, **environment).stdout
    assert float(python(MEMORY, **environment).stdout) == pytest.approx(float(python(MEMORY).stdout), rel=1e-5)
    assert not list(tmp_path.iterdir())


@built
def test_a_user_without_a_home(tmp_path):
    code = "import os; os.environ.pop('HOME', None); import pathlib\n"
    code += "def nobody(): raise RuntimeError('Could not determine home directory')\n"
    code += "pathlib.Path.home = nobody\n" + MEMORY
    assert "building" in python(code, XDG_CACHE_HOME="", TITANS_BUILD_CACHE="").stderr
    assert "building" not in python(MEMORY, TITANS_BUILD_CACHE=str(_warm(tmp_path))).stderr


def _warm(folder):
    python(MEMORY, TITANS_BUILD_CACHE=str(folder))
    return folder


@built
def test_built_once_and_found_again(tmp_path):
    first = python(MEMORY, TITANS_BUILD_CACHE=str(tmp_path))
    assert "building the CPU kernels for float32" in first.stderr
    made = sorted(tmp_path.iterdir())
    assert [path.suffix for path in made] == [".so"]  # nothing half made is left behind
    assert python(MEMORY, TITANS_BUILD_CACHE=str(tmp_path)).stderr == ""
    assert sorted(tmp_path.iterdir()) == made


@built
def test_two_processes_may_build_at_once(tmp_path):
    with ThreadPoolExecutor(2) as pool:
        done = list(pool.map(lambda _: python(MEMORY, TITANS_BUILD_CACHE=str(tmp_path)), range(2)))
    assert done[0].stdout == done[1].stdout
    assert len(list(tmp_path.iterdir())) == 1


@built
@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_read_only_cache(tmp_path):
    tmp_path.chmod(0o500)
    assert "building" in python(MEMORY, TITANS_BUILD_CACHE=str(tmp_path / "in")).stderr


@built
def test_a_file_in_place_of_the_cache(tmp_path):
    (tmp_path / "file").write_text("")
    assert "building" in python(MEMORY, TITANS_BUILD_CACHE=str(tmp_path / "file")).stderr


@built
def test_a_broken_file_in_the_cache_is_built_again(tmp_path):
    python(MEMORY, TITANS_BUILD_CACHE=str(tmp_path))
    (made,) = tmp_path.iterdir()
    made.write_bytes(made.read_bytes()[:1000])
    assert "building" in python(MEMORY, TITANS_BUILD_CACHE=str(tmp_path)).stderr


def a_compiler(folder, script):
    """A compiler of one's own around the real one, told not to optimize much: it has to be quick."""
    path = folder / "cc"
    path.write_text(f'#!/bin/sh\nreal={library._compiler()[0]}\n{script}\nexec $real "$@" -O1\n')
    path.chmod(0o755)
    return str(path)


@built
@pytest.mark.parametrize(
    "with_threads, said",
    [
        # what clang's OpenMP needs and PyTorch has not loaded
        ('case " $* " in *" -fopenmp "*) exec $real -include "$(dirname "$0")/omp_of_its_own.h" "$@" -O1 ;; esac',
         "cannot be loaded: .*__kmpc_fork_call"),
        ('case " $* " in *" -fopenmp "*) echo "unsupported option -fopenmp" >&2; exit 1 ;; esac',
         "could not be built by .*unsupported option -fopenmp"),
    ],
)  # fmt: skip
def test_a_compiler_with_another_openmp_or_none_builds_for_one_thread(tmp_path, with_threads, said):
    (tmp_path / "omp_of_its_own.h").write_text(
        "extern void __kmpc_fork_call(void);\nstatic void (*needed)(void) __attribute__((used)) = __kmpc_fork_call;\n"
    )
    environment = dict(CC=a_compiler(tmp_path, with_threads), TITANS_BUILD_CACHE=str(tmp_path / "cache"))
    code = MEMORY + "print(library.refuse(device='cpu', dtype=torch.float32))"
    done = python("from titans_build.kernels.cpu_runtime import library\n" + code, **environment)
    assert re.search(f"the CPU kernels run on one thread, .*: with threads they (were built but )?{said}", done.stderr)
    value, refused = done.stdout.split()
    assert refused == "None"
    assert float(value) == pytest.approx(float(python(MEMORY).stdout), rel=1e-5)


def age(path, days):
    before = time.time() - days * 24 * 3600
    os.utime(path, (before, before))


@built
def test_libraries_unused_for_a_month_are_removed_at_the_next_build(tmp_path):
    environment = dict(TITANS_BUILD_CACHE=str(tmp_path), CC=a_compiler(tmp_path, ""))
    old, recent, foreign = (tmp_path / f"{name}.so" for name in ("kernels-32-0123456789", "kernels-64-32-0a", "notes"))
    unfinished = tmp_path / "building-a1b2"
    unfinished.mkdir()
    for path in (old, recent, foreign, unfinished / "a.o"):
        path.write_text("")
    for path, days in ((old, 31), (recent, 29), (foreign, 400), (unfinished, 31)):
        age(path, days)
    python(MEMORY, **environment)
    assert not old.exists() and not unfinished.exists()
    assert recent.exists() and foreign.exists()
    (made,) = set(tmp_path.glob("*.so")) - {recent, foreign}
    age(made, 31)
    python(MEMORY, **environment)  # used again, and marked
    assert time.time() - made.stat().st_mtime < 24 * 3600
