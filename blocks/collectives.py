"""Differentiable communication between the ranks of one dimension of a device mesh.

Every rank makes the same calls in the same order. A token, a scalar that each call takes and returns, makes autograd
run the calls of the backward pass in the reverse order on every rank, also where a rank does not use a result. Without
it, autograd would leave out such a call on that rank, and the rank at the other end would wait for ever.

Inside a model, the gradients of a rank are those of its own part of the tokens: the gradient of a parameter is their
sum over the ranks. Outside, every rank has the same tensors and the same gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from .state import map_state

ALIGNMENT = 16
"""Bytes to which each tensor of a message is padded."""
_SENDS: WeakKeyDictionary[Any, list[tuple[Any, Tensor]]] = WeakKeyDictionary()
"""Messages on their way, by process group. A message is lost if its work is freed before it is received: the other rank
would wait for ever where a model is freed after its last call."""


class Ranks:
    """The ranks of one dimension of a mesh, of which this process is ``rank``; and the bytes that it has sent."""

    def __init__(self, group: Any, rank: int, size: int) -> None:
        self.group, self.rank, self.size = group, rank, size
        self.first, self.last = rank == 0, rank == size - 1
        self.sent: dict[str, int] = {}
        """Bytes that this rank has sent, by the name of the call."""
        self._pending = [] if group is None else _SENDS.setdefault(group, [])

    def count(self, name: str, size: int) -> None:
        self.sent[name] = self.sent.get(name, 0) + size

    # -- messages to a neighbour, which do not wait for it ---------------------------------------------------------

    def send(self, tensors: Sequence[Tensor], to: int, *, shapes: bool = False) -> None:
        """Send tensors to rank ``to``. ``shapes``: their shapes come first, because the receiver does not know them."""
        messages = [_bytes_of(tensors)]
        if shapes:
            sizes = [size for x in tensors for size in x.shape]
            messages.insert(0, torch.tensor(sizes, device=messages[0].device))
        for message in messages:
            if message.numel():
                self.count("state" if to > self.rank else "gradient", message.numel() * message.element_size())
                self._pending.append((dist.isend(message, group=self.group, group_dst=to), message))
        while len(self._pending) > 8:
            self._pending.pop(0)[0].wait()

    def receive(self, like: Sequence[Tensor], source: int, *, shapes: bool = False) -> list[Tensor]:
        """Receive tensors of the dtypes and shapes of ``like`` from rank ``source``."""
        if not like:
            return []
        device = like[0].device
        if shapes:
            sizes = torch.empty(sum(x.dim() for x in like), dtype=torch.int64, device=device)
            dist.recv(sizes, group=self.group, group_src=source)
            like = _with_shapes(like, sizes.tolist())
        message = torch.empty(_size_of(like), dtype=torch.uint8, device=device)
        if message.numel():
            dist.recv(message, group=self.group, group_src=source)
        return _tensors_of(message, like)

    # -- calls of all ranks ----------------------------------------------------------------------------------------

    def broadcast(self, tensors: Sequence[Tensor], *, shapes: bool = False) -> list[Tensor]:
        """The tensors of the last rank."""
        if not tensors:
            return []
        if self.size == 1:
            return list(tensors)
        source, like = self.size - 1, tensors
        if shapes:
            sizes = torch.tensor([size for x in tensors for size in x.shape], device=tensors[0].device)
            dist.broadcast(sizes, group=self.group, group_src=source)
            like = _with_shapes(tensors, sizes.tolist())
        message = _bytes_of(tensors) if self.last else torch.empty(
            _size_of(like), dtype=torch.uint8, device=tensors[0].device
        )  # fmt: skip
        if self.last:
            self.count("final state", message.numel())
        dist.broadcast(message, group=self.group, group_src=source)
        return list(tensors) if self.last else _tensors_of(message, like)

    def sum(self, x: Tensor) -> Tensor:
        """The sum over the ranks."""
        x = x.clone(memory_format=torch.contiguous_format)
        if self.size == 1:
            return x
        self.count("sum", x.numel() * x.element_size())
        dist.all_reduce(x, group=self.group)
        return x

    def gather(self, x: Tensor) -> list[Tensor]:
        """The tensors of all ranks, which have one shape."""
        x = x.contiguous()
        if self.size == 1:
            return [x]
        parts = [torch.empty_like(x) for _ in range(self.size)]
        self.count("gather", x.numel() * x.element_size())
        dist.all_gather(parts, x, group=self.group)
        return parts

    def exchange(self, given: Sequence[Sequence[Tensor]], like: Sequence[Sequence[Tensor]]) -> list[list[Tensor]]:
        """Send ``given[rank]`` to each rank, and receive tensors of the dtypes and shapes of ``like[rank]`` from it."""
        messages, sizes = [_bytes_of(tensors) for tensors in given], [_size_of(tensors) for tensors in like]
        self.count("exchange", sum(len(message) for message in messages) - len(messages[self.rank]))
        sent = torch.cat(messages)
        received = sent.new_empty(sum(sizes))
        dist.all_to_all_single(received, sent, sizes, [len(message) for message in messages], group=self.group)
        return [_tensors_of(message, tensors) for message, tensors in zip(received.split(sizes), like)]


def any_of_all(value: bool, device: torch.device) -> bool:
    """Whether ``value`` is true in any process."""
    found = torch.tensor(int(value), device=device)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return bool(found)


def _size_of(tensors: Sequence[Tensor]) -> int:
    return sum(x.numel() * x.element_size() + -x.numel() * x.element_size() % ALIGNMENT for x in tensors)


def _bytes_of(tensors: Sequence[Tensor]) -> Tensor:
    parts = []
    for x in tensors:
        flat = x.detach().reshape(-1).clone(memory_format=torch.contiguous_format).view(torch.uint8)
        parts.append(F.pad(flat, (0, -len(flat) % ALIGNMENT)))
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.uint8)


def _tensors_of(message: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    found, start = [], 0
    for x in like:
        size = x.numel() * x.element_size()
        found.append(message[start : start + size].view(x.dtype).view(x.shape))
        start += size + -size % ALIGNMENT
    return found


def _with_shapes(like: Sequence[Tensor], sizes: list[int]) -> list[Tensor]:
    rest = iter(sizes)
    return [torch.empty([next(rest) for _ in x.shape], dtype=x.dtype, device="meta") for x in like]


def _zeros(like: Tensor) -> Tensor:
    return torch.zeros((), dtype=like.dtype, device=like.device).expand(like.shape)


class Tie(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *others: Tensor) -> Tensor:
        ctx.others = [_zeros(y) if y.requires_grad else None for y in others]
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad, *ctx.others


def tie(x: Tensor, *others: Tensor) -> Tensor:
    """``x``, with zero gradients for ``others``: all ranks then have gradients of the same tensors.

    FSDP sums those gradients over the ranks that each rank has, so that every rank must have the same.
    """
    used = [y for y in others if y.requires_grad]
    tied: Tensor = Tie.apply(x, *used) if used and torch.is_grad_enabled() else x
    return tied


class Send(Function):
    """``(x, token, *tensors)``, after the tensors are sent to the next rank."""

    @staticmethod
    def forward(ctx: Any, ranks: Ranks, shapes: bool, x: Tensor, token: Tensor, *tensors: Tensor) -> Any:
        ranks.send(tensors, ranks.rank + 1, shapes=shapes)
        ctx.ranks = ranks
        ctx.like = [torch.empty_like(y, device="meta") if y.is_floating_point() else None for y in tensors]
        ctx.device = x.device
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(same := [y.view_as(y) for y in tensors if not y.is_floating_point()]))
        rest = iter(same)
        return x.view_as(x), token.view_as(token), *(
            y.view_as(y) if y.is_floating_point() else next(rest) for y in tensors
        )  # fmt: skip

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, x: Tensor | None, token: Tensor | None, *grads: Tensor | None) -> Any:
        like = [torch.empty_like(y, device=ctx.device) for y in ctx.like if y is not None]
        received = iter(ctx.ranks.receive(like, ctx.ranks.rank + 1))
        sums = []
        for y, grad in zip(ctx.like, grads):
            far = None if y is None else next(received)
            sums.append(far if grad is None or far is None else grad + far)
        return None, None, x, token, *sums


class Receive(Function):
    """``(x, token, *tensors)`` with tensors of the rank before. ``like``: tensors of their shapes."""

    @staticmethod
    def forward(ctx: Any, ranks: Ranks, shapes: bool, x: Tensor, token: Tensor, *like: Tensor) -> Any:
        tensors = ranks.receive(like, ranks.rank - 1, shapes=shapes)
        ctx.ranks, ctx.count = ranks, len(tensors)
        ctx.like = [torch.empty_like(y, device="meta") if y.is_floating_point() else None for y in tensors]
        ctx.device = x.device
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(y for y in tensors if not y.is_floating_point()))
        return x.view_as(x), token.view_as(token), *tensors

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, x: Tensor | None, token: Tensor | None, *grads: Tensor | None) -> Any:
        given = [
            torch.zeros_like(y, device=ctx.device) if grad is None else grad
            for y, grad in zip(ctx.like, grads)
            if y is not None
        ]
        ctx.ranks.send(given, ctx.ranks.rank - 1)
        return None, None, x, token, *[None] * ctx.count


class Shift(Function):
    """``(x, token, halo)``: the last ``count`` tokens of the rank before; of the first rank, none."""

    @staticmethod
    def forward(ctx: Any, ranks: Ranks, count: int, x: Tensor, token: Tensor) -> Any:
        tail = x[:, x.shape[1] - count :]
        if not ranks.last:
            ranks.send([tail], ranks.rank + 1)
        halo = tail[:, :0].clone() if ranks.first else ranks.receive([tail], ranks.rank - 1)[0]
        ctx.ranks, ctx.count, ctx.shape = ranks, count, tail.shape
        return x.view_as(x), token.view_as(token), halo

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, x: Tensor, token: Tensor, halo: Tensor) -> Any:
        if not ctx.ranks.first:
            ctx.ranks.send([halo], ctx.ranks.rank - 1)
        if not ctx.ranks.last:
            (far,) = ctx.ranks.receive([x.new_empty(ctx.shape)], ctx.ranks.rank + 1)
            x = x.clone()
            x[:, x.shape[1] - ctx.count :] += far
        return None, None, x, token


class Gather(Function):
    """``(tokens of all ranks, token)``. Each rank's gradient is its part of the sum."""

    @staticmethod
    def forward(ctx: Any, ranks: Ranks, x: Tensor, token: Tensor) -> Any:
        ctx.ranks = ranks
        return torch.cat(ranks.gather(x), dim=1), token.view_as(token)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, x: Tensor, token: Tensor) -> Any:
        return None, ctx.ranks.sum(x).chunk(ctx.ranks.size, dim=1)[ctx.ranks.rank], token


