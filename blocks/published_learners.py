"""The published learners by name: memories with other defaults. ``docs/learners.md`` has their equations.

What is around the memory (convolution, unit length of queries and keys, output gate) is that of ``memory``. Every field
of ``memory`` can be given, as for any block.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

from ..registry import register, show
from .memory import NeuralMemory

ONLINE: dict[str, Any] = {
    "network": "linear", "norm": False, "objective": "l2_half", "momentum": False, "chunk": 1, "clip": None,
    "max_step": 1.0,
}  # fmt: skip
"""One matrix, written at every token by a step without momentum."""
DEEP: dict[str, Any] = {"momentum": False, "clip": None}
"""The network of ``memory``, without momentum."""
POLYNOMIAL: dict[str, Any] = {"type": "polynomial", "degree": 2}

LEARNERS: dict[str, tuple[str, dict[str, Any]]] = {
    "linear_attention": (
        "Linear attention: W = W + theta v k^T (arXiv 2006.16236).",
        ONLINE | {"objective": "dot", "forgetting": False},
    ),
    "retnet": (
        "RetNet's retention: W = (1 - alpha) W + theta v k^T with constant gates (arXiv 2307.08621).",
        ONLINE | {"objective": "dot", "gates": "constant"},
    ),
    "gla": (
        "Gated linear attention: each column decays by its own gate (arXiv 2312.06635).",
        ONLINE | {"objective": "dot", "retention": "channel"},
    ),
    "delta_net": (
        "DeltaNet: W = W - theta (W k - v) k^T (arXiv 2406.06484).",
        ONLINE | {"forgetting": False},
    ),
    "gated_delta_net": (
        "Gated DeltaNet: the delta rule at weights that have decayed (arXiv 2412.06464).",
        ONLINE | {"retention": {"type": "scalar", "first": True}},
    ),
    "kda": (
        "Kimi Delta Attention: Gated DeltaNet with a decay for each column (arXiv 2510.26692).",
        ONLINE | {"retention": {"type": "channel", "first": True}},
    ),
    "delta_product": (
        "DeltaProduct: several delta steps for each token after one decay (arXiv 2502.10297).",
        ONLINE | {"retention": {"type": "scalar", "first": True}, "keys": 2},
    ),
    "momentum_delta": (
        "The momentum delta rule: Gated DeltaNet with momentum (arXiv 2605.05838).",
        ONLINE | {"retention": {"type": "scalar", "first": True}, "momentum": True},
    ),
    "ttt_linear": (
        "TTT-Linear: one matrix under LayerNorm, chunks of 16, no decay (arXiv 2407.04620).",
        ONLINE | {"norm": True, "chunk": 16, "forgetting": False},
    ),
    "ttt_mlp": (
        "TTT-MLP: two layers of expansion 4 under LayerNorm, chunks of 16, no decay (arXiv 2407.04620).",
        DEEP | {"objective": "l2_half", "forgetting": False},
    ),
    "titans": ("Titans' memory: the defaults of memory (arXiv 2501.00663).", {}),
    "titans_channel": ("Titans' memory with a decay for each column of each matrix.", {"retention": "channel"}),
    "moneta": (
        "Moneta: an L3 objective, and weights normalized by their L4 norm (arXiv 2504.13173, eq. 24-25).",
        DEEP | {"objective": {"type": "lp", "p": 3.0}, "retention": {"type": "lq", "q": 4.0}},
    ),
    "yaad": (
        "Yaad: a Huber objective with a learned threshold (arXiv 2504.13173, eq. 26).",
        DEEP | {"objective": {"type": "huber", "delta": None}},
    ),
    "memora": (
        "Memora: rows of weights are distributions, kept by KL divergence (arXiv 2504.13173, eq. 27).",
        DEEP | {"retention": "kl"},
    ),
    "dla": (
        "Deep linear attention: a dot product objective and polynomial features (arXiv 2505.23735, eq. 19).",
        DEEP | {"objective": "dot", "features": POLYNOMIAL},
    ),
    "swla": (
        "Sliding-window linear attention: one matrix, each step over a window (arXiv 2505.23735, eq. 20).",
        ONLINE | {"objective": "dot", "features": POLYNOMIAL, "window": 4, "chunk": 16},
    ),
    "omega_net": (
        "OmegaNet: gradients over a window, polynomial features (arXiv 2505.23735, eq. 10).",
        DEEP | {"features": POLYNOMIAL, "window": 4},
    ),
    "atlas": (
        "Atlas: OmegaNet with momentum, whose steps are orthogonalized (arXiv 2505.23735, eq. 32-33).",
        {"features": POLYNOMIAL, "window": 4, "optimizer": {"type": "muon", "scale": "update"}, "clip": None},
    ),
    "lact": (
        "LaCT: a SwiGLU memory that moves once in a large chunk, by an orthogonalized step (arXiv 2505.23884).",
        {"network": "gated_mlp", "activation": "silu", "expansion": 2, "norm": False, "objective": "dot",
         "optimizer": {"type": "muon", "coefficients": "lact"}, "steps": "each", "retention": "rows",
         "forgetting": False, "retrieve": "anchor", "chunk": 2048, "clip": None},
    ),
}  # fmt: skip
"""The summary and the fields of each name."""
CLIPPED_BEFORE = ("moneta", "yaad", "memora", "dla", "omega_net", "atlas")
"""Those whose gradients were bounded by default."""


def _add(name: str, summary: str, defaults: dict[str, Any]) -> None:
    @functools.wraps(NeuralMemory.__init__)
    def initialize(self: Any, dim: int, **fields: Any) -> None:
        NeuralMemory.__init__(self, dim, **{**defaults, **fields})

    signature = inspect.signature(NeuralMemory.__init__)
    parameters = [
        p.replace(default=defaults[p.name]) if p.name in defaults else p for p in signature.parameters.values()
    ]
    initialize.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    others = ", ".join(f"``{name}: {show(value)}``" for name, value in defaults.items())
    doc = f"{summary}\n\nThe block ``memory`` with the defaults {others or 'it has'}."
    cls = type(
        "".join(part.capitalize() for part in name.split("_")),
        (NeuralMemory,),
        {
            "__init__": initialize,
            "__doc__": doc,
            "__module__": __name__,
            "variant_of": "memory",
            # fingerprints leave these out, so that what was saved with them keeps its own
            "former_defaults": {"clip": 1.0} if name in CLIPPED_BEFORE else {},
        },
    )
    globals()[cls.__name__] = register(name)(cls)  # a name of the module, so that it can be pickled


for _name, (_summary, _defaults) in LEARNERS.items():
    _add(_name, _summary, _defaults)
