"""One call of a model whose tokens are shared out over the ranks of a mesh's ``context``."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from ..kernels.dispatch import integers
from ..kernels.documents import NO_DOCUMENT, Documents, packed_ids
from .block import Block, call, initial_state, unsharded
from .collectives import Enter, Gather, Leave, Ranks, Receive, Send, Shift, Sum, Whole, any_of_all, tie
from .memory import NeuralMemory
from .observers import active
from .parallel_memory import can_run, run_affine, run_chunks
from .parallel_plan import past_at, row_groups, sharding_of
from .state import State, concatenate, detach, map_state, named_tensors, select, where
from .tensor_parallel import MethodCall


class ContextCall:
    """One call of a model whose tokens are shared out over ``context``; blocks call it for earlier tokens."""

    def __init__(
        self,
        ranks: Ranks,
        model: Any,
        x: Tensor | None,
        state: Any,
        shape: tuple[int, int],
        mask: Tensor | None,
        documents: Tensor | None,
        cu_seqlens: Tensor | None,
        recompute: bool,
        ways: dict[Block, str],
    ) -> None:
        self.recompute = recompute and torch.is_grad_enabled()
        self.ways = ways
        self._documents: dict[int, Documents] = {}
        self.ranks, self.rows, self.time = ranks, *shape
        self.length = self.time // ranks.size
        self.start = ranks.rank * self.length
        self.part = slice(self.start, self.start + self.length)
        self.mask, self.grows = mask, model.grows
        self.ended, self.empty = False, None
        self.ids = documents
        if cu_seqlens is not None:
            self.ids, self.ended, self.empty = packed_ids(cu_seqlens, *shape)
            self.ids = self.ids.to(next(model.parameters()).device)
        self.before = None if state is None else state.document
        documents_of_all = self.all_documents()
        self.begins = state is None or (documents_of_all is not None and not all(documents_of_all.continues))
        """Whether fresh states are used, by any rank."""
        if documents_of_all is not None and torch.is_grad_enabled():
            self.begins = any_of_all(self.begins, next(model.parameters()).device)
        given = [y for _, y in named_tensors(state) if y.is_floating_point()]
        device = next(model.parameters()).device
        self.token = torch.zeros((), device=device)
        needed = [*model.parameters(), *given, *([] if x is None else [x])]
        if torch.is_grad_enabled() and any(y.requires_grad for y in needed):
            self.token.requires_grad_(True)
        self.token, self.x, *given = Enter.apply(ranks, self.token, x, *given)
        rest = iter(given)
        self.state = map_state(lambda y: next(rest) if y.is_floating_point() else y, state)

    # -- documents -------------------------------------------------------------------------------------------------

    def known(self, start: int) -> Tensor | None:
        """The document of each row before the token ``start``."""
        if self.ids is None or start == 0:
            return self.before
        mask = None if self.mask is None else self.mask[:, :start]
        return Documents(self.ids[:, :start], mask, self.before, ended=self.ended).after

    def documents_from(self, start: int) -> Documents | None:
        """The documents of the tokens from ``start`` to the end of this rank's part."""
        if self.ids is None:
            return None
        if start not in self._documents:
            part = slice(start, self.part.stop)
            mask = None if self.mask is None else self.mask[:, part]
            # without a valid token before, the documents of the state have ended just now
            ended = self.ended and (start == 0 or (self.mask is not None and not bool(self.mask[:, :start].any())))
            empty = self.empty if self.ranks.last else None
            self._documents[start] = Documents(
                self.ids[:, part], mask, self.known(start), ended=ended, empty=empty
            )  # fmt: skip
        return self._documents[start]

    def all_documents(self) -> Documents | None:
        """The documents of all tokens."""
        if self.ids is None:
            return None
        if -1 not in self._documents:
            self._documents[-1] = Documents(self.ids, self.mask, self.before, ended=self.ended, empty=self.empty)
        return self._documents[-1]

    # -- the end of the call ---------------------------------------------------------------------------------------

    def leave(self, hidden: Tensor, state: Any) -> tuple[Tensor, Any]:
        """The outputs of this rank, and the state of the last rank."""
        given = [y for _, y in named_tensors(state)]
        hidden, *found = Leave.apply(self.ranks, self.grows, hidden, self.token, *given)
        rest = iter(found)
        return hidden, map_state(lambda _: next(rest), state)

    def sum(self, x: Tensor) -> Tensor:
        """The sum over the ranks."""
        total: Tensor = Sum.apply(self.ranks, x)
        return total

    def gather(self, x: Tensor) -> Tensor:
        """The outputs of all ranks."""
        whole: Tensor = Whole.apply(self.ranks, x)
        return whole

    # -- blocks ----------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Within the ``with`` block, blocks that depend on earlier tokens are run by :meth:`run`."""
        before, call.shard = call.shard, self
        try:
            yield
        finally:
            call.shard = before

    def run(
        self, block: Block, x: Tensor, state: State, mask: Tensor | None, documents: Documents | None, named: Any
    ) -> tuple[Tensor, State]:
        """Run a block on this rank's tokens, after the tokens of the ranks before."""
        fresh = None if documents is None else documents.fresh
        with unsharded():
            way = self.ways.get(block, "gathered" if sharding_of(block) is None else "pipelined")
            if way == "gathered":
                return self._run_gathered(block, x, state, fresh, named)
            if torch.is_grad_enabled():
                x = tie(x, *self._used(block, state, fresh))
            past = self._past(block, state)
            if way == "window" and self.mask is None and past is not None and past <= self.length:
                return self._run_after_window(block, x, state, fresh, past, named)
            if isinstance(block, NeuralMemory) and way in ("affine", "chunk") and not named:
                before = state if state is not None else self._fresh(block, documents)
                if can_run(way, block, before, self.mask, documents):
                    if way == "chunk":
                        return run_chunks(self, block, x, before)
                    return run_affine(self, block, x, before, documents)
            return self._run_after_state(block, x, state, mask, documents, named)

    def _past(self, block: Block, state: State) -> int | None:
        """The number of tokens that each rank needs of the rank before."""
        if self.ids is not None:  # a document may begin anywhere
            return block.past()
        counters = [y for path, y in named_tensors(state) if _is_counter(path)]
        begun = integers(counters[0]) if counters else [0]
        starts = range(self.length, self.time, self.length)
        return past_at(block, [place + start for place in begun for start in starts])

    def _used(self, block: Block, state: State, fresh: State) -> list[Tensor]:
        """The tensors that get a gradient on some rank, and so on all: what one process would use."""
        parameters = dict(block.named_parameters())
        if self.begins:
            used = list(parameters.values())
        else:
            names = set().union(*(_used_by_tokens(block, *place) for place in self._places(block, state)))
            used = [parameter for name, parameter in parameters.items() if name in names]
            fresh = None
        return [*used, *(y for _, y in named_tensors((state, fresh)))]

    def _places(self, block: Block, state: State) -> set[tuple[tuple[int, ...], int]]:
        """The counters of each row before the call, modulo the block's period, and its number of tokens.

        A call of at least a period is represented by one token at a multiple of the period.
        """
        counters = [y for path, y in named_tensors(state) if _is_counter(path)]
        lengths = [self.time] * self.rows if self.mask is None else self.mask.sum(1).tolist()
        if not counters or max(lengths) >= block.period or not any(lengths):
            return {((0,) * len(counters), 1)}
        rows = zip(*([position % block.period for position in integers(y)] for y in counters))
        return {(row, length) for row, length in zip(rows, lengths) if length}

    def repeat(self, block: Block, x: Any, state: State, method: Callable[..., Any] | None = None, **named: Any) -> Any:
        """Call a block or its ``method``, which ``recompute`` calls again in the backward pass."""
        function: Callable[..., Any] = block if method is None else method
        if not self.recompute:
            return function(x, state, **named)
        parameters = dict(block.named_parameters())
        if not all(isinstance(parameter, nn.Parameter) for parameter in parameters.values()):
            # in the backward pass, the block does not have this rank's heads in place of its parameters
            method = functools.partial(functional_call, MethodCall(block, function))
            given: dict[str, Tensor] = {f"of.{name}": parameter for name, parameter in parameters.items()}
            return checkpoint(lambda *inputs: method(given, inputs, named), x, state, use_reentrant=False)
        return checkpoint(function, x, state, use_reentrant=False, **named)

    def _run_gathered(self, block: Block, x: Tensor, state: State, fresh: State, named: Any) -> tuple[Tensor, State]:
        """Each rank computes all tokens."""
        x, self.token = Gather.apply(self.ranks, x, self.token)
        y, after = self.repeat(
            block, x, state, mask=self.mask, documents=_starting(self.all_documents(), fresh), **named
        )
        return y[:, self.part], after

    def _run_after_state(
        self, block: Block, x: Tensor, state: State, mask: Tensor | None, documents: Documents | None, named: Any
    ) -> tuple[Tensor, State]:
        """Each rank waits for the state of the rank before, which sends that of each group of rows when it has it."""
        state = state if self.ranks.first or state is not None else self._fresh(block, documents)
        together = named or block.grows or documents is not None or active
        groups = 1 if together else row_groups(self.rows, block.dim, x.is_cpu, self.ranks.size)
        if groups == 1:
            return self._run_rows_after_state(block, x, state, mask, documents, named)
        outputs, states = [], []
        for rows in torch.arange(self.rows).chunk(groups):
            part = slice(int(rows[0]), int(rows[-1]) + 1)
            given = None if mask is None else mask[part]
            y, after = self._run_rows_after_state(block, x[part], select(state, part), given, None, named)
            outputs.append(y)
            states.append(after)
        return torch.cat(outputs), concatenate(states)

    def _run_rows_after_state(
        self, block: Block, x: Tensor, state: State, mask: Tensor | None, documents: Documents | None, named: Any
    ) -> tuple[Tensor, State]:
        ranks, grows = self.ranks, block.grows
        if not ranks.first:
            tensors = [y for _, y in named_tensors(state)]
            x, self.token, *found = Receive.apply(ranks, grows, x, self.token, *(y.detach() for y in tensors))
            rest = iter(found)
            state = map_state(lambda _: next(rest), state)
        y, after = self.repeat(block, x, state, mask=mask, documents=documents, **named)
        if not ranks.last:
            given = [z for _, z in named_tensors(after)]
            y, self.token, *found = Send.apply(ranks, grows, tie(y, x), self.token, *given)
            rest = iter(found)
            after = map_state(lambda _: next(rest), after)
        return y, after

    def _run_after_window(
        self, block: Block, x: Tensor, state: State, fresh: State, past: int, named: Any
    ) -> tuple[Tensor, State]:
        """Each rank begins with the last ``past`` tokens of the rank before. Their outputs are not used."""
        if past:
            x, self.token, halo = Shift.apply(self.ranks, past, x, self.token)
        if self.ranks.first:
            y, after = self.repeat(block, x, state, documents=_starting(self.documents_from(0), fresh), **named)
            return y, after
        start = self.start - past
        if past:
            x = torch.cat((halo, x), dim=1)
        documents = _starting(self.documents_from(start), fresh)
        before = self.state_at(block, state, start, documents)
        y, after = self.repeat(block, x, before, documents=documents, **named)
        return y[:, past:], after

    def state_at(self, block: Block, state: State, start: int, documents: Documents | None) -> State:
        """A state at the token ``start``: right in what does not depend on the tokens before, and in its positions."""
        if start == 0:
            return state
        begun = self._fresh(block, documents)
        state = begun if state is None else state
        count = torch.full((self.rows,), start)
        if self.ids is not None:
            ids = self.ids.cpu()
            same = (ids[:, :start] == ids[:, start : start + 1]).long()
            count = same.flip(1).cumprod(1).sum(1)  # tokens of the document before start
            known = self.before
            goes_on = torch.full((self.rows,), not self.ended)
            if known is not None:
                known = known.cpu()
                goes_on &= (known == NO_DOCUMENT) | (known == ids[:, 0])
            goes_on &= count == start
            if not bool(goes_on.all()):
                state = where(goes_on.to(self.ids.device), state, begun)
        return _advance(state, count)

    def _fresh(self, block: Block, documents: Documents | None) -> State:
        if documents is not None and documents.fresh is not None:
            return map_state(lambda y: y.expand(self.rows, *y.shape[1:]), documents.fresh)
        return initial_state(block, self.rows)


