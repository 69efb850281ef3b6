"""The memory operation against both references, its laws of state, and its refusals."""

import itertools

import pytest
import torch

from titans_build.kernels.cpu_runtime import library
from titans_build.kernels.dispatch import BackendError
from titans_build.kernels.memory import MemoryState, titans_memory

UNBUILT = library.refuse(device="cpu", dtype=torch.float64)


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
@pytest.mark.parametrize("activation", ["identity", "silu", "gelu", "relu"])
@pytest.mark.parametrize("norm", [True, False])
def test_depths_and_activations(memory_case, depth, activation, norm):
    memory_case(depth=depth, norm=norm, scale=0.4, step=0.05).assert_agrees(chunk=5, activation=activation)


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 16, 64])
@pytest.mark.parametrize("time", [1, 13, 70])
@pytest.mark.parametrize("norm", [True, False])
def test_chunks_and_lengths(memory_case, chunk, time, norm):
    # LayerNorm of an erased memory divides by sqrt(eps), and 70 steps of that amplify rounding: forget little here
    case = memory_case(time=time, d_in=6, d_out=6, norm=norm, scale=0.7, step=0.01, forget=0.05)
    case.assert_agrees(chunk=chunk, activation="silu")


@pytest.mark.parametrize("momentum,forgetting", list(itertools.product([True, False], repeat=2)))
@pytest.mark.parametrize("read", ["after", "before"])
def test_gates_off_and_reading_before(memory_case, momentum, forgetting, read):
    memory_case(momentum=momentum, forgetting=forgetting, step=0.05).assert_agrees(chunk=4, read=read)


@pytest.mark.parametrize("clip", [0.3, 2.0])
@pytest.mark.parametrize("norm", [True, False])
def test_clipping(memory_case, clip, norm):
    memory_case(norm=norm).assert_agrees(chunk=5, clip=clip)


@pytest.mark.parametrize("backend", ["auto", "torch", "closed_form", "reference"])
def test_clipping_a_gradient_of_nothing(backend):
    """Every unit of the hidden layer is dead, so the surprise is 0, where its length has no derivative."""
    random = torch.Generator().manual_seed(0)
    dead, out = -torch.ones(1, 1, 4, 4, dtype=torch.float64), torch.zeros(1, 1, 4, 4, dtype=torch.float64)
    k = torch.rand(1, 3, 1, 4, dtype=torch.float64, generator=random).requires_grad_()
    size = torch.full((1, 3, 1), 0.1, dtype=torch.float64)
    options = dict(activation="relu", norm=torch.ones(1, 4, dtype=torch.float64), clip=1.0, backend=backend)
    y, _ = titans_memory(k, k, k, size, size, size, MemoryState.fresh((dead, out)), **options)
    y.sum().backward()
    assert k.grad.isfinite().all() and torch.equal(k.grad, torch.ones_like(k))


def test_clipping_binds_on_some_tokens_only(memory_case):
    case = memory_case()
    free, bound, tight = (case.run(chunk=5, clip=c)[0] for c in (None, 2.0, 0.3))
    assert not torch.equal(free, bound) and not torch.equal(bound, tight)
    assert torch.equal(case.run(chunk=5, clip=1e9)[0], free)


def test_unequal_widths(memory_case):
    memory_case(d_in=3, d_out=5, norm=False, step=0.05).assert_agrees(chunk=4)


@pytest.mark.parametrize("keep", [None, 1, 2, 3, 8, 100])
@pytest.mark.parametrize("backend", ["native", "torch"])
def test_what_is_kept_does_not_change_gradients(memory_case, keep, backend):
    case = memory_case(time=23, step=0.05)
    case.assert_equal(
        case.gradients(case.tensors(case.run(chunk=2, keep=keep, backend=backend))),
        case.gradients(case.tensors(case.run(chunk=2, backend="reference"))),
        1e-9,
    )


@pytest.mark.parametrize("chunk", [1, 4, 16])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("clip", [None, 0.5])
def test_rows_at_different_positions_and_masks(memory_case, chunk, masked, clip):
    mask = None
    if masked:
        torch.manual_seed(3)
        mask = torch.rand(4, 19) > 0.4
        mask[1] = False
        mask[2, :7] = False
        mask[3, 9:] = False
    case = memory_case(batch=4, time=19, phases=[3, 0, 7, 2 * chunk], mask=mask, scale=0.3, step=0.02)
    case.state.anchor[0].data[3] = case.state.weights[0].data[3]
    case.state.anchor[1].data[3] = case.state.weights[1].data[3]
    if chunk == 1:
        case.state = case.state._replace(anchor=case.state.weights)
        case.leaves = case.leaves[:-2]
    case.assert_agrees(chunk=chunk, clip=clip)


