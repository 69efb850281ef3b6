"""Generation: the prompt is processed in one pass, then one token at a time from the state."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ..kernels.linear import is_unmodified
from .sampling import Sampler
from .speculation import Draft, Drafted, ModelDraft, PromptLookup, check_draft, speculate
from .state import State, trainable


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


class Generation(NamedTuple):
    """The result of :func:`generate`. Its state and logits are sufficient to continue exactly."""

    tokens: Tensor
    """``[batch, prompt + new]`` int64: the prompt, then the new tokens."""
    state: State
    """The state after all valid tokens of ``tokens``, including the last."""
    logits: Tensor
    """``[batch, vocab]``: the prediction of the next token."""

    @property
    def drafted(self) -> Drafted | None:
        """How many tokens ``draft`` proposed, how many the model accepted, and its calls; ``None`` without a draft."""
        return getattr(self, "_drafted", None)


class DraftedGeneration(Generation):
    """The result of :func:`generate` with a draft."""

    _drafted: Drafted


class Step(NamedTuple):
    """One new token of each row, and the state after it."""

    token: Tensor
    """``[batch]`` int64."""
    state: State
    logits: Tensor
    """``[batch, vocab]``: the prediction of the next token."""

    def trainable(self) -> Step:
        """Return a copy in ordinary tensors. Autograd does not accept those of inference mode."""
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
    draft: Any = None,
) -> Generation:
    """Continue ``tokens`` [batch, time] int64 by ``max_new_tokens`` tokens.

    Args:
        model: a ``LanguageModel`` with a vocabulary.
        tokens: the prompt.
        max_new_tokens: number of new tokens.
        state: the state before the prompt; by default a fresh one.
        temperature: divides the logits. 0 is greedy: the most likely token is taken.
        top_k: sample from the ``top_k`` most likely tokens only.
        top_p: sample from the most likely tokens only, up to the first at which their probability reaches ``top_p``.
        seed: an integer, a generator on the model's device, or ``None`` for a random seed. PyTorch's global generator
            is not used.
        mask: ``[batch, time]`` bool, true at valid tokens. Prompts of unequal length may be padded on either side.
        logits: ``[batch, vocab]``, the prediction for rows without a valid token in ``tokens``.
        draft: speculative decoding: ``"prompt"`` proposes what followed the last tokens where they occurred before, and
            a smaller ``LanguageModel`` of the same vocabulary proposes its own tokens. The model checks all proposed
            tokens in one call. Greedy tokens are those without ``draft``; sampled ones have the same distribution.
            Numbers of tokens and calls are in ``drafted`` of the result.

    The returned state includes all returned tokens, so ``generate(model, more, state=gen.state)`` continues with a
    further prompt. To continue without one, pass the logits too:
    ``generate(model, gen.tokens[:, :0], state=gen.state, logits=gen.logits)`` gives the tokens of one longer call.

    Gradients are not tracked. Raises ``ValueError`` or ``TypeError`` for arguments out of range, for a row without a
    valid token and without ``logits``, for logits that are not finite, and for inputs that ``forward`` refuses.
    """
    if isinstance(max_new_tokens, bool) or not isinstance(max_new_tokens, int) or max_new_tokens < 0:
        raise ValueError(f"max_new_tokens: expected an integer >= 0, got {max_new_tokens!r}")
    if draft is not None:
        check_draft(draft, model)
    logits, state = read_prompt(model, tokens, state, mask=mask, logits=logits)
    sampler = Sampler(temperature, top_k, top_p, seed, device=tokens.device)
    if draft is not None and max_new_tokens:
        source = _read_draft(draft, tokens, mask, sampler)
        _keep_freed_memory(logits)
        found = speculate(model, logits, state, sampler, max_new_tokens, source)
        new_tokens, state, logits = map(trainable, (found.tokens, found.state, found.logits))
        generation = DraftedGeneration(torch.cat([tokens, new_tokens], dim=1), state, logits)
        generation._drafted = found.drafted
        return generation
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
    """Process a prompt; return the logits ``[batch, vocab]`` at the last valid token of each row, and the state.

    ``logits`` [batch, vocab] is returned for rows in which the prompt has no valid token.
    """
    called = _calls(model)
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
    present = torch.full((rows,), time > 0, device=tokens.device) if mask is None else mask.any(dim=1)
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


def _read_draft(draft: Any, tokens: Tensor, mask: Tensor | None, sampler: Sampler) -> Draft:
    """The draft after the prompt."""
    if isinstance(draft, str):
        texts = tokens.tolist()
        if mask is not None:
            texts = [[token for token, valid in zip(*row) if valid] for row in zip(texts, mask.tolist())]
        return PromptLookup(texts)
    rows, like = tokens.shape[0], next(draft.parameters())
    unused = torch.zeros(rows, draft.vocab, dtype=like.dtype, device=like.device)  # for rows without a token
    _, state = read_prompt(draft, tokens, mask=mask, logits=unused)
    return ModelDraft(draft, state, rows, sampler, tokens.device)


def _calls(model: Any) -> bool:
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


@torch.inference_mode()
def steps(model: Model, logits: Tensor, state: State, sampler: Sampler, count: int) -> Iterator[Step]:
    """Yield ``count`` new tokens one at a time, for streaming output or stopping early.

    Tensors are computed in inference mode, which takes a seventh less time. Autograd does not accept them;
    :meth:`Step.trainable` returns a copy that it accepts.
    """
    _keep_freed_memory(logits)
    decode = model.decoder(logits.shape[0])
    for _ in range(count):
        token = sampler(logits)
        if _calls(model):
            out = model(token.unsqueeze(1), state)
            state, logits = out.state, out.logits[:, 0]
        else:
            # sampled tokens need no checks
            hidden, state = decode(model.lookup(token.unsqueeze(1)), state)
            logits = model.predict(hidden[:, 0])
        yield Step(token, state, logits)


def _keep_freed_memory(like: Tensor) -> None:
    """Raise malloc's threshold for ``mmap``, so that memory of states is reused and not returned to the system.

    glibc raises the threshold to the size of the largest block that was freed. The block is never written to.
    """
    if like.is_cpu:
        torch.empty(31 * 2**20, dtype=torch.uint8, device="cpu")
