"""Models on a device mesh: rows over ``data``, the tokens of a sequence over ``context``, heads over ``tensor``.

Parameters are sharded over ``data`` (``fully_shard``). Each rank of ``context`` runs the blocks on its own part of
the tokens. A block that depends on earlier tokens says in ``Block.sharding`` how that part gets them.
"""

from __future__ import annotations

import contextlib
import functools
import time
import warnings
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from ..kernels.documents import NO_DOCUMENT, Documents, packed_ids
from .block import Block, call, initial_state, unsharded
from .collectives import (
    Enter,
    Gather,
    Leave,
    Once,
    Ranks,
    Receive,
    Send,
    Shift,
    Sum,
    Whole,
    any_of_all,
    scale_gradients,
    tie,
)
from .memory import NeuralMemory
from .parallel_memory import can_run, run_affine, run_chunks
from .parallel_plan import CONTEXTS, Step, plan, sharding_of
from .state import State, detach, map_state, named_tensors, where
from .tensor_parallel import EVERYTHING, DividedParameters, MethodCall, part_of_state, share_heads, whole_state

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

_Model = TypeVar("_Model")

DIMENSIONS = ("data", "context", "tensor")
"""The names of mesh dimensions."""
KEPT = 64
"""Lengths of sequences whose steps are kept."""
WAIT = 5.0
"""Seconds that other ranks wait with an error that the first rank has, too: a launcher ends them before."""


def parallelize(
    model: _Model,
    mesh: DeviceMesh,
    *,
    gather_outputs: bool = True,
    reshard_after_forward: bool = True,
    recompute: bool = False,
    context: str = "auto",
) -> _Model:
    """Share out a model over the ranks of a mesh, in place. Every rank calls this with the same model.

    Args:
        model: built on every rank with the same seed, or loaded from the same folder.
        mesh: a ``DeviceMesh`` over all processes whose dimensions are named ``data``, ``context`` or ``tensor``.
        gather_outputs: return the logits and hidden states of all tokens. Otherwise those of this rank's tokens, which
            are a part of the time axis; loss and state are whole in both cases.
        recompute: activation checkpointing of the blocks that depend on earlier tokens, for a mesh with ``context``.
            Checkpointing of whole layers would repeat their communication in another order.
        context: how memories whose state needs no waiting get what they need of earlier tokens, for a mesh with
            ``context``: ``"affine"``, ``"chunk"``, ``"pipelined"`` as the others, or ``"auto"``, which takes the
            shorter time by a model of cost. ``model.parallel.plan(time)`` shows it.
        reshard_after_forward: free the gathered parameters of a layer between forward and backward (``fully_shard``).

    Each rank calls the model with the whole batch of its group of ``data``, which ranks of ``context`` and ``tensor``
    have in common. Losses, gradients and states are those of one process; the gradients are means over ``data``.
    Parameters and gradients are ``DTensor`` objects.

    Raises ``TypeError`` or ``ValueError`` for what is no such mesh, for heads that the ranks of ``tensor`` cannot
    share, and for ranks with different recipes.
    """
    shared: Any = model
    if context not in CONTEXTS:
        raise ValueError(f"context: expected one of {', '.join(CONTEXTS)}, got {context!r}")
    parallel = Parallel(shared, mesh, gather_outputs, recompute, context)
    if parallel.size > 1:
        _shard_parameters(shared, mesh, parallel, reshard_after_forward)
        shared.parallel = parallel
    return model


