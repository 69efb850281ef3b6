"""Tokens below the surprise threshold neither write nor forget, on every path alike."""

import itertools

import pytest
import torch

from titans_build.kernels.memory import MemoryState, Options, Tokens, titans_memory
from titans_build.kernels.memory.measure import measure_memory
from titans_build.kernels.memory.surprise import thresholded_memory

LOW, MIDDLE, HIGH = 1e-6, 8.0, 1e6


def masks(rows, time):
    mask = torch.rand(rows, time, generator=torch.Generator().manual_seed(3)) > 0.4
    mask[1] = False
    mask[2, :7] = False
    return mask


def measured(case, chunk, threshold, **options):
    tokens = Tokens(case.q, case.k, case.v, case.theta, case.eta, case.alpha)
    given = Options(chunk, "gelu", options.get("clip"), "after", threshold=threshold)
    return measure_memory(tokens, case.state, case.norm, case.mask, given)


def test_the_threshold_holds_back_some_tokens_and_not_others(memory_case):
    held = measured(memory_case(), 5, MIDDLE).suppressed
    assert 0.2 < held.double().mean() < 0.8


@pytest.mark.parametrize("momentum,forgetting", list(itertools.product([True, False], repeat=2)))
@pytest.mark.parametrize("clip", [None, 0.7])
@pytest.mark.parametrize("threshold", [MIDDLE, HIGH])
def test_every_path_agrees_with_both_oracles(memory_case, momentum, forgetting, clip, threshold):
    case = memory_case(momentum=momentum, forgetting=forgetting, step=0.05)
    case.assert_agrees(chunk=4, clip=clip, threshold=threshold)


@pytest.mark.parametrize("momentum", [True, False])
@pytest.mark.parametrize("read", ["after", "before"])
def test_rows_at_different_positions_and_masks(memory_case, momentum, read):
    for mask in (None, masks(4, 19)):
        case = memory_case(batch=4, time=19, phases=[3, 0, 7, 5], mask=mask, scale=0.3, step=0.05, momentum=momentum)
        case.assert_agrees(chunk=4, clip=0.5, read=read, threshold=5.0)


@pytest.mark.parametrize("cuts", [(1, 4, 9), (5, 10), (2, 3, 4, 5, 13)])
@pytest.mark.parametrize("momentum", [True, False])
@pytest.mark.parametrize("backend", ["native", "torch"])
def test_any_split_is_the_whole(memory_case, cuts, backend, momentum):
    case = memory_case(step=0.05, momentum=momentum)
    whole = case.tensors(case.run(chunk=5, backend=backend, threshold=MIDDLE))
    state, outputs = None, []
    for start, stop in zip((0, *cuts), (*cuts, 14)):
        y, state = case.run(state, slice(start, stop), chunk=5, backend=backend, threshold=MIDDLE)
        outputs.append(y)
    pieces = case.tensors((torch.cat(outputs, 1), state))
    case.assert_equal(pieces, whole)
    case.assert_equal(case.gradients(pieces), case.gradients(whole))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("flags", [{}, {"momentum": False}, {"forgetting": False}, {"norm": False}])
@pytest.mark.parametrize("backend", ["step", "native_step"])
def test_step_is_the_recurrence(memory_case, masked, clip, flags, backend):
    mask = torch.rand(3, 11, generator=torch.Generator().manual_seed(0)) > 0.3 if masked else None
    case = memory_case(batch=3, time=11, phases=[1, 0, 2], mask=mask, step=0.05, **flags)
    with torch.no_grad():
        whole = case.run(chunk=4, backend="reference", clip=clip, threshold=4.0)
        state, outputs = case.state, []
        for t in range(11):
            y, state = case.run(state, slice(t, t + 1), chunk=4, backend=backend, clip=clip, threshold=4.0)
            outputs.append(y)
    case.assert_equal(case.tensors((torch.cat(outputs, 1), state)), case.tensors(whole))


@pytest.mark.parametrize("backend", ["native", "torch", "reference"])
def test_what_a_threshold_means(memory_case, backend):
    """Below every surprise it changes nothing; above all of them the gates are zero, and momentum carries on."""
    case = memory_case(step=0.05)
    case.assert_equal(
        case.tensors(case.run(chunk=4, backend=backend, threshold=LOW)),
        case.tensors(case.run(chunk=4, backend=backend)),
    )
    held = case.tensors(case.run(chunk=4, backend=backend, threshold=HIGH))
    case.theta, case.alpha = torch.zeros_like(case.theta), torch.zeros_like(case.alpha)
    shut = case.tensors(case.run(chunk=4, backend=backend))
    case.assert_equal(held, shut)
    assert (held[1] - case.state.weights[0]).abs().max() > 1e-3


@pytest.mark.parametrize("momentum", [True, False])
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("phases", [None, [3, 3], [3, 1]])
def test_a_chunk_without_a_write_costs_no_products(memory_case, momentum, grad, phases):
    """The operation itself is not called, and the state's weights are the very tensors."""
    case = memory_case(momentum=momentum, phases=phases)
    weights = tuple(w.detach().requires_grad_(grad) for w in case.state.weights)
    still = tuple(torch.zeros_like(w) for w in case.state.momentum)  # nothing to carry on
    state = case.state._replace(weights=weights, momentum=still)
    tokens, options = Tokens(case.q, case.k, case.v, case.theta, case.eta, case.alpha), Options(4, "gelu", 1.0, "after")

    def never(*given):
        raise AssertionError("called")

    with torch.set_grad_enabled(grad):
        y, after = thresholded_memory(never, tokens, state, case.norm, None, options._replace(threshold=HIGH))
        expected = case.run(state, chunk=4, backend="reference", threshold=HIGH)
    assert all(a is b for a, b in zip(after.weights, weights))
    case.assert_equal(case.tensors((y, after)), case.tensors(expected))
    assert torch.equal(after.position, expected[1].position)


