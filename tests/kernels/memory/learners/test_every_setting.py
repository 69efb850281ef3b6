"""``learn`` against the recurrence as a loop, for every part: outputs, final state, gradients, splits and documents."""

from __future__ import annotations

import importlib.util
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import titans_build as tb
from titans_build.kernels.cpu_runtime import library
from titans_build.kernels.dispatch import BackendError
from titans_build.kernels.memory import MEMORY, LearnerState, learn
from titans_build.kernels.memory.learner import rows

TIME, WIDTH, CHUNK = 10, 3, 4
UNBUILT = library.refuse(device="cpu", dtype=torch.float64)
BACKENDS = ["auto", "general", *[name for name in MEMORY.backends if not name.startswith("triton")]]


class TwoLayers(nn.Module):
    """A user's network: its parameters are biased, which those of the named networks are not."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(WIDTH, 4), nn.Linear(4, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(x)))


MLP: Any = lambda given: given.weights(WIDTH, 5, WIDTH)  # noqa: E731
LINEAR: Any = lambda given: given.weights(WIDTH, WIDTH)  # noqa: E731
SIMPLEX: Any = lambda given: given.simplex(given.weights(WIDTH, 5, WIDTH))  # noqa: E731
GATED: Any = lambda given: given.gated(5)  # noqa: E731


def case(weights: Any = MLP, scale: float = 1.0, gates: str = "theta eta alpha", **options: Any) -> Any:
    return weights, scale, gates.split(), options


def muon(**fields: Any) -> dict[str, Any]:
    return {"type": "muon", "steps": 3, **fields}


SETTINGS: dict[str, Any] = {
    # networks
    "linear": case(LINEAR, network="linear"),
    "mlp": case(),
    "mlp with norm": case(norm=True),
    "three layers": case(lambda given: given.weights(WIDTH, 4, 5, WIDTH), activation="silu"),
    "gated_mlp": case(GATED, network="gated_mlp", activation="silu", norm=True),
    "factorised": case(lambda given: given.weights(WIDTH, 2, 4, 2, WIDTH), network="factorised"),
    "slots": case(network="slots"),
    "a module": case(
        lambda given: (given.normal(2, 2, 4, WIDTH), given.normal(2, 2, 4), given.normal(2, 2, WIDTH, 4)),
        network=TwoLayers(),
    ),
    # objectives
    "l2_half": case(objective="l2_half"),
    "dot": case(objective="dot", norm=True),
    "lp": case(objective={"type": "lp", "p": 3}, scale=0.2),
    "lp with tanh": case(objective={"type": "lp", "p": 1, "smooth": 2.0}),
    "huber": case(objective={"type": "huber", "delta": 1.5}, norm=True),
    "huber for each token": case(objective={"type": "huber", "delta": "tensor"}),
    "huber elementwise": case(objective={"type": "huber", "delta": 0.7, "form": "elementwise"}),
    # the order of reads
    "read before": case(read="before"),
    "read at the anchor": case(read="anchor"),
    # optimizers
    "step": case(optimizer="step"),
    "no momentum": case(gates="theta alpha"),
    "order 2": case(optimizer={"type": "momentum", "order": 2}, scale=0.3),
    "muon": case(optimizer=muon()),
    "muon without momentum": case(optimizer=muon(), gates="some alpha"),  # its derivative at a step of 0 is near 1e9
    "muon of updates": case(optimizer=muon(scale="update"), norm=True),
    "muon read before": case(optimizer=muon(scale="update"), read="before"),
    "muon once a chunk": case(GATED, network="gated_mlp", optimizer=muon(), read="anchor"),
    "muon of updates once a chunk": case(optimizer=muon(scale="update"), read="anchor", norm=True),
    "muon of channels once a chunk": case(optimizer=muon(), retention="channel", read="anchor"),
    # retention
    "nothing forgotten": case(retention="none", gates="theta eta"),
    "channel": case(retention="channel", norm=True),
    "channel and window, read before": case(
        retention="channel", window=3, read="before", gates="theta eta alpha gamma", activation="silu", scale=0.5,
    ),
    "channel and clip, read at the anchor": case(retention="channel", clip=0.8, read="anchor", gates="theta alpha"),
    "decay first": case(LINEAR, network="linear", chunk=1, retention={"type": "scalar", "first": True}),
    "decay of channels first": case(chunk=1, retention={"type": "channel", "first": True}, norm=True),
    "decay first, two keys": case(chunk=1, keys=2, retention={"type": "scalar", "first": True}, gates="theta alpha"),
    "the delta rule": case(LINEAR, network="linear", chunk=1, gates="theta"),
    "kl": case(SIMPLEX, retention="kl", optimizer="step"),
    "kl with momentum": case(SIMPLEX, retention="kl", norm=True),
    "lq": case(retention={"type": "lq", "q": 4}, optimizer="step", norm=True),
    "lq read before": case(retention={"type": "lq", "q": 4}, read="before", scale=0.3),
    "lq with momentum": case(retention={"type": "lq", "q": 3}, scale=0.3),
    "rows": case(retention="rows"),
    "rows once a chunk": case(retention="rows", read="anchor", gates="theta eta"),
    "soft_threshold": case(retention={"type": "soft_threshold", "by": 0.02}),
    "soft_threshold once a chunk": case(retention={"type": "soft_threshold", "by": 0.02}, read="anchor"),
    # windows and features
    "window": case(window=3, gates="theta eta alpha gamma", norm=True, scale=0.5),
    "window read before": case(window=2, read="before", gates="theta alpha", activation="relu"),
    "window read at the anchor": case(GATED, network="gated_mlp", window=3, read="anchor", scale=0.5),
    "window of huber for each token": case(
        objective={"type": "huber", "delta": "tensor"}, window=3, gates="theta eta alpha gamma", norm=True, scale=0.5,
    ),
    "window longer than a chunk": case(window=6, gates="theta eta alpha", scale=0.3),
    "window and muon": case(window=3, gates="theta eta alpha gamma", optimizer=muon(scale="update")),
    "gamma alone": case(gates="theta eta alpha gamma"),
    "powers": case(features={"type": "polynomial", "degree": 3}, norm=True, scale=0.5),
    "powers of dot": case(features={"type": "polynomial", "degree": 2}, norm=True, objective="dot", window=2),
    "tensor powers": case(
        lambda given: given.weights(1 + WIDTH + WIDTH**2, 5, WIDTH), scale=0.3,
        features={"type": "polynomial", "degree": 2, "form": "tensor"},
    ),
    "tensor powers with coefficients": case(
        lambda given: given.weights(1 + WIDTH + WIDTH**2, WIDTH), network="linear", scale=0.3,
        features={"type": "polynomial", "degree": 2, "form": "tensor", "coefficients": [0.5, 1.0, 0.3]},
    ),
    # several writes for each token
    "two keys": case(keys=2, chunk=1),
    "two keys, one step": case(keys=2, chunk=4, gates="one eta alpha"),
    "three keys in a window": case(keys=3, chunk=3, window=4, scale=0.3),
    "two keys read before": case(keys=2, read="before"),
    "two keys once a chunk": case(keys=2, read="anchor", optimizer=muon()),
    # reset and projected queries
    "reset": case(reset=4, chunk=2, norm=True),
    "reset and window": case(reset=4, window=3, chunk=2, scale=0.5),
    "reset once a chunk": case(reset=4, chunk=2, optimizer=muon(), read="anchor"),
    "projected": case(query="projected", norm=True),
    "projected and reset": case(query="projected", reset=4, chunk=2),
    "projected, read before": case(query="projected", read="before"),
    "projected, two keys": case(query="projected", keys=2, chunk=2),
    # bounds
    "clip": case(clip=0.8, norm=True),
    "clip and window": case(clip=0.8, window=3, gates="theta eta alpha gamma"),
    "clip and gated_mlp": case(GATED, network="gated_mlp", clip=0.8, read="before"),
    "threshold": case(threshold=3.0),
    "threshold under lq": case(threshold=3.0, retention={"type": "lq", "q": 4}),
}  # fmt: skip
SUMS = (
    "gated_mlp", "clip and gated_mlp", "huber for each token", "window", "window longer than a chunk", "powers",
    "window read before", "window read at the anchor", "window of huber for each token", "clip and window",
    "three keys in a window", "channel", "channel and window, read before", "channel and clip, read at the anchor",
)  # fmt: skip
"""Some settings that the C kernel takes, and batched products, in PyTorch and in the precision of a GPU."""
QUICK = ("clip and gated_mlp", "window of huber for each token", "channel and window, read before")
"""Those of them that Triton's interpreter runs every day: it takes seconds for each."""
IN_PRODUCTS = ["torch", *(["triton_batched"] if importlib.util.find_spec("triton") else [])]
IN_KERNELS = ["triton"] if importlib.util.find_spec("triton") else []


