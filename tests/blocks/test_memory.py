"""The neural memory block and its options."""

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import titans_build as tb
from titans_build.blocks.memory import NeuralMemory
from titans_build.blocks.published_learners import LEARNERS
from titans_build.blocks.state import named_tensors
from titans_build.registry import RecipeError

SMALL = {"type": "memory", "heads": 2, "chunk": 5, "expansion": 2}


def memory(dim: int = 8, **options: object) -> NeuralMemory:
    torch.manual_seed(0)
    block = tb.build_block(SMALL | options, dim=dim, dtype=torch.float64)
    assert isinstance(block, NeuralMemory)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return block


def test_gates_of_a_chunk_are_those_of_its_first_token() -> None:
    block = memory(gates="chunk")
    x = torch.randn(1, 12, 8, dtype=torch.float64)
    theta, eta, alpha = block.inputs(x, block.init_state(1), None)[0][3:6]
    for gate in (theta, eta, alpha):
        assert torch.equal(gate[:, 0:5], gate[:, :1].expand(-1, 5, -1))
        assert torch.equal(gate[:, 5:10], gate[:, 5:6].expand(-1, 5, -1))
        assert not torch.equal(gate[:, 4], gate[:, 5])


@pytest.mark.parametrize("gates", ["token", "chunk"])
def test_empty_and_masked_inputs_do_not_change_the_state(gates: str) -> None:
    block = memory(gates=gates)
    state = block(torch.randn(2, 7, 8, dtype=torch.float64), block.init_state(2))[1]
    for x, mask in (
        (torch.randn(2, 3, 8, dtype=torch.float64), torch.zeros(2, 3, dtype=torch.bool)),
        (torch.randn(2, 0, 8, dtype=torch.float64), None),
    ):
        y, after = block(x, state, mask=mask)
        assert torch.equal(y, torch.zeros_like(x))
        for (name, old), (_, new) in zip(tb.state.named_tensors(state), tb.state.named_tensors(after)):
            assert torch.equal(old, new), name


@pytest.mark.parametrize("heads", [1, 4])
def test_hard_gates_are_initialized_like_sigmoids(heads: int) -> None:
    """Equal means and deviations, and no gate is saturated: all have gradients."""
    options = {"heads": heads, "chunk": 5, "type": "memory"}
    soft, hard = (tb.build_block(options | {"gating": g}, dim=64, seed=0) for g in ("sigmoid", "hard_sigmoid"))
    assert isinstance(soft, NeuralMemory) and isinstance(hard, NeuralMemory)
    x = torch.randn(4, 500, 64)
    for a, b in zip(*(b.inputs(x, b.init_state(4), None)[0][3:6] for b in (soft, hard))):
        assert b.min() > 0 and b.max() < 1
        torch.testing.assert_close(a.mean((0, 1)), b.mean((0, 1)), rtol=0.01, atol=0.0)
        torch.testing.assert_close(a.std((0, 1)), b.std((0, 1)), rtol=0.05, atol=0.0)


@pytest.mark.parametrize("time", [1, 7])
@pytest.mark.parametrize("grad", [False, True])
def test_hard_gates_reach_zero_and_one(time: int, grad: bool) -> None:
    """With closed gates a memory is bit-identical; with fully open gates it forgets everything."""
    block = memory(dim=32, gating="hard_sigmoid", momentum=False)
    x = torch.randn(1, time, 32, dtype=torch.float64)
    with torch.no_grad():
        block.controls.weight.zero_()
        block.controls.bias.fill_(-3.5)
    start = block.init_state(1)
    with torch.set_grad_enabled(grad):
        _, shut = block(x, start)
        with torch.no_grad():
            block.controls.bias[2:] = 3.5
        _, wiped = block(x, start)
    for before, kept, gone in zip(start.memory.weights, shut.memory.weights, wiped.memory.weights):
        assert torch.equal(before, kept)
        assert not gone.any()


def test_threshold() -> None:
    block, free = memory(threshold=4.0), memory()
    x = torch.randn(2, 12, 8, dtype=torch.float64)
    with tb.observe(block) as seen:
        y, _ = block(x)
    wrote = seen.memories[""].wrote
    assert wrote.any() and not wrote.all()
    assert torch.equal(wrote, seen.memories[""].surprise >= 4.0)
    assert not torch.equal(y, free(x)[0])
    quiet = memory(threshold=1e6, momentum=False)
    _, state = quiet(x)
    assert all(torch.equal(w[1], p) for w, p in zip(state.memory.weights, quiet.initial_weights))


