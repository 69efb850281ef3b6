"""Memories whose tokens are shared out over ranks that run side by side: as affine maps, or chunk by chunk.

**Affine.** One matrix ``W`` [out, in] without a norm, whose errors are linear in what it predicts, depends on earlier
tokens by ``X' = X A + B``. ``X`` [out, n] is the matrix with its momentum beside it, and that at the chunk's start if
a rank begins within a chunk. The rows of ``X`` do not depend on each other, and ``A`` is the same for all. A rank
therefore computes ``B`` and ``A`` in one run from rows of zeros followed by the rows of the identity, whose values are
zero. Outputs are linear in ``X`` too: those of the rows of the identity, times ``X``, are what earlier tokens add.

**Chunk.** The gradients of a chunk are taken at its start, and so are the outputs if they are read there (``read:
anchor``). They need nothing of the other tokens of the chunk, and what the weights become is a sum over its tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..kernels.dispatch import full_precision
from ..kernels.documents import Documents
from ..kernels.linear import linear
from ..kernels.memory.learner import networks, objectives, updates
from ..kernels.memory.learner.chunks import empty_pending
from .collectives import Gather, Shift, Total
from .memory import NeuralMemory, NeuralMemoryState
from .observers import active
from .state import State, map_state

DECAYS = (updates.Keep, updates.Decay, updates.ChannelDecay)
PARTS = ("weights", "momentum", "second", "anchor")
"""The matrices of a state that depend on earlier tokens."""


def halo(block: NeuralMemory) -> int:
    """The number of tokens of the rank before that the convolution needs."""
    return block.conv - 1 if block.conv else 0


def is_affine(block: NeuralMemory) -> bool:
    """Whether the state and the outputs are affine in the state before."""
    if not _is_shared(block) or len(block.shapes) > 1 or block.norm_gain is not None:
        return False
    rule = block.rule
    if rule is None:  # that of Titans
        return block.clip is None
    return (
        type(rule.network) in (networks.Linear, networks.MLP)
        and type(rule.retention) in DECAYS
        and type(rule.optimizer) in (updates.Step, updates.Momentum)
        and (
            type(rule.objective) is objectives.DotProduct
            or (type(rule.objective) in (objectives.SquaredError, objectives.HalfSquaredError) and rule.clip is None)
        )
    )


def sums_chunks(block: NeuralMemory) -> bool:
    """Whether the tokens of a chunk are read at its start, and what they write is a sum over them."""
    if not _is_shared(block) or block.retrieve != "anchor":
        return False
    rule = block.rule
    if rule is None or rule.moves_once:
        return rule is None or rule.keys == 1
    decays = (*DECAYS, updates.LqNorm)
    return rule.sums and rule.keys == 1 and rule.optimizer.order < 2 and type(rule.retention) in decays


def _is_shared(block: NeuralMemory) -> bool:
    """Whether the state has nothing else of earlier tokens but the last inputs of the convolution."""
    rule = block.rule
    return (
        type(block).update is NeuralMemory.update
        and type(block).inputs is NeuralMemory.inputs
        and block.use != "read"
        and block.gates != "chunk"
        and block.threshold is None
        and (rule is None or (rule.window == 1 and rule.query is None and rule.reset is None))
    )


def affine_parts(block: NeuralMemory, aligned: bool) -> int:
    """The number of matrices in ``X``. ``aligned``: ranks begin where chunks do."""
    order = 0 if not block.momentum else 1 if block.rule is None else block.rule.optimizer.order
    return 1 + order + (not aligned)


def can_run(way: str, block: NeuralMemory, state: NeuralMemoryState, mask: Tensor | None, documents: Any) -> bool:
    """Whether a call can be run in this way, which padding and observers do not allow."""
    if mask is not None or active or block.use == "read":
        return False
    return way == "affine" or (documents is None and len(set(state.memory.position.tolist())) == 1)


def _with_history(shard: Any, block: NeuralMemory, x: Tensor, state: NeuralMemoryState) -> tuple[Tensor, State]:
    """``x``, and the state with the last inputs of the convolution before this rank's tokens."""
    count = halo(block)
    if not count:
        return x, state
    x, shard.token, before = Shift.apply(shard.ranks, count, x, shard.token)
    if shard.ranks.first:
        return x, state
    history = linear(block.qkv, before).to(block.output_gain.dtype)
    if shard.ids is not None:  # a document begins without a history
        ids = shard.ids[:, shard.start - count : shard.start + 1]
        history = torch.where((ids[:, :-1] == ids[:, -1:]).unsqueeze(-1), history, 0.0)
    return x, state._replace(convolution=history)


