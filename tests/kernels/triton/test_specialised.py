"""What Triton makes of the arguments of a launch: a size of 1 is a constant to it, and no number of its own."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

HERE = Path(__file__).parent
SOURCES = HERE.parents[2] / "kernels"
KERNELS = 18


def test_sizes_of_one():
    """Every kernel, in a process of its own: where TRITON_INTERPRET is set, there are none to be compiled."""
    done = subprocess.run([sys.executable, str(HERE / "front_end.py")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    every = {
        ".".join((*path.relative_to(SOURCES).with_suffix("").parts, name))
        for path in SOURCES.rglob("*.py")
        for name in re.findall(r"^@triton\.jit\ndef (\w*_kernel)\(", path.read_text(), re.MULTILINE)
    }
    assert len(every) == KERNELS
    assert set(done.stdout.splitlines()) == every