def test_read_does_not_write_and_reads_each_token_as_the_next() -> None:
    block = memory()
    x = torch.randn(2, 7, 8, dtype=torch.float64)
    _, state = block(x)
    before = [t.clone() for _, t in tb.state.named_tensors(state)]
    asked = block.read(x, state)
    assert all(torch.equal(a, b) for a, (_, b) in zip(before, tb.state.named_tensors(state)))
    # tokens are read independently of each other, and as a read-only block reads the next token
    assert torch.allclose(block.read(x[:, 3:4], state), asked[:, 3:4], atol=1e-12)
    block.use = "read"
    assert torch.allclose(block(x[:, 3:4], state)[0], asked[:, 3:4], atol=1e-12)


def test_write_returns_the_state_of_forward() -> None:
    block = memory()
    x = torch.randn(2, 7, 8, dtype=torch.float64)
    mask = torch.rand(2, 7) > 0.3
    written, (_, expected) = block.write(x, block.init_state(2), mask), block(x, mask=mask)
    for (path, a), (_, b) in zip(tb.state.named_tensors(written), tb.state.named_tensors(expected)):
        assert torch.equal(a, b), path


def test_use() -> None:
    x = torch.randn(1, 9, 8, dtype=torch.float64)
    both, frozen, silent = (memory(use=use) for use in ("both", "read", "write"))
    fresh = frozen.init_state(1)
    assert all(torch.equal(a, b) for a, b in zip(frozen(x)[1].memory.weights, fresh.memory.weights))
    y, state = silent(x)
    assert not y.any()
    assert all(torch.equal(a, b) for a, b in zip(state.memory.weights, both(x)[1].memory.weights))


def test_a_fresh_state_has_the_learned_initial_weights() -> None:
    block = memory(learn_momentum=True)
    state = block.init_state(3).memory
    for part, learned in ((state.weights, block.initial_weights), (state.momentum, block.initial_momentum)):
        assert all(torch.equal(w[1], p) and w.requires_grad for w, p in zip(part, learned))
    assert all(w.any() for w in state.weights)


def test_the_state_of_a_bfloat16_model_is_float32() -> None:
    block = tb.build_block(SMALL, dim=8, dtype=torch.bfloat16)
    y, state = block(torch.randn(1, 6, 8, dtype=torch.bfloat16))
    assert y.dtype == torch.bfloat16
    assert all(w.dtype == torch.float32 for w in (*state.memory.weights, *state.memory.momentum))


def test_the_state_shares_no_larger_memory() -> None:
    block = memory()
    with torch.no_grad():
        for length in (10, 1000):
            _, state = block(torch.randn(1, length, 8, dtype=torch.float64))
            for path, tensor in tb.state.named_tensors(state):
                assert tensor.untyped_storage().nbytes() <= 2 * tensor.nbytes, path


def test_flops_count_the_products() -> None:
    block = memory(dim=16, chunk=4, conv=0)
    projections = 2 * (3 * 16 * 16 + 16 * 6 + 16 * 16 + 16 * 16)
    weights, first, width = 2 * 8 * 16, 8 * 16, 8 + 16
    per_head = 2 * weights + 2 * (weights - first) + 8 * weights + 2 * 4 * 2 * width
    assert block.flops(8) == 8 * (projections + 2 * per_head)


def test_invalid_fields_are_errors() -> None:
    with pytest.raises(RecipeError, match="5 heads do not divide the width 8"):
        tb.build_block({"type": "memory", "heads": 5}, dim=8)
    with pytest.raises(RecipeError, match="momentum is false"):
        tb.build_block({"type": "memory", "momentum": False, "learn_momentum": True}, dim=8)


