"""A learner's rule: its parts, and which of them go together."""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ....registry import show
from .. import state
from ..network_torch import ACTIVATIONS
from ..state import Options
from . import networks, objectives, updates
from .module import ModuleNetwork
from .parts import CATALOGUES, Features, Network, Objective, Optimizer, Retention, make_part

READS = ("after", "before", "anchor")


@dataclass(frozen=True)
class Rule:
    """How a learner learns. Arguments of :func:`make_rule`, with parts as objects."""

    network: Network
    objective: Objective
    optimizer: Optimizer
    retention: Retention
    features: Features | None
    activation_name: str
    chunk: int
    window: int
    read: str
    reset: int | None
    keys: int
    query: str | None
    steps: str
    clip: float | None
    threshold: float | None
    module: ModuleNetwork | None
    text: str | None = None
    """The arguments of :func:`make_rule` as JSON, tensors left out; ``None`` where a part is given as an object."""

    @property
    def activation(self) -> Callable[[Tensor], Tensor]:
        return ACTIVATIONS[self.activation_name].value

    @property
    def has_parameters(self) -> bool:
        """Whether parts have tensors of their own that gradients may be wanted of."""
        parts = [part for part in vars(self).values() if not isinstance(part, ModuleNetwork)]
        own = [x for part in parts for x in getattr(part, "__dict__", {}).values()]
        return any(isinstance(x, nn.Module) or (isinstance(x, Tensor) and x.requires_grad) for x in own)

    @property
    def tensors(self) -> tuple[tuple[str, str, Tensor], ...] | None:
        """The tensors of the parts, each with the part and the attribute; ``None`` if there are modules, too."""
        found = []
        for name in CATALOGUES:
            for attribute, value in vars(getattr(self, name)).items() if getattr(self, name) is not None else ():
                if isinstance(value, nn.Module):
                    return None
                if isinstance(value, Tensor):
                    found.append((name, attribute, value))
        return tuple(found)

    def with_tensors(self, tensors: Sequence[tuple[str, str, Tensor]]) -> Rule:
        """The same rule with other ``tensors``."""
        parts = {name: copy.copy(getattr(self, name)) for name, _, _ in tensors}
        for name, attribute, value in tensors:
            setattr(parts[name], attribute, value)
        return replace(self, **parts)

    @property
    def sums(self) -> bool:
        """Whether the weights are sums over the writes, so that they need not be made for each token."""
        linear = self.retention.linear and self.optimizer.linear and self.module is None
        scales = self.retention.scales and self.retention.gates != "channel"
        return linear and (self.read == "anchor" or not self.retention.linked or scales)

    @property
    def solves(self) -> bool:
        """Whether the errors of many chunks of one write are the solution of a triangular system.

        That is so for one matrix and an error that is linear in the prediction.
        """
        return (
            self.sums
            and not self.retention.linked
            and self.chunk == 1
            and self.window == 1
            and self.read != "anchor"
            and type(self.network) in (networks.Linear, networks.MLP)
            and type(self.objective) in (objectives.SquaredError, objectives.HalfSquaredError, objectives.DotProduct)
            and self.clip is self.threshold is None
            and self.steps == "one"
        )

    @property
    def moves_once(self) -> bool:
        """Whether the weights move once a chunk."""
        return self.read == "anchor" and not (self.retention.linear and self.optimizer.linear)

    @property
    def parts_of_state(self) -> set[str]:
        """The fields of ``LearnerState`` that ``MemoryState`` does not have and the rule needs."""
        needed = {
            "initial": self.reset is not None or self.retention.uses_initial,
            "second": self.optimizer.order == 2,
            "pending": self.moves_once,
            "recent": self.window > 1,
            "projection": self.query is not None,
        }
        return {name for name, needs in needed.items() if needs}

    def features_of(self, x: Tensor) -> Tensor:
        """The network's input for a key or a query ``[..., d_in]``."""
        if self.features is None:
            return x
        y, width = self.features.forward(x), self.features.width(x.shape[-1])
        if y.shape != (*x.shape[:-1], width):
            raise ValueError(f"features: {type(self.features).__name__}: its width is {width}, but forward gives "
                             f"{list(y.shape)} for {list(x.shape)}")  # fmt: skip
        return y

    def channels(self, weights: Sequence[Tensor]) -> list[slice]:
        """The place of each matrix's columns among the channels of ``alpha``."""
        found, start = [], 0
        for w in weights:
            found.append(slice(start, start + w.shape[-1]))
            start += w.shape[-1]
        return found

    def options(self, keep: int | None = None, half: str | None = None) -> Options | None:
        """The options of the operation ``titans_memory`` that computes this rule, or ``None`` if it does not."""
        if (
            type(self.network) not in (networks.MLP, networks.Linear, networks.GatedMLP)
            or type(self.objective) not in _OBJECTIVES
            or any(isinstance(x, Tensor) for name, x in vars(self.objective).items() if name != "delta")
            or type(self.optimizer) not in (updates.Step, updates.Momentum)
            or self.optimizer.order > 1
            or type(self.retention) not in (updates.Keep, updates.Decay, updates.ChannelDecay)
            or (self.window > 1 and self.retention.first)
            or self.steps == "each"
            or (self.threshold is not None and (self.window > 1 or type(self.network) is networks.GatedMLP))
            or (type(self.network) is networks.GatedMLP and self.retention.gates == "channel")
        ):
            return None
        objective = _OBJECTIVES[type(self.objective)](self.objective)
        return Options(
            self.chunk, self.activation_name, self.clip, self.read, keep, half, self.threshold, objective,
            decay_first=self.retention.first, window=self.window, gated=type(self.network) is networks.GatedMLP,
        )  # fmt: skip

    @property
    def is_titans(self) -> bool:
        """Whether ``titans_memory`` is the rule."""
        options = self.options()
        return (
            options is not None
            and options.objective == state.SQUARED
            and type(self.retention) is not updates.ChannelDecay
            and not self.retention.first
            and self.reset is None
            and self.keys == 1
            and self.features is None
            and self.query is None
            and self.window == 1
            and not options.gated
        )

    def problems(self, no_momentum: str | None = None) -> Iterator[tuple[str, str]]:
        """``(argument, message)`` for parts that do not go together, in an operation or in a block.

        ``no_momentum``: what says that there is no momentum, such as ``"eta is None"``.
        """
        if no_momentum is not None and self.optimizer.order == 2:
            yield "optimizer", f"order 2 is the momentum of the momentum, and {no_momentum}"
        if self.reset is not None and self.reset * self.keys % self.chunk:
            yield "reset", f"expected a multiple of the chunk's {self.chunk} writes, got {self.reset} tokens"
        if self.retention.gates not in ("none", "scalar", "channel"):
            yield "retention", f"gates: expected 'none', 'scalar' or 'channel', got {self.retention.gates!r}"
        if self.optimizer.order not in (0, 1, 2):
            yield "optimizer", f"order: expected 0, 1 or 2, got {self.optimizer.order!r}"
        if self.retention.first and self.chunk > 1:
            yield "retention", f"decays before the gradient is taken (first), which needs chunk 1, not {self.chunk}"
        if self.moves_once and self.window > 1:
            yield "window", "a rule that moves once a chunk (read='anchor') has no window: every token is in its chunk"
        if self.threshold is not None and (not self.sums or self.window > 1):
            reason = "a window of one write" if self.sums else "weights that are sums over the writes"
            yield "threshold", f"needs {reason}"
        if self.threshold is not None and self.retention.first:
            yield "threshold", "a token below it does not decay, and with first decays before its gradient is taken"
        if self.steps == "each" and (self.window > 1 or self.keys > 1 or self.optimizer.scales_update):
            yield "steps", "a step size for each matrix needs a window of one write, one key, and steps along gradients"
        if self.query is not None and self.keys > 1 and self.read != "after":
            yield "query", "projected queries with several keys for each token are read after it is written"
        if self.module is not None and self.retention.gates == "channel":
            yield "retention", "decays by channel need matrices, and the network is a module"
        if self.module is not None and self.features is not None:
            yield "features", "the network is a module, which can compute them itself"

    def refuse_weights(self, weights: Sequence[Tensor], d_in: int, d_out: int) -> str | None:
        """Why the network cannot run with these weights, or ``None``."""
        if self.module is not None:
            return self.module.refuse(weights, d_in, d_out, not isinstance(self.optimizer, updates.Muon))
        width = d_in if self.features is None else self.features.width(d_in)
        used: set[int] = set()

        def apply(i: int, x: Tensor) -> Tensor:
            if i >= len(weights):
                raise ValueError(f"needs at least {i + 1} matrices, got {len(weights)}")
            if i in used:
                raise ValueError(f"applies matrix {i} twice")
            used.add(i)
            out, into = weights[i].shape[-2:]
            if weights[i].dim() != 4 or into != x.shape[-1]:
                raise ValueError(f"state.weights[{i}]: expected [batch, heads, out, in={x.shape[-1]}], "
                                 f"got {list(weights[i].shape)}")  # fmt: skip
            return x.new_empty(*x.shape[:-1], out)

        try:
            y = self.network.forward(apply, torch.empty(1, width, device="meta"), self.activation, len(weights))
        except (ValueError, RuntimeError) as error:
            return f"network {type(self.network).__name__}: {error}"
        if used != set(range(len(weights))):
            return f"network {type(self.network).__name__}: uses {len(used)} matrices, got {len(weights)}"
        if y.shape != (1, d_out):
            return (f"network {type(self.network).__name__}: expected outputs [..., {d_out}] as v for inputs "
                    f"[..., {width}], got {['...', *y.shape[1:]]}")  # fmt: skip
        return None


