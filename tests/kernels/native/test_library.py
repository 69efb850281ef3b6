"""Building the C kernels: the compiler there is, the cache, and every way in which there may be none."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from titans_build.kernels.native import library

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
        "import torch; from titans_build.kernels.native import library;"
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
def test_a_cache_that_cannot_be_written_is_done_without(tmp_path):
    tmp_path.chmod(0o500)
    assert "building" in python(MEMORY, TITANS_BUILD_CACHE=str(tmp_path / "in")).stderr


@built
def test_a_file_where_the_cache_should_be_is_done_without(tmp_path):
    (tmp_path / "file").write_text("")
    assert "building" in python(MEMORY, TITANS_BUILD_CACHE=str(tmp_path / "file")).stderr


@built
def test_a_broken_file_in_the_cache_is_built_again(tmp_path):
    python(MEMORY, TITANS_BUILD_CACHE=str(tmp_path))
    (made,) = tmp_path.iterdir()
    made.write_bytes(made.read_bytes()[:1000])
    assert "building" in python(MEMORY, TITANS_BUILD_CACHE=str(tmp_path)).stderr
