"""``observe`` records every token of every memory, and does not change the model."""

import copy
import pickle

import pytest
import torch
from torch.testing import assert_close

import titans_build as tb
from titans_build.blocks import observers
from titans_build.blocks.state import named_tensors
from titans_build.kernels.memory import Options, Tokens
from titans_build.kernels.memory.measure import measure_memory
from titans_build.kernels.short_conv import query_key_value

MEMORY = {"type": "memory", "heads": 2, "chunk": 4}
ATTENTION = {"type": "attention", "heads": 2, "window": 6}
LAYERS = {
    "mac": [{"type": "context", "segment": 5, "persistent": 2, "memory": MEMORY, "attend": ATTENTION}, "ffn"],
    "mag": [{"type": "persistent", "tokens": 3, "of": {"type": "gate", "branches": [ATTENTION, MEMORY]}}],
    "mal": [{"type": "persistent", "tokens": 3, "of": [MEMORY, ATTENTION]}],
    "lmm": [MEMORY],
    "inputs": [{"type": "context", "segment": 5, "persistent": 2, "memory": MEMORY, "write": "inputs", "form": "silu"}],
    "inside": [{"type": "context", "segment": 4, "memory": MEMORY, "attend": [MEMORY, ATTENTION]}],
}
PATHS = {"mac": "layers.0.blocks.0.memory", "mag": "layers.0.blocks.0.of.branches.1",
         "mal": "layers.0.blocks.0.of.of.0", "lmm": "layers.0.blocks.0", "inputs": "layers.0.blocks.0.memory",
         "inside": "layers.0.blocks.0.memory"}  # fmt: skip
GATES = {"mac": "layers.0.blocks.0", "mag": "layers.0.blocks.0.of", "inputs": "layers.0.blocks.0"}


def model(name="mac", dtype=torch.float64, dim=16):
    recipe = {"version": 1, "dim": dim, "vocab": 11, "layers": LAYERS, "stack": [name]}
    recipe["layers"] = {name: LAYERS[name]}
    built = tb.build(tb.load_recipe(recipe), seed=0, dtype=dtype)
    with torch.no_grad():
        for i, parameter in enumerate(built.parameters()):
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i), dtype=torch.float64)
            parameter.add_(0.1 * noise.to(parameter.dtype))
    return built


def tokens(time=13, rows=2, seed=0):
    return torch.randint(0, 11, (rows, time), generator=torch.Generator().manual_seed(seed))


def padded(rows=3, time=13):
    mask = torch.rand(rows, time, generator=torch.Generator().manual_seed(1)) > 0.4
    mask[0, :4] = False
    mask[1, 9:] = False
    return mask


def same(a, b):
    for (path, x), (other, y) in zip(named_tensors(a), named_tensors(b), strict=True):
        assert path == other and torch.equal(x, y), path


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_observing_does_not_change_results(name, masked, dtype):
    module, given = model(name, dtype), tokens(rows=3)
    mask = padded() if masked else None

    def run():
        module.zero_grad()
        out = module(given, mask=mask, targets=given)
        out.loss.backward()
        return out, [p.grad.clone() for p in module.parameters() if p.grad is not None]

    expected, grads = run()
    with tb.observe(module) as seen:
        out, found = run()
    assert torch.equal(out.logits, expected.logits) and torch.equal(out.loss, expected.loss)
    same(out.state, expected.state)
    assert all(torch.equal(a, b) for a, b in zip(found, grads, strict=True))
    assert list(seen.memories) == [PATHS[name]]
    record = seen.memories[PATHS[name]]
    real = torch.ones(3, 13, dtype=torch.bool) if mask is None else mask
    for value in record[:5]:
        assert value.shape == (3, 13, 2) and value.dtype == torch.float32 and not value.requires_grad
        assert torch.equal(value.isfinite().all(-1), real) and torch.equal(value.isnan().all(-1), ~real)
    assert torch.equal(record.wrote, real.unsqueeze(-1).expand(-1, -1, 2))
    assert record.norms.shape[0] == 3 and record.norms.shape[2:] == (2, 2) and record.start.shape == (3, 2, 2)
    assert not observers.active