@pytest.mark.parametrize("read_state", [False, True])
@pytest.mark.parametrize("momentum", ["zero", "learned", "none"])
@pytest.mark.parametrize("ends", [None, [], [1], [2, 0]])
def test_the_states_of_some_rows_without_initial_momentum(memory_case, ends, momentum, read_state):
    mask = torch.arange(13) < torch.tensor([[5], [13], [8], [0]])
    case = memory_case(batch=4, time=13, phases=[0, 3, 0, 0], mask=mask, momentum=momentum != "none", step=0.05)
    state = case.state
    if momentum == "zero":
        case.leaves = [x for x in case.leaves if all(x is not part for part in state.momentum)]
    if momentum != "none":
        zero = tuple(torch.zeros_like(x).requires_grad_(momentum == "learned") for x in state.momentum)
        case.leaves += zero if momentum == "learned" else ()
        state = state._replace(momentum=zero)

    def run(backend, ends):
        y, after = case.run(state, chunk=4, clip=1.0, backend=backend, ends=ends)
        return case.tensors((y, after)), after.position

    expected, position = run("reference", None)
    if ends is not None:
        expected, position = [expected[0], *(x[ends] for x in expected[1:])], position[ends]
    used = slice(None if read_state else 1)
    gradients = case.gradients(expected[used])
    for backend in ("torch", *(["native"] if UNBUILT is None else [])):
        got, after = run(backend, ends)
        assert torch.equal(after, position)
        case.assert_equal(got, expected)
        case.assert_equal(case.gradients(got[used]), gradients)


@pytest.mark.parametrize("cuts", [(1, 4, 9), (5, 10), (7,), (2, 3, 4, 5, 13)])
@pytest.mark.parametrize("backend", ["native", "torch"])
def test_any_split_is_the_whole(memory_case, cuts, backend):
    case = memory_case(step=0.05)
    whole = case.tensors(case.run(chunk=5, backend=backend))
    state, outputs = None, []
    for start, stop in zip((0, *cuts), (*cuts, 14)):
        y, state = case.run(state, slice(start, stop), chunk=5, backend=backend)
        outputs.append(y)
    pieces = case.tensors((torch.cat(outputs, 1), state))
    case.assert_equal(pieces, whole)
    case.assert_equal(case.gradients(pieces), case.gradients(whole))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("options", [{}, {"clip": 0.5}, {"read": "before"}])
@pytest.mark.parametrize("flags", [{}, {"momentum": False}, {"forgetting": False}, {"norm": False}])
def test_step_is_the_recurrence(memory_case, masked, options, flags):
    mask = torch.rand(3, 11, generator=torch.Generator().manual_seed(0)) > 0.3 if masked else None
    case = memory_case(batch=3, time=11, phases=[1, 0, 2], mask=mask, step=0.05, **flags)
    with torch.no_grad():
        whole = case.run(chunk=4, backend="reference", **options)
        state, outputs = case.state, []
        for t in range(11):
            y, state = case.run(state, slice(t, t + 1), chunk=4, backend="step", **options)
            outputs.append(y)
    case.assert_equal(case.tensors((torch.cat(outputs, 1), state)), case.tensors(whole))
    assert torch.equal(state.position, whole[1].position)


@pytest.mark.parametrize("options", [{}, {"clip": 0.7, "read": "before"}, {"norm": False}])
@pytest.mark.parametrize("backend", ["native", "torch"])
def test_gradcheck(memory_case, options, backend):
    norm = options.get("norm", True)
    options = {name: value for name, value in options.items() if name != "norm"}
    case = memory_case(batch=1, time=7, heads=1, d_in=2, d_out=2, norm=norm, step=0.05)
    names = ["q", "k", "v", "theta", "eta", "alpha"]

    def run(*leaves):
        values = dict(zip(names, leaves))
        rest = list(leaves[len(names) :])
        gain = rest.pop(0) if norm else None
        state = case.state._replace(weights=tuple(rest[:2]), momentum=tuple(rest[2:]), anchor=tuple(rest[:2]))
        y, end = titans_memory(*(values[n] for n in names), state, chunk=3, norm=gain, backend=backend, **options)
        return (y, *end.weights, *end.momentum)

    # a gate at its end point has no two-sided difference inside [0, 1], but the operation is smooth through it
    assert torch.autograd.gradcheck(run, case.leaves, atol=1e-6, rtol=1e-4)


