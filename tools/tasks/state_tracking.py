"""Word problems of groups: tracking a state that each token changes."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from ..randomness import Draws, Integers
from .task import IGNORED, Rows, Task, register_task


@register_task("state_tracking")
@dataclass(kw_only=True)
class StateTracking(Task):
    """Say the product of all elements of a group so far (arXiv 2404.08819, 2411.12537).

    A row is a series of random elements. The target of each is the product of the elements up to and with it, from
    position ``first`` on. Groups are the cyclic ``Z2``, ``Z3``, ... (sums modulo n; ``Z2`` is parity), the symmetric
    ``S3``, ``S4``, ``S5``, which have all permutations of so many things, and the alternating ``A4`` and ``A5``, which
    have the even ones. A product applies the later permutation last. Tokens are the elements, 0 the neutral one. With
    ``group: Z5, length: 8, first: 2`` (``.`` is a target that does not count)::

        tokens    3 4 0 1 1 2 4 3
        targets   . . 2 3 4 1 0 3

    With ``first`` at the length that a model was trained on, only longer series count.
    """

    group: Annotated[
        str, Field(pattern=r"^(Z([2-9]|[1-9]\d)|S[3-5]|A[45])$", description="Z2 to Z99, S3 to S5, A4, A5")
    ] = "Z2"
    length: Annotated[int, Field(ge=1, description="tokens of a row")] = 64
    first: Annotated[int, Field(ge=0, description="first position with a target")] = 0

    def __post_init__(self) -> None:
        self.elements = _elements(self.group)
        """[order, things] the permutations, of which row 0 is the neutral one."""
        numbers = {tuple(element): number for number, element in enumerate(self.elements.tolist())}
        self.product = np.array(
            [[numbers[tuple(later[earlier])] for later in self.elements] for earlier in self.elements], np.int64
        )
        """[order, order] the number of the product of an earlier and a later element."""
        self.vocab = len(self.elements)

    @classmethod
    def problems(cls, fields: dict[str, Any]) -> Iterable[tuple[str, str]]:
        if fields["first"] >= fields["length"]:
            yield "first", f"expected under the length {fields['length']}, got {fields['first']}"

    def rows(self, draws: Draws) -> Rows:
        tokens = draws.integers("elements", self.length, self.vocab)
        targets = np.empty_like(tokens)
        state = np.zeros(draws.rows, np.int64)
        for time in range(self.length):
            state = targets[:, time] = self.product[state, tokens[:, time]]
        targets[:, : self.first] = IGNORED
        return Rows(tokens, targets)

    def references(self) -> dict[str, float]:
        return {"any element": 1 / self.vocab}


def _elements(group: str) -> Integers:
    kind, size = group[0], int(group[1:])
    if kind == "Z":
        return (np.arange(size)[:, None] + np.arange(size)) % size
    return np.array([each for each in itertools.permutations(range(size)) if kind == "S" or _is_even(each)])


def _is_even(permutation: tuple[int, ...]) -> bool:
    return sum(a > b for a, b in itertools.combinations(permutation, 2)) % 2 == 0
