"""The processes of a run: one, or those that ``torchrun`` started, which share rows and parameters (FSDP2)."""

from __future__ import annotations

import atexit
import contextlib
import os
import warnings
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor

from ...blocks.language_model import LanguageModel
from ...blocks.state import State, map_state
from ..terminal import CommandFailed


class Processes:
    """This process and the others. Methods are collective: every process calls them, in the same order."""

    def __init__(self, rank: int = 0, world: int = 1, device: torch.device | None = None) -> None:
        self.rank, self.world = rank, world
        self.device = device if device is not None else torch.device("cpu")
        self.mesh: Any = None
        if world > 1:
            from torch.distributed.device_mesh import init_device_mesh

            self.mesh = init_device_mesh(self.device.type, (world,))

    @property
    def main(self) -> bool:
        """Whether this is the process that prints and writes the log."""
        return self.rank == 0

    def sum(self, *numbers: float) -> list[float]:
        """All-reduced sums."""
        if self.world == 1:
            return list(numbers)
        import torch.distributed as dist

        summed = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        dist.all_reduce(summed)
        return cast("list[float]", summed.tolist())

    def barrier(self) -> None:
        """Wait for the other processes."""
        self.sum(0.0)

    def shard(self, model: LanguageModel, *, reshard_after_forward: bool = True) -> None:
        """Shard the parameters with FSDP2, one group for each layer.

        An auxiliary loss sends gradients into a layer other than through its outputs. FSDP2 does not gather the
        parameters for those, so they have to stay gathered (``reshard_after_forward=False``).
        """
        if self.world == 1:
            return
        from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

        # about outputs that are views; nothing here writes into outputs
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module")
        for layer in model.layers:
            _copy_states(layer)
            fully_shard(layer, mesh=self.mesh, reshard_after_forward=reshard_after_forward)
            register_fsdp_forward_method(layer, "init_state")
        fully_shard(model, mesh=self.mesh)
        # when a run resumes from a state, init_state is the first call, and has to reach the root before the layers
        register_fsdp_forward_method(model, "init_state")

    def reshard(self, model: LanguageModel) -> None:
        """Free the parameters that a forward pass without a backward pass has left gathered."""
        if self.world == 1:
            return
        from torch.distributed.fsdp import FSDPModule

        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def shard_rows(self, tensor: Tensor) -> Tensor:
        """A ``DTensor`` over all processes' rows, of which this process has ``tensor``."""
        if self.world == 1:
            return tensor
        from torch.distributed.tensor import DTensor, Shard

        return DTensor.from_local(tensor, self.mesh, [Shard(0)], run_check=False)


@contextlib.contextmanager
def process_errors(processes: Processes, resume: str) -> Iterator[None]:
    """Raise ``CommandFailed`` in place of the error about another process that has ended. ``resume``: a command."""
    try:
        yield
    except RuntimeError as error:
        import torch.distributed as dist

        first = str(error).partition("\n")[0]
        lost = any(part in str(error) for part in ("gloo", "closed by peer", "Connection reset", "NCCL"))
        if processes.world == 1 or not (isinstance(error, dist.DistError) or lost):
            raise
        message = (
            f"process {processes.rank}: another process of this run has ended, or cannot be reached: {first[:200]}"
        )
        raise CommandFailed(f"{message}\nresume from the last checkpoint: {resume}") from None


def to_local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def full_tensor(tensor: Tensor) -> Tensor:
    """The whole tensor, gathered from all processes."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


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


def init_processes(device: torch.device) -> Processes:
    """The processes that ``torchrun``'s environment describes: gloo on CPUs, NCCL on GPUs."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or "RANK" not in os.environ:
        return Processes(device=device)
    import torch.distributed as dist

    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        # at exit, not before: a destroyed group cannot be made again, and the process may train another run
        atexit.register(dist.destroy_process_group)
    return Processes(dist.get_rank(), dist.get_world_size(), device)