class Case:
    """One setting with inputs that record what is done to them."""

    def __init__(self, make: Any, name: str, mask: bool = True, time: int = TIME) -> None:
        weights, scale, gates, options = SETTINGS[name]
        given = make(time=time, width=WIDTH)
        self.options = {"chunk": CHUNK, "network": "mlp", **options}
        self.keys = self.options.get("keys", 1)
        self.weights = weights(given)
        k, v, theta = given.k, given.v, scale * given.theta
        if self.keys > 1:
            k, v = given.normal(2, 2, time, self.keys, 2, WIDTH)
            k, theta = k / k.norm(dim=-1, keepdim=True), scale * 0.3 * given.uniform(2, time, self.keys, 2)
        if "one" in gates:
            theta = theta[:, :, 0]
        if "some" in gates:
            theta = theta + 0.05
        alpha = 1 - given.keep
        retention = self.options.get("retention")
        if "channel" in (retention, retention["type"] if isinstance(retention, dict) else None):
            alpha = 0.5 * given.uniform(2, time, 2, sum(w.shape[-1] for w in self.weights))
        self.inputs: dict[str, Any] = dict(q=given.q, k=k, v=v, theta=theta, eta=given.eta, alpha=alpha)
        self.inputs |= {gate: None for gate in ("eta", "alpha") if gate not in gates}
        if "gamma" in gates:
            self.inputs["gamma"] = given.gamma
        if isinstance(objective := self.options.get("objective"), dict) and objective.get("delta") == "tensor":
            self.inputs["delta"] = 1 + given.uniform(2, time, 2)
        if self.options.pop("norm", False):
            self.options["norm"] = given.gain
        if mask:
            hidden = torch.zeros(2, time, dtype=torch.bool)
            hidden[0, 2] = hidden[1, 4] = True
            self.inputs["mask"] = ~hidden
        self.leaves = [x for x in self.inputs.values() if x is not None and x.is_floating_point()]
        self.leaves += [*self.weights, *([self.options["norm"]] if "norm" in self.options else [])]
        for leaf in self.leaves:
            leaf.requires_grad_()

    def arguments(self, span: slice = slice(None)) -> tuple[list[Any], dict[str, Any]]:
        given = {name: None if x is None else x[:, span] for name, x in self.inputs.items()}
        options = dict(self.options)
        if "delta" in given:
            options["objective"] = options["objective"] | {"delta": given.pop("delta")}
        tokens = [given.pop(name) for name in ("q", "k", "v", "theta", "eta", "alpha")]
        return tokens, {**options, **given}

    def learn(self, state: Any = None, span: slice = slice(None), **more: Any) -> tuple[Tensor, Any]:
        tokens, options = self.arguments(span)
        return learn(*tokens, LearnerState.fresh(self.weights) if state is None else state, **options, **more)

    def loop(self, general: Any, **more: Any) -> list[Any]:
        tokens, options = self.arguments()
        y, rows = general.learn_loop(*tokens, self.weights, **options, **more)
        weights, momentum, anchor, position = general.fields(rows, self.options["chunk"], self.keys)
        return [y, *weights, *(momentum if self.has_momentum else ()), *anchor, position]

    @property
    def has_momentum(self) -> bool:
        """Whether the momentum is anything; the state may leave it out otherwise."""
        return self.inputs["eta"] is not None and self.options.get("optimizer") != "step"

    def tensors(self, result: tuple[Tensor, Any]) -> list[Any]:
        y, state = result
        momentum = (*state.momentum, *state.second) if self.has_momentum else ()
        return [y, *state.weights, *momentum, *state.anchor, state.position]

    def gradients(self, tensors: list[Tensor]) -> list[Tensor]:
        random = torch.Generator().manual_seed(1)
        total = sum((x * torch.randn(x.shape, generator=random, dtype=x.dtype)).sum() for x in tensors[:-1])
        found = torch.autograd.grad(total, self.leaves, allow_unused=True)
        return [torch.zeros_like(x) if g is None else g for g, x in zip(found, self.leaves)]