# -- affine ------------------------------------------------------------------------------------------------------------


def run_affine(
    shard: Any, block: NeuralMemory, x: Tensor, state: NeuralMemoryState, documents: Documents | None
) -> tuple[Tensor, NeuralMemoryState]:
    """Run a block on this rank's tokens. ``state``: that of the first rank."""
    ranks, memory = shard.ranks, state.memory
    begins = [place + shard.length * rank for place in memory.position.tolist() for rank in range(1, ranks.size)]
    aligned = block.chunk == 1 or (documents is None and all(place % block.chunk == 0 for place in begins))
    names = [name for name in PARTS if getattr(memory, name, ()) and not (name == "anchor" and aligned)]
    out, into = memory.weights[0].shape[-2:]
    size = into * len(names)
    if not ranks.first:
        state = shard.state_at(block, state, shard.start, documents)
        identity = torch.eye(size, dtype=memory.weights[0].dtype, device=x.device)
        rows = F.pad(identity, (0, 0, out, 0)).expand(*memory.weights[0].shape[:2], -1, -1).split(into, -1)
        parts: dict[str, Any] = {name: (part,) for name, part in zip(names, rows)}
        parts.setdefault("anchor", parts["weights"])
        state = state._replace(memory=state.memory._replace(**parts))
        if documents is not None:
            fresh: Any = block.init_state(1) if documents.fresh is None else documents.fresh
            more = map_state(lambda w: F.pad(w, (0, 0, 0, size)) if w.dim() == 4 else w, fresh.memory)
            documents = documents.starting(fresh._replace(memory=more))
    x, state = _with_history(shard, block, x, state)
    y, after = shard.repeat(block, x, state, block.update, documents=documents, zeros=0 if ranks.first else size)
    message = torch.cat([getattr(after.memory, name)[0] for name in names], -1)
    message = F.pad(message, (0, 0, 0, size)) if ranks.first else message
    maps, shard.token = Gather.apply(ranks, message.unsqueeze(1), shard.token)
    if not ranks.first:
        with full_precision(x.device.type):
            known = maps[:, 0, :, :out]
            for rank in range(1, ranks.rank):
                known = _after(shard, rank, known, maps[:, rank])
            read = (y[..., out:].transpose(1, 2).to(known.dtype) @ known.mT).transpose(1, 2).to(y.dtype)
            y = _add(y[..., :out], read, _goes_on(shard, shard.part))
            found = {name: getattr(after.memory, name, ()) for name in PARTS}
            ended = {name: (_after(shard, ranks.rank, known, part[0]),) for name, part in found.items() if part}
        after = after._replace(memory=after.memory._replace(**ended))
    return block.project_output(y, x), after


def _after(shard: Any, rank: int, known: Tensor, part: Tensor) -> Tensor:
    """What is ``known`` ``[batch, heads, out, n]`` before the tokens of a rank, as it is after them."""
    out, stop = known.shape[-2], (rank + 1) * shard.length
    same = _goes_on(shard, slice(rank * shard.length, stop))
    return _add(part[:, :, :out], known @ part[:, :, out:], None if same is None else same[:, -1:])


def _goes_on(shard: Any, span: slice) -> Tensor | None:
    """Which tokens ``[batch, time]`` of a rank belong to the document of the token before; ``None``: all."""
    ids = shard.ids
    return None if ids is None else ids[:, span] == ids[:, span.start - 1 : span.start]


