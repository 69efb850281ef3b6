"""``Fingerprint``: identifies the recipe of a model in its states; and checksums of weights."""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels.dispatch import integers

_names: dict[int, str] = {}  # names of the recipes that were built in this process, for messages


class Fingerprint:
    """The fingerprint of a recipe as a number, which states contain as one int64 in each row.

    States of two recipes may have equal shapes and different meanings, such as chunks of 16 or of 32 tokens. As a
    tensor with the rows first, the fingerprint is selected, concatenated, moved and saved with the rest of a state.
    """

    def __init__(self, fingerprint: str = "0" * 16, name: str = "", earlier: str | None = None) -> None:
        """``fingerprint``: 16 hex digits, zeros for models without a recipe. ``name``: of the recipe, for messages.

        ``earlier``: what earlier versions wrote into states of this recipe.
        """
        self.number = int.from_bytes(bytes.fromhex(fingerprint), "big", signed=True)
        self.earlier = int.from_bytes(bytes.fromhex(earlier or fingerprint), "big", signed=True)
        if name:
            _names[self.number] = name

    def check(self, found: Tensor) -> None:
        """Raise ``ValueError`` with both recipes unless all values of ``found`` are this fingerprint."""
        if found.is_meta or torch.compiler.is_compiling():  # no values to compare
            return
        numbers = integers(found if found.dim() == 1 else found.flatten())
        other = next((number for number in numbers if number not in (self.number, self.earlier)), None)
        if other is not None:
            recipes = f"it is of {_describe(int(other))}, the model of {_describe(self.number)}"
            raise ValueError(f"the state is of another recipe: {recipes}")


def _describe(number: int) -> str:
    fingerprint = number.to_bytes(8, "big", signed=True).hex()
    return f"{_names[number]!r} ({fingerprint})" if number in _names else f"a recipe with fingerprint {fingerprint}"


def sums_of_bits(x: Tensor) -> bytes:
    """Sums of the bits of ``x`` along two directions, as int64: any change but one made for it changes them."""
    data = x.detach().contiguous().reshape(-1).view(torch.uint8)
    words = len(data) // 8 - len(data) // 8 % 256
    table, rest = data[: 8 * words].view(torch.int64).view(-1, 256), data[8 * words :]
    found: bytes = torch.cat([table.sum(dim=0), table.sum(dim=1), rest.long()]).cpu().numpy().tobytes()
    return found
