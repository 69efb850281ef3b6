"""Each published learner as a block computes its paper's equations on its own queries, keys, values and gates."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import titans_build as tb
from titans_build.blocks.published_learners import LEARNERS

BATCH, TIME, DIM, CHUNK = 2, 11, 8, 4


class Block:
    """A block with random parameters, what it computes, and what it gives to the operation."""

    def __init__(self, name: str) -> None:
        torch.manual_seed(0)
        chunk = 1 if LEARNERS[name][1].get("chunk") == 1 else CHUNK
        fields: dict[str, Any] = {"type": name, "heads": 2, "chunk": chunk}
        if name.startswith("titans"):
            fields["clip"] = None  # the paper does not bound gradients
        self.block = block = tb.build_block(fields, dim=DIM).double()
        for parameter in block.parameters():
            if parameter.requires_grad:  # the weights of constant gates are zero
                torch.nn.init.normal_(parameter, std=0.5)
        state = block.init_state(BATCH)
        x = torch.randn(BATCH, TIME, DIM, dtype=torch.float64)
        tokens, _, _ = block.inputs(x, state, None)
        self.q, self.k, self.v, self.theta = tokens.q, tokens.k, tokens.v, tokens.theta
        self.eta, self.alpha = tokens.eta, tokens.alpha
        self.gamma, self.delta = getattr(tokens, "gamma", None), getattr(tokens, "parameter", None)
        self.weights = list(state.memory.weights)
        self.stepped = self.theta.unsqueeze(-1) * self.v if self.theta.dim() == 3 else None
        self.y, after = block.update(x, state)
        self.after = list(after.memory.weights)

    @property
    def keep(self) -> Tensor:
        return torch.ones_like(self.theta) if self.alpha is None else 1 - self.alpha

    def net(self, x: Tensor, weights: list[Tensor]) -> Tensor:
        """The network: a matrix or an MLP, with what is before and after it."""
        h = x
        if self.block.coefficients is not None:
            _, a, b = self.block.coefficients.tolist()
            h = a * x + b * x**2
        for l, w in enumerate(weights):
            h = (w @ (F.gelu(h) if l else h).unsqueeze(-1)).squeeze(-1)
        gain = self.block.norm_gain
        return h if gain is None else x + F.layer_norm(h, h.shape[-1:], eps=1e-6) * gain


def omega(published: Any, b: Block, window: int, bias: str, **more: Any) -> Any:
    gamma = torch.ones_like(b.theta) if b.gamma is None else b.gamma
    return published.omega(b.q, b.k, b.v, b.theta, gamma, b.keep, b.net, b.weights, CHUNK, window, bias, **more)


def titans(published: Any, b: Block) -> Any:
    forget = (
        b.alpha.unsqueeze(-1).expand(*b.alpha.shape, sum(w.shape[-1] for w in b.weights))
        if b.alpha.dim() == 3
        else b.alpha
    )
    parts = list(forget.split([w.shape[-1] for w in b.weights], -1))
    return published.titans(b.q, b.k, b.v, b.theta, b.eta, parts, b.net, b.weights, CHUNK)


def ttt(published: Any, b: Block) -> Any:
    return published.ttt(b.q, b.k, b.v, b.theta, b.weights, b.block.norm_gain, CHUNK)


def momentum_delta(published: Any, b: Block) -> Any:
    ones = torch.ones_like(b.theta)
    return published.momentum_delta(b.q, b.k, b.v, b.keep, b.eta, b.theta, ones, b.weights[0])


RULES: dict[str, Callable[[Any, Block], Any]] = {
    "linear_attention": lambda p, b: p.linear_attention(b.q, b.k, b.stepped, b.weights[0]),
    "retnet": lambda p, b: p.retnet(b.q, b.k, b.stepped, b.keep[0, 0], b.weights[0]),
    "gla": lambda p, b: p.gla(b.q, b.k, b.stepped, b.keep, b.weights[0]),
    "delta_net": lambda p, b: p.delta_net(b.q, b.k, b.v, b.theta, b.weights[0]),
    "gated_delta_net": lambda p, b: p.gated_delta_net(b.q, b.k, b.v, b.theta, b.keep, b.weights[0]),
    "kda": lambda p, b: p.kda(b.q, b.k, b.v, b.theta, b.keep, b.weights[0]),
    "delta_product": lambda p, b: p.delta_product(b.q, b.k, b.v, b.theta, b.keep, b.weights[0]),
    "momentum_delta": momentum_delta,
    "ttt_linear": ttt,
    "ttt_mlp": ttt,
    "titans": titans,
    "titans_channel": titans,
    "moneta": lambda p, b: p.moneta(b.q, b.k, b.v, b.theta, b.keep, b.net, b.weights, CHUNK),
    "yaad": lambda p, b: p.yaad(b.q, b.k, b.v, b.theta, b.delta, b.keep, b.net, b.weights, CHUNK),
    "memora": lambda p, b: p.memora(b.q, b.k, b.v, b.theta, b.keep, b.net, b.weights, CHUNK),
    "dla": lambda p, b: omega(p, b, 1, "dot"),
    "swla": lambda p, b: omega(p, b, 4, "dot"),
    "omega_net": lambda p, b: omega(p, b, 4, "l2"),
    "atlas": lambda p, b: omega(p, b, 4, "l2", theta=b.eta, newton_schulz=5),
    "lact": lambda p, b: p.lact(b.q, b.k, b.v, b.theta, b.eta, b.weights, CHUNK),
}


def test_every_name_has_a_rule() -> None:
    assert set(RULES) == set(LEARNERS)


@pytest.mark.parametrize("name", RULES)
def test_the_block_computes_the_rule(name: str, published: Any) -> None:
    block = Block(name)
    y, state = RULES[name](published, block)
    torch.testing.assert_close(block.y, y, rtol=1e-9, atol=1e-9)
    state = state[0] if isinstance(state, tuple) else state  # without the momentum
    for mine, theirs in zip(block.after, state if isinstance(state, list) else [state], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("name", "fingerprint"), [("yaad", "e00be3f73143fb54"), ("atlas", "4baaef72d5bdfb93")])
def test_recipes_with_bounded_gradients_keep_the_fingerprint_from_when_that_was_the_default(name, fingerprint) -> None:
    recipes = [
        tb.load_recipe({"version": 1, "dim": 16, "layers": {"a": [{"type": name, **fields}]}, "stack": ["a"]})
        for fields in ({"clip": 1.0}, {}, {"clip": None})
    ]
    assert [recipe.fingerprint == fingerprint for recipe in recipes] == [True, False, False]
    assert recipes[1] == recipes[2]


@pytest.mark.parametrize("name", [*RULES, "memory"])
def test_an_ensemble_by_vmap_over_parameters(name: str) -> None:
    """As in PyTorch's tutorial on model ensembling; and the gradient of each sample."""
    chunk = 1 if name != "memory" and LEARNERS[name][1].get("chunk") == 1 else CHUNK
    fields = {"type": name, "heads": 2, "chunk": chunk}
    blocks = [tb.build_block(fields, dim=DIM, seed=seed).double() for seed in range(2)]
    x = torch.randn(BATCH, TIME, DIM, dtype=torch.float64)

    def run(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        y, state = torch.func.functional_call(blocks[0], parameters, (x[:, :5],))
        return torch.cat([y, torch.func.functional_call(blocks[0], parameters, (x[:, 5:], state))[0]], 1)

    stacked, _ = torch.func.stack_module_state(list(blocks))
    torch.testing.assert_close(torch.vmap(run, (0, None))(stacked, x), torch.stack([block(x)[0] for block in blocks]))

    loss = lambda parameters, x: run(parameters, x.unsqueeze(0)).square().sum()  # noqa: E731
    given = {name: p.detach() for name, p in blocks[0].named_parameters()}
    each = torch.vmap(torch.func.grad(loss), (None, 0))(given, x)
    parameters = {name: p for name, p in blocks[0].named_parameters() if p.requires_grad}
    for row in range(BATCH):
        found = torch.autograd.grad(loss(parameters, x[row]), list(parameters.values()), materialize_grads=True)
        for key, grad in zip(parameters, found):
            torch.testing.assert_close(each[key][row], grad, msg=lambda text, key=key: f"{key}: {text}")
