"""Models on a device mesh: rows over ``data``, the tokens of a sequence over ``context``, heads over ``tensor``.

Parameters are sharded over ``data`` (``fully_shard``). Each rank of ``context`` runs the blocks on its own part of
the tokens. A block that depends on earlier tokens says in ``Block.sharding`` how that part gets them.
"""

from __future__ import annotations

import contextlib
import hashlib
import time
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar, cast

import torch
from torch import Tensor

from .block import is_sharded
from .collectives import Once, Ranks, scale_gradients
from .fingerprint import Fingerprint, sums_of_bits
from .parallel_call import ContextCall
from .parallel_plan import CONTEXTS, Step, plan, row_groups
from .state import State, map_state
from .tensor_parallel import EVERYTHING, DividedParameters, part_of_state, share_heads, whole_state

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

    Raises ``TypeError`` or ``ValueError`` for what is no such model or mesh, for heads or linear layers (LoRA) that the
    ranks of ``tensor`` cannot share, and for ranks with different recipes or parameters.
    """
    # every LanguageModel has a fingerprint; its module imports this one
    if not isinstance(getattr(model, "fingerprint", None), Fingerprint):
        raise TypeError(f"model: expected a LanguageModel, got {type(model).__name__}")
    shared: Any = model
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
        if next(model.parameters()).is_meta:
            self.refuse("model: its parameters are on the meta device: expected weights, the same on every rank")
        if context not in CONTEXTS:
            self.refuse(f"context: expected one of {', '.join(CONTEXTS)}, got {context!r}")
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
        self._layers, self._dim, self._on_cpu = model.layers, model.dim, next(model.parameters()).is_cpu
        self._steps: dict[tuple[int, int], list[Step]] = {}
        self._count = _count(model)
        self.whole = False
        """Whether each rank computes all tokens."""
        numbers = torch.tensor([model.fingerprint.number, _checksum(model)], device=next(model.parameters()).device)
        every = [torch.empty_like(numbers) for _ in range(self.size)]
        dist.all_gather(every, numbers)
        for rank, (recipe, parameters) in enumerate(torch.stack(every).tolist()):
            if recipe != int(every[0][0]):
                self.refuse(f"rank {rank} has another recipe than rank 0: expected the same model on every rank")
            if parameters != int(every[0][1]):
                self.refuse(
                    f"rank {rank} has other parameters than rank 0: build the model with the same seed on every rank, "
                    "or load the same weights, before parallelize"
                )

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
        if torch.is_grad_enabled() and (count := _count(model)) != self._count:
            self.refuse(
                f"model: it has {count} parameters, and had {self._count} in parallelize: the ranks do not share "
                "gradients of those that are added later: put in layers (LoRA) before"
            )
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
        ways = {step.block: step.way for step in self.steps(length, shape[0])}
        return ContextCall(ranks, model, x, state, shape, mask, documents, cu_seqlens, self.recompute, ways)

    def steps(self, time: int, rows: int = 1) -> list[Step]:
        """How each block gets what it needs of earlier tokens, in a sequence of ``time`` tokens."""
        groups = row_groups(rows, self._dim, self._on_cpu, self.context.size)
        if (time, groups) not in self._steps:
            if len(self._steps) > KEPT:
                self._steps.clear()
            self._steps[time, groups] = plan(self._layers, self.context.size, time, self.how, groups)
        return self._steps[time, groups]

    def plan(self, time: int, rows: int = 1) -> dict[str, str]:
        """How each block that depends on earlier tokens gets what it needs of them, by its path in the model.

        ``"window"``, ``"pipelined"``, ``"affine"``, ``"chunk"`` or ``"gathered"``, for ``rows`` rows of ``time``
        tokens. Calls with padding run ``"window"``, ``"affine"`` and ``"chunk"`` as ``"pipelined"``.
        """
        return {step.name: step.way for step in self.steps(time, rows) if step.way != "local"}

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


# -- parameters --------------------------------------------------------------------------------------------------------


def _checksum(model: Any) -> int:
    """A number of 64 bits that other parameters, or others of them frozen, would change."""
    digest = hashlib.blake2b(digest_size=8)
    for name, x in model.named_parameters():
        digest.update(repr((name, x.shape, x.dtype, x.requires_grad)).encode())
        if not is_sharded(x):
            digest.update(sums_of_bits(x))
    return int.from_bytes(digest.digest(), "big", signed=True)


def _count(model: Any) -> int:
    return sum(1 for _ in model.named_parameters(remove_duplicate=False))


def _shard_parameters(model: Any, mesh: DeviceMesh, parallel: Parallel, reshard_after_forward: bool) -> None:
    """Divide the parameters over ``tensor``, and over ``data`` with FSDP2, one group for each layer."""
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    # about outputs that are views; nothing here writes into outputs
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module")
    sizes, names = [getattr(parallel, name).size for name in DIMENSIONS], mesh.mesh_dim_names or ()
    if sum(size > 1 for size in sizes) > 1 or parallel.context.size > 1:
        ranks = mesh.mesh.permute([names.index(name) for name in DIMENSIONS if name in names]).reshape(sizes)
        # context first: FSDP shards over the second of the two dimensions that it gets, and replicates over the first
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
