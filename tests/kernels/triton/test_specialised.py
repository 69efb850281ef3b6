"""What Triton makes of the arguments of a launch, for a GPU that is not there."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

HERE = Path(__file__).parent
SOURCES = HERE.parents[2] / "kernels"
KERNELS = 38


@pytest.fixture(scope="module")
def found():
    """Of a process of its own: where TRITON_INTERPRET is set, there are no kernels to be compiled."""
    done = subprocess.run([sys.executable, str(HERE / "front_end.py")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def test_sizes_of_one(found):
    """A size of 1 is a constant to Triton, and no number of its own."""
    every = {
        ".".join((*path.relative_to(SOURCES).with_suffix("").parts, name))
        for path in SOURCES.rglob("*.py")
        for name in re.findall(r"^@triton\.jit.*\ndef (\w*_kernel)\(", path.read_text(), re.MULTILINE)
    }
    assert len(every) == KERNELS
    assert set(found["kernels"]) == every


def test_float64_is_computed_in_float64(found):
    assert not found["single"]


def test_what_threads_still_have_to_load_is_not_stored_over(found):
    assert not found["early"]


def test_no_length_and_no_number_of_rows_compiles_a_kernel_again(found):
    assert not found["again"]
