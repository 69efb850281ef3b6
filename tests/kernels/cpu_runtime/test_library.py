"""Building the C kernels: the compiler there is, the cache, and every way in which there may be none."""

import errno
import hashlib
import os
import pathlib
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from titans_build.kernels.cpu_runtime import build_cache, library

built = pytest.mark.skipif(library._compiler() is None, reason="no C compiler")
root = pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="only root gives files away")
STRANGER = 12345

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


def script(path, text):
    path.write_text("#!/bin/sh\n" + text)
    path.chmod(0o755)
    return str(path)


@pytest.fixture(scope="module")
def expected():
    """What the memory prints."""
    return pytest.approx(float(python(MEMORY).stdout), rel=1e-5)


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """A compiler that is told not to optimize much, and a library that it made."""
    folder = tmp_path_factory.mktemp("real")
    compiler = script(folder / "cc", f'exec {library._compiler()[0]} "$@" -O0\n')
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CC", compiler)
        patch.setenv("TITANS_BUILD_CACHE", str(folder))
        library.load(torch.float32)
    return compiler, next(folder.glob("*.so"))


class Builds:
    """Loads the kernels in this process, with a compiler that only copies, and a cache of its own."""

    def __init__(self, folder, made, patch, log):
        self.cache, self.made, self.patch, self.log = folder / "cache", made, patch, log
        self.folder = folder
        patch.setenv("TITANS_BUILD_CACHE", str(self.cache))
        self.compiler()

    def compiler(self, link='cp {made} "$last"', compile=': > "$last"', version="echo one"):
        """What it does for ``--version``, for a file, and for the library; ``$last`` is the output."""
        cases = f"*\\ --version\\ *) {version};; *\\ -shared\\ *) {link};; *) {compile};;".replace(
            "{made}", str(self.made)
        )
        self.patch.setenv("CC", script(self.folder / "cc", f'for last; do :; done\ncase " $* " in {cases} esac\n'))

    def load(self):
        """The path of the library that is loaded, what was logged, and whether anything was built."""
        self.log.clear()
        build_cache.warn_once.cache_clear()
        path = pathlib.Path(library.load(torch.float32)._name)
        return path, self.log.text, "building" in self.log.text

    def fails(self):
        """The reason, and what was logged."""
        self.log.clear()
        build_cache.warn_once.cache_clear()
        with pytest.raises(library.NotBuilt) as error:
            library.load(torch.float32)
        return str(error.value), self.log.text

    def file(self):
        (path,) = self.cache.iterdir()  # nothing half made is left behind
        return path

    def replace(self, content):
        """Put another file in place of the library: this process has loaded the one that is there."""
        path = self.file()
        path.unlink()
        path.write_bytes(content)


@pytest.fixture
def builds(tmp_path, real, monkeypatch, caplog):
    return Builds(tmp_path, real[1], monkeypatch, caplog)


def test_other_devices_and_dtypes_are_refused_without_building():
    assert "runs on a CPU, not on cuda" in library.refuse(device="cuda", dtype=torch.float32)
    assert "float32 and float64, not torch.bfloat16" in library.refuse(device="cpu", dtype=torch.bfloat16)


# -- compilers ---------------------------------------------------------------------------------------------------------


@built
def test_the_real_compiler_builds_what_runs_and_nothing_else_is_left(real, expected):
    done = python(MEMORY, CC=real[0], TITANS_BUILD_CACHE=str(real[1].parent))
    assert done.stderr == ""
    assert float(done.stdout) == expected
    assert sorted(path.name for path in real[1].parent.iterdir()) == ["cc", real[1].name]


@pytest.mark.parametrize("compiler", ["/nowhere/cc", 'gcc "'])
def test_without_a_compiler(monkeypatch, compiler):
    monkeypatch.setenv("CC", compiler)
    with pytest.raises(library.NotBuilt, match="needs a C compiler: CC names"):
        library.load(torch.float32)


def test_where_the_kernels_cannot_be_built_an_operation_says_so_once_and_runs_on_another_path(tmp_path, expected):
    twice = MEMORY + "titans_memory(*[t.double() for t in (x, x, x, gate, gate, gate)], MemoryState.fresh("
    twice += "(torch.ones(1, 1, 2, 2).double(),)), chunk=2)"
    done = python(twice, CC="false", TITANS_BUILD_CACHE=str(tmp_path))
    assert done.stderr.count("could not be built by false") == done.stderr.count("slower backends") == 1
    assert float(done.stdout) == expected
    assert not list(tmp_path.iterdir())


