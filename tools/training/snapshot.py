"""What a run is at a step, as named tensors: weights, optimizer, averages, carried state, random numbers; and back."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...blocks.language_model import LanguageModel
from ...blocks.state import State, map_state, named_tensors
from .distributed import Processes
from .optimiser import Average


@dataclass
class Snapshot:
    """The parts of a run that tensors hold. ``rows``: of this process, whose state is carried."""

    model: LanguageModel
    optimizer: torch.optim.Optimizer
    average: Average | None
    state: State
    rows: int
    processes: Processes

    def tensors(self) -> dict[str, Tensor]:
        """All of it, each tensor by name; in a run of several processes, this one's shares."""
        found = {f"model.{name}": tensor.detach() for name, tensor in _weights(self.model).items()}
        for name, parameter in self.model.named_parameters():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                found[f"optimizer.{name}.{key}"] = value
        if self.average is not None:
            found |= {f"average.{name}": tensor for name, tensor in self.average.tensors.items()}
        for path, tensor in named_tensors(self.state):
            # views of one memory, and of more of it than they show
            found[f"state.{path}"] = self.processes.rows(tensor.detach().clone(memory_format=torch.contiguous_format))
        for device, numbers in self._random().items():
            found[f"random.{self.processes.rank}.{device}"] = numbers
        return found

    def prepare(self, names: set[str]) -> dict[str, Tensor]:
        """``tensors()`` of the run that a checkpoint with these names was made of, to be read into."""
        for name, parameter in self.model.named_parameters():
            if f"optimizer.{name}.exp_avg" in names:
                step = torch.zeros((), device=parameter.device if self.optimizer.defaults.get("fused") else "cpu")
                moments = {key: torch.zeros_like(parameter.detach()) for key in ("exp_avg", "exp_avg_sq")}
                self.optimizer.state[parameter] = {"step": step, **moments}
        self.state = None
        if any(name.startswith("state.") for name in names):
            with torch.no_grad():
                fresh = self.model.init_state(self.rows)
            self.state = map_state(lambda x: x.detach().clone(memory_format=torch.contiguous_format), fresh)
        wanted = self.tensors()
        # of more processes than there were, those that are new draw numbers of their own
        return {name: x for name, x in wanted.items() if name in names or not name.startswith("random.")}

    def restore(self, read: dict[str, Tensor]) -> None:
        """Take over what was read into ``prepare``'s tensors."""
        if self.state is not None:
            tensors = iter([read[f"state.{path}"] for path, _ in named_tensors(self.state)])
            self.state = map_state(lambda _: self.processes.own_rows(next(tensors)), self.state)
        mine = f"random.{self.processes.rank}."
        for device in self._random():
            if mine + device in read:
                if device == "cpu":
                    torch.set_rng_state(read[mine + device])
                else:
                    torch.get_device_module(device).set_rng_state(read[mine + device])

    def _random(self) -> dict[str, Tensor]:
        kind = self.processes.device.type
        found = {"cpu": torch.get_rng_state()}
        if kind != "cpu":
            found[kind] = torch.get_device_module(kind).get_rng_state()
        return found


def random_names(processes: int, device: str) -> set[str]:
    """What the random numbers of so many processes are called that compute on this kind of device."""
    return {f"random.{rank}.{kind}" for rank in range(processes) for kind in ("cpu", device)}


def _weights(model: LanguageModel) -> dict[str, Tensor]:
    """Parameters, and the buffers that are saved."""
    return dict(model.state_dict(keep_vars=True))
