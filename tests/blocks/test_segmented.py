"""The methods of blocks that ``context`` uses: the parts of a memory, and outputs at some tokens only."""

import pytest
import torch

from titans_build.blocks.attention import Attention
from titans_build.blocks.build import build_block
from titans_build.blocks.memory import NeuralMemory
from titans_build.blocks.segmented import forward_every, split_memory

DIM = 8


def make(**fields):
    return build_block({"type": "memory", "heads": 2, "chunk": 4, **fields}, dim=DIM, dtype=torch.float64, seed=0)


def is_split(memory):
    return split_memory(memory, 2).update != memory


@pytest.mark.parametrize("fields", [{}, {"conv": 0}, {"use": "read"}, {"use": "write"}, {"gates": "chunk"}])
@pytest.mark.parametrize("masked", [False, True])
def test_parts_equal_read_and_forward(fields, masked):
    memory = make(**fields)
    torch.manual_seed(0)
    x = torch.randn(2, 11, DIM, dtype=torch.float64)
    mask = torch.rand(2, 11) > 0.3 if masked else None
    state = memory.write(torch.randn(2, 5, DIM, dtype=torch.float64), memory.init_state(2))
    y, after = memory(x, state, mask=mask)
    assert is_split(memory)
    project, read, update, output = split_memory(memory, 2)
    torch.testing.assert_close(read(project(x), state), memory.read(x, state))
    raw, learned = update(x, state, mask=mask)
    got = output(raw, x)
    torch.testing.assert_close(got if mask is None else got * mask.unsqueeze(-1), y)
    torch.testing.assert_close(learned.memory.weights, after.memory.weights)


def test_a_single_piece_calls_the_memory():
    memory = make()
    assert split_memory(memory, 1).update == memory


def hooked(memory):
    memory.register_forward_hook(lambda module, given, out: None)


def replaced(memory):
    memory.read = lambda x, state: x


def derived(memory):
    memory.__class__ = type(
        "Derived", (NeuralMemory,), {"forward": lambda self, x, state=None, *, mask=None: (x, state)}
    )


@pytest.mark.parametrize("change", [hooked, replaced, derived])
def test_modified_memories_are_called(change):
    memory = make()
    change(memory)
    assert not is_split(memory)


class Doubled(Attention):
    def forward(self, x, state=None, *, mask=None):
        y, state = super().forward(x, state, mask=mask)
        return 2 * y, state


@pytest.mark.parametrize("kind", [Attention, Doubled])
@pytest.mark.parametrize("hook", [False, True])
def test_forward_every_equals_forward(kind, hook):
    block = build_block({"type": "attention", "heads": 2}, dim=DIM, dtype=torch.float64)
    block.__class__ = kind
    x, calls = torch.randn(2, 6, DIM, dtype=torch.float64), []
    if hook:
        block.register_forward_hook(lambda module, given, out: calls.append(module))
    y, state = forward_every(block, x, block.init_state(2), step=2)
    assert bool(calls) == hook
    expected, after = block(x, block.init_state(2))
    torch.testing.assert_close((y, state), (expected[:, 1::2], after))


def test_an_adapter_in_place_of_the_projection_is_called():
    block = build_block({"type": "attention", "heads": 2}, dim=DIM, dtype=torch.float64)
    layer = block.qkv
    block.qkv = torch.nn.Sequential(layer, torch.nn.Identity())
    block.qkv.weight = layer.weight
    called = []
    layer.register_forward_hook(lambda *_: called.append(True))
    forward_every(block, torch.randn(2, 6, DIM, dtype=torch.float64), block.init_state(2), step=2)
    assert called