def same(got: list[Tensor], expected: list[Tensor], tolerance: float = 1e-10) -> None:
    for a, b in zip(got, expected, strict=True):
        assert a.shape == b.shape
        scale = max(1.0, b.abs().max().item())
        torch.testing.assert_close(a / scale, b / scale, rtol=0, atol=tolerance)


@pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")
@pytest.mark.parametrize("name", SETTINGS)
def test_outputs_state_and_gradients(name, make, general):
    """On every backend that takes the setting, which the general one always does."""
    case = Case(make, name)
    expected = case.loop(general)
    gradients = case.gradients(expected)
    taken = ["auto", "general"]
    if name in SUMS:
        taken += ["closed_form", "reference", "torch", *(["native"] if UNBUILT is None else [])]
    for backend in {*BACKENDS, *taken}:
        try:
            got = case.tensors(case.learn(backend=backend))
        except BackendError:
            assert backend not in taken
            continue
        same(got, expected)
        same(case.gradients(got), gradients)


@pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")
@pytest.mark.parametrize("name", [
    name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in SUMS
])  # fmt: skip
def test_batched_products_on_a_gpu(name, make, general):
    pytest.importorskip("triton")
    case = Case(make, name, time=6 if name in QUICK else TIME)
    expected = case.loop(general)
    gradients = case.gradients(expected)
    for backend in ("triton_batched", *(IN_KERNELS if name.startswith("channel") else [])):
        got = case.tensors(case.learn(backend=backend))
        same(got, expected)
        same(case.gradients(got), gradients)