def _add(x: Tensor, more: Tensor, where: Tensor | None) -> Tensor:
    """``x + more``. NaN of earlier documents adds nothing where ``where`` ``[batch, ...]`` is false."""
    return x + more if where is None else torch.where(where[..., None, None], x + more, x)


# -- chunks ------------------------------------------------------------------------------------------------------------


def run_chunks(
    shard: Any, block: NeuralMemory, x: Tensor, state: NeuralMemoryState
) -> tuple[Tensor, NeuralMemoryState]:
    """Run a block on this rank's tokens. ``state``: that of the first rank."""
    memory: Any = state.memory
    place, length = int(memory.position[0]), shard.length
    x, state = _with_history(shard, block, x, state)
    tokens, history, gates = block.inputs(x, state, None)
    outputs, start = [], 0
    while start < shard.time:
        stop = min(start + block.chunk - (place + start) % block.chunk, shard.time)
        ends = (place + stop) % block.chunk == 0
        if (place + start) % block.chunk == 0:
            memory = memory._replace(anchor=memory.weights)
        # All ranks write the last token of a chunk, after the others: the update with it ends the chunk, from what all
        # have added. What is sent is the token's inputs, which are smaller than the weights after it.
        count, owner = stop - ends - start, (stop - 1) // length
        span = slice(max(start - shard.start, 0), min(max(stop - ends - shard.start, 0), length))
        added = _Sums(block, memory)
        if span.start < span.stop:
            mine = tokens.at(span)
            first = start >= shard.start
            position = memory.position + (max(start, shard.start) - start)
            before = (memory if first else added.without(memory))._replace(position=position)
            y, after = shard.repeat(block, x, state._replace(memory=before), block.update, inputs=(mine, None, None))
            outputs.append(y)
            added.take(mine, after.memory)
        last: list[Tensor] = []
        if ends:
            at = (stop - 1) % length
            last = [z[:, at : at + 1] for z in tokens if z is not None]
            if owner != shard.ranks.rank:
                last = [torch.zeros_like(z) for z in last]
        if count:
            memory = added.all(shard, memory)._replace(position=memory.position + count)
        if ends:
            # zeros of the other ranks are added
            flat = torch.cat([z.to(memory.weights[0].dtype).flatten(1) for z in last], 1)
            flat, shard.token = Total.apply(shard.ranks, flat, shard.token)
            parts = flat.split([z[0].numel() for z in last], 1)
            rest = (z.view(like.shape).to(like.dtype) for z, like in zip(parts, last))
            token = type(tokens)(*(None if z is None else next(rest) for z in tokens))
            y, ended = block.update(x, state._replace(memory=memory), inputs=(token, None, None))
            memory = ended.memory
            if owner == shard.ranks.rank:
                outputs.append(y)
        start = stop
    return block.project_output(torch.cat(outputs, 1), x), NeuralMemoryState(memory, history, gates)


