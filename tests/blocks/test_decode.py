"""Decoders give the outputs and states of ``forward``, for all stacks, starting states, hooks and observers."""

import copy
import threading

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import titans_build as tb
from titans_build.blocks.attention import Attention
from titans_build.blocks.block import Block
from titans_build.blocks.build import materialize
from titans_build.blocks.combinators import Gate, Layer
from titans_build.blocks.context import Context
from titans_build.blocks.decode import decode_plan, decoder, read_plan, reader
from titans_build.blocks.generation import Sampler, read_prompt, steps
from titans_build.blocks.memory import NeuralMemory
from titans_build.blocks.state import map_state, named_tensors
from titans_build.kernels.cpu_runtime import library

SMALL = ["lmm", "mac", "mag", "mal", "transformer", "windows-and-mac", "two-memories", "memory-as-ffn"]
SMALL += ["deltas-and-mac", "llama-and-memory"]
MEMORY = {"type": "memory", "heads": 2, "chunk": 3}
ATTENTION = {"type": "attention", "heads": 2, "window": 7}
CONTEXT = {"type": "context", "segment": 4, "persistent": 2, "memory": MEMORY, "attend": "attention"}
BLOCKS = {
    "memory": MEMORY,
    "memory of one layer, linear": {**MEMORY, "depth": 1, "momentum": False, "forgetting": False, "norm": False},
    "memory without a convolution": {**MEMORY, "conv": 0, "retrieve": "before", "clip": None},
    "memory with a gate per chunk": {**MEMORY, "gates": "chunk"},
    "memory with hard gates": {**MEMORY, "gating": "hard_sigmoid"},
    "memory with a threshold": {**MEMORY, "threshold": 5.0},
    "memory that is only read": {**MEMORY, "use": "read"},
    "attention": ATTENTION,
    "attention over everything": {"type": "attention", "heads": 2},
    "attention of few keys": {**ATTENTION, "heads": 4, "kv_heads": 2, "rope": None, "qk_norm": False},
    "ffn": "ffn",
    "ffn with gelu": {"type": "ffn", "kind": "gelu"},
    "rms_norm": "rms_norm",
    "layer_norm": "layer_norm",
    "chain": [ATTENTION, "layer_norm", MEMORY, "ffn"],
    "gate": {"type": "gate", "branches": [ATTENTION, MEMORY]},
    "sum": {"type": "gate", "branches": [ATTENTION, MEMORY], "form": "sum"},
    "persistent": {"type": "persistent", "tokens": 3, "of": [MEMORY, ATTENTION]},
    "residual": {"type": "residual", "of": MEMORY},
    "context": CONTEXT,
    "context with a way round attention": {**CONTEXT, "attend": {"type": "residual", "of": ATTENTION}},
    "context of inputs": {**CONTEXT, "write": "inputs"},
    "context of a chain": {**CONTEXT, "attend": [ATTENTION, "ffn"], "form": "silu"},
    "context of persistent memories": {
        **CONTEXT,
        "memory": {"type": "persistent", "tokens": 2, "of": {"type": "gate", "branches": [MEMORY, [MEMORY, MEMORY]]}},
    },
    "context of a memory with a way round": {**CONTEXT, "memory": {"type": "residual", "of": MEMORY}},
}


@pytest.mark.parametrize("register", [decode_plan, read_plan])
def test_a_class_has_one_plan_of_a_kind(register):
    class Planned:
        pass

    def first(*arguments):
        return None

    def second(*arguments):
        return None

    assert register(Planned)(first) is first
    with pytest.raises(ValueError, match="Planned"):
        register(Planned)(second)


class Shift(Block):
    """Adds the previous token. Its state is the tensor that it was given, not a copy."""

    def init_state(self, batch_size):
        return torch.zeros(batch_size, 1, self.dim, dtype=torch.float64)

    def forward(self, x: Tensor, state=None, *, mask=None):
        before = self.init_state(x.shape[0]) if state is None else state
        assert mask is None
        return x + torch.cat([before, x[:, :-1]], dim=1), x[:, -1:]


