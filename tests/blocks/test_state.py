"""States and operations on them."""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

import titans_build as tb
from titans_build.blocks import state as st
from titans_build.blocks.state import State


class Pair(NamedTuple):
    weights: tuple[Tensor, ...]
    position: Tensor
    rest: State = None


class Other(NamedTuple):
    weights: tuple[Tensor, ...]
    position: Tensor
    rest: State = None


def make(rows=3, start=0.0, kind=Pair):
    weights = torch.arange(rows * 2.0).view(rows, 2) + start
    return kind((weights, weights.double() * 10), torch.arange(rows) + int(start), (None, weights[:, 0]))


def same(a, b):
    pairs = list(zip(st.named_tensors(a), st.named_tensors(b), strict=True))
    return all(x[0] == y[0] and x[1].dtype == y[1].dtype and torch.equal(x[1], y[1]) for x, y in pairs)


def test_named_tensors():
    assert [path for path, _ in st.named_tensors((make(), None))] == [
        *("0.weights.0", "0.weights.1", "0.position", "0.rest.1"),
    ]


def test_map_state_keeps_the_structure():
    mapped = st.map_state(lambda a, b: a + b, make(), make(start=1))
    assert type(mapped) is Pair and mapped.rest[0] is None
    assert torch.equal(mapped.position, torch.tensor([1, 3, 5]))
    assert st.map_state(torch.clone, None) is None


@pytest.mark.parametrize(
    "other",
    [
        make(kind=Other),
        make()._replace(weights=(torch.zeros(3, 2),)),
        make()._replace(rest=None),
        make()._replace(position=None),
    ],
)
def test_states_of_different_structures_are_errors(other):
    with pytest.raises(TypeError, match="differ in structure"):
        st.map_state(torch.add, make(), other)
    with pytest.raises(TypeError, match="differ in structure"):
        st.concatenate([other, make()])


@pytest.mark.parametrize("wrong", [[torch.zeros(2)], {"a": torch.zeros(2)}, 3, "text"])
def test_values_that_are_no_states_are_errors(wrong):
    with pytest.raises(TypeError, match="tree of named tuples"):
        st.map_state(torch.clone, (wrong,))
    with pytest.raises(TypeError, match="tree of named tuples"):
        list(st.named_tensors((wrong,)))


def test_select_with_order_and_repetitions():
    state = make()
    for rows in ([2, 0, 0], torch.tensor([2, 0, 0])):
        assert torch.equal(st.select(state, rows).position, torch.tensor([2, 0, 0]))
    assert torch.equal(st.select(state, slice(1, 3)).position, torch.tensor([1, 2]))
    assert torch.equal(st.select(state, torch.tensor([True, False, True])).weights[0], state.weights[0][[0, 2]])
    assert torch.equal(st.select(state, [True, False, True]).position, torch.tensor([0, 2]))


@pytest.mark.parametrize("rows", [torch.tensor([-1, 0]), [-1, 0], (2, -3)])
def test_negative_row_numbers(rows):
    assert torch.equal(st.select(make(), rows).position, torch.tensor([2, 0]))


def test_empty_selections():
    assert st.batch_size(st.select(make(), [])) == 0
    assert same(st.reset(make(), [], make(start=100)), make())


@pytest.mark.parametrize(
    "rows, error, message",
    [
        ([5], IndexError, "row 5 is out of range for a state of 3 rows"),
        ([0, -4], IndexError, "row -4 is out of range for a state of 3 rows"),
        ([True], IndexError, r"bools \[1\]: expected one for each of the 3 rows"),
        ([0.5], TypeError, "row numbers or bools, got torch.float32"),
        ([[0, 1]], TypeError, r"row numbers or bools, got torch.int64 \[1, 2\]"),
        (None, TypeError, "row numbers or bools, got None"),
        ("ab", TypeError, "row numbers or bools, got 'ab'"),
    ],
)
def test_invalid_rows_are_errors(rows, error, message):
    with pytest.raises(error, match=message):
        st.select(make(), rows)
    with pytest.raises(error, match=message):
        st.reset(make(), rows, make(start=100))


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda a: st.concatenate(a), TypeError, "expected a list of states, got one Pair"),
        (lambda a: st.concatenate(a.position), TypeError, "expected a list of states, got one Tensor"),
        (lambda a: st.concatenate([a, st.to(a, dtype=torch.half)]), TypeError, "dtypes: torch.float32, torch.float16"),
        (lambda a: st.concatenate([a, st.to(a, "meta")]), ValueError, "devices: cpu, meta"),
        (lambda a: st.where(torch.tensor([True]), a, a), TypeError, r"rows: expected bool \[3\], got torch.bool \[1\]"),
        (lambda a: st.where([True] * 3, a, a), TypeError, r"rows: expected bool \[3\], got \[True"),
        (lambda a: st.where(torch.ones(3).bool(), a, make(2)), ValueError, "states of 3 and 2 rows"),
        (lambda a: st.reset(a, [0], make(2)), ValueError, "fresh has 2 rows: expected 1, or 3"),
        (lambda a: st.reset(a, [0], st.to(a, dtype=torch.half)), TypeError, "different dtypes"),
        (lambda a: st.reset(a, [0], a._replace(position=torch.zeros(3, 1))), ValueError, "rows of different shapes"),
        (lambda a: st.reset(a, [0], a._replace(rest=None)), TypeError, "differ in structure at rest: "),
        (lambda a: st.to(a, dtype=torch.int32), TypeError, "floating-point torch.dtype or None, got torch.int32"),
        (lambda a: st.to(a, dtype="half"), TypeError, "floating-point torch.dtype or None, got 'half'"),
        (lambda a: st.batch_size(torch.tensor(1.0)), ValueError, "batch as dimension 0"),
    ],
)
def test_invalid_arguments_are_errors(call, error, message):
    with pytest.raises(error, match=message):
        call(make())


