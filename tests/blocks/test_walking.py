"""A memory's halves are its ``read`` and its ``forward``, and stand for them only where those are its own."""

import pytest
import torch

from titans_build.blocks.build import build_block
from titans_build.blocks.memory import NeuralMemory
from titans_build.blocks.walking import walk

DIM = 8


def make(**fields):
    return build_block({"type": "memory", "heads": 2, "chunk": 4, **fields}, dim=DIM, dtype=torch.float64, seed=0)


def halves_of(memory):
    return walk(memory, 2).learn != memory


@pytest.mark.parametrize("fields", [{}, {"conv": 0}, {"use": "read"}, {"use": "write"}, {"gates": "chunk"}])
@pytest.mark.parametrize("masked", [False, True])
def test_two_halves_make_a_whole(fields, masked):
    memory = make(**fields)
    torch.manual_seed(0)
    x = torch.randn(2, 11, DIM, dtype=torch.float64)
    mask = torch.rand(2, 11) > 0.3 if masked else None
    state = memory.write(torch.randn(2, 5, DIM, dtype=torch.float64), memory.init_state(2))
    y, after = memory(x, state, mask=mask)
    assert halves_of(memory)
    ask, answer, learn, finish = walk(memory, 2)
    torch.testing.assert_close(answer(ask(x), state), memory.read(x, state))
    raw, learned = learn(x, state, mask=mask)
    got = finish(raw, x)
    torch.testing.assert_close(got if mask is None else got * mask.unsqueeze(-1), y)
    torch.testing.assert_close(learned.memory.weights, after.memory.weights)


def test_one_piece_takes_the_whole():
    memory = make()
    assert walk(memory, 1).learn == memory


def hooked(memory):
    memory.register_forward_hook(lambda module, given, out: None)


def of_its_own(memory):
    memory.read = lambda x, state: x


def derived(memory):
    memory.__class__ = type(
        "Derived", (NeuralMemory,), {"forward": lambda self, x, state=None, *, mask=None: (x, state)}
    )


@pytest.mark.parametrize("change", [hooked, of_its_own, derived])
def test_what_stands_in_their_place_is_called(change):
    memory = make()
    change(memory)
    assert not halves_of(memory)
