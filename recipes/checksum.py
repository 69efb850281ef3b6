"""A checksum of tensors, so that bytes which changed on a disk are noticed when they are read back."""

from __future__ import annotations

import zlib

import torch
from torch import Tensor


class Checksum:
    """CRC-32 of tensors' names and bytes, added one by one in any order that is the same both times."""

    def __init__(self) -> None:
        self._value = 0

    def add(self, name: str, tensor: Tensor) -> None:
        """One more tensor, contiguous and on the CPU."""
        self._value = zlib.crc32(name.encode(), self._value)
        # bytes, whatever the numbers are: numpy has no bfloat16
        self._value = zlib.crc32(tensor.detach().reshape(-1).view(torch.uint8).numpy().data, self._value)

    def __str__(self) -> str:
        return f"{self._value:08x}"


def checksum(tensors: dict[str, Tensor]) -> str:
    """Of all of them, sorted by name."""
    total = Checksum()
    for name in sorted(tensors):
        total.add(name, tensors[name])
    return str(total)
