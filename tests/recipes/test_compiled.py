"""``torch.compile`` of models in one graph: every packaged recipe gives the results of eager mode."""

import contextlib
from typing import Any

import pytest
import torch

import titans_build as tb
from titans_build.blocks.state import named_tensors
from titans_build.kernels.dispatch import VARIABLE
from titans_build.recipes.loading import base_names

SMALL = {"dim": 32, "vocab": 40, "stack.0.repeat": 1}
# the segments and windows of these are shorter than the sequence, and no divisors of it
PARTS = {
    "continuum": {f"layers.continuum.{i}.chunk": chunk for i, chunk in enumerate((4, 8, 16, 64))},
    "deltas-and-mac": {"layers.mac.0.segment": 16, "layers.mac.0.memory.chunk": 8},
    "hope": {f"layers.hope.0.{i}.chunk": chunk for i, chunk in enumerate((4, 8, 16, 64))},
    "llama-and-memory": {"layers.plain.0.window": 16, "layers.beside.0.branches.0.window": 16},
    "lmm": {"layers.lmm.0.chunk": 8},
    "mac": {"layers.mac.0.segment": 16, "layers.mac.0.memory.chunk": 8},
    "mag": {"layers.mag.0.of.branches.0.window": 16, "layers.mag.0.of.branches.1.chunk": 8},
    "mal": {"layers.mal.0.of.0.chunk": 8, "layers.mal.0.of.1.window": 16},
    "memory-as-ffn": {"layers.learner.0.window": 16, "layers.learner.1.chunk": 8},
    "transformer": {"layers.plain.0.window": 16},
    "tnt": {"layers.tnt.0.branches.0.chunk": 16, "layers.tnt.0.branches.4.chunk": 16}
    | {f"layers.tnt.0.branches.{i}.reset": 16 for i in (1, 2, 3, 4)},
    "two-memories": {"layers.mag.0.of.branches.0.window": 16},
    "windows-and-mac": {"layers.window.0.window": 16, "layers.mac.0.segment": 16},
}
PYTORCH = (
    "attention=sdpa,memory=torch,memory_read=torch,rms_norm=torch,l2_norm=torch,gate=torch,gated_norm=torch,"
    "swiglu=torch,rotary=torch,query_key_value=torch,query=torch,cached_attention=torch"
)
SLOW = pytest.mark.slow
EVERYDAY = [pytest.param(name, marks=() if name == "mac" else SLOW) for name in base_names()]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def model(name, **changes):
    return tb.build(tb.load_recipe(name, overrides={**SMALL, **PARTS[name], **changes}), seed=0)


def compiled(function, backend="aot_eager", dynamic=None):
    torch._dynamo.reset()
    return torch.compile(function, backend=backend, fullgraph=True, dynamic=dynamic)


def tokens(time=35, rows=2):
    return torch.randint(0, 40, (rows, time))


def step(run, module, given, targets):
    """Outputs, state and gradients of one training step."""
    module.zero_grad()
    out = run(given, targets=targets)
    out.loss.backward()
    grads = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    return {"logits": out.logits.detach(), "loss": out.loss.detach(), **dict(named_tensors(out.state)), **grads}


def same(one, other):
    assert one.keys() == other.keys()
    for name, x in one.items():
        if x.is_floating_point():
            assert (x - other[name]).norm() <= 2e-5 * other[name].norm() + 1e-6, name
        else:
            assert torch.equal(x, other[name]), name


@pytest.mark.parametrize("name", EVERYDAY)
def test_a_training_step_compiles_once(name):
    module = model(name)
    run = compiled(module)
    for _ in range(2):
        given, targets = tokens(), tokens()
        same(step(run, module, given, targets), step(module, module, given, targets))
        with torch._dynamo.config.patch(error_on_recompile=True):
            given, targets = tokens(), tokens()
            same(step(run, module, given, targets), step(module, module, given, targets))


LEARNERS = {
    "a window": {"type": "omega_net"},
    "a gated network": {"type": "memory", "network": "gated_mlp"},
    "weights of every token": {"type": "memora"},
    "norms of every token": {"type": "moneta"},
    "a step of every token": {"type": "atlas"},
    "a step of every chunk": {"type": "lact", "chunk": 8},
    "a map after every token": {"type": "memory", "retention": "rows"},
    "resets and projected queries": {"type": "memory", "reset": 16, "chunk": 8, "query": "projected"},
    "several keys": {"type": "delta_product", "keys": 3},
    "a learned threshold": {"type": "yaad", "optimizer": {"type": "muon", "steps": 2}, "momentum": True},
    "learners that write themselves": {"type": "self_modifying", "chunk": 8},
}
ALWAYS = ("a window", "a step of every chunk", "learners that write themselves")


@pytest.mark.parametrize("name", [n if n in ALWAYS else pytest.param(n, marks=SLOW) for n in LEARNERS])
def test_every_learner_compiles_once(name):
    """Rows at different positions, which an earlier call has left, and lengths that differ."""
    block = tb.build_block(LEARNERS[name], dim=16)

    def outcome(run, x, state):
        block.zero_grad()
        y, after = run(x, state)
        y.square().sum().backward()
        grads = {name: p.grad for name, p in block.named_parameters() if p.grad is not None}
        return {"y": y.detach(), **dict(named_tensors(after)), **grads}

    with torch.no_grad():
        _, state = block(torch.randn(2, 9, 16), mask=torch.rand(2, 9) < 0.6)
    run = compiled(block, dynamic=True)
    for count, time in enumerate((21, 35)):
        x = torch.randn(2, time, 16)
        with torch._dynamo.config.patch(error_on_recompile=count > 0):
            same(outcome(run, x, state), outcome(block, x, state))