@pytest.mark.parametrize("query", [None, "projected"])
@pytest.mark.parametrize("backend", ["native", "torch"])
def test_backends_take_resets_of_masked_rows_at_different_places(make, backend, query):
    """The stretches between resets are rows, so that no mask and no place needs the general path."""
    given = make(time=24, width=16)
    inputs = [x.float() for x in (given.q, given.k, given.v, given.theta, given.eta, 1 - given.keep)]
    start, mask = (
        LearnerState.fresh([w.float() for w in given.weights(16, 32, 16)]),
        torch.ones(2, 24, dtype=torch.bool),
    )
    mask[0, :5] = mask[1, 7:9] = mask[1, 20:22] = False
    options = dict(chunk=2, reset=4, query=query)
    with torch.no_grad():
        y, state, cut = [], start, 11  # rows are at different places where the second call begins
        for span in (slice(cut), slice(cut, 24)):
            part, state = learn(*[x[:, span] for x in inputs], state, mask=mask[:, span], backend=backend, **options)
            y.append(part)
        assert state.position.tolist() == [19, 20]
        for row in range(2):
            one = start.rows(lambda x, row=row: x[row : row + 1])
            for token in mask[row].nonzero().flatten().tolist():
                now = [x[row : row + 1, token : token + 1] for x in inputs]
                expected, one = learn(*now, one, backend="general", **options)
                torch.testing.assert_close(torch.cat(y, 1)[row, token], expected[0, 0], rtol=0, atol=1e-5)
            for a, b in zip(state.weights, one.weights):
                torch.testing.assert_close(a[row], b[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("chunk", [5, 37])
@pytest.mark.parametrize("name", [
    "window", "window read before", "window of huber for each token", "clip and gated_mlp", "window read at the anchor",
    "channel", "channel and window, read before", "channel and clip, read at the anchor",
])  # fmt: skip
def test_long_chunks_and_windows(name, chunk, make):
    """With more tokens than a backend takes together, saved states, and a state to go on from."""
    case = Case(make, name, time=75)
    case.options |= {"chunk": chunk} | ({"window": 20} if "window" in case.options else {})
    with torch.no_grad():
        case.inputs["theta"] *= 0.1  # the sum of many gradients would grow without bound
    gain = case.options.pop("norm", None)  # a norm of few numbers makes long sequences chaotic
    case.leaves = [x for x in case.leaves if x is not gain]
    found = []
    backends = ["torch", *(["native"] if UNBUILT is None else [])]
    for backend, keep in (("general", None), *((name, keep) for name in backends for keep in (1, 3))):
        y, state = case.learn(span=slice(0, 22), backend=backend, keep=keep)
        z, state = case.learn(state, slice(22, 75), backend=backend, keep=keep)
        tensors = case.tensors((torch.cat([y, z], 1), state))
        found.append((tensors, case.gradients(tensors)))
    for tensors, gradients in found[1:]:
        same(tensors, found[0][0])
        same(gradients, found[0][1], 1e-9)


@pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")
@pytest.mark.parametrize("field", ["q", "k", "v", "theta"])
@pytest.mark.parametrize("name", [
    "window read before", "clip and gated_mlp", "channel and window, read before", "projected, read before",
    "two keys read before", "lq read before",
])  # fmt: skip
@torch.no_grad()
def test_nan_reaches_no_earlier_token_and_no_other_row(name, field, make, monkeypatch):
    """Nor the token itself, where it is read before it is written."""
    case = Case(make, name)
    before = case.learn()[0]
    case.inputs[field][0, 5] = float("nan")
    reads = field == "q" or (field == "k" and "query" in case.options)  # the token's key is in its query, too
    stop = 5 if reads else 6
    assert case.options["read"] == "before"
    confined = [*IN_PRODUCTS, *(IN_KERNELS if name.startswith("channel") else [])]
    for backend in ("auto", "general", *confined):
        if backend in confined:  # which see to it themselves, as on a GPU
            monkeypatch.setattr(rows, "sum_is_finite", lambda *tensors: True)
        try:
            y = case.learn(backend=backend)[0]
        except BackendError:
            assert name == "lq read before" and backend in confined
            continue
        same([y[0, :stop], y[1]], [before[0, :stop], before[1]])
        after = y[0, 6:].isnan()
        assert not after.any() if field == "q" else after.all()


@pytest.mark.slow
def test_resets_in_a_compiled_block():
    block = tb.build_block({"type": "memory", "chunk": 4, "reset": 8, "heads": 2}, dim=16)
    x, mask = torch.randn(2, 20, 16), torch.ones(2, 20, dtype=torch.bool)
    mask[0, 3:6] = False
    compiled = torch.compile(block, backend="eager")
    for given in (None, mask):
        assert torch.equal(compiled(x, mask=given)[0], block(x, mask=given)[0])


@pytest.mark.parametrize("name", SETTINGS)
def test_a_split_sequence_is_the_whole(name, make):
    case = Case(make, name)
    with torch.no_grad():
        whole = case.tensors(case.learn())
        cuts, state, outputs = (0, 1, 4, 6, 7, TIME), None, []  # one token, a whole chunk, and parts of chunks
        for begin, end in pairwise(cuts):
            y, state = case.learn(state, slice(begin, end))
            outputs.append(y)
        same(case.tensors((torch.cat(outputs, 1), state)), whole)


@pytest.mark.parametrize("name", SETTINGS)
def test_documents_are_rows_of_their_own(name, make, general):
    case = Case(make, name)
    documents = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1, 2], [3, 3, 5, 5, 5, 5, 5, 5, 5, 5]])
    with torch.no_grad():
        same(case.tensors(case.learn(documents=documents)), case.loop(general, documents=documents))


