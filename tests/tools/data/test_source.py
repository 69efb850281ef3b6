from __future__ import annotations

from typing import Any

import pytest

from titans_build.registry import RecipeError
from titans_build.tools.data.source import Share, share_of


def test_shares_cover_all_rows():
    assert share_of(6, (0, 1)) == Share(0, 6, 6)
    assert [share_of(6, (rank, 3)) for rank in range(3)] == [Share(0, 2, 6), Share(2, 2, 6), Share(4, 2, 6)]
    assert share_of(6, (1, 3)).numbers(2).tolist() == [14, 15]


@pytest.mark.parametrize(
    ("rows", "part", "message"),
    [
        (6, (0, 4), "rows: 6 rows of a batch cannot be shared by 4 processes: give a multiple of 4"),
        (0, (0, 1), "rows: expected integer >= 1, got 0"),
        (True, (0, 1), "rows: expected integer >= 1, got true"),
        (6, (3, 3), "part: expected .rank, world. with 0 <= rank < world"),
        (6, (0, 0), "part: expected"),
    ],
)
def test_invalid_shares(rows: int, part: tuple[int, int], message: str):
    with pytest.raises(RecipeError, match=message):
        share_of(rows, part)


@pytest.mark.parametrize("index", [-1, 1.0, True, None])
def test_invalid_index(index: Any):
    with pytest.raises(ValueError, match="expected integer >= 0"):
        share_of(4, (0, 1)).numbers(index)
