"""The processes of a run: one, or those that ``torchrun`` started, which share rows, tokens, heads and parameters."""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor

from ...blocks.language_model import LanguageModel
from ...blocks.parallel import parallelize
from ...registry import Problem, RecipeError
from ..terminal import CommandFailed, first_process_first
from .settings import Mesh


class Processes:
    """This process and the others. Methods are collective: every process calls them, in the same order."""

    def __init__(self, rank: int = 0, world: int = 1, device: torch.device | None = None) -> None:
        self.rank, self.world = rank, world
        self.device = device if device is not None else torch.device("cpu")
        self.mesh: Any = None
        self.store: Any = None
        """Keys and values that processes have in common; under ``torchrun``, in a process that outlives them."""
        self.group, self.groups = rank, world
        """Of the groups of processes that have rows in common, the number of this one's, and how many there are."""
        self.first_of_group = True

    def arrange(self, mesh: Mesh | None) -> None:
        """Make the device mesh. Raises ``RecipeError`` if it is for another number of processes."""
        mesh = Mesh() if mesh is None else mesh
        together = mesh.context * mesh.tensor
        data = max(self.world // together, 1) if mesh.data is None else mesh.data
        if data * together != self.world:
            sizes = f"data {data} x context {mesh.context} x tensor {mesh.tensor}"
            message = f"{sizes} are {data * together} processes, and there are {self.world}"
            raise RecipeError([Problem("mesh", message)], "settings")
        self.group, self.groups = self.rank // together, data
        self.first_of_group = self.rank % together == 0
        if self.world > 1:
            from torch.distributed.device_mesh import init_device_mesh

            shape, names = (data, mesh.context, mesh.tensor), ("data", "context", "tensor")
            self.mesh = init_device_mesh(self.device.type, shape, mesh_dim_names=names)

    @property
    def main(self) -> bool:
        """Whether this is the process that prints and writes the log."""
        return self.rank == 0

    def gather(self, numbers: Tensor) -> Tensor:
        """The numbers of all processes, stacked in float64 on the CPU."""
        if self.world == 1:
            return numbers.double()[None]
        import torch.distributed as dist

        mine = numbers.to(self.device, torch.float64)
        every = [torch.empty_like(mine) for _ in range(self.world)]
        dist.all_gather(every, mine)
        return torch.stack(every).cpu()

    def sum(self, *numbers: float) -> list[float]:
        """The sums over all processes."""
        if self.world == 1:
            return list(numbers)
        return cast("list[float]", self.gather(torch.tensor(numbers, dtype=torch.float64)).sum(0).tolist())

    def sum_of_groups(self, *numbers: float) -> list[float]:
        """Sums of numbers that the processes of a group have in common."""
        return self.sum(*(number if self.first_of_group else 0 for number in numbers))

    def speaks(self) -> bool:
        """Whether this process is the first to call this, also where some have ended. Does not wait for others."""
        try:
            return self.store is None or self.store.add("speaks", 1) == 1
        except RuntimeError:  # the store was in the first process, which has ended
            return self.rank == 1

    def barrier(self) -> None:
        """Wait for the other processes."""
        self.sum(0.0)

    def shard(self, model: LanguageModel, *, reshard_after_forward: bool = True, recompute: bool = False) -> None:
        """Share out a model over the processes (``parallelize``).

        Raises ``RecipeError`` for a model that the processes cannot share.

        An auxiliary loss sends gradients into a layer other than through its outputs. FSDP2 does not gather the
        parameters for those, so they have to stay gathered (``reshard_after_forward=False``).
        """
        if self.world > 1:
            try:
                parallelize(
                    model,
                    self.mesh,
                    gather_outputs=False,
                    reshard_after_forward=reshard_after_forward,
                    recompute=recompute,
                )  # fmt: skip
            except ValueError as error:
                raise RecipeError([Problem("mesh", str(error))], "settings") from error

    @contextlib.contextmanager
    def whole(self, model: LanguageModel, *, compute: bool = False) -> Iterator[None]:
        """Within the ``with`` block, outputs are those of all tokens. ``compute``: each process computes all tokens."""
        if model.parallel is None:
            yield
            return
        with model.parallel.whole_outputs(compute=compute):
            yield

    def reshard(self, model: LanguageModel) -> None:
        """Free the parameters that a forward pass without a backward pass has left gathered."""
        if self.world == 1:
            return
        from torch.distributed.fsdp import FSDPModule

        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def shard_rows(self, tensor: Tensor) -> Tensor:
        """A ``DTensor`` over the rows of all groups, of which this one has ``tensor``."""
        if self.world == 1:
            return tensor
        from torch.distributed.tensor import DTensor, Replicate, Shard

        return DTensor.from_local(tensor, self.mesh, [Shard(0), Replicate(), Replicate()], run_check=False)


@contextlib.contextmanager
def process_errors(processes: Processes, resume: str) -> Iterator[None]:
    """Raise ``CommandFailed`` in place of the error about another process that has ended. ``resume``: a command.

    The first process that notices does. The others raise ``SystemExit``, with which they end and print nothing.
    Errors that all processes find are raised by the first one before the others, so that ``torchrun`` shows one of
    them.
    """
    try:
        with first_process_first((CommandFailed, ValueError)):
            yield
    except RuntimeError as error:
        import torch.distributed as dist

        line = str(error).partition("\n")[0]
        reason = (line.partition("] ")[2] or line).partition(". ")[0]  # without the file of gloo's code
        lost = any(part in str(error) for part in ("gloo", "closed by peer", "Connection reset", "NCCL"))
        if processes.world == 1 or not (isinstance(error, dist.DistError) or lost):
            raise
        if not processes.speaks():
            raise SystemExit(1) from None
        message = f"another process of this run has ended, or cannot be reached ({reason[:200]})"
        raise CommandFailed(f"process {processes.rank}: {message}: resume from the last checkpoint: {resume}") from None


def to_local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def full_tensor(tensor: Tensor) -> Tensor:
    """The whole tensor, gathered from all processes."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def init_processes(device: torch.device) -> Processes:
    """The processes that ``torchrun``'s environment describes: gloo on CPUs, NCCL on GPUs."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or "RANK" not in os.environ:
        return Processes(device=device)
    import torch.distributed as dist

    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    store = None
    logger = logging.getLogger("torch.distributed.tensor")
    if logger.level == logging.NOTSET:  # it advises against a mesh of two dimensions at every run
        logger.setLevel(logging.ERROR)
    if not dist.is_initialized():
        store, rank, world = next(dist.rendezvous("env://"))
        group = dist.PrefixStore("group", store)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=group, rank=rank, world_size=world)
        # at exit, not before: a destroyed group cannot be made again, and the process may train another run
        atexit.register(dist.destroy_process_group)
    processes = Processes(dist.get_rank(), dist.get_world_size(), device)
    processes.store = store
    return processes