def test_autocast_does_not_change_dtypes_of_the_state() -> None:
    block = tb.build_block(SMALL | {"gates": "chunk"}, dim=8)
    x = torch.randn(2, 9, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, state = block(x)
        y, state = block(x[:, :3], state)
        block.read(x, state)
    y.sum().backward()
    assert {t.dtype for _, t in tb.state.named_tensors(state)} == {torch.float32, torch.int64}


@pytest.mark.parametrize("options", [{}, {"conv": 0, "retrieve": "before"}, {"gates": "chunk", "use": "read"}], ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_backends_agree(options: dict[str, object], masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    block = memory(**options)
    x = torch.randn(2, 23, 8, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(2, 23) > 0.3 if masked else None
    found = []
    for backend in ("auto", "torch", "reference,memory=torch"):
        monkeypatch.setenv("TITANS_BUILD_BACKEND", backend)
        y, state = block(x, mask=mask)
        asked = block.read(x, state)
        leaves = [x, *block.parameters()]
        total = y.square().sum() + asked.sum() + sum(t.sum() for _, t in tb.state.named_tensors(state))
        found.append([y, asked, *torch.autograd.grad(total, leaves, materialize_grads=True)])
    for other in found[1:]:
        for a, b in zip(found[0], other):
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)


def test_gradients_of_one_token_for_single_parameters() -> None:
    block = memory(dim=32).requires_grad_(False)
    x = torch.randn(1, 1, 32, dtype=torch.float64)
    for parameter in (block.output_gain, block.initial_weights[0], block.convolution, block.output.weight):
        parameter.requires_grad_(True)
        (gradient,) = torch.autograd.grad(block(x)[0].sum(), parameter)
        assert gradient.any()
        parameter.requires_grad_(False)


def test_hooked_and_replaced_layers_are_called() -> None:
    block, x = memory(dim=32), torch.randn(1, 1, 32, dtype=torch.float64)
    with torch.no_grad():
        expected = block(x)[0]
        for name in ("qkv", "controls", "output_gate", "output"):
            called = []
            layer = getattr(block, name)
            handle = layer.register_forward_hook(lambda *_, called=called: called.append(True))
            assert torch.allclose(block(x)[0], expected) and called
            handle.remove()
            wrapped = torch.nn.Sequential(layer)
            setattr(block, name, wrapped)
            assert torch.allclose(block(x)[0], expected)
            setattr(block, name, layer)


def test_invalid_inputs_are_errors() -> None:
    block = tb.build_block(SMALL, dim=8)
    x = torch.zeros(1, 3, 8)
    with pytest.raises(ValueError, match="mask"):
        block(x, mask=torch.ones(1, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"\[batch, time, 8\]"):
        block(torch.zeros(1, 3, 5))
    with pytest.raises(ValueError, match="state has 2 rows"):
        block(x, block.init_state(2))
    with pytest.raises(TypeError, match="expected NeuralMemoryState"):
        block(x, (torch.zeros(1),))


def test_the_class_alone_is_a_module_with_initialized_parameters() -> None:
    alone = tb.NeuralMemory(dim=8)
    assert torch.equal(alone.controls.bias, tb.build_block("memory", dim=8).controls.bias)
    assert all(0.5 < weight.std() < 2 for weight in alone.initial_weights)
    x = torch.randn(2, 9, 8)
    y, _ = alone(x)
    assert torch.allclose(torch.cat([alone(x[:, :4])[0], alone(x[:, 4:], alone(x[:, :4])[1])[0]], 1), y, atol=1e-5)
    with pytest.raises(ValueError, match="heads: 4 heads do not divide the width 9"):
        tb.NeuralMemory(dim=9)


@pytest.mark.parametrize("name", ["omega_net", "lact", "moneta", "titans_channel", "kda"])
def test_a_learner_takes_hooks_on_saved_tensors_and_activation_checkpointing(name: str) -> None:
    block = tb.build_block({"type": name, "heads": 2} | ({"chunk": 4} if name != "kda" else {}), dim=16).double()
    x = torch.randn(2, 9, 16, dtype=torch.float64, requires_grad=True)

    def gradients(y: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(y.square().sum(), [x, *block.parameters()], allow_unused=True))

    expected = gradients(block(x)[0])
    again = gradients(checkpoint(lambda x: block(x)[0], x, use_reentrant=False))
    with torch.autograd.graph.save_on_cpu():
        y = block(x)[0]
    for found in (again, gradients(y)):
        for a, b in zip(found, expected):
            assert (a is None) == (b is None) and (a is None or torch.equal(a, b))


@pytest.mark.parametrize("name", [*LEARNERS])
def test_a_learners_state_shares_no_larger_memory(name: str) -> None:
    block = tb.build_block(
        {"type": name, "heads": 2} | ({} if LEARNERS[name][1].get("chunk") == 1 else {"chunk": 4}), dim=16
    )
    with torch.no_grad():
        after = block(torch.randn(1, 60, 16))[1]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for _, t in named_tensors(after)}
    assert sum(storages.values()) <= 2.5 * block.state_bytes()
