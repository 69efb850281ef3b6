"""The loop against titans-pytorch, where that is installed: its options that are settings of ours.

Its queries, keys and values are the inputs here, its matrices are ours transposed, and its loss is a mean.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

neural_memory = pytest.importorskip("titans_pytorch.neural_memory", reason="pip install titans-pytorch")
memory_models = pytest.importorskip("titans_pytorch.memory_models")

WIDTH, TIME, CHUNK = 4, 8, 4
SETTINGS: dict[str, Any] = {
    "momentum": ({}, {}),
    "no momentum": (dict(momentum=False), {}),
    "momentum of order 2": (dict(momentum_order=2), dict(optimizer={"type": "momentum", "order": 2})),
    "Newton-Schulz": (dict(spectral_norm_surprises=True), dict(optimizer={"type": "muon", "steps": 5})),
    "factorised": (dict(model=lambda: memory_models.FactorizedMemoryMLP(WIDTH, 2, k=3)), dict(network="factorised")),
    "two keys": (dict(momentum=False, num_kv_per_token=2), dict(keys=2, chunk=2 * CHUNK)),
}


def transposed(tensors: Any) -> tuple[Tensor, ...]:
    return tuple(w.mT for w in tensors)


@pytest.mark.parametrize("name", SETTINGS)
def test_outputs_and_weights(name: str, given: Any, general: Any) -> None:
    theirs, ours = SETTINGS[name]
    keys = ours.get("keys", 1)
    model = theirs.get("model", lambda: memory_models.MemoryMLP(WIDTH, depth=2, expansion_factor=2.0))()
    module = neural_memory.NeuralMemory(
        WIDTH, chunk_size=1, batch_size=CHUNK, pre_rmsnorm=False, mem_model_norm_add_residual=False,
        **{**theirs, "model": model},
    ).double()  # fmt: skip
    for gate in (module.to_momentum, module.to_decay_factor) if module.to_momentum else (module.to_decay_factor,):
        first = gate[0].weight.data[:1].clone()  # of the orders of momentum, all have one gate here
        gate[0].weight.data.copy_(first.expand_as(gate[0].weight))
        gate[0].bias.data.fill_(0.3)
    x = given.normal(2, TIME, WIDTH)
    with torch.no_grad():
        expected, state = module(x)
        last = transposed(state.states[0].values())
        start = transposed(w.expand(2, *w.shape[-2:]) for w in module.memory_model_parameters)
        k, v = (layer(x).view(2, TIME, keys, 1, WIDTH) for layer in (module.to_keys, module.to_values))
        step = module.adaptive_step_transform(module.to_adaptive_step(x)).view(2, TIME, keys, 1)
        eta = module.to_momentum(x).sigmoid()[0] if module.to_momentum else None
        y, rows = general.learn_loop(
            module.to_queries(x).unsqueeze(2), k, v, step / WIDTH, eta, module.to_decay_factor(x).sigmoid(),
            tuple(w.unsqueeze(1) for w in start), **{"chunk": CHUNK, **ours},
        )  # fmt: skip
    # in Newton-Schulz it divides by max(norm, 1e-7), and the loop by norm + 1e-7
    close = dict(rtol=0, atol=1e-5 if name == "Newton-Schulz" else 1e-10)
    torch.testing.assert_close(y.squeeze(2), expected, **close)
    weights, *_ = general.fields(rows, CHUNK, keys)
    for mine, their in zip(weights, last, strict=True):
        torch.testing.assert_close(mine.squeeze(1), their, **close)
