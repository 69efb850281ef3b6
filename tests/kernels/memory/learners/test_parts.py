"""Parts of a user's own, and the arguments that ``learn`` refuses."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import titans_build as tb
from titans_build.kernels.dispatch import BackendError
from titans_build.kernels.memory import LearnerState, learn, titans_memory
from titans_build.kernels.memory.learner.parts import (
    CATALOGUES,
    Features,
    Network,
    Objective,
    Optimizer,
    Retention,
    register_network,
    register_objective,
)
from titans_build.kernels.memory.learner.rule import rule_of_text

BATCH, TIME, HEADS, DIM = 2, 9, 2, 4


@pytest.fixture(autouse=True)
def scratch() -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for catalogue in CATALOGUES.values():
            stack.enter_context(catalogue.scratch())
        yield


def tokens(keys: int = 1, channels: int = 0) -> list[Tensor]:
    draw = torch.Generator().manual_seed(0)
    rand = lambda *shape: torch.rand(*shape, generator=draw, dtype=torch.float64)  # noqa: E731
    time = (TIME, keys) if keys > 1 else (TIME,)
    q, k, v = rand(BATCH, TIME, HEADS, DIM), rand(BATCH, *time, HEADS, DIM), rand(BATCH, *time, HEADS, DIM)
    alpha = rand(BATCH, TIME, HEADS, *([channels] if channels else [])) / 10
    return [q, k, v, rand(BATCH, *time, HEADS) / 10, rand(BATCH, TIME, HEADS), alpha]


def fresh() -> LearnerState:
    draw = torch.Generator().manual_seed(1)
    shapes = ((BATCH, HEADS, 8, DIM), (BATCH, HEADS, DIM, 8))
    return LearnerState.fresh([torch.rand(*shape, generator=draw, dtype=torch.float64) for shape in shapes])


def run(keys: int = 1, **settings: Any) -> tuple[Tensor, LearnerState]:
    y, state = learn(*tokens(keys), fresh(), chunk=4, keys=keys, **settings)
    assert isinstance(state, LearnerState)
    return y, state


class Double(Objective):
    def error(self, prediction: Tensor, target: Tensor, parameter: Tensor | None) -> Tensor:
        return 2 * (prediction - target)


def test_a_replaced_part_is_used() -> None:
    @register_objective("mine")
    class Half(Objective):
        def error(self, prediction: Tensor, target: Tensor, parameter: Tensor | None) -> Tensor:
            return prediction - target

    torch.testing.assert_close(run(objective="mine")[0], run(objective="l2_half")[0])
    register_objective("mine", replace=True)(Double)
    torch.testing.assert_close(run(objective="mine")[0], run(objective="l2")[0])


@pytest.mark.slow
def test_a_compiled_block_uses_the_class_that_its_name_stood_for() -> None:
    """Also where another class has the name since; where that one cannot be found, the block says so."""
    x = torch.randn(2, 9, 8)

    def block() -> tuple[Any, Any]:
        torch._dynamo.reset()
        made = tb.build_block({"type": "memory", "chunk": 4, "heads": 2, "objective": "mine"}, dim=8, seed=0)
        return made, torch.compile(made, backend="eager", fullgraph=True)

    for scale in (1, 5):

        class Scaled(Objective):
            def error(self, prediction: Tensor, target: Tensor, parameter: Tensor | None, scale: int = scale) -> Tensor:
                return scale * (prediction - target)

        register_objective("mine", replace=scale > 1)(Scaled)
        made, compiled = block()
        torch.testing.assert_close(compiled(x)[0], made(x)[0])
    stale, compiled = block()
    register_objective("mine", replace=True)(Double)
    rule_of_text.cache_clear()
    with pytest.raises(ValueError, match=r"objective: 'mine' was registered again .* build the model again"):
        compiled(x)
    stale(x)


class Gained(Retention):
    def scale(self, weights: Tensor) -> Tensor:
        return 1 / (1 + weights.square().sum((-2, -1), keepdim=True))


class Linked(Retention):
    def link(self, weights: Tensor) -> Tensor:
        return weights / (1 + weights.square().sum((-2, -1), keepdim=True))


@pytest.mark.parametrize("read", ["after", "before", "anchor"])
@pytest.mark.parametrize("kind", [Gained, Linked])
def test_weights_may_be_linked_under_decays_by_channel(kind: type[Retention], read: str) -> None:
    """Equal decays of all channels are the decay of the matrix."""

    class ByChannel(kind):  # type: ignore[misc, valid-type]
        gates = "channel"

    *given, alpha = tokens()
    channels = alpha.unsqueeze(-1).expand(*alpha.shape, 12)
    y, state = learn(*given, alpha, fresh(), chunk=4, read=read, retention=Gained())
    z, other = learn(*given, channels, fresh(), chunk=4, read=read, retention=ByChannel())
    torch.testing.assert_close((z, *other.weights), (y, *state.weights))


@pytest.mark.parametrize("order", [0, 1, 2])
def test_theta_may_multiply_the_momentum_itself(order: int) -> None:
    class Plain(Optimizer):
        scales_update = True

    class Update(Plain):
        def update(self, momentum: Tensor) -> Tensor:
            return momentum.clone()

    parts = Plain(), Update(), Optimizer()
    for part in parts:
        part.order = order
    (y, state), (z, other), (without, _) = (run(optimizer=part) for part in parts)
    torch.testing.assert_close((y, *state.weights, *state.momentum), (z, *other.weights, *other.momentum))
    assert (order == 0) == torch.allclose(y, without)


def test_overridden_methods_are_called_without_a_flag() -> None:
    class Zero(Retention):
        def project(self, u: Tensor, initial: Tensor | None) -> Tensor:
            return 0 * u

    class Dark(Retention):
        def link(self, weights: Tensor) -> Tensor:
            return 0 * weights

    class Sign(Optimizer):
        def update(self, momentum: Tensor) -> Tensor:
            return 0 * momentum

    class Refuses(Retention):
        def refuse(self, weights: Any) -> str | None:
            return "no weights fit"

    assert run(retention=Zero())[1].weights[0].abs().max() == 0
    assert run(retention=Dark())[0].abs().max() == 0
    assert torch.equal(run(optimizer=Sign(), retention="none")[1].weights[0], fresh().weights[0])
    with pytest.raises(ValueError, match="no weights fit"):
        run(retention=Refuses())


def test_a_tensor_in_an_objective_gets_its_gradient() -> None:
    p = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    y, _ = run(objective={"type": "lp", "p": p})
    torch.testing.assert_close(y, run(objective={"type": "lp", "p": 3})[0])
    (grad,) = torch.autograd.grad(y.sum(), p)
    step = 1e-6
    ends = [run(objective={"type": "lp", "p": 3 + d})[0].sum() for d in (step, -step)]
    torch.testing.assert_close(grad, (ends[0] - ends[1]) / (2 * step), rtol=1e-6, atol=0.0)


class Stranger:
    """Has the methods of every part, and is none."""

    def error(self, prediction: Tensor, target: Tensor, parameter: Tensor | None) -> Tensor:
        return prediction - target

    link = project = update = forward = width = shapes = error


class Channels(Retention):
    gates = "channels"


class Third(Optimizer):
    order = 3


class Wide(Features):
    def width(self, d_in: int) -> int:
        return d_in

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, x], -1)


class Scalar(Network):
    def forward(self, apply: Any, x: Tensor, activation: Any, matrices: int) -> Tensor:
        return apply(1, apply(0, x)).sum()

    def shapes(self, d_in: int, d_out: int, depth: int, expansion: int) -> list[tuple[int, int]]:
        return [(8, d_in), (d_out, 8)]


@pytest.mark.parametrize("kind", CATALOGUES)
def test_a_part_is_of_the_class_of_its_kind(kind: str) -> None:
    with pytest.raises(TypeError, match=f"no {kind}: it is no subclass of {CATALOGUES[kind].base.__name__}"):
        CATALOGUES[kind].register("stranger")(Stranger)
    with pytest.raises(TypeError, match=f"{kind}: expected one of"):
        run(**{kind: Stranger()})


def test_a_class_with_abstract_methods_is_refused() -> None:
    class NoShapes(Network):
        def forward(self, apply: Any, x: Tensor, activation: Any, matrices: int) -> Tensor:
            return x

    with pytest.raises(TypeError, match="it has no shapes"):
        register_network("no_shapes")(NoShapes)


@pytest.mark.parametrize(
    ("message", "settings"),
    [
        (r"chunk: expected a whole number >= 1, got 4\.0", {"chunk": 4.0}),
        (r"keys: expected a whole number >= 1, got True", {"keys": True}),
        (r"retention: gates: expected 'none', 'scalar' or 'channel', got 'channels'", {"retention": Channels()}),
        (r"optimizer: order: expected 0, 1 or 2, got 3", {"optimizer": Third()}),
        (r"features: Wide: its width is 4, but forward gives \[2, 9, 2, 8\]", {"features": Wide()}),
        (r"network Scalar: expected outputs \[\.\.\., 4\]", {"network": Scalar()}),
        (r"mask: expected a tensor, got list", {"mask": [[True]]}),
        (r"documents: expected a tensor, got list", {"documents": [[0]]}),
        (
            r"features: polynomial: coefficients: expected 3",
            {"features": {"type": "polynomial", "coefficients": [1.0]}},
        ),
        (r"coefficients: expected 3", {"features": {"type": "polynomial", "coefficients": torch.ones(2)}}),
        (r"threshold: needs weights that are sums over the writes", {"threshold": 0.1, "retention": "kl"}),
        (r"parameter of the objective: expected", {"objective": {"type": "huber", "delta": torch.ones(3)}}),
        (r"unknown network 'foo'; expected one of factorised", {"network": "foo"}),
        (r"clip: expected a norm > 0 or None, got True", {"clip": True}),
        (r"activation: expected one of gelu, identity, relu, silu, got ''", {"activation": ""}),
    ],
)
def test_refused(message: str, settings: dict[str, Any]) -> None:
    learn(*tokens(), fresh(), chunk=4)  # the same in whole numbers
    with pytest.raises((ValueError, TypeError), match=message):
        learn(*tokens(), fresh(), **{"chunk": 4, **settings})


@pytest.mark.parametrize("keys", [1, 2])
@pytest.mark.parametrize("argument", ["q", "k", "v", "theta"])
def test_a_missing_tensor_is_refused(argument: str, keys: int) -> None:
    given: dict[str, Any] = dict(zip(("q", "k", "v", "theta", "eta", "alpha"), tokens(keys)))
    given[argument] = None
    with pytest.raises(TypeError, match=f"{argument}: expected a tensor, got NoneType"):
        learn(*given.values(), fresh(), chunk=4, keys=keys)


def test_features_of_another_width_under_a_norm_are_refused_by_a_named_backend() -> None:
    gain, width = torch.ones(HEADS, DIM, dtype=torch.float64), 1 + DIM + DIM**2
    features = {"type": "polynomial", "degree": 2, "form": "tensor"}
    state = LearnerState.fresh([torch.rand(BATCH, HEADS, DIM, width, dtype=torch.float64)])
    with pytest.raises(BackendError, match="backend='reference'"):
        learn(*tokens(), state, features=features, norm=gain, backend="reference")


def test_a_state_of_another_window_or_of_other_decays_is_refused() -> None:
    state = run(window=3)[1]
    with pytest.raises(ValueError, match=r"state\.recent: expected the last 4 writes"):
        learn(*tokens(), state, chunk=4, window=5)
    moves_once: Any = dict(chunk=4, optimizer="muon", read="anchor")
    _, state = learn(*tokens(channels=12), fresh(), retention="channel", **moves_once)
    with pytest.raises(ValueError, match=r"state\.pending: expected"):
        learn(*tokens(), state, **moves_once)


STATES: dict[str, dict[str, Any]] = {
    "pending": {"optimizer": "muon", "read": "anchor"},
    "recent": {"window": 3},
    "projection": {"query": "projected"},
    "second": {"optimizer": {"type": "momentum", "order": 2}},
}


@pytest.mark.parametrize("part", STATES)
def test_a_rule_that_would_lose_a_part_of_a_state_refuses_it(part: str) -> None:
    state = run(**STATES[part])[1]
    learn(*tokens(), state, chunk=4, **STATES[part])
    for settings in ({}, *(other for name, other in STATES.items() if name != part)):
        with pytest.raises(ValueError, match=f"state: holds {part}, which this rule does not know"):
            learn(*tokens(), state, chunk=4, **settings)
    with pytest.raises(TypeError, match=f"got LearnerState: its {part} is for learn alone"):
        titans_memory(*tokens(), state, 4)  # type: ignore[arg-type]


@pytest.mark.parametrize("first", [True, False])
def test_a_window_of_another_objective_is_refused(first: bool) -> None:
    thresholds = {"objective": {"type": "huber", "delta": torch.rand(BATCH, TIME, HEADS, dtype=torch.float64)}}
    before, after = (thresholds, {}) if first else ({}, thresholds)
    _, state = run(window=3, **before)
    with pytest.raises(ValueError, match="another objective"):
        learn(*tokens(), state, chunk=4, window=3, **after)


def test_coefficients_that_a_block_is_given_are_not_learned() -> None:
    features = {"type": "polynomial", "degree": 2, "coefficients": [0.0, 2.0, 3.0]}
    given, default = (
        tb.build_block({"type": "memory", "heads": 2, "features": each}, dim=8, seed=0)
        for each in (features, "polynomial")
    )
    assert "coefficients" in dict(default.named_parameters()) and "coefficients" not in dict(given.named_parameters())
    default.coefficients.data.copy_(torch.tensor(features["coefficients"]))
    x = torch.randn(1, 6, 8)
    torch.testing.assert_close(given(x)[0], default(x)[0])


def test_parts_of_a_state_that_hold_nothing_are_not_lost() -> None:
    given = [x[:, :8] for x in tokens()]
    _, state = learn(*given, fresh(), chunk=4, **STATES["pending"])  # two whole chunks
    assert isinstance(state, LearnerState)
    y, after = learn(*tokens(), state, chunk=4)
    torch.testing.assert_close(y, titans_memory(*tokens(), state.plain(), 4)[0])
    with pytest.raises(TypeError, match=r"got LearnerState: state\.plain\(\) is one"):
        titans_memory(*tokens(), state, 4)  # type: ignore[arg-type]
    assert learn(*tokens(), after, chunk=4)[1].position.tolist() == [8 + 2 * TIME] * BATCH


def test_weights_that_another_rule_has_written_are_no_distributions() -> None:
    state = run(retention="scalar")[1]
    with pytest.raises(ValueError, match="kl keeps each row of the weights a probability distribution"):
        learn(*tokens(), state._replace(weights=tuple(-w for w in state.weights)), chunk=4, retention="kl")


def test_order_two_needs_momentum() -> None:
    q, k, v, theta, _, alpha = tokens()
    with pytest.raises(ValueError, match="optimizer: order 2 is the momentum of the momentum, and eta is None"):
        learn(q, k, v, theta, None, alpha, fresh(), chunk=4, **STATES["second"])


def test_a_module_of_another_width_is_refused() -> None:
    module = nn.Linear(DIM, DIM + 1).double()
    state = LearnerState.fresh([p.detach().expand(BATCH, HEADS, *p.shape) for p in module.parameters()])
    with pytest.raises(ValueError, match=r"network: Linear: expected outputs .*4.*, got .*5"):
        learn(*tokens(), state, chunk=4, network=module)


@pytest.mark.parametrize(
    ("field", "fields"),
    [
        ("optimizer", {"type": "delta_net", "optimizer": "momentum"}),
        ("optimizer", {"type": "memory", "momentum": False, "optimizer": {"type": "momentum", "order": 2}}),
        ("retention", {"type": "delta_net", "retention": "scalar"}),
        ("retention", {"type": "memory", "forgetting": False, "retention": "channel"}),
        ("learn_momentum", {"type": "memory", "optimizer": "step", "learn_momentum": True}),
        ("features", {"type": "memory", "features": {"type": "polynomial", "coefficients": [1.0]}}),
    ],
)
def test_fields_of_a_block_that_contradict_each_other_are_refused(field: str, fields: dict[str, Any]) -> None:
    with pytest.raises(tb.RecipeError) as caught:
        tb.build_block(fields, dim=8)
    assert [problem.path.rpartition(".")[2] for problem in caught.value.problems] == [field]


def test_learned_coefficients_do_not_outlive_a_transform() -> None:
    block = tb.build_block({"type": "memory", "heads": 2, "features": "polynomial"}, dim=8)
    x, given = torch.ones(1, 3, 8), {name: p.detach() for name, p in block.named_parameters()}
    torch.func.grad(lambda p: torch.func.functional_call(block, p, (x,))[0].sum())(given)
    copy.deepcopy(block)(x)


def test_constant_gates_keep_the_laws() -> None:
    tb.check_block({"type": "retnet", "heads": 2}, dim=8, laws=["determinism"])


class Network2(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(DIM, 3), nn.Linear(3, DIM)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.outer(torch.tanh(self.inner(x)))


@pytest.mark.parametrize("by", ["save_on_cpu", "checkpoint", pytest.param("compile", marks=pytest.mark.slow)])
@pytest.mark.parametrize("settings", [{}, {"window": 2, "retention": "none"}], ids=["sums", "window"])
def test_a_module_under_saved_tensor_hooks_checkpointing_and_compilation(by: str, settings: dict[str, Any]) -> None:
    torch.manual_seed(0)
    module = Network2().double()
    start = [p.detach().expand(BATCH, HEADS, *p.shape) for p in module.parameters()]

    def f(*given: Tensor) -> Tensor:
        return learn(*given, LearnerState.fresh(start), chunk=4, network=module, **settings)[0]

    def gradients(f: Any) -> tuple[Tensor, ...]:
        given = [x.clone().requires_grad_() for x in tokens()]
        y = f(*given)
        return (y.detach(), *torch.autograd.grad(y.square().sum(), given, materialize_grads=True))

    plain = gradients(f)
    if by == "save_on_cpu":
        with torch.autograd.graph.save_on_cpu():
            found = gradients(f)
    elif by == "checkpoint":
        found = gradients(lambda *given: checkpoint(f, *given, use_reentrant=False))
    else:
        found = gradients(torch.compile(f, backend="eager"))
    torch.testing.assert_close(found, plain)


@pytest.mark.parametrize("settings", [{"window": 2}, {"retention": "lq"}, {"optimizer": "muon"}, {"retention": "kl"}])
def test_vmap_over_a_learner(settings: dict[str, Any]) -> None:
    (q, k, v, *gates), state = tokens(), fresh()
    f = lambda v: learn(q, k, v, *gates, state, chunk=4, **settings)[0]  # noqa: E731
    together = torch.vmap(f)(torch.stack([v, 2 * v]))
    torch.testing.assert_close(together, torch.stack([f(v), f(2 * v)]))


def test_weights_of_a_window_that_depend_on_the_token_and_the_time(learn_alone: Any, given: Any) -> None:
    """Equation 9 of ATLAS with ``gamma_i^(t)``, one matrix and gradients at the weights before each token."""
    gamma = torch.rand(*given.theta.shape, 3, dtype=given.theta.dtype)
    weights = given.weights(4, 4)
    got = learn_alone(
        given.q, given.k, given.v, given.theta, None, 1 - given.keep, weights, chunk=1, network="linear", window=3,
        optimizer="step", gamma=gamma,
    )  # fmt: skip
    w, outputs, each = weights[0], [], lambda x: x[..., None, None]
    for t in range(given.q.shape[1]):
        step = torch.zeros_like(w)
        for back in range(min(3, t + 1)):
            k, v = given.k[:, t - back], given.v[:, t - back]
            error = torch.einsum("bhoi,bhi->bho", w, k) - v
            step = step + each(gamma[:, t, :, back]) * 2 * error.unsqueeze(-1) * k.unsqueeze(-2)
        w = each(given.keep[:, t]) * w - each(given.theta[:, t]) * step
        outputs.append(torch.einsum("bhoi,bhi->bho", w, given.q[:, t]))
    torch.testing.assert_close(got[:2], (torch.stack(outputs, 1), (w,)))


def test_lact(learn_alone: Any, given: Any, published: Any) -> None:
    weights = given.gated(6)
    rates = torch.stack([given.theta, given.theta.flip(1), 0.5 * given.theta.square()], -1)
    got = learn_alone(
        given.q, given.k, given.v, rates, given.eta, None, weights, chunk=4, network="gated_mlp", steps="each",
        activation="silu", objective="dot", optimizer={"type": "muon", "coefficients": "lact"}, retention="rows",
        read="anchor",
    )  # fmt: skip
    y, (last, momentum) = published.lact(given.q, given.k, given.v, rates, given.eta, weights, 4)
    torch.testing.assert_close(got, (y, tuple(last), tuple(momentum)))


@pytest.mark.parametrize(
    "settings", [{"window": 2}, {"optimizer": {"type": "muon", "scale": "update"}}, {"keys": 2}], ids=str
)
def test_step_sizes_of_each_matrix_need_one_write_a_step(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="steps: a step size for each matrix needs"):
        run(steps="each", **settings)


@pytest.mark.parametrize("settings", [{"optimizer": "muon"}, {"retention": "lq"}, {"window": 2}, {"network": "slots"}])
def test_results_need_no_gradients_where_no_input_does(settings: dict[str, Any]) -> None:
    q, k, v, *gates = tokens()
    state = LearnerState.fresh(torch.randn(BATCH, HEADS, DIM, DIM, dtype=torch.float64) for _ in range(2))
    settings = {"network": "mlp", "chunk": 4, "backend": "general", **settings}
    y, after = learn(q, k, v, *gates, state, **settings)
    assert not y.requires_grad and not any(w.requires_grad for w in after.weights)
    assert learn(q.requires_grad_(), k, v, *gates, state, **settings)[0].requires_grad


def test_weights_of_a_windows_places_with_several_keys() -> None:
    q, k, v, theta, eta, alpha = tokens(keys=2)
    gamma = torch.rand(BATCH, TIME, 2, HEADS, 3, dtype=torch.float64)
    state = LearnerState.fresh([torch.randn(BATCH, HEADS, DIM, DIM, dtype=torch.float64)])

    def outputs(gamma: Tensor) -> Tensor:
        settings: dict[str, Any] = {"network": "linear", "keys": 2, "window": 3, "chunk": 4}
        return learn(q, k, v, theta, eta, alpha, state, gamma=gamma, **settings)[0]

    torch.testing.assert_close(outputs(gamma), outputs(gamma.flatten(1, 2)), rtol=0, atol=0)
    same = gamma[:, :, :1].expand_as(gamma)
    torch.testing.assert_close(outputs(same), outputs(same[:, :, 0]), rtol=0, atol=0)


@pytest.mark.parametrize("q", [3.0, 4.0, 16.0])
def test_a_forgotten_matrix_under_its_lq_norm_stays_finite(q: float) -> None:
    """A repeated token has no error, so that the matrix decays, and ``a / |a|^2`` grows as ``1 / |a|``."""
    for size in (1.0, 1e-6, 1e-12, 1e-21, 1e-40):
        state = LearnerState.fresh(size * torch.randn(BATCH, HEADS, DIM, DIM) for _ in range(2))
        given = [x.float() for x in tokens()]
        norm = torch.ones(HEADS, DIM)
        y, _ = learn(*given, state, norm=norm, chunk=4, network="mlp", retention={"type": "lq", "q": q})
        assert y.isfinite().all()