@pytest.mark.parametrize("masked", [False, True])
def test_records_equal_the_inputs_of_the_operation(masked):
    block = tb.build_block({**MEMORY, "threshold": 6.0}, dim=16, dtype=torch.float64, seed=0)
    x, mask = torch.randn(3, 13, 16, dtype=torch.float64), padded() if masked else None
    with torch.no_grad(), tb.observe(block) as seen:
        _, after = block(x, mask=mask)
    record = seen.memories[""]
    for row in range(3):
        kept = x[row : row + 1] if mask is None else x[row : row + 1, mask[row]]
        real = torch.ones(13, dtype=torch.bool) if mask is None else mask[row]
        state = block.init_state(1)
        q, k, v, _ = query_key_value(block.qkv(kept), block.convolution, state.convolution, 2, None)
        theta, eta, alpha = block.inputs(kept, state, None)[0][3:6]
        options = Options(4, "gelu", 1.0, "after", threshold=6.0)
        expected = measure_memory(Tokens(q, k, v, theta, eta, alpha), state.memory, block.norm_gain, None, options)
        assert 0.1 < expected.suppressed.double().mean() < 0.9
        zeroed = [gate.masked_fill(expected.suppressed, 0.0) for gate in (theta, alpha)]
        wanted = expected.surprise, expected.error, zeroed[0], eta, zeroed[1]
        for found, value in zip(record, wanted):
            assert_close(found[row, real], value[0].float())
        assert torch.equal(record.wrote[row, real], ~expected.suppressed[0])
    norms = torch.stack([w.norm(dim=(-2, -1)) for w in after.memory.weights], -1)
    assert_close(record.norms, norms.float().unsqueeze(1))
    fresh = torch.stack([w.norm(dim=(-2, -1)) for w in block.init_state(3).memory.weights], -1)
    assert_close(record.start, fresh.float())


@pytest.mark.parametrize("name", LAYERS)
def test_records_are_nan_at_masked_tokens_only(name):
    module, given, mask = model(name), tokens(rows=3), padded()
    with torch.no_grad():
        with tb.observe(module) as seen:
            module(given, mask=mask)
        for row in range(3):
            with tb.observe(module) as alone:
                module(given[row : row + 1, mask[row]])
            for found, expected in ((seen.memories, alone.memories), (seen.gates, alone.gates)):
                assert found.keys() == expected.keys()
                for path in found:
                    for a, b in zip(found[path][:6], expected[path][:6]):
                        assert_close(a[row, mask[row]], b[0])
    assert list(seen.gates) == ([GATES[name]] if name in GATES else ["layers.0.blocks.0"] if name == "inside" else [])


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("pieces", [(13,), (4, 1, 6, 2), (1,) * 13])
def test_records_of_a_stream_equal_those_of_one_pass(name, pieces):
    module, given = model(name), tokens()
    with torch.no_grad():
        with tb.observe(module) as whole:
            module(given)
        with tb.observe(module) as seen:
            state = None
            for piece in given.split(pieces, dim=1):
                state = module(piece, state).state
    for a, b in zip(seen.memories[PATHS[name]][:6], whole.memories[PATHS[name]][:6]):
        assert_close(a, b)
    assert_close(seen.memories[PATHS[name]].norms[:, -1], whole.memories[PATHS[name]].norms[:, -1])
    assert_close(seen.memories[PATHS[name]].start, whole.memories[PATHS[name]].start)
    for path, gate in whole.gates.items():
        for a, b in zip(seen.gates[path], gate):
            assert_close(a, b)


@pytest.mark.parametrize("name", LAYERS)
def test_generation_is_recorded_for_each_token(name):
    module, given = model(name, torch.float32, 32), tokens()
    expected = module.generate(given, 7).tokens
    with tb.observe(module) as seen:
        out = module.generate(given, 7)
    assert torch.equal(out.tokens, expected)
    with torch.no_grad(), tb.observe(module) as whole:
        module(out.tokens)
    for a, b in zip(seen.memories[PATHS[name]][:5], whole.memories[PATHS[name]][:5]):
        assert a.shape == (2, 20, 2)
        assert_close(a, b, rtol=1e-3, atol=1e-4)
    for path, gate in whole.gates.items():
        for a, b in zip(seen.gates[path], gate):
            assert_close(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["mac", "mag"])
def test_records_of_a_frozen_memory(name):
    module, given = model(name), tokens()
    with torch.no_grad(), module.freeze_memory():
        expected = module(given).logits
        with tb.observe(module) as seen:
            assert torch.equal(module(given).logits, expected)
    record = seen.memories[PATHS[name]]
    assert (record.surprise > 0).all() and not record.wrote.any()
    assert not record.step.any() and not record.forgetting.any() and not record.momentum.any()
    assert torch.equal(record.norms[:, -1], record.start)


def test_gate_records_equal_the_factor_of_the_first_branch():
    module, given = model("mag"), tokens()
    gate = module.layers[0].blocks[0].of
    outputs = []
    hooks = [branch.register_forward_hook(lambda m, i, o: outputs.append(o[0])) for branch in gate.branches]
    with torch.no_grad(), tb.observe(module) as seen:
        module(given)
    for hook in hooks:
        hook.remove()
    a, b = outputs[-2:]
    record = seen.gates[GATES["mag"]]
    assert_close(record.first, a.norm(dim=-1).float())
    assert_close(record.second, b.norm(dim=-1).float())
    normed = b / (b.square().mean(-1, keepdim=True) + 1e-6).sqrt() * gate.gate.gain_b
    assert_close(record.gate, torch.sigmoid(normed).mean(-1).float())


