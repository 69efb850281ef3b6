"""How large what is timed on a GPU is, and how large to see that it runs anywhere."""

from __future__ import annotations

from typing import NamedTuple


class Sizes(NamedTuple):
    """What is measured: on a GPU, or quickly anywhere to see that it runs."""

    matrix: int
    copied: int
    """Bytes of the copy that bandwidth is measured with."""
    heads: int
    """Rows x heads: enough of them to fill the device."""
    lengths: tuple[int, ...]
    widths: tuple[tuple[int, int, int], ...]
    """Of the memories: ``d``, expansion, layers."""
    chunk: int
    window: int
    stepping: int
    """Rows x heads that decode at a time."""
    model: str
    """The size of packaged recipes, or nothing: the small ones."""
    transformer: dict[str, int]
    """The transformer of that size, for bytes as the models are then, too: what they do with many words is the same."""
    texts: tuple[int, ...]
    """Lengths for whole models."""
    seconds: float
    """For each case, once it is warm."""


FULL = Sizes(
    8192, 2**32, 128, (2048, 8192, 32768, 131072), ((64, 2, 2), (64, 4, 2), (64, 1, 2), (64, 1, 1), (128, 1, 1)),
    64, 1024, 2048, "-170m", dict(dim=768, depth=12, vocab=256, heads=12, hidden=4224), (8192, 32768, 131072), 0.4,
)  # fmt: skip
QUICK = Sizes(
    64, 2**16, 2, (32,), ((16, 2, 2), (16, 1, 1)), 16, 16, 4, "",
    dict(dim=32, depth=1, vocab=256, heads=2, hidden=64), (64,), 0.0,
)  # fmt: skip