def test_a_gradient_through_momentum_of_zero_is_no_reason_to_skip(memory_case):
    """Nothing carries on, yet the outputs would change if something did."""
    case = memory_case(step=0.05)
    still = tuple(torch.zeros_like(w).requires_grad_() for w in case.state.momentum)
    found = []
    for backend in ("torch", "reference"):
        y, _ = case.run(case.state._replace(momentum=still), chunk=4, backend=backend, threshold=HIGH)
        found.append(torch.autograd.grad(y.square().sum(), still))
    assert found[0][0].any()
    case.assert_equal(*found)


def test_quiet_chunks_between_loud_ones(memory_case):
    """Some chunks of a sequence write and others do not: each is taken as it is, and gradients pass through all."""
    case = memory_case(time=24, batch=1, heads=1, momentum=False, step=0.05)
    with torch.no_grad():
        state = case.state._replace(anchor=case.state.weights)
        answered = titans_memory(
            case.k, case.k, case.v, torch.zeros_like(case.theta), None, None, state, norm=case.norm
        )[0]
        case.v[:, 4:12] = answered[:, 4:12]  # nothing surprises there
        case.alpha[:, :4] = 0
        case.theta[:, :4] = 0
    held = measured(case, 4, 1.0).suppressed[0, :, 0]
    assert held[4:12].all() and not held[12:].all()
    case.assert_agrees(chunk=4, threshold=1.0)


@pytest.mark.parametrize("backend", ["native", "torch", "closed_form", "reference"])
def test_what_is_not_a_number_is_not_held_back(memory_case, backend):
    case = memory_case(time=9)
    with torch.no_grad():
        case.v[0, 6, 0, 0] = float("nan")
        y, state = case.run(chunk=4, backend=backend, threshold=HIGH)
    assert y[:, :6].isfinite().all() and y[1].isfinite().all() and y[0, :, 1].isfinite().all()
    assert state.weights[0][0, 0].isnan().any() and state.weights[0][1].isfinite().all()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("phases", [None, [3, 0, 2, 5]])
@pytest.mark.parametrize("threshold", [None, 4.0])
def test_measuring_is_what_the_recurrence_meets(memory_case, masked, phases, threshold):
    """Against the surprise of every token at the anchor that the reference's state has just before it."""
    from titans_build.kernels.memory.surprise import surprise_at

    mask = masks(4, 13) if masked else None
    case = memory_case(batch=4, time=13, phases=phases, mask=mask, scale=0.3, step=0.05)
    found = measured(case, 4, threshold, clip=0.5)
    state = case.state
    with torch.no_grad():
        for t in range(13):
            began = (state.position % 4 == 0).view(-1, 1, 1, 1)
            anchor = tuple(torch.where(began, w, a) for w, a in zip(state.weights, state.anchor))
            expected = surprise_at(case.k[:, t : t + 1], case.v[:, t : t + 1], anchor, "gelu", case.norm)
            real = torch.ones(4, dtype=torch.bool) if mask is None else mask[:, t]
            for a, b in zip((found.surprise, found.error), expected):
                torch.testing.assert_close(a[:, t][real], b[:, 0][real], rtol=1e-9, atol=1e-10)
            if threshold is not None:
                assert torch.equal(found.suppressed[:, t][real], expected.norm[:, 0][real] < threshold)
            at = slice(t, t + 1)
            _, state = case.run(state, at, chunk=4, backend="reference", clip=0.5, threshold=threshold)


def test_a_narrow_model_selects_in_its_state_s_dtype(memory_case):
    case = memory_case(time=20)
    with torch.no_grad():
        narrow = [x.to(torch.bfloat16) for x in (case.q, case.k, case.v, case.theta, case.eta, case.alpha)]
        state = MemoryState.fresh(tuple(w.float() for w in case.state.weights))
        y, after = titans_memory(*narrow, state, chunk=4, norm=case.norm.to(torch.bfloat16), threshold=MIDDLE)
        wide = [x.float() for x in narrow]
        exact, _ = titans_memory(*wide, state, chunk=4, norm=case.norm.to(torch.bfloat16).float(), threshold=MIDDLE)
    assert y.dtype == torch.bfloat16 and after.weights[0].dtype == torch.float32
    assert (y.float() - exact).norm() < 0.01 * exact.norm()


def test_no_tokens(memory_case):
    case = memory_case()
    y, state = case.run(tokens=slice(0, 0), chunk=4, threshold=1.0)
    assert y.shape == (2, 0, 2, 4) and torch.equal(state.position, case.state.position)


@pytest.mark.parametrize("threshold", [0, -1.0, "high"])
def test_thresholds_that_are_none(memory_case, threshold):
    with pytest.raises(ValueError, match="threshold: expected a norm > 0 or None"):
        memory_case().run(chunk=4, threshold=threshold)
