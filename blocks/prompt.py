"""Reading a prompt: the logits at its last token, and the state after it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from ..kernels.linear import is_unmodified
from .state import State


class Model(Protocol):
    """The methods of a model that generation uses; ``LanguageModel`` documents them."""

    vocab: int | None

    def __call__(self, tokens: Tensor, state: Any, mask: Tensor | None = None) -> Any: ...
    def check_mask(self, mask: Tensor, shape: tuple[int, int]) -> None: ...
    def check_state(self, state: Any, rows: int) -> None: ...
    def embed(self, tokens: Tensor) -> Tensor: ...
    def lookup(self, tokens: Tensor) -> Tensor: ...
    def run(self, x: Tensor, state: Any, mask: Tensor | None) -> tuple[Tensor, Any]: ...
    def decoder(self, rows: int) -> Callable[[Tensor, Any], tuple[Tensor, Any]]: ...
    def predict(self, hidden: Tensor) -> Tensor: ...


@torch.no_grad()
def read_prompt(
    model: Model,
    tokens: Tensor,
    state: State = None,
    *,
    mask: Tensor | None = None,
    logits: Tensor | None = None,
) -> tuple[Tensor, State]:
    """Process a prompt; return the logits ``[batch, vocab]`` at the last valid token of each row, and the state.

    ``logits`` [batch, vocab] is returned for rows in which the prompt has no valid token.
    """
    called = is_called(model)
    if called:
        out = model(tokens, state, mask)
        hidden, state = out.logits, out.state
    else:
        x = model.embed(tokens)
        if mask is not None:
            model.check_mask(mask, (x.shape[0], x.shape[1]))
        if state is not None:
            model.check_state(state, x.shape[0])
        hidden, state = model.run(x, state, mask)
    rows, time = tokens.shape
    if mask is None:  # nothing that a GPU would have to be asked for
        absent = [] if time else list(range(rows))
    else:
        present = mask.any(dim=1)
        absent = (~present).nonzero().flatten().tolist()
    if absent and logits is None:
        raise ValueError(f"tokens: row {absent[0]} has no valid token, and no logits were given")
    if logits is not None:
        _check_logits(logits, (rows, model.vocab), tokens.device)
    if len(absent) == rows:
        assert logits is not None
        return logits, state
    if mask is None:
        return (hidden[:, -1] if called else model.predict(hidden[:, -1])), state
    # the last valid token of each row, with padding on either side
    index = (mask * torch.arange(time, device=mask.device)).argmax(dim=1)
    last = hidden[torch.arange(rows, device=mask.device), index]
    predicted = last if called else model.predict(last)
    if logits is not None:
        predicted = torch.where(present.unsqueeze(1), predicted, logits.to(predicted.dtype))
    return predicted, state


def is_called(model: Any) -> bool:
    """Whether the model is called for every token: hooks, accelerate and FSDP act on calls of the whole model."""
    return not is_unmodified(model, "forward")


def _check_logits(logits: Tensor, shape: tuple[int, int | None], device: torch.device) -> None:
    if not isinstance(logits, Tensor):
        raise TypeError(f"logits: expected a tensor [batch, vocab], got {type(logits).__name__}")
    if not logits.is_floating_point():
        raise TypeError(f"logits: expected a floating-point tensor, got {logits.dtype}")
    if tuple(logits.shape) != shape:
        raise ValueError(f"logits: expected [batch, vocab] = {list(shape)}, got {list(logits.shape)}")
    if logits.device != device:
        raise ValueError(f"logits: expected device {device} as tokens, got {logits.device}")
