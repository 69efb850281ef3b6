"""Speculative decoding: a draft proposes several tokens, and one call of the model checks them.

The tokens are those of plain decoding. Greedy: a proposal is accepted if it is the model's choice. Sampled: by the rule
of Leviathan et al. (2023) and Chen et al. (2023), which gives the distribution of plain sampling.

A call that accepts all proposals of a row moves the row's state behind them. Otherwise the state stays before the call,
and the accepted tokens are read again together with the next proposals, so that going back costs no call of its own.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ..registry import nearest
from .decode import Decoder
from .observers import observers_of
from .prompt import is_called
from .sampling import Sampler, expect_finite
from .state import State, where

LONGEST = 64
"""Maximum number of tokens that are proposed for a row at once."""
WORTH = 4
"""Tokens of each row that a call must give. Checking up to ``LONGEST`` takes the time of 4 to 9 decoded tokens."""


class Drafted(NamedTuple):
    """What a draft has saved. Numbers of tokens are sums over the rows."""

    proposed: int
    """Tokens that the draft proposed."""
    accepted: int
    """Tokens of them that the model accepted."""
    calls: int
    """Calls of the model after the prompt. Plain decoding takes one for each new token of a row."""


class Proposal(NamedTuple):
    """Proposed tokens of each row."""

    tokens: list[list[int]]
    probability: Tensor | None = None
    """``[batch, longest, vocab]``: the distributions the tokens were drawn from; ``None``: they are certain."""


class Draft(Protocol):
    """A source of proposals."""

    def propose(self, limits: list[int]) -> Proposal | None:
        """Propose up to ``limits[row]`` tokens that follow; ``None`` if it is not worth a call."""
        ...

    def extend(self, tokens: list[list[int]], accepted: list[int] | None = None) -> None:
        """Take note of new tokens of each row. ``accepted``: of the last proposal, if one was made."""
        ...


# -- drafts ------------------------------------------------------------------------------------------------------------


class PromptLookup:
    """Proposes what followed the longest recent occurrence of the last tokens of a row, in its prompt and answer.

    After a proposal that was not worth its call, an occurrence must be twice as long, so that text without repetitions
    costs little.
    """

    def __init__(self, rows: list[list[int]]) -> None:
        self._rows = [_Index(tokens) for tokens in rows]

    def propose(self, limits: list[int]) -> Proposal | None:
        tokens = [row.propose(limit) for row, limit in zip(self._rows, limits)]
        active = sum(limit > 0 for limit in limits)
        return Proposal(tokens) if sum(map(len, tokens)) >= WORTH * max(active, 1) else None

    def extend(self, tokens: list[list[int]], accepted: list[int] | None = None) -> None:
        for index, row in enumerate(self._rows):
            row.extend(tokens[index])
            if accepted is not None:
                row.adapt(accepted[index])


class _Index:
    """The tokens of one row, and where each sequence of ``GRAM`` tokens occurred before."""

    GRAM = 3
    CANDIDATES = 8
    LEAST = 4
    """Tokens that an occurrence shares with the last ones, at least; twice as many at first."""

    def __init__(self, tokens: list[int]) -> None:
        self._tokens: list[int] = []
        self._ends: dict[tuple[int, ...], int] = {}
        self._earlier: list[int] = []  # for each end of a sequence, the end of its previous occurrence; 0: none
        self._least, self._proposed = 2 * self.LEAST, 0
        self._source = 0  # the token expected to follow; 0: unknown
        self._length = 0  # tokens before it that agree with the last ones
        self.extend(tokens)

    def extend(self, tokens: list[int]) -> None:
        known, ends, earlier = self._tokens, self._ends, self._earlier
        for token in tokens:
            if self._source and known[self._source] == token:
                self._source, self._length = self._source + 1, self._length + 1
            else:
                self._source = 0
            known.append(token)
            gram = tuple(known[-self.GRAM :])
            earlier.append(ends.get(gram, 0))
            ends[gram] = len(known)

    def propose(self, limit: int) -> list[int]:
        self._proposed = 0
        if limit and not self._source:
            self._search()
        if not limit or not self._source or self._length < self._least:
            return []
        found: list[int] = []
        for index in range(self._source, self._source + min(limit, LONGEST, max(2 * WORTH, 2 * self._length))):
            # an occurrence that overlaps its repetition goes on with what is proposed
            found.append(self._tokens[index] if index < len(self._tokens) else found[index - len(self._tokens)])
        self._proposed = len(found)
        return found

    def _search(self) -> None:
        known, end = self._tokens, self._earlier[-1] if self._tokens else 0
        self._length = 0
        for _ in range(self.CANDIDATES):
            if not end:
                return
            length = 0
            while length < min(end, LONGEST) and known[end - 1 - length] == known[-1 - length]:
                length += 1
            if length > self._length:
                self._source, self._length = end, length
            end = self._earlier[end - 1]

    def adapt(self, accepted: int) -> None:
        """Require longer occurrences after a proposal of little use, and shorter ones after one of use."""
        if self._proposed and accepted < min(WORTH, self._proposed):
            self._least = min(2 * self._least, LONGEST)
        elif self._proposed:
            self._least = max(self._least // 2, self.LEAST)


class ModelDraft:
    """Proposes the tokens of a smaller model. It proposes more after success, and pauses after failures."""

    def __init__(self, model: Any, state: State, rows: int, sampler: Sampler, device: torch.device) -> None:
        self._reader = Reader(model, state, rows, device)
        self._sampler = sampler
        self._states: list[State] = []  # after each proposed token but the last
        self._proposed: list[list[int]] = []
        self._width, self._pause, self._wait = 2 * WORTH, 0, 0

    def propose(self, limits: list[int]) -> Proposal | None:
        self._proposed = []
        count = min(self._width, max(limits))
        if self._wait or not count:
            self._wait = max(0, self._wait - 1)
            return None
        reader = self._reader
        logits, state = reader.read(None)
        reader.advance(state)
        logits = logits[:, -1]
        if not bool(logits.amax(dim=1).isfinite().all()):
            raise ValueError("draft: its logits are not finite (its weights or its state)")
        tokens: list[list[int]] = []
        probabilities: list[Tensor] = []
        self._states = [state]
        for index in range(count):
            if self._sampler.temperature:
                probabilities.append(self._sampler.probabilities(logits))
            token = self._sampler(logits)
            tokens.append(token.tolist())
            if index + 1 < count:
                logits, state = reader.step(token, state)
                self._states.append(state)
        self._proposed = [list(row)[:limit] for row, limit in zip(zip(*tokens), limits)]
        return Proposal(self._proposed, torch.stack(probabilities, dim=1) if probabilities else None)

    def extend(self, tokens: list[list[int]], accepted: list[int] | None = None) -> None:
        reader = self._reader
        if not self._proposed or accepted is None:
            reader.unread = [before + new for before, new in zip(reader.unread, tokens)]
            return
        active = [row for row, new in enumerate(tokens) if new]
        # rows that accepted more than others read their tokens again
        common = min((accepted[row] for row in active), default=0)
        common = min(common, len(self._states) - 1)
        reader.state = self._states[common]
        reader.unread = [new[common:] for new in tokens]
        best = max((accepted[row] for row in active), default=0)
        if all(accepted[row] == len(self._proposed[row]) for row in active):
            self._width = min(2 * self._width, LONGEST)
        else:
            self._width = max(WORTH, min(self._width, best + 1))
        self._pause = 0 if best >= WORTH else min(2 * self._pause + WORTH, LONGEST)
        self._wait = self._pause


def check_draft(draft: Any, model: Any) -> None:
    """Raise unless ``draft`` is ``"prompt"``, or a model that fits ``model``, which is not observed."""
    if any(True for _ in observers_of(model)):
        raise RuntimeError("draft: an observer would see tokens that are not accepted: generate without a draft")
    if isinstance(draft, str):
        if draft != "prompt":
            raise ValueError(f"draft: {draft!r}{nearest(draft, ['prompt'])}: expected 'prompt' or a smaller model")
        return
    if not (hasattr(draft, "decoder") and hasattr(draft, "vocab")):
        raise TypeError(f"draft: expected 'prompt' or a model of this library, got {type(draft).__name__}")
    if draft.vocab != model.vocab:
        raise ValueError(f"draft: a vocabulary of {draft.vocab} tokens: expected {model.vocab}, as the model has")
    devices = [next(module.parameters()).device for module in (draft, model)]
    if devices[0] != devices[1]:
        raise ValueError(f"draft: it is on {devices[0]}: expected {devices[1]}, as the model is")


# -- reading and checking ----------------------------------------------------------------------------------------------


class Reader:
    """A model and its state, with the tokens of each row that the state does not contain yet."""

    def __init__(self, model: Any, state: State, rows: int, device: torch.device) -> None:
        self.model, self.state, self.device = model, state, device
        self.unread: list[list[int]] = [[] for _ in range(rows)]
        self.calls = 0
        self._decode: Decoder = model.decoder(rows)
        self._called = is_called(model)

    def read(self, proposal: Proposal | None) -> tuple[Tensor, State]:
        """Read the unread tokens and a proposal. Return the logits and the state after them.

        Logits: ``[batch, 1 + longest proposal, vocab]``, after the unread tokens and each proposed one.
        """
        rows = len(self.unread)
        proposed = [[] for _ in range(rows)] if proposal is None else proposal.tokens
        both = [old + new for old, new in zip(self.unread, proposed)]
        lengths, longest = list(map(len, both)), max(map(len, both))
        if proposal is None and min(lengths) == longest <= WORTH and not self._called:
            state = self.state
            for token in zip(*both):  # a decoder takes less time for few tokens
                logits, state = self.step(torch.tensor(token, device=self.device), state)
            return logits.unsqueeze(1), state
        tokens = torch.tensor([row + [0] * (longest - len(row)) for row in both], device=self.device)
        mask = None
        if min(lengths) < longest:
            mask = torch.arange(longest, device=self.device) < torch.tensor(lengths, device=self.device).unsqueeze(1)
        first = torch.tensor([max(len(row) - 1, 0) for row in self.unread], device=self.device)
        index = first.unsqueeze(1) + torch.arange(1 + max(map(len, proposed)), device=self.device)
        index = index.clamp(max=longest - 1)
        row = torch.arange(rows, device=self.device).unsqueeze(1)
        self.calls += 1
        if self._called:
            out = self.model(tokens, self.state, mask)
            return out.logits[row, index], out.state
        hidden, state = self.model.run(self.model.lookup(tokens), self.state, mask)
        return self.model.predict(hidden[row, index]), state

    def step(self, token: Tensor, state: State) -> tuple[Tensor, State]:
        """Read one token ``[batch]`` after ``state``. Return the logits ``[batch, vocab]`` and the next state."""
        self.calls += 1
        if self._called:
            out = self.model(token.unsqueeze(1), state)
            return out.logits[:, 0], out.state
        hidden, state = self._decode(self.model.lookup(token.unsqueeze(1)), state)
        return self.model.predict(hidden[:, 0]), state

    def advance(self, state: State, proposed: list[list[int]] | None = None, accepted: list[int] | None = None) -> None:
        """Set the state after a call, in rows that accepted all of ``proposed``; the others read again."""
        if proposed is None or accepted is None:
            complete = [True] * len(self.unread)
        else:
            complete = [count == len(row) for count, row in zip(accepted, proposed)]
        if not all(complete) and self.model.grows:  # rows of different lengths: all read again
            complete = [False] * len(complete)
        if all(complete):
            self.state = state
        elif any(complete):
            self.state = where(torch.tensor(complete, device=self.device), state, self.state)
        for row, done in enumerate(complete):
            if done:
                self.unread[row] = []
            elif proposed is not None and accepted is not None:
                self.unread[row] = self.unread[row] + proposed[row][: accepted[row]]


class Speculation(NamedTuple):
    """The result of :func:`speculate`."""

    tokens: Tensor
    """``[batch, count]`` int64: the new tokens."""
    state: State
    logits: Tensor
    drafted: Drafted


@torch.inference_mode()
def speculate(model: Any, logits: Tensor, state: State, sampler: Sampler, count: int, draft: Draft) -> Speculation:
    """Return ``count >= 1`` new tokens of each row, with the state and logits after them, as ``steps`` gives them."""
    rows, device = logits.shape[0], logits.device
    reader = Reader(model, state, rows, device)
    first = sampler(logits).tolist()
    new = [[token] for token in first]
    reader.unread = [[token] for token in first]
    draft.extend(reader.unread)
    last: list[Tensor | None] = [None] * rows  # logits of finished rows
    proposed = accepted = 0
    while any(end is None for end in last):
        limits = [count - len(row) for row in new]
        proposal = draft.propose(limits) if max(map(len, reader.unread)) <= LONGEST else None
        logits, state = reader.read(proposal)
        tokens = [[] for _ in range(rows)] if proposal is None else proposal.tokens
        counts, following = _check(sampler, logits, proposal, limits)
        reader.advance(state, tokens, counts)
        added: list[list[int]] = [[] for _ in range(rows)]
        for row, accept in enumerate(counts):
            if last[row] is not None:
                continue
            added[row] = tokens[row][:accept]
            if limits[row] > accept:
                added[row] = [*added[row], following[row]]
                reader.unread[row] = [*reader.unread[row], following[row]]
            elif not reader.unread[row]:
                last[row] = logits[row, accept]
            new[row] += added[row]
        draft.extend(added, None if proposal is None else counts)
        proposed, accepted = proposed + sum(map(len, tokens)), accepted + sum(counts)
    ends = torch.stack([end for end in last if end is not None])
    return Speculation(torch.tensor(new, device=device), reader.state, ends, Drafted(proposed, accepted, reader.calls))


def _check(
    sampler: Sampler, logits: Tensor, proposal: Proposal | None, limits: list[int]
) -> tuple[list[int], list[int]]:
    """The number of accepted tokens of each row, and the token that follows them if the limit allows one more.

    ``logits``: ``[batch, 1 + longest proposal, vocab]``. Raises ``ValueError`` for logits that are not finite where a
    token depends on them.
    """
    if proposal is None:
        rows = [row for row, limit in enumerate(limits) if limit]
        drawn = dict(zip(rows, sampler(logits[rows, 0]).tolist())) if rows else {}
        return [0] * len(limits), [drawn.get(row, 0) for row in range(len(limits))]
    tokens = proposal.tokens
    largest = logits.amax(dim=2).tolist()

    def accepted(fits: list[list[bool]]) -> list[int]:
        counts = []
        for row, limit in enumerate(limits):
            count = next((i for i in range(len(tokens[row])) if not fits[row][i]), len(tokens[row]))
            for value in largest[row][: min(count + 1, limit)]:
                expect_finite(row, value)
            counts.append(count)
        return counts

    if not sampler.temperature:
        best = logits.argmax(dim=2).tolist()
        counts = accepted([[token == choice for token, choice in zip(*row)] for row in zip(tokens, best)])
        return counts, [row[count] for row, count in zip(best, counts)]

    # accept with probability min(1, p / q); where it fails, draw from the positive part of p - q
    p = sampler.probabilities(logits)
    longest, device = logits.shape[1] - 1, logits.device
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in tokens], dtype=torch.int64, device=device)
    ids = ids.unsqueeze(2)
    q = torch.zeros_like(p[:, 1:]).scatter(2, ids, 1.0) if proposal.probability is None else proposal.probability
    ratio = p[:, :longest].gather(2, ids) / q.gather(2, ids)
    uniform = torch.rand(ratio.shape, generator=sampler.generator, dtype=p.dtype, device=device)
    counts = accepted((uniform < ratio).squeeze(2).tolist())
    at = torch.tensor(counts, device=device)
    following = p[torch.arange(len(limits), device=device), at]
    rejected = [row for row, count in enumerate(counts) if count < len(tokens[row])]
    if rejected:
        rest = (following[rejected] - q[rejected, at[rejected]]).clamp(min=0)
        # rounding may leave nothing where p and q are almost equal
        following[rejected] = torch.where(rest.sum(dim=1, keepdim=True) > 0, rest, following[rejected])
    draws = [count < limit for count, limit in zip(counts, limits)]
    following[[not draw for draw in draws]] = 1.0  # not used, and may not be finite
    return counts, torch.multinomial(following, 1, generator=sampler.generator).squeeze(1).tolist()