class Parallel:
    """The ranks of each dimension of a mesh, as a model uses them."""

    def __init__(
        self, model: Any, mesh: DeviceMesh, gather_outputs: bool, recompute: bool, context: str = "auto"
    ) -> None:
        import torch.distributed as dist
        from torch.distributed.device_mesh import DeviceMesh

        if not isinstance(mesh, DeviceMesh):
            raise TypeError(f"mesh: expected a torch DeviceMesh, got {type(mesh).__name__}")
        self.first = dist.get_rank() == 0
        if model.parallel is not None:
            self.refuse("model: it is shared out already: expected a model that no mesh has")
        names = mesh.mesh_dim_names or ()
        for name in names or ("none",):
            if name not in DIMENSIONS:
                expected = "mesh_dim_names of 'data', 'context' or 'tensor'"
                self.refuse(f"mesh: expected {expected}, got {name!r}")
        self.size = mesh.size()
        if self.size != dist.get_world_size():
            self.refuse(f"mesh: it has {self.size} ranks: expected all {dist.get_world_size()} processes")
        self.data, self.context, self.tensor = (
            Ranks(mesh.get_group(name), mesh.get_local_rank(name), mesh.shape[names.index(name)])
            if name in names
            else Ranks(None, 0, 1)
            for name in DIMENSIONS
        )
        self.gather_outputs, self.recompute, self.how = gather_outputs, recompute, context
        self._layers = model.layers
        self._steps: dict[int, list[Step]] = {}
        self.whole = False
        """Whether each rank computes all tokens."""
        number = model.fingerprint.number
        numbers = torch.tensor([number], device=next(model.parameters()).device)
        every = [torch.empty_like(numbers) for _ in range(self.size)]
        dist.all_gather(every, numbers)
        for rank, other in enumerate(every):
            if int(other) != int(every[0]):
                self.refuse(f"rank {rank} has another recipe than rank 0: expected the same model on every rank")

        self.places: list[dict[str, Any]] = []
        """For each layer, the heads of its parameters, if ranks share them."""
        self.divided: list[DividedParameters] = []
        if self.tensor.size > 1:
            try:
                self.places = share_heads(model.layers, self.tensor)
            except ValueError as error:
                self.refuse(str(error))

    def refuse(self, message: str) -> NoReturn:
        """Raise ``ValueError``: at once on the first rank, so that a launcher shows no other."""
        if not self.first:
            time.sleep(WAIT)
        raise ValueError(message)

    def enter(
        self,
        model: Any,
        x: Tensor | None,
        state: Any,
        shape: tuple[int, int],
        mask: Tensor | None,
        documents: Tensor | None,
        cu_seqlens: Tensor | None,
    ) -> ContextCall | None:
        """Begin a call of the model with inputs ``[batch, time, ...]``; ``None`` if each rank computes all tokens."""
        ranks, length = self.context, shape[1]
        packed = documents is not None or cu_seqlens is not None
        alone = ranks.size == 1 and not (packed and self.data.size > 1 and torch.is_grad_enabled())
        if alone or self.whole or length == 0:
            return None
        if length < ranks.size:
            self.refuse(f"a sequence of {length} tokens is shorter than the {ranks.size} ranks of the mesh's context")
        if length % ranks.size:
            self.refuse(
                f"a sequence of {length} tokens cannot be shared by the {ranks.size} ranks of the mesh's context: "
                f"give a multiple of {ranks.size}, with padding and a mask if need be"
            )
        ways = {step.block: step.way for step in self.steps(length)}
        return ContextCall(ranks, model, x, state, shape, mask, documents, cu_seqlens, self.recompute, ways)

    def steps(self, time: int) -> list[Step]:
        """How each block gets what it needs of earlier tokens, in a sequence of ``time`` tokens."""
        if time not in self._steps:
            if len(self._steps) > KEPT:
                self._steps.clear()
            self._steps[time] = plan(self._layers, self.context.size, time, self.how)
        return self._steps[time]

    def plan(self, time: int) -> dict[str, str]:
        """How each block that depends on earlier tokens gets what it needs of them, by its path in the model.

        ``"window"``, ``"pipelined"``, ``"affine"``, ``"chunk"`` or ``"gathered"``, for rows of ``time`` tokens. Calls
        with padding run ``"window"``, ``"affine"`` and ``"chunk"`` as ``"pipelined"``.
        """
        return {step.name: step.way for step in self.steps(time) if step.way != "local"}

    def part_of(self, model: Any, state: Any) -> Any:
        """This rank's heads of a state."""
        if state is None or self.tensor.size == 1:
            return state
        state = scale_gradients(state, self.tensor.size)
        return state._replace(layers=part_of_state(model.layers, state.layers, self.tensor))

    def inputs(self, x: Tensor | None) -> Tensor | None:
        """Embeddings, whose gradient is that of all ranks of ``tensor``."""
        return x if x is None or self.tensor.size == 1 else cast(Tensor, scale_gradients(x, self.tensor.size))

    def whole_of(self, model: Any, state: Any) -> Any:
        """A state with the heads of all ranks."""
        if self.tensor.size == 1:
            return state
        return state._replace(layers=whole_state(model.layers, state.layers, self.tensor))

    def outputs(self, *found: Any) -> Any:
        """Outputs and states: inside, each rank of ``tensor`` has its share of a gradient that all of them have."""
        return found if self.tensor.size == 1 else scale_gradients(tuple(found), 1 / self.tensor.size)

    def once(self, state: State) -> State:
        """A state that every rank has computed, whose gradient is counted once."""
        if self.context.size == 1 or not torch.is_grad_enabled():
            return state
        return map_state(lambda x: Once.apply(self.context, x) if x.requires_grad else x, state)

    @contextlib.contextmanager
    def whole_outputs(self, *, compute: bool) -> Iterator[None]:
        """Within the ``with`` block, outputs are those of all tokens. ``compute``: every rank computes all tokens."""
        before = self.whole, self.gather_outputs
        self.whole, self.gather_outputs = compute, True
        for each in self.divided:
            each.kept = {}
        try:
            yield
        finally:
            self.whole, self.gather_outputs = before
            for each in self.divided:
                each.kept = None


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
            past = block.past()
            if way == "window" and mask is None and past is not None:
                return self._run_after_window(block, x, state, fresh, past, named)
            if isinstance(block, NeuralMemory) and way in ("affine", "chunk") and not named:
                before = state if state is not None else self._fresh(block, documents)
                if can_run(way, block, before, self.mask, documents):
                    if way == "chunk":
                        return run_chunks(self, block, x, before)
                    return run_affine(self, block, x, before, documents)
            return self._run_after_state(block, x, state, mask, documents, named)

    def _used(self, block: Block, state: State, fresh: State) -> list[Tensor]:
        """The tensors that get a gradient on some rank, and so on all: what one process would use."""
        parameters = dict(block.named_parameters())
        if self.begins:
            used = list(parameters.values())
        else:
            used = [parameters[name] for name in _used_by_tokens(block) if name in parameters]
            fresh = None
        return [*used, *(y for _, y in named_tensors((state, fresh)))]

    def repeat(self, block: Block, x: Any, state: State, method: Callable[..., Any] | None = None, **named: Any) -> Any:
        """Call a block or its ``method``, which ``recompute`` calls again in the backward pass."""
        function: Callable[..., Any] = block if method is None else method
        if not self.recompute:
            return function(x, state, **named)
        parameters = dict(block.named_parameters())
        if not all(isinstance(parameter, nn.Parameter) for parameter in parameters.values()):
            # in the backward pass, the block does not have this rank's heads in place of its parameters
            method = functools.partial(functional_call, MethodCall(block, function))
            given = {f"of.{name}": parameter for name, parameter in parameters.items()}
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
        """Each rank waits for the state of the rank before."""
        ranks, grows = self.ranks, block.grows
        if not ranks.first:
            like = state if state is not None else self._fresh(block, documents)
            tensors = [y for _, y in named_tensors(like)]
            x, self.token, *found = Receive.apply(ranks, grows, x, self.token, *(y.detach() for y in tensors))
            rest = iter(found)
            state = map_state(lambda _: next(rest), like)
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