class Total(Function):
    """``(the sum over the ranks, token)``. Each rank's gradient is its part of the sum."""

    @staticmethod
    def forward(ctx: Any, ranks: Ranks, x: Tensor, token: Tensor) -> Any:
        ctx.ranks = ranks
        return ranks.sum(x), token.view_as(token)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, x: Tensor, token: Tensor) -> Any:
        return None, ctx.ranks.sum(x), token


class Enter(Function):
    """``(token, x, *state)``: this rank's tokens of ``x``, and the state, of whose gradients all ranks get the sum."""

    @staticmethod
    def forward(ctx: Any, ranks: Ranks, token: Tensor, x: Tensor | None, *state: Tensor) -> Any:
        ctx.ranks = ranks
        part = None if x is None else x.chunk(ranks.size, dim=1)[ranks.rank].clone()
        return token.view_as(token), part, *(y.view_as(y) for y in state)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, token: Tensor, x: Tensor, *state: Tensor) -> Any:
        whole = torch.cat(ctx.ranks.gather(x), dim=1) if ctx.needs_input_grad[2] else None
        return None, token, whole, *(
            ctx.ranks.sum(y) if need else None for y, need in zip(state, ctx.needs_input_grad[3:])
        )  # fmt: skip


class Leave(Function):
    """``(hidden, *state)`` with the state of the last rank. Every rank's ``hidden`` and token get a gradient."""

    @staticmethod
    def forward(ctx: Any, ranks: Ranks, shapes: bool, hidden: Tensor, token: Tensor, *state: Tensor) -> Any:
        ctx.last, ctx.like, ctx.token = ranks.last, _zeros(hidden), _zeros(token)
        ctx.set_materialize_grads(False)
        state = tuple(y.view_as(y) for y in ranks.broadcast(state, shapes=shapes))
        ctx.mark_non_differentiable(*(y for y in state if not y.is_floating_point()))
        return hidden.view_as(hidden), *state

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, hidden: Tensor | None, *state: Tensor | None) -> Any:
        hidden = ctx.like if hidden is None else hidden
        return None, None, hidden, ctx.token, *(state if ctx.last else [None] * len(state))


