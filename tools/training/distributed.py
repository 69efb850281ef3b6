"""The processes of a run: one, or as many as ``torchrun`` started, which share the rows and the parameters (FSDP2)."""

from __future__ import annotations

import atexit
import os
import warnings
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from ...blocks.language_model import LanguageModel
from ...blocks.state import State, map_state


class Processes:
    """This process and the others. Everything here is called by all of them, in the same order."""

    def __init__(self, rank: int = 0, world: int = 1, device: torch.device | None = None) -> None:
        self.rank, self.world = rank, world
        self.device = device if device is not None else torch.device("cpu")
        self.mesh: Any = None
        if world > 1:
            from torch.distributed.device_mesh import init_device_mesh

            self.mesh = init_device_mesh(self.device.type, (world,))

    @property
    def main(self) -> bool:
        """Whether this is the one process that prints and keeps the books."""
        return self.rank == 0

    @property
    def part(self) -> tuple[int, int]:
        """As sources take it."""
        return self.rank, self.world

    def total(self, *numbers: float) -> list[float]:
        """Sums over the processes, the same in each."""
        if self.world == 1:
            return list(numbers)
        import torch.distributed as dist

        summed = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        dist.all_reduce(summed)
        return cast("list[float]", summed.tolist())

    def wait(self) -> None:
        """Wait for the others."""
        self.total(0.0)

    def shard(self, model: LanguageModel, *, keep: bool = False) -> None:
        """Let every process keep a share of each parameter, gathered layer by layer as they are needed.

        ``keep``: from the forward pass to the backward one what was gathered stays. That is needed where gradients
        come into a layer beside its outputs, as those of the auxiliary loss do: they would find the parameters gone.
        """
        if self.world == 1:
            return
        from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

        # that outputs may be views; nothing here writes into outputs
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module")
        for layer in model.layers:
            _own_states(layer)
            fully_shard(layer, mesh=self.mesh, reshard_after_forward=not keep)
            register_fsdp_forward_method(layer, "init_state")
        fully_shard(model, mesh=self.mesh)
        # the model has to be asked before its layers are, in a run that goes on from a state
        register_fsdp_forward_method(model, "init_state")

    def release(self, model: LanguageModel) -> None:
        """Let go of parameters that a forward pass without a backward one has left gathered, as they then were."""
        if self.world == 1:
            return
        from torch.distributed.fsdp import FSDPModule

        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def rows(self, tensor: Tensor) -> Tensor:
        """This process's rows of a tensor as a share of all processes' rows."""
        if self.world == 1:
            return tensor
        from torch.distributed.tensor import DTensor, Shard

        return DTensor.from_local(tensor, self.mesh, [Shard(0)], run_check=False)

    def own_rows(self, tensor: Tensor) -> Tensor:
        """The rows of this process, of a tensor that ``rows`` made."""
        return tensor if self.world == 1 else local(tensor)


def local(tensor: Tensor) -> Tensor:
    """What this process has of a tensor."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor of which the processes have shares; every process has to ask."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def _own_states(layer: Any) -> None:
    """Let no state of the layer lie in its parameters, whose memory goes when they are no longer needed.

    A fresh memory holds its learned initial weights, as they are.
    """

    def own(state: State) -> State:
        held = {parameter.untyped_storage().data_ptr() for parameter in layer.parameters()}
        return map_state(lambda x: x.clone() if x.untyped_storage().data_ptr() in held else x, state)

    forward: Callable[..., Any] = layer.forward
    init_state: Callable[[int], State] = layer.init_state

    def own_forward(x: Tensor, state: State = None, *, mask: Tensor | None = None) -> tuple[Tensor, State]:
        y, state = forward(x, state, mask=mask)
        return y, own(state)

    layer.forward = own_forward
    layer.init_state = lambda batch_size: own(init_state(batch_size))


def processes(device: torch.device) -> Processes:
    """The processes that ``torchrun`` says there are: gloo between CPUs, NCCL between GPUs."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or "RANK" not in os.environ:
        return Processes(device=device)
    import torch.distributed as dist

    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        # not sooner: processes that have parted find each other no more, and there may be another run
        atexit.register(dist.destroy_process_group)
    return Processes(dist.get_rank(), dist.get_world_size(), device)


def gathered(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter whole, on the CPU; every process has to ask."""
    return {name: whole(parameter.detach()).cpu() for name, parameter in model.named_parameters()}