class Doubled(Attention):
    def forward(self, x, state=None, *, mask=None):
        y, state = super().forward(x, state, mask=mask)
        return 2 * y, state

    def every(self, x, state=None, *, step, mask=None):
        y, state = super().every(x, state, step=step, mask=mask)
        return y, state


def made(spec, dim=32, dtype=torch.float64):
    with torch.device("meta"):
        block = spec if isinstance(spec, Block) else Layer(dim, of=[spec])
    materialize(block, "cpu", dtype, 0)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return block


def tokens(rows, time, dim=32, seed=0):
    return torch.randn(rows, time, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def one_by_one(block, x, state):
    """Outputs and final state of a decoder, and all states in between."""
    outputs, states = [], [state]
    with torch.inference_mode():
        decode = decoder(block, x.shape[0])
        for token in x.unbind(1):
            y, state = decode(token.unsqueeze(1), state)
            outputs.append(y.clone())
            states.append(state)
    return torch.cat(outputs, dim=1), states


@pytest.mark.parametrize("rows", [1, 2, 5])
@pytest.mark.parametrize("name", BLOCKS)
def test_decoder_gives_the_outputs_and_state_of_forward(name, rows):
    block, x = made(BLOCKS[name]), tokens(rows, 13)
    with torch.no_grad():
        expected, last = block(x, block.init_state(rows))
    y, states = one_by_one(block, x, block.init_state(rows))
    assert_close(y, expected, rtol=1e-10, atol=1e-12)
    assert_close(dict(named_tensors(states[-1])), dict(named_tensors(last)), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["memory", "attention", "chain", "gate", "context"])
def test_rows_at_different_positions(name):
    block, x = made(BLOCKS[name]), tokens(2, 9)
    mask = torch.arange(5) < torch.tensor([[5], [2]])
    with torch.no_grad():
        _, state = block(tokens(2, 5, seed=1), block.init_state(2), mask=mask)
        expected, last = block(x, state)
    y, states = one_by_one(block, x, state)
    assert_close(y, expected, rtol=1e-10, atol=1e-12)
    assert_close(dict(named_tensors(states[-1])), dict(named_tensors(last)), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["memory", "attention", "context", "persistent"])
def test_earlier_states_are_not_modified(name):
    block, x = made(BLOCKS[name]), tokens(1, 10)
    with torch.inference_mode():
        decode, state = decoder(block, 1), block.init_state(1)
        kept, copies = [], []
        for token in x.unbind(1):
            kept.append(state)
            copies.append(map_state(torch.clone, state))
            _, state = decode(token.unsqueeze(1), state)
        # continuing again from a state in the middle
        for at in (3, 7):
            again, _ = decode(x[:, at : at + 1], kept[at])
            expected, _ = block(x[:, at : at + 1], kept[at])
            assert_close(again, expected, rtol=1e-10, atol=1e-12)
    for one, as_it_was in zip(kept, copies):
        assert_close(dict(named_tensors(one)), dict(named_tensors(as_it_was)), rtol=0, atol=0)


@pytest.mark.parametrize(
    "spec",
    [
        MEMORY,
        [MEMORY, MEMORY],
        {"type": "gate", "branches": [MEMORY, MEMORY]},
        {"type": "persistent", "of": MEMORY},
        {**MEMORY, "gates": "chunk"},
    ],
    ids=["memory", "chain", "gate", "persistent", "not prepared"],
)
def test_reader_gives_the_outputs_of_read(spec):
    block, x = made(spec).blocks[0], tokens(2, 4)
    with torch.inference_mode():
        state = block.write(tokens(2, 5, seed=1), block.init_state(2))
        ask = reader(block, 2)
        assert_close(ask(x[:, :1], state), block.read(x[:, :1], state), rtol=1e-10, atol=1e-12)


def test_a_custom_block_may_keep_its_input():
    with torch.device("meta"):
        layer = Layer(32, of=["rms_norm", [ATTENTION, Shift(32), "ffn"]])
    block, x = made(layer), tokens(2, 6)
    with torch.no_grad():
        expected, _ = block(x, block.init_state(2))
    y, _ = one_by_one(block, x, block.init_state(2))
    assert_close(y, expected, rtol=1e-10, atol=1e-12)


def test_the_forward_of_a_subclass_is_called():
    with torch.device("meta"):
        layer = Layer(32, of=[Doubled(32, heads=2, window=4)])
    block, x = made(layer), tokens(1, 6)
    with torch.no_grad():
        expected, _ = block(x, block.init_state(1))
    y, _ = one_by_one(block, x, block.init_state(1))
    assert_close(y, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    "path", ["blocks.0", "blocks.0.memory", "blocks.0.attend.out", "blocks.0.gate", "norms.0", "blocks.0.memory.output"]
)
def test_hooks_are_called(path):
    block, x = made(CONTEXT), tokens(1, 3)
    calls = []
    block.get_submodule(path).register_forward_hook(lambda module, args, output: calls.append(output))
    one_by_one(block, x, block.init_state(1))
    assert len(calls) >= 3


def test_a_replaced_forward_of_an_instance_is_called():
    block, x = made(MEMORY), tokens(1, 3)
    calls, forward = [], block.blocks[0].forward
    block.blocks[0].forward = lambda *args, **named: calls.append(args) or forward(*args, **named)
    one_by_one(block, x, block.init_state(1))
    assert len(calls) == 3


def test_invalid_outputs_of_a_block_are_errors():
    class Narrow(Shift):
        def forward(self, x, state=None, *, mask=None):
            return x[..., :4], state

    with torch.device("meta"):
        layer = Layer(32, of=[[Narrow(32), "ffn"]])
    with pytest.raises(ValueError, match=r"Narrow: output is torch.float64 \[1, 1, 4\]: expected .*\[1, 1, 32\]"):
        one_by_one(made(layer), tokens(1, 1), ((torch.zeros(1, 1, 32, dtype=torch.float64), None),))


# -- models ------------------------------------------------------------------------------------------------------------


def greedy(model, logits, state, count):
    return list(steps(model, logits, state, Sampler(), count))


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("recipe", SMALL)
def test_decoding_packaged_models_equals_forward(recipe, rows):
    loaded = tb.load_recipe(recipe, overrides={"dim": 32})
    model = tb.build(loaded, dtype=torch.float64, seed=0)
    prompt = torch.randint(256, (rows, 40), generator=torch.Generator().manual_seed(0))
    logits, state = read_prompt(model, prompt)
    given = greedy(model, logits, state, 12)
    for step in given:
        with torch.no_grad():
            hidden, state = model.run(model.lookup(step.token[:, None]), state, None)
            assert_close(step.logits, model.predict(hidden[:, 0]), rtol=1e-9, atol=1e-10)
        assert_close(dict(named_tensors(step.state)), dict(named_tensors(state)), rtol=1e-9, atol=1e-10)


@pytest.fixture
def model():
    return tb.build(
        tb.load_recipe("mac", overrides={"dim": 32, "layers.mac.0.segment": 8}), dtype=torch.float64, seed=0
    )


@pytest.fixture
def prompt():
    return torch.arange(20)[None] % 256


def test_plans_are_used_where_kernels_exist(model, prompt, monkeypatch):
    if library.refuse(device="cpu", dtype=torch.float64):
        pytest.skip("no C compiler")
    logits, state = read_prompt(model, prompt)

    def never(self, *args, **named):
        raise AssertionError(f"{type(self).__name__} was called")

    for kind in (Context, NeuralMemory, Attention, Layer, Gate):
        monkeypatch.setattr(kind, "__call__", never)
    assert len(greedy(model, logits, state, 12)) == 12


def test_two_decoders_of_one_model_are_independent(model, prompt):
    starts = [read_prompt(model, prompt), read_prompt(model, prompt.flip(1))]
    alone = [[step.logits for step in greedy(model, *start, 9)] for start in starts]
    together = [steps(model, *start, Sampler(), 9) for start in starts]
    both = list(zip(*together))
    for i in range(2):
        assert_close([pair[i].logits for pair in both], alone[i], rtol=0, atol=0)


def test_decoders_in_several_threads_are_independent(model, prompt):
    starts = [read_prompt(model, prompt), read_prompt(model, prompt.flip(1))]
    alone = [[step.logits for step in greedy(model, *start, 40)] for start in starts]
    found = [None, None]

    def run(i):
        found[i] = [step.logits for step in greedy(model, *starts[i], 40)]

    threads = [threading.Thread(target=run, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(2):
        assert_close(found[i], alone[i], rtol=1e-12, atol=1e-12)


def test_memory_frozen_between_tokens(model, prompt):
    start = read_prompt(model, prompt)
    given = steps(model, *start, Sampler(), 6)
    states = [next(given).state for _ in range(3)]
    model.freeze_memory()
    states += [next(given).state for _ in range(3)]
    model.unfreeze_memory()
    weights = [dict(named_tensors(state))["layers.0.0.memory.memory.weights.0"] for state in states]
    assert not torch.equal(weights[1], weights[2])
    assert torch.equal(weights[3], weights[2]) and torch.equal(weights[5], weights[2])


def test_changed_parameters_are_used(model, prompt):
    """Changed in place, and replaced by another tensor."""
    start = read_prompt(model, prompt)
    for change in (lambda p: p.mul_(1.5), lambda p: setattr(p, "data", p.detach() * 1.5)):
        given = steps(model, *start, Sampler(), 2)
        step = next(given)
        with torch.no_grad():
            for parameter in model.layers.parameters():
                change(parameter)
        after = next(given)
        with torch.no_grad():
            hidden, _ = model.run(model.lookup(after.token[:, None]), step.state, None)
            assert_close(after.logits, model.predict(hidden[:, 0]), rtol=1e-9, atol=1e-10)


def swapped_in(model):
    weight = model.layers[1].blocks[1].up
    weight.weight = torch.nn.Parameter(1.5 * weight.weight.detach())


def assigned(model):
    model.load_state_dict({name: 1.1 * value for name, value in model.state_dict().items()}, assign=True)


def replaced(model):
    model.layers[1].blocks[1] = copy.deepcopy(model.layers[0].blocks[1])


def hooked(model):
    model.layers[1].blocks[1].register_forward_hook(lambda block, args, out: (2 * out[0], out[1]))


def given_a_forward(model):
    layer = model.layers[1].blocks[1].up
    forward = layer.forward
    layer.forward = lambda x: 2 * forward(x)


@pytest.mark.parametrize("change", [swapped_in, assigned, replaced, hooked, given_a_forward])
def test_replaced_modules_and_hooks_are_used(model, prompt, change):
    given = steps(model, *read_prompt(model, prompt), Sampler(), 3)
    next(given)
    step = next(given)
    change(model)
    after = next(given)
    with torch.no_grad():
        hidden, _ = model.run(model.lookup(after.token[:, None]), step.state, None)
        assert_close(after.logits, model.predict(hidden[:, 0]), rtol=1e-9, atol=1e-10)


def test_a_state_that_no_longer_fits_is_an_error(model, prompt):
    given = steps(model, *read_prompt(model, prompt), Sampler(), 3)
    next(given)
    model.float()
    with pytest.raises(TypeError, match=r"is torch\.float64, expected torch\.float32"):
        next(given)


@pytest.mark.parametrize("logits, rows", [(1, 2), (2, 1)])
def test_a_state_with_other_rows_than_the_logits_is_an_error(model, prompt, logits, rows):
    predicted, state = read_prompt(model, prompt.expand(2, -1))
    given = steps(model, predicted[:logits], tb.state.select(state, slice(rows)), Sampler(), 2)
    with pytest.raises(ValueError, match=f"state has {rows} rows"):
        next(given)


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_the_selected_backend_is_used(model, prompt, backend, monkeypatch):
    start = read_prompt(model, prompt)
    expected = [step.logits for step in greedy(model, *start, 5)]
    setting = "memory=step,memory_read=torch,cached_attention=torch,projection=torch,gated_projection=torch"
    monkeypatch.setenv("TITANS_BUILD_BACKEND", setting if backend == "torch" else backend)
    assert_close([step.logits for step in greedy(model, *start, 5)], expected, rtol=1e-8, atol=1e-9)