def _is_counter(path: str) -> bool:
    return path.rpartition(".")[2] == "position"


def _used_by_tokens(block: Any, counters: tuple[int, ...], length: int) -> list[str]:
    """The names of the parameters that a call of ``length`` tokens uses with a state whose counters are given.

    The counters are given modulo the period. A context uses some parameters only where a segment begins. Parameters
    that are not named are those of fresh states.

    A forward and backward pass over tokens of ones shows them, because blocks do not say it. Each block keeps the names
    by counters and length, on which alone they depend.
    """
    known: dict[Any, list[str]] = vars(block).setdefault("_used_by_tokens", {})
    if (counters, length) not in known:
        with torch.enable_grad():
            parameters = {name: p for name, p in block.named_parameters() if p.requires_grad}
            like = next(iter(parameters.values()), None)
            if like is None:
                return []
            rest = iter(counters)
            begun = detach(initial_state(block, 1))
            given = iter(
                [
                    torch.full_like(y, block.period + next(rest)) if _is_counter(path) else y
                    for path, y in named_tensors(begun)
                ]
            )
            state = map_state(lambda _: next(given), begun)
            y, after = block(torch.ones(1, length, block.dim, dtype=like.dtype, device=like.device), state)
            outputs = [z.sum() for _, z in named_tensors((y, after)) if z.requires_grad]
            grads = torch.autograd.grad(torch.stack(outputs).sum(), list(parameters.values()), allow_unused=True)
        known[counters, length] = [name for name, grad in zip(parameters, grads) if grad is not None]
    return known[counters, length]


def _starting(documents: Documents | None, fresh: State) -> Documents | None:
    return documents if documents is None or fresh is None else documents.starting(fresh)


def _advance(state: State, count: Tensor) -> State:
    """The state with ``count`` [batch] more tokens in every counter of tokens."""
    if not isinstance(state, tuple):
        return state
    names = getattr(state, "_fields", [None] * len(state))
    parts = [
        part + count.to(part.device) if name == "position" and isinstance(part, Tensor) else _advance(part, count)
        for name, part in zip(names, state)
    ]
    return type(state)(*parts) if hasattr(state, "_fields") else tuple(parts)