def test_observers_are_nested():
    module, given = model(), tokens()
    with torch.no_grad():
        with tb.observe(module) as outer:
            module(given[:, :5])
            with tb.observe(module.layers[0]) as inner:
                module(given[:, 5:])
            with pytest.raises(KeyError), tb.observe(module) as broken:
                module(given[:, :3])
                raise KeyError
        module(given)
        again = outer.memories[PATHS["mac"]].surprise.shape
        with outer:
            module(given[:, :2])
    assert again == (2, 16, 2) and outer.memories[PATHS["mac"]].surprise.shape == (2, 18, 2)
    assert inner.memories["blocks.0.memory"].surprise.shape == (2, 8, 2)
    assert broken.memories[PATHS["mac"]].surprise.shape == (2, 3, 2)
    assert not observers.active
    with outer, pytest.raises(RuntimeError, match="already active"), outer:
        pass


def test_other_models_are_not_recorded():
    module, other = model(), model()
    with torch.no_grad(), tb.observe(module) as seen:
        other(tokens())
    assert seen.memories == {} and seen.gates == {}


def test_an_observed_model_can_be_copied_and_pickled():
    module, given = model(), tokens()
    with tb.observe(module) as seen:
        twin, thawed = copy.deepcopy(module), pickle.loads(pickle.dumps(module))
        assert torch.equal(twin(given).logits, thawed(given).logits)
    assert seen.memories == {}


def test_calls_with_different_numbers_of_rows_are_errors():
    module = model()
    with torch.no_grad(), tb.observe(module) as seen:
        module(tokens(rows=2))
        module(tokens(rows=3))
    with pytest.raises(ValueError, match=r"layers.0.blocks.0.memory: calls with different numbers of rows: 2, 3"):
        _ = seen.memories


@pytest.mark.parametrize("name", ["mac", "mag"])
def test_calls_without_valid_tokens_are_not_recorded(name):
    module = model(name)
    with torch.no_grad(), tb.observe(module) as seen:
        module(tokens(), mask=torch.zeros(2, 13, dtype=torch.bool))
    assert seen.memories == {} and seen.gates == {}


def test_a_model_must_be_a_module():
    with pytest.raises(TypeError, match="model: expected a module, got str"):
        tb.observe("mac")


def test_compiled_models_run_eagerly_while_observed():
    block, x = tb.build_block(MEMORY, dim=16, seed=0), torch.randn(2, 13, 16)
    torch._dynamo.reset()
    run = torch.compile(block, backend="eager", fullgraph=True)
    with torch.no_grad():
        expected = run(x)[0]
        with tb.observe(run) as seen:
            assert_close(run(x)[0], expected)
        with torch._dynamo.config.patch(error_on_recompile=True):
            assert torch.equal(run(x)[0], expected)
    assert list(seen.memories) == [""] and seen.memories[""].surprise.shape == (2, 13, 2)


@pytest.mark.parametrize("name", ["mac", "mag"])
def test_surprise_under_autocast_is_computed_in_float32(name):
    built, read = model(name, torch.float32), tokens()
    with torch.no_grad(), tb.observe(built) as exact:
        built(read)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), tb.observe(built) as seen:
        built(read)
    found, expected = seen.memories[PATHS[name]].surprise, exact.memories[PATHS[name]].surprise
    assert found.dtype == torch.float32 and found.isfinite().all()
    assert_close(found, expected, rtol=0.1, atol=0.05 * float(expected.mean()))


def test_steps_of_several_matrices_are_recorded_as_their_mean():
    block = tb.build_block({"type": "lact", "heads": 2, "chunk": 4}, dim=16)
    x = torch.randn(3, 7, 16)
    with tb.observe(block) as seen:
        block(x)
    (record,) = seen.memories.values()
    inputs, _, _ = block.inputs(x, block.init_state(3), None)
    assert_close(record.step, inputs.theta.mean(3).float())


def test_activation_checkpointing_is_recorded_once():
    module, given = model(), tokens()
    for layer in module.layers:
        whole = layer.forward
        layer.forward = lambda *x, whole=whole, **y: torch.utils.checkpoint.checkpoint(
            whole, *x, use_reentrant=False, **y
        )
    with tb.observe(module) as seen:
        module(given, targets=given).loss.backward()
    assert seen.memories[PATHS["mac"]].surprise.shape == (2, 13, 2)