def _used_by_tokens(block: Any) -> list[str]:
    """The names of the parameters that a call with a state uses. Others are those of fresh states."""
    found: list[str] | None = vars(block).get("_used_by_tokens")
    if found is None:
        with torch.enable_grad():
            parameters = {name: p for name, p in block.named_parameters() if p.requires_grad}
            like = next(iter(parameters.values()), None)
            if like is None:
                return []
            # at a multiple of the period, so that context begins a segment
            state = _advance(detach(initial_state(block, 1)), torch.full((1,), block.period))
            y, after = block(torch.ones(1, 1, block.dim, dtype=like.dtype, device=like.device), state)
            outputs = [z.sum() for _, z in named_tensors((y, after)) if z.requires_grad]
            grads = torch.autograd.grad(torch.stack(outputs).sum(), list(parameters.values()), allow_unused=True)
        found = [name for name, grad in zip(parameters, grads) if grad is not None]
        vars(block)["_used_by_tokens"] = found
    return found


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


# -- parameters --------------------------------------------------------------------------------------------------------


def _shard_parameters(model: Any, mesh: DeviceMesh, parallel: Parallel, reshard_after_forward: bool) -> None:
    """Divide the parameters over ``tensor``, and over ``data`` with FSDP2, one group for each layer."""
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    # about outputs that are views; nothing here writes into outputs
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module")
    sizes, names = [getattr(parallel, name).size for name in DIMENSIONS], mesh.mesh_dim_names or ()
    if sum(size > 1 for size in sizes) > 1 or parallel.context.size > 1:  # FSDP takes these in this order
        ranks = mesh.mesh.permute([names.index(name) for name in DIMENSIONS if name in names]).reshape(sizes)
        mesh = DeviceMesh(mesh.device_type, ranks.movedim(1, 0), mesh_dim_names=("context", "data", "tensor"))
    for layer in model.layers:
        _copy_states(layer)
    if parallel.tensor.size > 1:
        vocabulary = () if model.dim % parallel.tensor.size else ("embedding", "head")
        for module, places in (*zip(model.layers, parallel.places), (model, dict.fromkeys(vocabulary, EVERYTHING))):
            every = [name for name, _ in module.named_parameters(remove_duplicate=False)]
            own = [name for name in every if module is not model or not name.startswith("layers.")]
            divided = DividedParameters(module, own, places, mesh["tensor"], parallel.tensor)
            parallel.divided.append(divided)
            module.forward, module.init_state = map(divided.bound, (module.forward, module.init_state))
    if parallel.tensor.size == parallel.size:
        return
    data = mesh["data"] if parallel.context.size == 1 else mesh["context", "data"]
    for module in (*model.layers, model):
        fully_shard(module, mesh=data, reshard_after_forward=reshard_after_forward if module is not model else None)
        # when a run resumes from a state, init_state is the first call, and has to reach the root before the layers
        register_fsdp_forward_method(module, "init_state")
        if parallel.context.size > 1:
            # gradients are sums over context, and means over data
            module.set_gradient_divide_factor(parallel.data.size)
            module.set_force_sum_reduction_for_comms(True)


def _copy_states(layer: Any) -> None:
    """Let no state of the layer share storage with its parameters, which FSDP frees.

    The state of a fresh memory would: its weights are the learned initial weights.
    """
    forward, init_state = layer.forward, layer.init_state

    def copied(state: State) -> State:
        storages = {parameter.untyped_storage().data_ptr() for parameter in layer.parameters()}
        return map_state(lambda x: x.clone() if x.untyped_storage().data_ptr() in storages else x, state)

    def forward_with_own_state(x: Tensor, state: State = None, **named: Any) -> tuple[Tensor, State]:
        y, state = forward(x, state, **named)
        return y, copied(state)

    layer.forward = forward_with_own_state
    layer.init_state = lambda batch_size: copied(init_state(batch_size))