class Whole(Function):
    """The tokens of all ranks ``[batch, time, ...]``, of which every rank has the same gradient."""

    @staticmethod
    def forward(ctx: Any, ranks: Ranks, x: Tensor) -> Tensor:
        ctx.ranks = ranks
        return torch.cat(ranks.gather(x), dim=1)

    @staticmethod
    def backward(ctx: Any, x: Tensor) -> Any:
        return None, x.chunk(ctx.ranks.size, dim=1)[ctx.ranks.rank]


class WholeHeads(Function):
    """The heads of all ranks, of which every rank has the same gradient. ``sections``: those of ``dim``, here."""

    @staticmethod
    def forward(ctx: Any, ranks: Ranks, x: Tensor, dim: int, sections: tuple[int, ...]) -> Tensor:
        ctx.ranks, ctx.dim, ctx.sections = ranks, dim, sections
        parts = [y.split_with_sizes(sections, dim) for y in ranks.gather(x)]
        return torch.cat([part for section in zip(*parts) for part in section], dim)

    @staticmethod
    def backward(ctx: Any, x: Tensor) -> Any:
        sections = x.split_with_sizes([size * ctx.ranks.size for size in ctx.sections], ctx.dim)
        mine = [section.chunk(ctx.ranks.size, ctx.dim)[ctx.ranks.rank] for section in sections]
        return None, torch.cat(mine, ctx.dim), None, None


