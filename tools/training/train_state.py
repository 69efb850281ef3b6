"""The training state: everything that a checkpoint holds, as named tensors and JSON."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...blocks.language_model import LanguageModel
from ...blocks.state import State, map_state, named_tensors
from .distributed import Processes, to_local
from .optimizer import WeightAverage


@dataclass
class Progress:
    """The counters of a run, which JSON holds exactly."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    losses: list[float] = field(default_factory=list)
    best: dict[str, float] | None = None
    surprise: dict[str, dict[str, float]] = field(default_factory=dict)
    skipped: int = 0


@dataclass
class TrainState:
    """Weights, optimizer state, averaged weights, carried state, and the states of random number generators.

    ``rows``: rows of this process, whose state is carried.
    """

    model: LanguageModel
    optimizer: torch.optim.Optimizer
    average: WeightAverage | None
    state: State
    rows: int
    processes: Processes

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name; with several processes, this one's shards."""
        # parameters, and the buffers that are saved
        found = {f"model.{name}": tensor.detach() for name, tensor in self.model.state_dict(keep_vars=True).items()}
        for name, parameter in self.model.named_parameters():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                found[f"optimizer.{name}.{key}"] = value
        if self.average is not None:
            found |= {f"average.{name}": tensor for name, tensor in self.average.tensors.items()}
        for path, tensor in named_tensors(self.state):
            # a state tensor may be a view of a larger one
            found[f"state.{path}"] = self.processes.shard_rows(_contiguous_copy(tensor))
        for device, numbers in self._random().items():
            found[f"random.{self.processes.rank}.{device}"] = numbers
        return found

    def prepare(self, names: set[str]) -> dict[str, Tensor]:
        """``tensors()`` as it was when a checkpoint with these names was written, to be read into."""
        for name, parameter in self.model.named_parameters():
            if f"optimizer.{name}.exp_avg" in names:
                step = torch.zeros((), device=parameter.device if self.optimizer.defaults.get("fused") else "cpu")
                moments = {key: torch.zeros_like(parameter.detach()) for key in ("exp_avg", "exp_avg_sq")}
                self.optimizer.state[parameter] = {"step": step, **moments}
        self.state = None
        if any(name.startswith("state.") for name in names):
            with torch.no_grad():
                self.state = map_state(_contiguous_copy, self.model.init_state(self.rows))
        wanted = self.tensors()
        # a checkpoint of fewer processes has no generator state for the others
        return {name: x for name, x in wanted.items() if name in names or not name.startswith("random.")}

    def restore(self, read: dict[str, Tensor]) -> None:
        """Take over what was read into the tensors of ``prepare``."""
        if self.state is not None:
            tensors = iter([read[f"state.{path}"] for path, _ in named_tensors(self.state)])
            self.state = map_state(lambda _: to_local(next(tensors)), self.state)
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
    """Names of the generator states of ``processes`` processes on this kind of device."""
    return {f"random.{rank}.{kind}" for rank in range(processes) for kind in ("cpu", device)}


def _contiguous_copy(tensor: Tensor) -> Tensor:
    return tensor.detach().clone(memory_format=torch.contiguous_format)