def test_reset_with_one_fresh_row():
    assert torch.equal(st.reset(make(), [0, 2], make(1, start=9)).position, torch.tensor([9, 1, 9]))


def test_trainable_copies_tensors_of_inference_mode():
    state = make()
    with torch.inference_mode():
        state = state._replace(weights=(state.weights[0] * 2,))
    copy = st.trainable(state)
    assert not any(tensor.is_inference() for _, tensor in st.named_tensors(copy)) and same(copy, state)
    assert copy.position is state.position


def test_concatenate_is_the_inverse_of_select():
    state = make()
    assert same(st.concatenate([st.select(state, [0]), st.select(state, slice(1, None))]), state)
    with pytest.raises(ValueError, match="at least one"):
        st.concatenate([])


@pytest.mark.parametrize(
    "rows", [[1], torch.tensor([1]), torch.tensor([False, True, False]), [False, True, False], [-2]]
)
def test_reset(rows):
    state, fresh = make(), make(start=100)
    after = st.reset(state, rows, fresh)
    assert torch.equal(after.position, torch.tensor([0, 101, 2]))
    assert torch.equal(after.weights[1][[0, 2]], state.weights[1][[0, 2]])
    assert same(state, make())
    assert st.reset((None,), rows, (None,)) == (None,)


def test_where():
    chosen = st.where(torch.tensor([True, False, True]), make(), make(start=100))
    assert torch.equal(chosen.position, torch.tensor([0, 101, 2]))


def test_batch_size():
    assert st.batch_size(make()) == 3
    assert st.batch_size((None, None)) is None
    with pytest.raises(ValueError, match="position has 3"):
        st.batch_size(make()._replace(weights=(torch.zeros(2, 2),)))


def test_to_casts_floating_point_tensors_only():
    moved = st.to(make(), dtype=torch.bfloat16)
    assert moved.weights[0].dtype == moved.weights[1].dtype == torch.bfloat16
    assert moved.position.dtype == torch.int64
    assert st.to(make(), device="meta").position.device.type == "meta"


def test_detach():
    leaf = torch.ones(3, 2, requires_grad=True)
    state = make()._replace(weights=(leaf * 2,))
    cut = st.detach(state)
    assert not cut.weights[0].requires_grad and torch.equal(cut.weights[0], state.weights[0])
    assert state.weights[0].requires_grad


def test_nbytes_counts_expanded_tensors_in_full():
    state = make()
    assert st.nbytes(state) == 3 * (2 * 4 + 2 * 8 + 8 + 4)
    assert st.nbytes(torch.zeros(1, 5).expand(7, 5)) == 7 * 5 * 4


def test_gradients_through_reset_rows():
    """The previous state of a reset row has no gradient, and the learned initial state has."""
    block = tb.build_block({"type": "memory", "heads": 2, "chunk": 4}, dim=8, dtype=torch.float64, seed=0)
    _, carried = block(torch.randn(3, 5, 8, dtype=torch.float64))
    carried = st.map_state(lambda x: x.detach().requires_grad_(x.is_floating_point()), carried)
    x = torch.randn(3, 6, 8, dtype=torch.float64)
    y, _ = block(x, st.reset(carried, torch.tensor([False, True, False]), block.init_state(1)))
    expected, _ = block(x[1:2])
    torch.testing.assert_close(y[1:2], expected)
    grads = torch.autograd.grad(y[1].sum(), [carried.memory.weights[0], block.initial_weights[0]], retain_graph=True)
    (wanted,) = torch.autograd.grad(expected.sum(), [block.initial_weights[0]])
    assert not grads[0].any()
    torch.testing.assert_close(grads[1], wanted)
    (kept,) = torch.autograd.grad(y[0].sum(), [carried.memory.weights[0]])
    assert kept[0].any() and not kept[1:].any()


def test_rewind_of_a_block_is_its_prefix():
    block = tb.build_block({"type": "memory", "heads": 2, "chunk": 4}, dim=8, dtype=torch.float64, seed=0)
    x = torch.randn(2, 9, 8, dtype=torch.float64)
    _, before = block(x[:, :3])
    got = st.rewind(block, before, x, [7, 2])
    for row, count in enumerate((7, 2)):
        _, expected = block(x[row : row + 1, :count], st.select(before, [row]))
        for (path, one), (_, two) in zip(st.named_tensors(st.select(got, [row])), st.named_tensors(expected)):
            torch.testing.assert_close(one, two, msg=path)
    assert st.rewind(block, before, x, 0) is before
    assert torch.equal(st.rewind(block, None, x, 0).memory.position, torch.zeros(2, dtype=torch.int64))