@pytest.mark.parametrize("name", SETTINGS)
def test_a_step_of_zero_leaves_the_state(name, make):
    case = Case(make, name, mask=False, time=2 * CHUNK)
    case.inputs["theta"] = torch.zeros_like(case.inputs["theta"])
    case.inputs["alpha"] = None if case.inputs["alpha"] is None else torch.zeros_like(case.inputs["alpha"])
    retention = case.options.get("retention")
    if isinstance(retention, dict) and retention["type"] == "soft_threshold":
        case.options["retention"] = retention | {"by": 0.0}
    with torch.no_grad():
        _, state = case.learn()
    same(list(state.weights), list(case.weights), 1e-14)
    update = isinstance(case.options.get("optimizer"), dict) and case.options["optimizer"].get("scale") == "update"
    for momentum in () if update else (*state.momentum, *state.second):  # which has the gradients without their steps
        assert not momentum.any()


@pytest.mark.parametrize(
    "name",
    ["mlp with norm", "window", "channel", "clip and gated_mlp", "kl with momentum", "muon once a chunk", "projected"],
)
def test_second_derivatives(name, make, general):
    case = Case(make, name, time=6)
    found = []
    for tensors in (case.tensors(case.learn()), case.loop(general)):
        total = sum(x.square().sum() for x in tensors[:-1])
        first = torch.autograd.grad(total, case.leaves, create_graph=True, allow_unused=True)
        total = sum(g.square().sum() for g in first if g is not None)
        found.append([g for g in torch.autograd.grad(total, case.leaves, allow_unused=True) if g is not None])
    same(*found, 1e-9)


def test_a_second_call_with_documents_goes_on(make, general):
    case = Case(make, "window", mask=False)
    documents = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1, 2], [3, 3, 5, 5, 5, 5, 5, 5, 5, 5]])
    with torch.no_grad():
        y, state = case.learn(span=slice(0, 5), documents=documents[:, :5])
        z, state = case.learn(state, slice(5, TIME), documents=documents[:, 5:])
        same(case.tensors((torch.cat([y, z], 1), state)), case.loop(general, documents=documents))


def test_keys_may_follow_each_other_in_time(make):
    case = Case(make, "two keys")
    with torch.no_grad():
        expected = case.tensors(case.learn())
        tokens, options = case.arguments()
        flat = [x.flatten(1, 2) if i in (1, 2, 3) else x for i, x in enumerate(tokens)]
        same(case.tensors(learn(*flat, LearnerState.fresh(case.weights), **options)), expected)


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("name", SETTINGS)
def test_a_batch_may_have_no_rows(name, mask, make):
    case = Case(make, name, mask)
    case.inputs = {key: None if x is None else x[:0] for key, x in case.inputs.items()}
    case.weights = [weights[:0] for weights in case.weights]
    y, state = case.learn()
    y, state = case.learn(state)
    assert y.shape == case.inputs["q"].shape and state.position.shape == (0,)