class Sum(Function):
    """The sum over the ranks, of which every rank has the same gradient."""

    @staticmethod
    def forward(ctx: Any, ranks: Ranks, x: Tensor) -> Tensor:
        return ranks.sum(x)

    @staticmethod
    def backward(ctx: Any, x: Tensor) -> Any:
        return None, x


class Copy(Function):
    """``x``, of whose gradients all ranks get the sum."""

    @staticmethod
    def forward(ctx: Any, ranks: Ranks, x: Tensor) -> Tensor:
        ctx.ranks = ranks
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, x: Tensor) -> Any:
        return None, ctx.ranks.sum(x)


class Scale(Function):
    """``x``, whose gradient is multiplied by ``factor``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, x: Tensor) -> Any:
        return x * ctx.factor, None


def scale_gradients(state: Any, factor: float) -> Any:
    """Multiply the gradients of the tensors of a state, or of one tensor, by ``factor``."""
    return map_state(lambda x: Scale.apply(x, factor) if x.requires_grad else x, state)


class Once(Function):
    """``x``, whose gradient, which every rank has, is counted on one of them."""

    @staticmethod
    def forward(ctx: Any, ranks: Ranks, x: Tensor) -> Tensor:
        ctx.first = ranks.first
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, x: Tensor) -> Any:
        return None, x if ctx.first else torch.zeros_like(x)