def test_gates_at_their_end_points(memory_case):
    case = memory_case(time=6, step=0.05)
    with torch.no_grad():
        wiped = case.alpha.clone()
        wiped[:, 2] = 1
        eta = case.eta.clone()
        eta[:, 2] = 0
        theta = case.theta.clone()
        theta[:, 2] = 0
        _, state = titans_memory(
            *(x[:, :3] for x in (case.q, case.k, case.v, theta, eta, wiped)), case.state, chunk=4, norm=case.norm
        )
        assert all(torch.equal(w, torch.zeros_like(w)) for w in (*state.weights, *state.momentum))
        still = titans_memory(
            case.q, case.k, case.v, torch.zeros_like(theta), torch.ones_like(eta), None,
            MemoryState.fresh(case.state.weights), chunk=4, norm=case.norm,
        )[1]  # fmt: skip
        assert all(torch.equal(a, b) for a, b in zip(still.weights, case.state.weights))


def test_inputs_are_never_modified(memory_case):
    case = memory_case(phases=[3, 0])
    before = [x.detach().clone() for x in case.leaves]
    case.tensors(case.run(chunk=4))
    case.gradients(case.tensors(case.run(chunk=4)))
    with torch.no_grad():
        case.run(tokens=slice(0, 1), chunk=4)
    assert all(torch.equal(a, b) for a, b in zip(before, case.leaves))


@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)])
def test_narrow_inputs_keep_a_wide_state(memory_case, dtype, tolerance):
    case = memory_case(time=40, d_in=8, d_out=8, step=0.02, scale=0.3)
    with torch.no_grad():
        narrow = [x.to(dtype) for x in (case.q, case.k, case.v, case.theta, case.eta, case.alpha)]
        weights = tuple(w.float() for w in case.state.weights)
        y, state = titans_memory(*narrow, MemoryState.fresh(weights), chunk=8, norm=case.norm.to(dtype))
        exact, _ = titans_memory(
            *(x.double() for x in narrow), MemoryState.fresh(tuple(w.double() for w in weights)), chunk=8,
            norm=case.norm.to(dtype).double(), backend="reference",
        )  # fmt: skip
    assert y.dtype == dtype and all(w.dtype == torch.float32 for w in (*state.weights, *state.momentum))
    assert (y.double() - exact).square().mean().sqrt() / exact.square().mean().sqrt() < tolerance


@pytest.mark.parametrize("backend", ["native", "torch"])
def test_memory_of_backward_does_not_hold_every_chunk(backend):
    held = []
    torch.manual_seed(0)
    q, k, v = (torch.nn.functional.normalize(torch.randn(1, 512, 1, 16), dim=-1) for _ in range(3))
    gate = torch.rand(1, 512, 1) * 0.1
    weights = tuple((torch.randn(1, 1, 16, 16) / 4).requires_grad_() for _ in range(2))

    def pack(x):
        held.append(x.numel())
        return x

    # a state is weights and momentum of two layers; where all are kept, so are the layers' outputs for the queries,
    # and on the torch path for the keys
    state, outputs = 2 * 2 * 16 * 16, {"native": 1, "torch": 2}[backend] * 2 * 512 * 16
    # of 64 states at chunk starts, or 2 of them, beside the one that was given; the torch path keeps first and last
    every, two = {"native": (63, 1), "torch": (65, 2)}[backend]
    for keep, kept in ((1, every * state + outputs), (32, two * state)):
        held.clear()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            titans_memory(q, k, v, gate, gate, gate, MemoryState.fresh(weights), chunk=8, keep=keep, backend=backend)
        assert sum(held) == 3 * q.numel() + 3 * gate.numel() + state + kept


def test_no_tokens(memory_case):
    case = memory_case()
    y, state = case.run(tokens=slice(0, 0), chunk=4)
    assert y.shape == (2, 0, 2, 4)
    case.assert_equal(case.tensors((y, state)), case.tensors((y, case.state)))


