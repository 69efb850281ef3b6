"""Generation: the prompt in one pass, then one token at a time from the state."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from .build import check_seed
from .state import State, trainable


class Model(Protocol):
    """The methods of a model that generation uses; ``LanguageModel`` documents them."""

    vocab: int | None

    def check_mask(self, mask: Tensor, shape: tuple[int, int]) -> None: ...
    def check_state(self, state: Any, rows: int) -> None: ...
    def embed(self, tokens: Tensor) -> Tensor: ...
    def lookup(self, tokens: Tensor) -> Tensor: ...
    def run(self, x: Tensor, state: Any, mask: Tensor | None) -> tuple[Tensor, Any]: ...
    def decoder(self, rows: int) -> Callable[[Tensor, Any], tuple[Tensor, Any]]: ...
    def predict(self, hidden: Tensor) -> Tensor: ...


class Generation(NamedTuple):
    """A prompt that was continued, and what is needed to continue it further."""

    tokens: Tensor
    """``[batch, prompt + new]`` int64: the prompt as it was given, then the new tokens."""
    state: State
    """Has read every valid token of ``tokens``, the last new one included."""
    logits: Tensor
    """``[batch, vocab]``: the prediction of the token after the last."""


class Step(NamedTuple):
    """One new token in each row, and the state after it."""

    token: Tensor
    """``[batch]`` int64."""
    state: State
    logits: Tensor
    """``[batch, vocab]``: the prediction of the token after this one."""

    def trainable(self) -> Step:
        """The same in ordinary tensors, which gradients may be taken through: a copy of those of inference mode."""
        copy: Step = trainable(self)
        return copy


@torch.no_grad()
def generate(
    model: Model,
    tokens: Tensor,
    max_new_tokens: int = 64,
    state: State = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | torch.Generator | None = None,
    *,
    mask: Tensor | None = None,
    logits: Tensor | None = None,
) -> Generation:
    """Continue ``tokens`` [batch, time] int64 by ``max_new_tokens`` tokens, from ``state`` (fresh if not given).

    ``temperature`` 0 takes the likeliest token. Otherwise tokens are drawn from the ``top_k`` likeliest, and among
    them from the likeliest that together reach probability ``top_p``. ``seed``: an integer, a generator on the
    model's device, or ``None`` for a draw that cannot be repeated; PyTorch's global generator is not touched.
    ``mask`` [batch, time] bool: true at valid tokens, for prompts of unequal length padded on either side.

    The returned state has read all of the returned tokens, so a further prompt goes straight on:
    ``generate(model, more, state=gen.state)``. To continue without new tokens, pass the prediction too:
    ``generate(model, gen.tokens[:, :0], state=gen.state, logits=gen.logits)`` continues exactly.

    Gradients are not tracked. Raises ``ValueError`` or ``TypeError`` for settings out of range, for a row without
    any valid token to continue, for predictions that are not finite (a diverged model), and for whatever the model's
    ``forward`` refuses.
    """
    if isinstance(max_new_tokens, bool) or not isinstance(max_new_tokens, int) or max_new_tokens < 0:
        raise ValueError(f"max_new_tokens: expected an integer >= 0, got {max_new_tokens!r}")
    logits, state = read_prompt(model, tokens, state, mask=mask, logits=logits)
    sampler = Sampler(temperature, top_k, top_p, seed, device=tokens.device)
    new = []
    step = None
    for step in steps(model, logits, state, sampler, max_new_tokens):
        new.append(step.token)
    if step is None:
        return Generation(tokens, state, logits)
    _, state, logits = step.trainable()
    return Generation(torch.cat([tokens, torch.stack(new, dim=1)], dim=1), state, logits)


@torch.no_grad()
def read_prompt(
    model: Model,
    tokens: Tensor,
    state: State = None,
    *,
    mask: Tensor | None = None,
    logits: Tensor | None = None,
) -> tuple[Tensor, State]:
    """Read a prompt; return the prediction ``[batch, vocab]`` of the token after each row's last, and the state.

    ``logits`` [batch, vocab] is the prediction of rows in which the prompt has no token.
    """
    x = model.embed(tokens)
    rows, time, _ = x.shape
    if mask is not None:
        model.check_mask(mask, (rows, time))
    if state is not None:
        model.check_state(state, rows)
    present = torch.full((rows,), time > 0, device=tokens.device) if mask is None else mask.any(dim=1)
    absent = (~present).nonzero().flatten().tolist()
    if absent and logits is None:
        raise ValueError(f"tokens: row {absent[0]} has no real token to go on from, and no logits were given")
    if logits is not None:
        _check_logits(logits, (rows, model.vocab), tokens.device)
    hidden, state = model.run(x, state, mask)
    if len(absent) == rows:
        assert logits is not None
        return logits, state
    if mask is None:
        return model.predict(hidden[:, -1]), state
    # each row's last valid token, wherever the padding is
    index = (mask * torch.arange(time, device=mask.device)).argmax(dim=1)
    predicted = model.predict(hidden[torch.arange(rows, device=mask.device), index])
    if logits is not None:
        predicted = torch.where(present.unsqueeze(1), predicted, logits.to(predicted.dtype))
    return predicted, state


def _check_logits(logits: Tensor, shape: tuple[int, int | None], device: torch.device) -> None:
    if not isinstance(logits, Tensor):
        raise TypeError(f"logits: expected a tensor [batch, vocab], got {type(logits).__name__}")
    if not logits.is_floating_point():
        raise TypeError(f"logits: expected a floating-point tensor, got {logits.dtype}")
    if tuple(logits.shape) != shape:
        raise ValueError(f"logits: expected [batch, vocab] = {list(shape)}, got {list(logits.shape)}")
    if logits.device != device:
        raise ValueError(f"logits: expected device {device} as tokens, got {logits.device}")


@torch.inference_mode()
def steps(model: Model, logits: Tensor, state: State, sampler: Sampler, count: int) -> Iterator[Step]:
    """Yield ``count`` new tokens one at a time, for a caller that shows them as they come or stops early.

    What is yielded can be read, kept and passed on, but not trained from: it is made in inference mode, which saves
    a seventh of the time. ``Step.trainable`` is a copy without that limit.
    """
    _keep_freed_memory(logits)
    decode = model.decoder(logits.shape[0])
    for _ in range(count):
        token = sampler(logits)
        # straight to the stack: what the sampler drew needs none of the checks on a caller's tokens
        hidden, state = decode(model.lookup(token.unsqueeze(1)), state)
        logits = model.predict(hidden[:, 0])
        yield Step(token, state, logits)


def _keep_freed_memory(like: Tensor) -> None:
    """Stop the C library from returning a state's memory to the system at every token, and asking for it again.

    It does so beyond a threshold, which it raises when a larger block is freed. Nothing is written to this one.
    """
    if like.is_cpu:
        torch.empty(31 * 2**20, dtype=torch.uint8, device="cpu")


class Sampler:
    """Draws tokens from predictions, with a random generator of its own."""

    def __init__(
        self,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | torch.Generator | None = None,
        *,
        device: torch.device | str = "cpu",
    ) -> None:
        if not (_is_number(temperature) and math.isfinite(temperature) and temperature >= 0):
            raise ValueError(f"temperature: expected a number >= 0 (0 is greedy), got {temperature!r}")
        if top_k is not None and (isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 1):
            raise ValueError(f"top_k: expected an integer >= 1, got {top_k!r}")
        if top_p is not None and not (_is_number(top_p) and 0 < top_p <= 1):
            raise ValueError(f"top_p: expected a probability in (0, 1], got {top_p!r}")
        self.temperature, self.top_k, self.top_p = temperature, top_k, top_p
        if isinstance(seed, torch.Generator):
            self.generator = seed
        else:
            check_seed(seed)
            self.generator = torch.Generator(device=device)
            if seed is None:
                self.generator.seed()
            else:
                self.generator.manual_seed(seed)

    def __call__(self, logits: Tensor) -> Tensor:
        """``[batch, vocab]`` -> ``[batch]`` int64. A token at minus infinity is never drawn.

        Raises ``ValueError`` for a row that holds NaN or infinity, or no finite number at all.
        """
        largest, likeliest = logits.max(dim=-1)
        for row, value in enumerate(largest.tolist()):  # NaN and infinity are larger than all else
            if not math.isfinite(value):
                raise ValueError(
                    f"logits: the largest of row {row} is {value}, so no token can be drawn: the given logits, the "
                    "state or the model's weights are not finite"
                )
        if self.temperature == 0:
            return likeliest
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        # the largest becomes 0 first, so that a tiny temperature cannot overflow
        logits = (logits - largest.unsqueeze(-1)) / self.temperature
        limit = logits.shape[-1] if self.top_k is None else min(self.top_k, logits.shape[-1])
        ids = None
        if limit < logits.shape[-1] or self.top_p is not None:
            logits, ids = logits.topk(limit, dim=-1)
        probability = logits.softmax(dim=-1)
        if self.top_p is not None:
            # likeliest first: a token stays while those before it have not reached top_p (the first always stays)
            before = probability.cumsum(dim=-1) - probability
            probability = probability.masked_fill(before >= self.top_p, 0.0)
        drawn = torch.multinomial(probability, 1, generator=self.generator)
        return (drawn if ids is None else ids.gather(-1, drawn)).squeeze(-1)


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)
