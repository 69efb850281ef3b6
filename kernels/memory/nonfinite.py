"""Where a sequence stops being finite: what comes before it must not hear of it.

Inside a chunk every path but the oracle multiplies what is later by zero, and zero times NaN is NaN. A call is
therefore cut in two before a token that is not finite, which is another way to compute the same (any cut is). To find
out that there is none takes one reading of the inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..dispatch import sum_is_finite as surely_finite
from .tokens import Tokens


def cuts_before_infinities(tokens: Tokens, mask: Tensor | None) -> list[int]:
    """The tokens before which to cut, in order: of each row and head the first real one with NaN or infinity in it.

    Queries are not looked at: nothing hears of them but their own answer. None before token 0: nothing comes before
    it. Tensors without values, or that something transforms, are not looked into: ``[]``.
    """
    _, k, *others = tokens
    if k.shape[1] < 2 or torch.compiler.is_compiling() or torch._C._functorch.maybe_current_level() is not None:
        return []
    inputs = [x.detach() for x in (k, *others) if x is not None]
    if k.is_meta or surely_finite(*inputs):
        return []
    finite = [x.isfinite() for x in inputs]
    bad = ~torch.stack([x.all(-1) if x.dim() == 4 else x for x in finite]).all(0)
    if mask is not None:
        bad &= mask.unsqueeze(-1)
    first = bad.to(torch.uint8).argmax(1)  # 0 where there is none, too
    return sorted({*first.flatten().tolist()} - {0})