@pytest.mark.parametrize(
    "change,named",
    [
        (dict(k=torch.zeros(2, 14, 2, 5)), "k: expected"),
        (dict(v=torch.zeros(2, 13, 2, 4)), "v: expected"),
        (dict(q=torch.zeros(2, 14, 8)), "q: expected"),
        (dict(theta=torch.zeros(2, 14)), "theta: expected"),
        (dict(eta=torch.zeros(2, 14, 3)), "eta: expected"),
        (dict(alpha=torch.zeros(2, 14, 2, dtype=torch.int64)), "alpha .* expected a floating"),
        (dict(state="no"), "state: expected a MemoryState"),
        (dict(chunk=0), "chunk: expected"),
        (dict(chunk=2.5), "chunk: expected"),
        (dict(activation="gellu"), "activation: expected one of gelu"),
        (dict(norm=torch.ones(4)), "norm: expected a gain"),
        (dict(mask=torch.ones(2, 14)), "mask: expected torch.bool"),
        (dict(clip=-1.0), "clip: expected"),
        (dict(read="later"), "read: expected"),
        (dict(keep=0), "keep: expected"),
        (dict(ends=[2]), "ends: expected rows from 0 to 1"),
    ],
)
def test_refusals_name_the_argument(memory_case, change, named):
    case = memory_case()
    arguments = dict(
        q=case.q, k=case.k, v=case.v, theta=case.theta, eta=case.eta, alpha=case.alpha, state=case.state, chunk=4
    )
    with pytest.raises((ValueError, TypeError), match=named):
        titans_memory(**{**arguments, **change})


def test_a_state_that_does_not_fit_is_named(memory_case):
    case = memory_case()
    wrong = case.state._replace(momentum=case.state.momentum[:1])
    with pytest.raises(ValueError, match=r"state.momentum: expected the shapes"):
        case.run(wrong, chunk=4)
    other = MemoryState.fresh(tuple(torch.zeros(3, 2, 4, 4) for _ in range(2)))
    with pytest.raises(ValueError, match=r"state.weights\[0\]: expected \[batch=2"):
        case.run(other, chunk=4)


def test_a_forced_path_runs_or_fails(memory_case, monkeypatch):
    case = memory_case()
    with pytest.raises(BackendError, match="takes one token, not 14"):
        case.run(chunk=4, backend="step")
    with pytest.raises(BackendError, match="no such backend"):
        case.run(chunk=4, backend="cuda")
    monkeypatch.setenv("TITANS_BUILD_BACKEND", "memory=step")
    with pytest.raises(BackendError, match="TITANS_BUILD_BACKEND"):
        case.run(chunk=4)


@pytest.mark.parametrize("time", [1, 3])
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("phases", [[0, 0], [3, 0]])
def test_nothing_but_masked_tokens(memory_case, time, grad, phases):
    case = memory_case(time=time, phases=phases, mask=torch.zeros(2, time, dtype=torch.bool))
    with torch.set_grad_enabled(grad):
        y, state = case.run(chunk=4)
    assert y.shape == (2, time, 2, 4) and not y.any()
    case.assert_equal(case.tensors((y, state))[1:], case.tensors((y, case.state))[1:], 0.0)
    assert torch.equal(state.position, case.state.position)


def test_autocast_narrows_nothing(memory_case):
    case = memory_case()
    expected = case.tensors(case.run(chunk=4))
    grads = case.gradients(expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = case.tensors(case.run(chunk=4))
        case.assert_equal(got, expected, 0.0)
        case.assert_equal(case.gradients(got), grads, 0.0)


@pytest.mark.parametrize(
    "change,named",
    [
        (dict(norm=torch.ones(2, 4, dtype=torch.int64)), "norm .* expected a floating"),
        (dict(norm=True), "norm: expected a tensor"),
        (dict(theta=None), "theta: expected a tensor"),
        (dict(mask=torch.ones(2, 14, dtype=torch.bool, device="meta")), "mask: expected device"),
        (dict(activation=[]), "activation: expected one of"),
        (dict(clip="a"), "clip: expected"),
    ],
)
def test_refusals_of_odd_kinds(memory_case, change, named):
    case = memory_case()
    arguments = dict(q=case.q, k=case.k, v=case.v, theta=case.theta, eta=case.eta, alpha=case.alpha, state=case.state)
    with pytest.raises((ValueError, TypeError), match=named):
        titans_memory(**{**arguments, "norm": case.norm, **change})


@pytest.mark.parametrize(
    "change,named",
    [
        (dict(position=[0, 0]), "state.position: expected torch.int64"),
        (dict(momentum=None), "state.momentum: expected a tuple"),
        (dict(weights=()), "state.weights: expected a tuple"),
    ],
)
def test_refusals_of_odd_states(memory_case, change, named):
    case = memory_case()
    with pytest.raises((ValueError, TypeError), match=named):
        case.run(case.state._replace(**change), chunk=4)
    with pytest.raises(ValueError, match="weights: expected"):
        MemoryState.fresh(())