class _Sums:
    """What the tokens of a rank add to the memory within a chunk.

    Where weights move once a chunk, to the sums that are pending. Otherwise the weights decay, and momentum goes on, by
    factors that do not depend on the memory: ``W = kept W + carried S + ...``, ``S = eta S + ...``.

    A token multiplies ``W`` by ``keep`` and ``S`` by ``eta``, and adds the new ``S`` to ``W``. For ``n`` tokens of a
    rank, ``kept`` is ``keep_1 ... keep_n``, and ``carried`` the sum over ``i`` of ``eta_1 ... eta_i keep_(i+1) ...
    keep_n``. What a rank adds is then multiplied by the factors of each rank after it.
    """

    def __init__(self, block: NeuralMemory, memory: Any) -> None:
        self.block, self.moves_once = block, block.rule is not None and block.rule.moves_once
        w = memory.weights
        if self.moves_once:
            *self.matrices, eta, theta, kept = empty_pending(w, memory.pending[-1])
            self.factors = [eta, theta, kept]
            return
        self.matrices = [torch.zeros_like(z) for z in (*w, *memory.momentum)]
        by_channel = block.rule is not None and block.rule.retention.gates == "channel"
        channels = block.gate_sizes["alpha"] if by_channel else 1
        kept = w[0].new_ones(*w[0].shape[:2], channels)
        self.factors = [kept, torch.zeros_like(kept), kept[..., :1]]

    def without(self, memory: Any) -> Any:
        """The memory without what the tokens of other ranks have added."""
        return self._put(memory, self.matrices, self.factors)

    def _put(self, memory: Any, matrices: Sequence[Tensor], factors: Sequence[Tensor]) -> Any:
        if self.moves_once:
            return memory._replace(pending=(*matrices, *factors))
        count = len(memory.weights)
        return memory._replace(weights=tuple(matrices[:count]), momentum=tuple(matrices[count:]))

    def take(self, tokens: Any, after: Any) -> None:
        """Take what ``tokens`` have added from the memory ``after`` them."""
        if self.moves_once:
            *self.matrices, eta, theta, kept = after.pending
            self.factors = [eta, theta, kept]
            return
        dtype = after.weights[0].dtype
        one = torch.ones_like(tokens.theta[:, :, :, :1] if tokens.theta.dim() == 4 else tokens.theta.unsqueeze(-1))
        one = one.to(dtype)
        keep = one if tokens.alpha is None else 1 - tokens.alpha.to(dtype).view(*one.shape[:3], -1)
        later = F.pad(keep[:, 1:], (0, 0, 0, 0, 0, 1), value=1.0).flip(1).cumprod(1).flip(1)
        decay = one if tokens.eta is None else tokens.eta.to(dtype).unsqueeze(-1).cumprod(1)
        self.matrices = [*after.weights, *after.momentum]
        self.factors = [keep.prod(1), (later * decay).sum(1), decay[:, -1]]

    def all(self, shard: Any, memory: Any) -> Any:
        """The memory after the tokens of all ranks, the first of which began with ``memory``."""
        flat = torch.cat([z.flatten(1) for z in self.factors], 1).unsqueeze(1)
        flat, shard.token = Gather.apply(shard.ranks, flat, shard.token)
        every = flat.split([z[0].numel() for z in self.factors], 2)  # [batch, ranks, ...] each
        a, b, c = (part.view(len(part), -1, *z.shape[1:]).unbind(1) for part, z in zip(every, self.factors))
        factors, matrices = [sum(a), sum(b), torch.stack(c).prod(0)], self.matrices
        if not self.moves_once:
            kept, carried, eta = torch.ones_like(a[0]), torch.zeros_like(b[0]), torch.ones_like(c[0])
            for rank in range(shard.ranks.size - 1, shard.ranks.rank, -1):
                kept, carried, eta = kept * a[rank], kept * b[rank] + carried * c[rank], eta * c[rank]
            count = len(memory.weights)
            weights, momentum = matrices[:count], matrices[count:]
            matrices = [self._columns(kept, i) * w for i, w in enumerate(weights)]
            for i, s in enumerate(momentum):
                matrices[i] = matrices[i] + self._columns(carried, i) * s
            matrices += [self._columns(eta, i) * s for i, s in enumerate(momentum)]
        total, shard.token = Total.apply(shard.ranks, torch.cat([z.flatten(1) for z in matrices], 1), shard.token)
        parts = total.split([z[0].numel() for z in matrices], 1)
        return self._put(memory, [part.view(z.shape) for part, z in zip(parts, matrices)], factors)

    def _columns(self, factors: Tensor, i: int) -> Tensor:
        """Factors of the whole matrix ``i`` ``[batch, heads, 1]``, or of its columns, beside it."""
        if factors.shape[-1] > 1:
            start = sum(into for _, into in self.block.shapes[:i])
            factors = factors[..., start : start + self.block.shapes[i][1]]
        return factors.unsqueeze(-2)