def a_compiler(folder, compiler, script_):
    """A compiler of one's own around the real one."""
    return script(folder / "wrapped", f'real={compiler}\n{script_}\nexec $real "$@"\n')


@built
@pytest.mark.parametrize(
    "with_threads, said",
    [
        # what clang's OpenMP needs and PyTorch has not loaded
        pytest.param(
            'case " $* " in *" -fopenmp "*) exec $real -include "$(dirname "$0")/omp_of_its_own.h" "$@" ;; esac',
            "cannot be loaded: .*__kmpc_fork_call", marks=pytest.mark.slow),
        ('case " $* " in *" -fopenmp "*) echo "unsupported option -fopenmp" >&2; exit 1 ;; esac',
         "could not be built by .*unsupported option -fopenmp"),
    ],
)  # fmt: skip
def test_a_compiler_with_another_openmp_or_none_builds_for_one_thread(tmp_path, real, with_threads, said, expected):
    (tmp_path / "omp_of_its_own.h").write_text(
        "extern void __kmpc_fork_call(void);\nstatic void (*needed)(void) __attribute__((used)) = __kmpc_fork_call;\n"
    )
    environment = dict(CC=a_compiler(tmp_path, real[0], with_threads), TITANS_BUILD_CACHE=str(tmp_path / "cache"))
    code = MEMORY + "print(library.refuse(device='cpu', dtype=torch.float32))"
    done = python("from titans_build.kernels.cpu_runtime import library\n" + code, **environment)
    assert re.search(f"the CPU kernels run on one thread, .*: with threads they (were built but )?{said}", done.stderr)
    value, refused = done.stdout.split()
    assert refused == "None"
    assert float(value) == expected


@built
@pytest.mark.parametrize("when", ["version", "compile", "link"])
def test_a_compiler_that_hangs_is_stopped_with_its_children(builds, when, monkeypatch):
    monkeypatch.setattr(library, "SECONDS", 3.0)
    marks = builds.folder / "children"
    marks.mkdir()
    builds.compiler(**{when: f"sleep 100 & echo > {marks}/$!; wait"})
    start = time.monotonic()
    reason, said = builds.fails()
    assert time.monotonic() - start < 20
    assert "takes too long" in reason and said.count("takes too long") == 1
    assert marks.iterdir() and not any(_runs(int(mark.name)) for mark in marks.iterdir())
    assert not builds.cache.exists() or not list(builds.cache.iterdir())


def _runs(process):
    try:
        state = pathlib.Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


@built
@pytest.mark.parametrize(
    "link, said",
    [
        ('head -c 150000 {made} > "$last"', "a part of the file is missing"),
        ('head -c 40 {made} > "$last"', "cannot be loaded"),
        (': > "$last"', "cannot be loaded"),
        (":", "No such file"),
        ('{real} -shared -x c /dev/null -o "$last"', "it has no .*memory_run"),
        ('echo "No space left on device" >&2; head -c 1000 {made} > "$last"; exit 1', "No space left on device"),
        ('head -c 1000 {made} > "$last"; kill -9 $$', "SIGKILL"),
    ],
)
def test_a_library_that_is_not_whole_is_neither_loaded_nor_cached(builds, real, link, said):
    builds.compiler(link=link.replace("{real}", real[0]))
    reason, log = builds.fails()
    assert re.search(said, reason) and log.count("slower backends") == 1
    assert list(builds.cache.iterdir()) == []
    builds.compiler()
    assert builds.load()[2] and builds.file()


@built
def test_a_disk_that_is_full_at_the_end(builds, monkeypatch):
    def full(*paths):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    assert "No space left on device" in builds.fails()[0]
    assert list(builds.cache.iterdir()) == []


# -- the cache ---------------------------------------------------------------------------------------------------------


@built
def test_built_once_and_found_again(builds):
    path, said, made = builds.load()
    assert made and path.parent.parent == builds.cache and "building the CPU kernels for float32" in said
    assert builds.load() == (builds.file(), "", False)
    assert builds.cache.stat().st_mode & 0o777 == 0o700
    assert builds.file().stat().st_mode & 0o022 == 0
    builds.compiler(version="echo another compiler")
    assert builds.load()[2] and len(list(builds.cache.iterdir())) == 2


@built
def test_two_may_build_at_once(builds):
    builds.compiler(link='sleep 0.5; cp {made} "$last"')
    with ThreadPoolExecutor(2) as pool:
        assert all(pool.map(lambda _: library.load(torch.float32), range(2)))
    assert builds.file()


