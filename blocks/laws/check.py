"""``check_block``: a block is run under every law, which is what makes a custom block safe to nest."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from ...registry import Spec
from ..block import Block
from ..device import as_device, as_dtype
from ..language_model import LanguageModel
from . import batch, gradient, sequence, tensors
from .subject import LawError, Subject

LAWS: dict[str, Callable[[Subject], None]] = {
    "purity": tensors.purity,
    "determinism": tensors.determinism,
    "meta": tensors.meta,
    "causal": sequence.causal,
    "split": sequence.split,
    "step": sequence.step,
    "row": batch.row,
    "rows": batch.rows,
    "mask": batch.mask,
    "gradient": gradient.gradient,
    "save": tensors.save,
    "dtype": tensors.dtype,
    "position": sequence.position,
    "endurance": sequence.endurance,
}
"""Every law by name, in the order they are checked; the first line of each function says what it demands."""


def check_block(
    block: Spec | Block | LanguageModel,
    dim: int = 64,
    *,
    dtype: torch.dtype = torch.float64,
    laws: Iterable[str] | None = None,
    seed: int = 0,
    length: int | None = None,
    cuts: int | None = 48,
    endurance: int = 100_000,
    device: torch.device | str = "cpu",
) -> dict[str, float]:
    """Check that a block obeys the laws; return the largest difference seen under each law.

    ``block``: a registered name, ``{"type": name, ...}``, a list, a built block or a whole model. What is passed in
    is copied, and every parameter of the copy is randomised first: a zero at the start hides what it multiplies.
    ``dim``: the width (that of a built block is its own). ``dtype``: what most laws run in; tolerances follow it.
    ``laws``: names from ``LAWS``, all by default. ``length``: tokens in a sequence; by default a prime, and so no
    multiple of any chunk, segment or window, that passes the block's period and fills its buffers. ``cuts``: at
    most so many cut points, ``None`` for every one (short sequences are always cut everywhere). ``endurance``:
    tokens streamed under that law, which takes most of the time.

    Raises ``LawError`` at the first law that fails, naming the law, the shapes and the largest difference. Laws are
    checked in an order in which the first to fail is the cause and not a consequence. Raises ``RecipeError`` for a
    description that is wrong, and ``ValueError`` for another argument that is.
    """
    if length is not None and (isinstance(length, bool) or not isinstance(length, int) or length < 4):
        raise ValueError(f"length: expected an integer >= 4, so that there is something to cut, got {length!r}")
    device, dtype = as_device(device), as_dtype(dtype)
    chosen = list(LAWS) if laws is None else [laws] if isinstance(laws, str) else list(laws)
    for law in chosen:
        if law not in LAWS:
            raise ValueError(f"unknown law {law!r}: the laws are {', '.join(LAWS)}")
    subject = Subject(block, dim, dtype=dtype, seed=seed, length=length, cuts=cuts, endurance=endurance, device=device)
    differences = {}
    for law in LAWS:
        if law in chosen:
            subject.largest = 0.0
            try:
                LAWS[law](subject)
            except LawError:
                raise
            except Exception as error:
                raise LawError(law, f"raised {type(error).__name__}: {error}") from error
            differences[law] = subject.largest
    return differences
