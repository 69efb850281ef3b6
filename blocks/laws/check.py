"""``check_block``: tests a block against every law. Blocks that obey them can be combined freely."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from ...registry import Spec
from ..block import Block
from ..device import as_device, as_dtype
from ..language_model import LanguageModel
from . import batch, modified, sequence, tensors
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
    "documents": sequence.documents,
    "hooked": modified.hooked,
    "gradient": tensors.gradient,
    "rewind": sequence.rewind,
    "save": tensors.save,
    "dtype": tensors.dtype,
    "position": sequence.position,
    "endurance": sequence.endurance,
}
"""All laws by name, in the order in which they are checked. The docstrings of the functions state them."""


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
    """Check that a block obeys the laws. Return the largest difference under each law.

    ``block``: a registered name, ``{"type": name, ...}``, a list, a built block or a model. It is copied, and all
    parameters of the copy are randomized, since a parameter that starts at zero hides what it multiplies. ``dim``: the
    width, unless the block is built. ``dtype``: of most laws; it determines the tolerances. ``laws``: names of
    ``LAWS``, by default all. ``length``: tokens of a sequence. The default is a prime number, so that it is no multiple
    of a chunk, segment or window, and exceeds the period of the block and the size of its buffers. ``cuts``: the
    maximum number of cut points, or ``None`` for all; short sequences are cut everywhere. ``endurance``: the number of
    tokens under that law, which takes most of the time.

    Raises ``LawError`` for the first law that is violated, with the law, the shapes and the largest difference. The
    order of the laws is such that the first error is the cause of later ones. Raises ``RecipeError`` for an invalid
    description of a block, and ``ValueError`` for other invalid arguments.
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
            subject.law, subject.largest = law, 0.0
            try:
                LAWS[law](subject)
            except LawError:
                raise
            except Exception as error:
                raise LawError(law, f"raised {type(error).__name__}: {error}") from error
            differences[law] = subject.largest
    return differences
