"""Every Triton kernel compiles for every GPU it is made for, and fits: no GPU is needed to know."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

REPORT = Path(__file__).parents[3] / "benchmarks" / "kernel_resources.py"
SHARED = {"sm_80": 163, "sm_90": 227, "sm_100": 227, "gfx942": 64}
"""KiB of shared memory that one program can have."""
KERNELS = 16


def compiled(target, **options):
    """In a process of its own: where TRITON_INTERPRET is set, what ``triton.jit`` makes is no kernel to be compiled."""
    asked = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    command = [sys.executable, str(REPORT), "--json", "--target", target, *asked]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def assert_fits(rows, target, spilled):
    for row in rows:
        assert row["shared"] <= SHARED[target] * 1024, row
        assert row["spilled"] <= spilled, row


@pytest.mark.parametrize(
    "target", [target if target == "sm_90" else pytest.param(target, marks=pytest.mark.slow) for target in SHARED]
)
def test_a_small_memory(target):
    """Width, chunk and hidden units 16: at most 64 bytes of a thread are spilled."""
    rows = compiled(target, dim=16, hidden=16, chunk=16, operands="float32")
    assert len({row["kernel"] for row in rows}) == KERNELS
    assert_fits(rows, target, 64)


@pytest.mark.slow
@pytest.mark.parametrize("operands", ["bfloat16", "tf32"])
@pytest.mark.parametrize("target", SHARED)
def test_the_width_that_models_have(target, operands):
    """Width 64, chunk 64: at most 2 KiB of a thread are spilled, and products are of what they are asked to be."""
    rows = compiled(target, dim=64, hidden=128, chunk=64, operands=operands)
    assert_fits(rows, target, 2048)
    # the AMD kernels take TF32 in products of another name
    kinds = {"bfloat16": {"bf16"}, "tf32": {"tf32", "xf32"}}[operands]
    for row in rows:
        if "TOKENS" in row and "BLOCK" in row:  # a kernel of the memory with many tokens
            assert kinds & set(row["dot"].split()) or (operands == "tf32" and row["dot"] == "bf16"), row
            assert not {"f32", "f64"} & set(row["dot"].split()), row


@pytest.mark.slow
@pytest.mark.parametrize("operands", ["bfloat16", "float32"])
@pytest.mark.parametrize("target", SHARED)
def test_the_largest_memory(target, operands):
    """Heads of 128 numbers, four times as many hidden units, chunks of 128 tokens: what the kernels say they take."""
    assert_fits(compiled(target, dim=128, hidden=512, chunk=128, operands=operands), target, 2048)


@pytest.mark.parametrize(
    "sizes",
    [pytest.param(dict(layers=1, dim=64), marks=pytest.mark.slow), dict(dim=32, hidden=64)],
    ids=["one layer", "two layers"],
)
@pytest.mark.parametrize(
    "target", [target if target == "sm_90" else pytest.param(target, marks=pytest.mark.slow) for target in SHARED]
)
def test_a_state_that_stays(target, sizes):
    """The largest memories whose state stays in registers both ways: a thread spills at most 1 KiB, AMD's 2 KiB."""
    rows = compiled(target, **sizes, chunk=64, kernel="resident")
    assert [row["kernel"].rpartition(".")[2] for row in rows] == [
        "write_resident_kernel",
        "write_backward_resident_kernel",
    ]
    assert_fits(rows, target, 1024 if target.startswith("sm_") else 2048)


@pytest.mark.slow
def test_the_largest_state_that_stays():
    """Two layers, 64 x 64: forward alone, without a spill on the GPU it is made for."""
    rows = compiled("sm_90", dim=64, hidden=64, kernel="resident")
    assert [row["kernel"] for row in rows] == ["memory.triton.write_kernels.write_resident_kernel"]
    assert_fits(rows, "sm_90", 0)
