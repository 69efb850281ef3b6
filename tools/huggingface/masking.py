"""The attention mask of transformers as the mask of a block: which of the tokens at hand are real."""

from __future__ import annotations

from torch import Tensor


def real_tokens(attention_mask: Tensor | None, rows: int, time: int, before: int) -> Tensor | None:
    """``[rows, time]`` bool from ``[rows, time]`` or ``[rows, before + time]``, 0 at padding.

    Raises ``ValueError`` for other shapes.
    """
    if attention_mask is None:
        return None
    shapes = {(rows, time), (rows, before + time)}
    if tuple(attention_mask.shape) not in shapes:
        expected = " or ".join(str(list(shape)) for shape in sorted(shapes))
        raise ValueError(f"attention_mask: expected {expected}, 0 at padding, got {list(attention_mask.shape)}")
    return attention_mask[:, before:] != 0 if attention_mask.shape[1] > time else attention_mask != 0
