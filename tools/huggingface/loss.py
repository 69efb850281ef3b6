"""The loss of a batch in which labels are the tokens themselves: each is predicted from those before it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, pad

from ...blocks.language_model import IGNORED


def next_token_loss(
    logits: Tensor, labels: Tensor, mask: Tensor | None = None, count: Tensor | int | None = None
) -> Tensor:
    """Mean cross-entropy (nats) of ``labels`` [batch, time] int64 by the ``logits`` [batch, time, vocab] before each.

    Labels stand at their own tokens, as in transformers, and are shifted here; -100 does not count, nor does what
    follows a token where ``mask`` [batch, time] is false: a padded row has the loss of the row alone. ``count``: what
    to divide the sum by, where it is over more than this batch; by default the labels that count.
    """
    targets = pad(labels[:, 1:], (0, 1), value=IGNORED)
    if mask is not None:
        targets = targets.masked_fill(~mask, IGNORED)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    total = cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum")
    if count is None:
        count = (targets != IGNORED).sum().clamp(min=1)
    return total / (count.to(total.device) if isinstance(count, Tensor) else count)