@built
def test_a_user_without_a_home_and_a_file_in_place_of_the_cache(builds, monkeypatch):
    builds.cache.write_text("")
    path, _, made = builds.load()
    assert made and builds.folder not in path.parents

    def nobody():
        raise RuntimeError("Could not determine home directory")

    monkeypatch.setattr(pathlib.Path, "home", nobody)
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("TITANS_BUILD_CACHE", "")
    assert builds.load()[2]


@built
@pytest.mark.parametrize("size", [1000, 32, 0])
def test_a_broken_file_in_the_cache_is_built_again(builds, size):
    builds.load()
    builds.replace(builds.file().read_bytes()[:size])
    assert builds.load()[2]
    assert not builds.load()[2]


@built
def test_a_read_only_cache_is_used_where_it_is_warm(builds, monkeypatch):
    builds.load()
    builds.cache.chmod(0o500)
    if os.geteuid() == 0:  # root writes everywhere
        monkeypatch.setattr(os, "access", lambda path, mode, **_: mode != os.W_OK)
        monkeypatch.setattr(os, "geteuid", lambda: STRANGER)  # a cache that root made for all users
    assert builds.load() == (builds.file(), "", False)
    builds.compiler(version="echo another compiler")
    path, _, made = builds.load()
    assert made and builds.cache not in path.parents and builds.file()
    builds.cache.chmod(0o700)


@pytest.fixture
def planted(builds, real):
    """A library in the cache that leaves a mark where it is loaded, whole and under the right name."""
    builds.load()
    mark = builds.folder / "loaded"
    source = builds.folder / "planted.c"
    source.write_text(
        f'#include <stdio.h>\n__attribute__((constructor)) static void f(void) {{ fclose(fopen("{mark}", "w")); }}\n'
    )
    subprocess.run([real[0], "-shared", "-fPIC", str(source), "-o", str(source.with_suffix(".so"))], check=True)
    content = source.with_suffix(".so").read_bytes()
    builds.replace(content + hashlib.sha256(content).digest())
    return mark


def other_owner(path):
    os.chown(path, STRANGER, -1)


def group_writes(path):
    path.chmod(path.stat().st_mode | 0o020)


def all_write(path):
    path.chmod(0o1777 if path.is_dir() else 0o666)


@built
@pytest.mark.parametrize("change", [pytest.param(other_owner, marks=root), group_writes, all_write])
def test_a_file_that_others_may_have_written_is_built_again(builds, planted, change):
    change(builds.file())
    _, said, made = builds.load()
    assert made and not planted.exists()
    assert said.count("nothing is loaded from it") == 1 and str(builds.file()) in said
    assert builds.load() == (builds.file(), "", False) and not planted.exists()


@built
@pytest.mark.parametrize("change", [pytest.param(other_owner, marks=root), group_writes, all_write])
@pytest.mark.parametrize("readable", [True, False])
def test_a_folder_in_which_others_may_write_is_not_used(builds, planted, change, readable):
    change(builds.cache)
    if not readable:
        builds.file().unlink()
    before = list(builds.cache.iterdir())
    path, said, made = builds.load()
    assert made and builds.folder not in path.parents and not planted.exists()
    assert said.count("nothing is loaded from it") == 1 and str(builds.cache) in said
    assert list(builds.cache.iterdir()) == before


@built
def test_what_is_no_file_is_not_opened(builds):
    builds.load()
    path = builds.file()
    path.unlink()
    os.mkfifo(path)  # reading it would wait for a writer
    assert builds.load()[2]
    assert builds.load() == (path, "", False)


def age(path, days):
    before = time.time() - days * 24 * 3600
    os.utime(path, (before, before))


@built
def test_libraries_unused_for_a_month_are_removed_at_the_next_build(builds):
    builds.cache.mkdir()
    old, recent, foreign = (
        builds.cache / f"{name}.so" for name in ("kernels-32-0123456789", "kernels-64-32-0a", "notes")
    )
    unfinished = builds.cache / "building-a1b2"
    unfinished.mkdir()
    for path in (old, recent, foreign, unfinished / "a.o"):
        path.write_text("")
    for path, days in ((old, 31), (recent, 29), (foreign, 400), (unfinished, 31)):
        age(path, days)
    builds.load()
    assert not old.exists() and not unfinished.exists()
    assert recent.exists() and foreign.exists()
    (made,) = set(builds.cache.glob("*.so")) - {recent, foreign}
    age(made, 31)
    builds.load()  # used again, and marked
    assert time.time() - made.stat().st_mtime < 24 * 3600
