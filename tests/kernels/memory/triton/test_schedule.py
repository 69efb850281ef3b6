"""The rule by which a state stays in registers, and how to overrule it."""

import pytest
import torch

from titans_build.kernels.dispatch import BackendError

pytest.importorskip("triton")

from titans_build.kernels.memory.triton.schedule import (
    FINE_VARIABLE,
    VARIABLE,
    operands,
    resident,
    schedule,
    state_bytes,
)

HALF, FULL = operands(torch.float32, torch.bfloat16), operands(torch.float32)


@pytest.mark.parametrize("layers, parts, d, width, forward, backward", [
    (1, 2, 64, 64, True, True), (1, 2, 128, 128, False, False), (2, 2, 16, 32, True, True), (2, 2, 32, 64, True, False),
    (2, 2, 64, 64, True, False), (2, 1, 64, 64, True, False), (2, 2, 64, 128, False, False),
])  # fmt: skip
def test_what_stays(layers, parts, d, width, forward, backward):
    assert resident(layers, parts, d, width, d, HALF, backward=False) == forward
    assert resident(layers, parts, d, width, d, HALF, backward=True) == backward
    assert not resident(layers, parts, d, width, d, FULL, backward=False), "no matrix unit takes float32"


def test_it_goes_by_the_tiles_that_are_kept():
    assert state_bytes(2, 2, 32, 64, 32, backward=False) == 3 * 2 * 32 * 64 * 4
    assert state_bytes(1, 1, 64, 64, 64, backward=True) == 3 * 64 * 64 * 4
    assert state_bytes(2, 2, 17, 33, 5, backward=False) == 3 * (32 + 16) * 64 * 4, "tiles are powers of two, from 16 on"
    double = state_bytes(2, 2, 32, 64, 32, backward=False, wide=torch.float64)
    assert double == 2 * state_bytes(2, 2, 32, 64, 32, backward=False)


def test_a_state_stays_whole_or_not_at_all(monkeypatch):
    """However many hidden units there are: tiles that end before them would leave the rest out."""
    assert schedule("write_resident_kernel", 16, 16, 600, 16)["WIDTH"] == 1024
    assert state_bytes(2, 1, 16, 600, 16, backward=True) == 3 * 1024 * 32 * 4
    monkeypatch.setenv(VARIABLE, "resident")
    with pytest.raises(BackendError, match="take 384 KiB of registers in backward"):
        resident(2, 1, 16, 600, 16, FULL, backward=False)


def test_half_the_room_takes_half_the_warps():
    warps = lambda kernel, width: schedule(kernel, 64, 32, width, 32)["num_warps"]  # noqa: E731
    assert warps("write_resident_kernel", 64) == 4 and warps("write_resident_kernel", 128) == 8
    assert warps("write_backward_resident_kernel", 32) == 4 and warps("write_backward_resident_kernel", 64) == 8
    assert warps("write_kernel", 16) == 8


def test_the_environment_overrules_it(monkeypatch):
    monkeypatch.setenv(VARIABLE, "streamed")
    assert not resident(2, 2, 16, 32, 16, HALF, backward=False)
    monkeypatch.setenv(VARIABLE, "resident")
    assert resident(2, 2, 64, 128, 64, FULL, backward=False)
    with pytest.raises(BackendError, match=r"resident: the tiles of this memory take 2048 KiB .* has 256; expected"):
        resident(2, 2, 128, 512, 128, HALF, backward=False)
    monkeypatch.setenv(VARIABLE, "registers")
    with pytest.raises(BackendError, match=r"SCHEDULE=registers: no such schedule; expected auto, resident, streamed"):
        resident(2, 2, 16, 32, 16, HALF, backward=False)


def test_fine_products_are_a_choice(monkeypatch):
    assert HALF["FINE_PRECISION"] == "bf16x3" and FULL["FINE_PRECISION"] == "ieee"
    monkeypatch.setenv(FINE_VARIABLE, "off")
    one = operands(torch.float32, torch.bfloat16)
    assert (one["FINE"], one["FINE_PRECISION"]) == (one["OPERAND"], one["PRECISION"])
    monkeypatch.setenv(FINE_VARIABLE, "no")
    with pytest.raises(BackendError, match="FINE=no: expected on or off"):
        operands(torch.float32)
