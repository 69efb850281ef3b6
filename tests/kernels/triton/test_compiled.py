"""Every Triton kernel compiles for every GPU it is made for, and fits: no GPU is needed to know."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

SHARED = {"sm_80": 163, "sm_90": 227, "sm_100": 227, "gfx942": 64}
"""KiB of shared memory that one program can have."""


def compiled(*arguments):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(Path(__file__).with_name("compile_kernels.py")), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize(
    "target", [target if target == "sm_90" else pytest.param(target, marks=pytest.mark.slow) for target in SHARED]
)
def test_a_small_memory(target):
    """Width, chunk and hidden units 16: at most 64 bytes of a thread are spilled."""
    rows = compiled(16, 16, 16, "float32", target)
    assert len({row["kernel"] for row in rows}) == 8
    for row in rows:
        assert row["shared"] <= SHARED[target] * 1024, row
        assert (row["spilled"] or 0) <= 64, row


@pytest.mark.slow
@pytest.mark.parametrize("target", SHARED)
def test_the_width_that_models_have(target):
    """Width 64, chunk 64, bfloat16 operands, hidden units 32 at a time: at most 2 KiB of a thread are spilled."""
    for row in compiled(64, 64, 32, "bfloat16", target):
        assert row["shared"] <= SHARED[target] * 1024, row
        assert (row["spilled"] or 0) <= 2048, row
