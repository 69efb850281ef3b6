"""Every Triton kernel compiles for every GPU it is made for, and fits: no GPU is needed to know."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

import titans_build as tb
from titans_build.recipes.loading import packaged_names

pytest.importorskip("triton")

REPORT = Path(__file__).parents[3] / "benchmarks" / "kernel_resources.py"
SHARED = {"sm_80": 163, "sm_90": 227, "sm_100": 227, "gfx942": 64}
"""KiB of shared memory that one program can have."""
KERNELS = 22


def compiled(target, **options):
    """In a process of its own: where TRITON_INTERPRET is set, what ``triton.jit`` makes is no kernel to be compiled."""
    asked = [word for name, value in options.items() for word in (f"--{name}", *str(value).split())]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.json"
        command = [sys.executable, str(REPORT), "--json", str(file), "--target", target, *asked]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return json.loads(file.read_text())["rows"]


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
    half = "f16" if target == "sm_100" else "bf16"  # tcgen05's kind::f16 takes both
    # the AMD kernels take TF32 in products of another name; three products of bfloat16 are fine operands of TF32
    kinds = {"bfloat16": {half}, "tf32": {"tf32", "xf32"}}[operands]
    for row in rows:
        if "TOKENS" in row and "BLOCK" in row:  # a kernel of the memory with many tokens
            assert kinds & set(row["dot"].split()) or (operands == "tf32" and row["dot"] == half), row
            assert not {"f32", "f64"} & set(row["dot"].split()), row


@pytest.mark.slow
@pytest.mark.parametrize("operands", ["bfloat16", "float32"])
@pytest.mark.parametrize("target", SHARED)
def test_the_largest_memory(target, operands):
    """Heads of 128 numbers, four times as many hidden units, chunks of 128 tokens: what the kernels say they take."""
    assert_fits(compiled(target, dim=128, hidden=512, chunk=128, operands=operands), target, 2048)


MANY = "write_kernel read_kernel read_fixed_kernel rewrite read_backward write_backward_kernel read_fixed_backward"
"""The kernels of the memory with products of matrices, without those that keep the state."""
UNIT = {"sm_80": "mma", "sm_90": "wgmma", "sm_100": "tcgen05", "gfx942": "mfma"}


def assert_suits_hopper(row):
    """All products are of the kind that takes 64 rows, and no thread spills much.

    With chunks of 16 the rows are hidden units. Only the scores, of 16 queries and 16 keys, are of the other kind: two
    products, and six in the backward pass, where one takes three.
    """
    kernel, wide = row["kernel"].rpartition(".")[2], row["heads"] > 64
    scores = {"read_kernel": 12 if wide else 8, "read_backward_kernel": 64 if wide else 36}.get(kernel, 0)
    if wide and row["chunk"] < 64 and kernel in ("write_kernel", "write_backward_kernel"):
        scores = row["mma"]  # 32 hidden units at a time: with 64, 328 and 512 bytes would be spilled
    assert row["wgmma"] > 0 and row["mma"] <= (scores if row["chunk"] < 64 else 0), row
    assert_fits([row], "sm_90", 448 if wide and "write_backward" in kernel else 128)


def test_products_of_wide_heads_suit_hopper():
    """Those of batched memories, with all that they may add and multiply with."""
    rows = compiled("sm_90", dim=256, kernel="product_kernel update_kernel state_backward_kernel")
    assert len(rows) == 3
    for row in rows:
        assert row["wgmma"] > 0 and row["mma"] == 0, row
    assert_fits(rows, "sm_90", 128)


def test_a_packaged_size_suits_hopper():
    (row,) = compiled("sm_90", dim=64, kernel="read_kernel")
    assert_suits_hopper(row)


def test_the_results_are_of_the_packaged_sizes():
    rows = json.loads((REPORT.parent / "results" / "resources.json").read_text())["rows"]
    recipes = [tb.load_recipe(name) for name in packaged_names() if name.startswith("lmm-")]
    assert {row["heads"] for row in rows} == {recipe.dim // recipe.layers["lmm"][0]["heads"] for recipe in recipes}
    assert {row["target"] for row in rows} == SHARED.keys()


@pytest.mark.slow
@pytest.mark.parametrize("target, spilled", [("sm_80", 256), ("sm_90", 448), ("sm_100", 256), ("gfx942", 640)])
def test_the_packaged_sizes(target, spilled):
    """All kernels at all sizes fit, and the memory's products have the target's own instructions."""
    rows = compiled(target)
    at = {}
    for row in rows:
        at.setdefault((row["heads"], row["chunk"]), set()).add(row["kernel"])
    small = {(heads, chunk) for heads in (48, 64, 96) for chunk in (64, 16)}
    assert at.keys() == {*small, (256, 64)} and all(len(at[memory]) == KERNELS for memory in small), at
    assert len(at[256, 64]) == 19
    assert_fits(rows, target, spilled)
    assert all(row.get("tensor_memory", 0) <= 512 for row in rows)  # columns of a multiprocessor
    many = [row for row in rows if row["heads"] < 256 and any(name in row["kernel"] for name in MANY.split())]
    assert len(many) == 9 * len(small)
    for row in many:
        assert row[UNIT[target]] > 0, row
        if target == "sm_90":
            assert_suits_hopper(row)


@pytest.mark.slow
def test_short_chunks_suit_hopper():
    for row in compiled("sm_90", dim=48, hidden=192, chunk=16, kernel=MANY):
        assert_suits_hopper(row)


@pytest.mark.parametrize(
    "target", [target if target == "sm_90" else pytest.param(target, marks=pytest.mark.slow) for target in SHARED]
)
def test_a_state_of_one_layer_that_stays(target):
    """The largest: on the GPU it is made for, nothing is spilled and all products are of the larger kind."""
    rows = compiled(target, layers=1, dim=64, chunk=64, kernel="resident")
    assert [row["kernel"].rpartition(".")[2] for row in rows] == [
        "write_resident_kernel",
        "write_backward_resident_kernel",
    ]
    assert_fits(rows, target, 0 if target == "sm_90" else 1024 if target.startswith("sm_") else 2048)
    if target == "sm_90":
        assert all(row["wgmma"] > 0 and row["mma"] == 0 for row in rows), rows


@pytest.mark.parametrize("dim", [64, pytest.param(48, marks=pytest.mark.slow)])
def test_a_memory_of_one_matrix_written_and_read_in_one_launch(dim):
    """All products are of the kind that takes 64 rows. With a norm, clipping and momentum a thread spills a little."""
    rows = compiled("sm_90", layers=1, dim=dim, chunk=64, kernel="linear")
    names = ("linear_kernel", "linear_read_backward_kernel", "linear_write_backward_kernel")
    assert tuple(row["kernel"].rpartition(".")[2] for row in rows) == names
    assert all(row["wgmma"] > 0 and row["mma"] == 0 for row in rows), rows
    assert_fits(rows[:2], "sm_90", 0)
    assert_fits(rows[2:], "sm_90", 32 if dim == 64 else 128)


@pytest.mark.slow
@pytest.mark.parametrize("dim, both", [(64, False), (32, False), (16, True)])
def test_states_of_two_layers_that_stay(dim, both):
    """Forward up to 64 x 64, backward up to 32 x 32."""
    rows = compiled("sm_90", dim=dim, hidden=min(64, 2 * dim), kernel="resident")
    assert [row["kernel"].rpartition(".")[2] for row in rows] == [
        "write_resident_kernel",
        *["write_backward_resident_kernel"] * both,
    ]
    assert_fits(rows[:1], "sm_90", 64)
    assert_fits(rows[1:], "sm_90", 1024)