_OBJECTIVES: dict[type, Callable[[Any], state.Objective]] = {
    objectives.SquaredError: lambda part: state.SQUARED,
    objectives.HalfSquaredError: lambda part: state.Objective("l2_half"),
    objectives.DotProduct: lambda part: state.Objective("dot"),
    objectives.LpError: lambda part: state.Objective("lp", p=part.p, smooth=part.smooth),
    objectives.Huber: lambda part: state.Objective(
        "huber", delta=0.0 if part.delta is None or isinstance(part.delta, Tensor) else part.delta, form=part.form
    ),
}
"""The objectives that the memory operation has."""


def make_rule(
    *,
    chunk: int = 16,
    network: Any = "mlp",
    activation: str | None = "gelu",
    objective: Any = "l2",
    optimizer: Any = "momentum",
    retention: Any = "scalar",
    window: int = 1,
    features: Any = None,
    read: str = "after",
    reset: int | None = None,
    keys: int = 1,
    query: str | None = None,
    steps: str = "one",
    clip: float | None = None,
    threshold: float | None = None,
) -> Rule:
    """The rule of the arguments of :func:`learn`. Raises ``ValueError`` or ``TypeError`` for what does not fit."""
    given = dict(locals())
    module = ModuleNetwork(network) if isinstance(network, nn.Module) else None
    part: Any = module if module is not None else make_part("network", network)
    activation = (part.activation or "gelu") if activation is None else activation
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: expected one of {', '.join(sorted(ACTIVATIONS))}, got {activation!r}")
    for name, number, least in (("chunk", chunk, 1), ("window", window, 1), ("keys", keys, 1), ("reset", reset, 1)):
        if number is None and name == "reset":
            continue
        if isinstance(number, bool) or not isinstance(number, int) or number < least:
            raise ValueError(f"{name}: expected a whole number >= {least}, got {number!r}")
    for name, bound in (("clip", clip), ("threshold", threshold)):
        if bound is not None and (isinstance(bound, bool) or not (isinstance(bound, (int, float)) and bound > 0)):
            raise ValueError(f"{name}: expected a norm > 0 or None, got {bound!r}")
    if read not in READS:
        raise ValueError(f"read: expected 'after', 'before' or 'anchor', got {read!r}")
    if query not in (None, "projected"):
        raise ValueError(f"query: expected None or 'projected', got {query!r}")
    if steps not in ("one", "each"):
        raise ValueError(f"steps: expected 'one' or 'each', got {steps!r}")
    rule = Rule(
        part, make_part("objective", objective), make_part("optimizer", optimizer), make_part("retention", retention),
        None if features is None else make_part("features", features),
        activation, chunk, window, read, reset, keys, query, steps, clip, threshold, module, _text(given),
    )  # fmt: skip
    for name, problem in rule.problems():
        raise ValueError(f"{name}: {problem}")
    return rule


def _text(given: dict[str, Any]) -> str | None:
    plain = {
        name: {key: x for key, x in value.items() if not isinstance(x, Tensor)} if isinstance(value, dict) else value
        for name, value in given.items()
    }
    try:
        return json.dumps(plain | {"classes": _numbers(given)})
    except TypeError:
        return None


def _numbers(given: dict[str, Any]) -> dict[str, int]:
    """Which class of its name each part is, where it is not the first."""
    names = {kind: x.get("type") if isinstance(x := given[kind], dict) else x for kind in CATALOGUES}
    numbers = {kind: CATALOGUES[kind].lookup(x).number for kind, x in names.items() if isinstance(x, str)}
    return {kind: number for kind, number in numbers.items() if number > 1}


@functools.lru_cache(maxsize=1024)
def rule_of_text(text: str) -> Rule:
    """The rule that has this ``text``. Raises ``ValueError`` if another class has taken the name of a part."""
    given = json.loads(text)
    classes = given.pop("classes")
    for kind, now in _numbers(given).items():
        if classes.get(kind, 1) != now:
            raise ValueError(f"{kind}: {show(given[kind])} was registered again after this rule was made, whose class "
                             "a compiled model cannot find any more: build the model again")  # fmt: skip
    return make_rule(**given)