@pytest.mark.slow
@pytest.mark.parametrize("name", base_names())
def test_with_the_pytorch_backends(name, monkeypatch):
    """As on a machine without a C compiler."""
    monkeypatch.setenv(VARIABLE, PYTORCH)
    module = model(name)
    given, targets = tokens(), tokens()
    same(step(compiled(module), module, given, targets), step(module, module, given, targets))


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [True, None])
@pytest.mark.parametrize("by", ["auto", "PyTorch"])
@pytest.mark.parametrize("name", base_names())
def test_dynamic_lengths(name, by, dynamic, monkeypatch):
    """A model is compiled once, or twice if the second length makes it dynamic.

    All lengths have the same number of segments, since the graph of ``mac`` contains each segment.
    """
    monkeypatch.setenv(VARIABLE, PYTORCH if by == "PyTorch" else "")
    module = model(name)
    run = compiled(module, dynamic=dynamic)
    for count, time in enumerate((35, 46, 40, 37, 43)):
        given, targets = tokens(time), tokens(time)
        with torch._dynamo.config.patch(error_on_recompile=count > 1):
            same(step(run, module, given, targets), step(module, module, given, targets))


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [True, None])
@pytest.mark.parametrize("name", ["mac", "mag"])
def test_on_the_triton_kernels(name, dynamic, monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setenv(VARIABLE, "memory=triton,memory_read=triton,gate=triton,rms_norm=triton")
    module = model(name)
    run = compiled(module, dynamic=dynamic)
    for time in (35, 46):
        given, targets = tokens(time, rows=1), tokens(time, rows=1)
        same(step(run, module, given, targets), step(module, module, given, targets))


@pytest.mark.slow
@pytest.mark.parametrize("name", base_names())
def test_another_length(name):
    module = model(name)
    run = compiled(module)
    for time in (35, 50, 21, 37):
        given, targets = tokens(time), tokens(time)
        same(step(run, module, given, targets), step(module, module, given, targets))


@pytest.mark.slow
@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("name", base_names())
def test_continuing_from_a_state(name, mask):
    """Rows at different positions, pieces of one and of many tokens, and padding."""
    module, run = model(name), None
    state = other = None
    run = compiled(lambda *given, **named: module(*given, **named))
    with torch.no_grad():
        for time in (5, 1, 1, 40, 17, 1):
            given = tokens(time)
            real = torch.rand(given.shape) < 0.6 if mask else None
            out, expected = run(given, state, real), module(given, other, real)
            state, other = out.state, expected.state
            same({"logits": out.logits}, {"logits": expected.logits})
    if not module.grows:
        same(dict(named_tensors(state)), dict(named_tensors(other)))


@pytest.mark.slow
@pytest.mark.parametrize("name", base_names())
def test_the_inductor_backend(name):
    module = model(name)
    given, targets = tokens(), tokens()
    same(step(compiled(module, "inductor"), module, given, targets), step(module, module, given, targets))


@pytest.mark.slow
@pytest.mark.parametrize(
    "fields",
    [{"type": "memora"}, {"type": "moneta"}, {"type": "atlas"}, {"type": "lact", "chunk": 8}, {"type": "kda"}],
    ids=lambda fields: fields["type"],
)
def test_inductor_is_as_exact_as_eager_mode(fields: dict[str, Any]) -> None:
    """Both are compared with float64, since a learner may amplify rounding.

    The rows of ``memora`` are nearly equal distributions. Its network's outputs differ from each other by little, and
    LayerNorm divides by that difference.
    """
    block = tb.build_block(fields, dim=16)
    x, mask = torch.randn(2, 35, 16), torch.rand(2, 35) < 0.6

    def outcome(run: Any, x: torch.Tensor) -> dict[str, torch.Tensor]:
        block.zero_grad()
        y, state = run(x, mask=mask)
        y.square().sum().backward()
        grads = {name: p.grad.clone() for name, p in block.named_parameters() if p.grad is not None}
        return {
            "y": y.detach(),
            **{f"state {name}": z for name, z in named_tensors(state) if z.is_floating_point()},
            **grads,
        }

    eager, inductor = outcome(block, x), outcome(compiled(block, "inductor"), x)
    block.double()
    exact = outcome(block, x.double())
    assert eager.keys() == inductor.keys() == exact.keys()
    for name, right in exact.items():
        of_eager, of_inductor = ((found[name] - right).norm() / right.norm() for found in (eager, inductor))
        assert not of_inductor > 4 * of_eager + 1e-6, name


@pytest.mark.parametrize("mode", ["no_grad", "inference_mode", "frozen"])
@pytest.mark.parametrize("time", [1, 9])
@pytest.mark.parametrize(
    "fields",
    [
        {"type": "memora"},
        *(
            pytest.param(each, marks=pytest.mark.slow)
            for each in (
                {"type": "atlas"},
                {"type": "moneta"},
                {"type": "lact"},
                {"type": "memory", "network": "slots"},
            )
        ),
    ],
    ids=str,
)
def test_compiled_learners_without_gradients(fields: dict[str, Any], time: int, mode: str) -> None:
    torch._dynamo.reset()
    block = tb.build_block(fields, dim=8).requires_grad_(mode != "frozen")
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, time, 8)
    with contextlib.nullcontext() if mode == "frozen" else getattr(torch, mode)():
        torch.testing.assert_close(compiled(x)[0], block(x)[0])
