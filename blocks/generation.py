"""Generation: the prompt is processed in one pass, then one token at a time from the state."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .observers import observers_of
from .prefix_cache import PrefixCache
from .prompt import Model, is_called, read_prompt
from .sampling import Sampler
from .speculation import Draft, Drafted, ModelDraft, PromptLookup, check_draft, speculate
from .state import State, trainable


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
    prefix_cache: PrefixCache | None = None,
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
            tokens in one call. Greedy tokens are those without ``draft``, up to rounding; sampled ones have the same
            distribution. Numbers of tokens and calls are in ``drafted`` of the result.
        prefix_cache: a ``PrefixCache``: beginnings of the prompt that it holds are not read again. It then holds this
            prompt and its continuation, too.

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
    if prefix_cache is None:
        logits, state = read_prompt(model, tokens, state, mask=mask, logits=logits)
    elif state is not None or logits is not None:
        raise ValueError(
            "prefix_cache: its states begin with the first token: give the whole text, and no state or logits"
        )
    else:
        _expect_cache(prefix_cache, model)
        logits, state = prefix_cache.read(model, tokens, mask)
    sampler = Sampler(temperature, top_k, top_p, seed, device=tokens.device)
    generation = _generate(model, logits, state, sampler, tokens, mask, max_new_tokens, draft)
    if prefix_cache is not None and max_new_tokens:
        valid = None
        if mask is not None:
            valid = torch.cat([mask, mask.new_ones(len(mask), max_new_tokens)], dim=1)
        prefix_cache.store(model, generation.tokens, generation.state, generation.logits, valid)
    return generation


def _generate(
    model: Model,
    logits: Tensor,
    state: State,
    sampler: Sampler,
    tokens: Tensor,
    mask: Tensor | None,
    max_new_tokens: int,
    draft: Any,
) -> Generation:
    """Continue ``tokens`` from the logits and the state after them."""
    if draft is not None:
        drafted = Drafted(0, 0, 0)
        if max_new_tokens:
            source = read_draft(draft, tokens, mask, sampler)
            _keep_freed_memory(logits)
            found = speculate(model, logits, state, sampler, max_new_tokens, source)
            new_tokens, state, logits = map(trainable, (found.tokens, found.state, found.logits))
            tokens, drafted = torch.cat([tokens, new_tokens], dim=1), found.drafted
        generation = DraftedGeneration(tokens, state, logits)
        generation._drafted = drafted
        return generation
    new = []
    step = None
    for step in steps(model, logits, state, sampler, max_new_tokens):
        new.append(step.token)
    if step is None:
        return Generation(tokens, state, logits)
    _, state, logits = step.trainable()
    return Generation(torch.cat([tokens, torch.stack(new, dim=1)], dim=1), state, logits)


def _expect_cache(prefix_cache: Any, model: Any) -> None:
    if not isinstance(prefix_cache, PrefixCache):
        raise TypeError(f"prefix_cache: expected a PrefixCache, got {type(prefix_cache).__name__}")
    if getattr(model, "parallel", None) is not None:
        raise ValueError("prefix_cache: a model on a mesh (parallelize) cannot use one: generate without it")
    if any(True for _ in observers_of(model)):
        raise RuntimeError("prefix_cache: an observer would not see tokens of stored states: generate without it")


def read_draft(draft: Any, tokens: Tensor, mask: Tensor | None, sampler: Sampler) -> Draft:
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
        if is_called(model):
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
