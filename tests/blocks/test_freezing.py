"""A frozen memory is read and not written. Thawed, it continues from the same state."""

from __future__ import annotations

import copy

import pytest
import torch

from titans_build import state as st
from titans_build.blocks.block import Block
from titans_build.blocks.build import build_block
from titans_build.blocks.freezing import freeze
from titans_build.recipes import build, load, load_recipe, save

MEMORY = {"type": "memory", "heads": 2, "chunk": 4}
ATTENTION = {"type": "attention", "heads": 2, "window": 6}
LAYERS = {
    "mac": [{"type": "context", "segment": 5, "persistent": 2, "memory": MEMORY, "attend": ATTENTION}, "ffn"],
    "mag": [{"type": "persistent", "tokens": 3, "of": {"type": "gate", "branches": [ATTENTION, MEMORY]}}],
    "lmm": [MEMORY | {"gates": "chunk"}],
}
RECIPE = {"version": 1, "dim": 16, "vocab": 32, "layers": LAYERS, "stack": ["mac", "mag", "lmm"]}
NAMES = ["layers.0.blocks.0.memory", "layers.1.blocks.0.of.branches.1", "layers.2.blocks.0"]


@pytest.fixture
def model():
    made = build(RECIPE, dtype=torch.float64, seed=0)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return made


def ids(time, rows=2, seed=0):
    return torch.randint(32, (rows, time), generator=torch.Generator().manual_seed(seed))


def memories(state):
    """The states of the memories: weights, momentum, anchors, positions and the gates of the current chunk."""
    parts = (".weights.", ".momentum.", ".anchor.", "memory.position", ".gates")
    return {
        path: tensor
        for path, tensor in st.named_tensors(state)
        if any(part in path for part in parts) and "snapshot" not in path
    }


def same(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[path], right[path]) for path in left)


def test_a_frozen_memory_does_not_change(model):
    state = model(ids(7)).state
    with model.freeze_memory() as frozen:
        assert frozen.names == NAMES
        after = model(ids(13, seed=1), state).state
    assert len(memories(state)) > 20 and same(memories(after), memories(state))
    assert not same(memories(model(ids(13, seed=1), state).state), memories(state))


def test_freezing_equals_use_read_in_the_recipe(model):
    paths = ["layers.mac.0.memory", "layers.mag.0.of.branches.1", "layers.lmm.0"]
    reading = build(load_recipe(RECIPE, {f"{path}.use": "read" for path in paths}), dtype=torch.float64)
    reading.load_state_dict(model.state_dict())
    state = model(ids(7)).state
    theirs = state._replace(recipe=reading.init_state(2).recipe)
    with model.freeze_memory():
        torch.testing.assert_close(model(ids(9), state).logits, reading(ids(9), theirs).logits, rtol=0, atol=0)


def test_streaming_a_frozen_model_equals_one_pass(model):
    state, tokens = model(ids(7)).state, ids(11, seed=1)
    with model.freeze_memory():
        whole = model(tokens, state)
        logits, running = [], state
        for piece in tokens.split([1, 4, 1, 3, 2], dim=1):
            out = model(piece, running)
            logits.append(out.logits)
            running = out.state
    torch.testing.assert_close(torch.cat(logits, dim=1), whole.logits)
    assert same(memories(running), memories(state))


def test_generation_with_a_frozen_model_equals_one_pass(model):
    state = model(ids(7)).state
    with model.freeze_memory():
        generation = model.generate(ids(3), 9, state)
        expected = model(generation.tokens, state)
    assert same(memories(generation.state), memories(state))
    torch.testing.assert_close(generation.logits, expected.logits[:, -1])
    assert torch.equal(generation.tokens[:, 3:], expected.logits[:, 2:-1].argmax(-1))
    assert not same(memories(model.generate(ids(3), 9, state).state), memories(state))


def test_a_thawed_memory_continues_from_its_state():
    block = build_block(MEMORY | {"conv": 0}, dim=16, dtype=torch.float64)
    x = torch.randn(2, 20, 16, dtype=torch.float64)
    _, state = block(x[:, :6])  # two tokens into a chunk
    with freeze(block):
        _, after = block(x[:, 6:13], state)
    expected, ended = block(x[:, 13:], state)
    y, got = block(x[:, 13:], after)
    assert torch.equal(y, expected) and same(memories((got,)), memories((ended,)))


def test_persistent_tokens_are_written_even_if_frozen(model):
    fresh = model.init_state(2)
    with model.freeze_memory():
        frozen = model.init_state(2)
        assert same(dict(st.named_tensors(frozen)), dict(st.named_tensors(fresh)))
        assert same(memories(model(ids(5)).state), memories(fresh))
    assert fresh.layers[1][0][1].memory.position.tolist() == [3, 3]


def test_memories_are_frozen_until_thawed(model):
    def learns():
        state = model.init_state(2)
        return not same(memories(model(ids(5), state).state), memories(state))

    model.freeze_memory()
    assert not learns()
    with model.freeze_memory() as inner:
        assert inner.names == []
    assert not learns()  # memories that were frozen before the `with` block remain frozen
    model.unfreeze_memory()
    model.unfreeze_memory()
    assert learns()
    with pytest.raises(KeyError), model.freeze_memory():
        raise KeyError
    assert learns()
    handle = model.freeze_memory()
    assert not learns()
    handle.thaw()
    assert learns()


def test_copies_and_saved_models(model, tmp_path):
    model.freeze_memory()
    twin = copy.deepcopy(model)
    twin.unfreeze_memory()
    assert model.layers[2].blocks[0].use == "read" and twin.layers[2].blocks[0].use == "both"
    save(model, tmp_path)
    assert load(tmp_path).layers[2].blocks[0].use == "both"  # freezing does not change the recipe


def test_a_memory_with_use_write_cannot_be_frozen():
    model = build(RECIPE | {"layers": {"a": [MEMORY, MEMORY | {"use": "write"}]}, "stack": ["a"]})
    with pytest.raises(ValueError, match=r"layers.0.blocks.1: cannot be frozen"):
        model.freeze_memory()
    assert model.layers[0].blocks[0].use == "both"


def test_a_memory_with_use_read_is_neither_frozen_nor_thawed():
    model = build(RECIPE | {"layers": {"a": [MEMORY | {"use": "read"}]}, "stack": ["a"]})
    assert model.freeze_memory().names == []
    model.unfreeze_memory()
    assert model.layers[0].blocks[0].use == "read"


def test_custom_blocks_with_an_attribute_use_are_frozen():
    class Counter(Block):
        def __init__(self) -> None:
            super().__init__(1)
            self.use = "both"

        def init_state(self, batch_size):
            return torch.zeros(batch_size, 1)

        def forward(self, x, state=None, *, mask=None):
            state = self.init_state(len(x)) if state is None else state
            return x, state if self.use == "read" else state + x.shape[1]

    block = Counter()
    with freeze(block):
        assert block(torch.zeros(1, 3, 1))[1] == 0
        # persistent tokens are written into a fresh memory even if it is frozen
        assert block.prefix(torch.zeros(1, 3, 1))[1] == 3 and block.use == "read"
    assert block(torch.zeros(1, 3, 1))[1] == 3
