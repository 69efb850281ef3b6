"""``memory_loss`` is the prediction error before each token is written, ``write_cost`` the mean of the gates."""

import pytest
import torch
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import titans_build as tb
from titans_build.blocks import observers
from titans_build.blocks.state import named_tensors
from titans_build.kernels.memory import read_memory
from titans_build.kernels.short_conv import query_key_value

MEMORY = {"type": "memory", "heads": 2, "chunk": 4, "expansion": 1}
ATTENTION = {"type": "attention", "heads": 2, "window": 6}
LAYERS = {
    "mac": [{"type": "context", "segment": 5, "persistent": 2, "memory": MEMORY, "attend": ATTENTION}],
    "mag": [{"type": "persistent", "tokens": 3, "of": {"type": "gate", "branches": [ATTENTION, MEMORY]}}],
    "mal": [{"type": "persistent", "tokens": 3, "of": [MEMORY, ATTENTION]}],
    "lmm": [MEMORY],
    "selective": [{**MEMORY, "threshold": 5.0, "gating": "hard_sigmoid"}],
}


def model(name, layers=1, dtype=torch.float64):
    recipe = {"version": 1, "dim": 8, "vocab": 11, "layers": {name: LAYERS[name]}, "stack": [name] * layers}
    return tb.build(tb.load_recipe(recipe), seed=0, dtype=dtype)


def tokens(time=11, rows=2):
    return torch.randint(0, 11, (rows, time), generator=torch.Generator().manual_seed(0))


MASK = torch.tensor([[True] * 9 + [False] * 2, [False] * 3 + [True] * 8])


def loss(module, given, mask=None):
    with tb.memory_loss(module) as aux:
        out = module(given, mask=mask)
    return aux.value(), out


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_memory_loss_against_single_tokens(masked, frozen):
    """Reads the memory with the key of each token before it is written, and compares with the value."""
    block = tb.build_block(MEMORY, dim=8, dtype=torch.float64, seed=0)
    x, mask = torch.randn(2, 11, 8, dtype=torch.float64), MASK if masked else None
    block.use = "read" if frozen else "both"
    with torch.no_grad():
        with tb.memory_loss(block) as aux:
            block(x, mask=mask)
        errors = []
        for row in range(2):
            state = block.init_state(1)
            for token in (x[row] if mask is None else x[row, mask[row]]).split(1):
                projected = block.qkv(token.unsqueeze(0))
                _, k, v, _ = query_key_value(projected, block.convolution, state.convolution, 2, None)
                predicted = read_memory(k, state.memory.weights, block.activation, block.norm_gain)
                errors.append((predicted - v).square().sum(-1).flatten())
                _, state = block(token.unsqueeze(0), state)
    assert_close(aux.value(), torch.cat(errors).mean())


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("masked", [False, True])
def test_outputs_and_states_do_not_change(name, masked):
    module, given, mask = model(name, layers=2), tokens(), MASK if masked else None
    value, out = loss(module, given, mask)
    expected = module(given, mask=mask)
    assert torch.equal(out.logits, expected.logits)
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(named_tensors(out.state), named_tensors(expected.state)))
    assert value.shape == () and value > 0 and not observers.active
    # the loss is the mean of those of single rows, weighted by their tokens
    counts = torch.tensor([11.0, 11.0] if mask is None else mask.sum(1).tolist(), dtype=torch.float64)
    alone = [loss(module, given[b : b + 1] if mask is None else given[b : b + 1, mask[b]])[0] for b in range(2)]
    assert_close(value, (torch.stack(alone) * counts).sum() / counts.sum())


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("masked", [False, True])
def test_gradient_against_finite_differences(name, masked):
    module, given, mask = model(name), tokens(), MASK if masked else None
    parameters = dict(module.named_parameters())
    with torch.no_grad():
        for i, parameter in enumerate(parameters.values()):
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i)))
    value, out = loss(module, given, mask)
    total = out.logits.square().mean() + 0.5 * value
    grads = dict(zip(parameters, torch.autograd.grad(total, parameters.values(), allow_unused=True)))
    aux_only = torch.autograd.grad(loss(module, given, mask)[0], module.embedding)[0]
    assert aux_only.abs().max() > 1e-4

    def evaluate():
        with torch.no_grad():
            value, out = loss(module, given, mask)
            return float(out.logits.square().mean() + 0.5 * value)

    for i, (path, parameter) in enumerate(parameters.items()):
        direction = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(50 + i), dtype=torch.float64)
        direction /= direction.norm()
        seen = []
        for move in (1e-5, -2e-5):
            with torch.no_grad():
                parameter.add_(move * direction)
            seen.append(evaluate())
        with torch.no_grad():
            parameter.add_(1e-5 * direction)
        found = 0.0 if grads[path] is None else float((grads[path] * direction).sum())
        assert found == pytest.approx((seen[0] - seen[1]) / 2e-5, rel=1e-5, abs=1e-7), path


def test_several_calls_give_the_mean_over_all_tokens():
    module, given = model("mac"), tokens()
    whole, _ = loss(module, given)
    with torch.no_grad(), tb.memory_loss(module) as aux:
        state = None
        for piece in given.split([4, 1, 1, 5], dim=1):
            state = module(piece, state).state
    assert_close(aux.value(), whole.detach())
    with tb.memory_loss(module) as aux:
        module.generate(given, 3)
    assert aux.value() > 0


def test_the_loss_of_a_bfloat16_model_is_float32():
    module = model("mag", dtype=torch.bfloat16)
    value, _ = loss(module, tokens())
    assert value.dtype == torch.float32
    assert_close(value.double(), loss(module.double(), tokens())[0], rtol=0.05, atol=0.0)


def test_the_loss_of_a_model_without_memories_is_zero():
    block = tb.build_block("ffn", dim=8)
    with tb.memory_loss(block) as aux:
        block(torch.randn(1, 3, 8))
    assert aux.value() == 0 and aux.value().dtype == torch.float32


def test_a_call_without_valid_tokens():
    module = model("lmm")
    value, _ = loss(module, tokens(), torch.zeros(2, 11, dtype=torch.bool))
    assert value == 0


def test_with_activation_checkpointing():
    module, given = model("mac", layers=2), tokens()

    def grads():
        module.zero_grad()
        with tb.memory_loss(module) as aux:
            out = module(given, targets=given)
            total = out.loss + 0.1 * aux.value()
            total.backward()
        return total.detach(), [p.grad.clone() for p in module.parameters()]

    expected = grads()
    for layer in module.layers:
        whole = layer.forward
        layer.forward = lambda *x, whole=whole, **y: checkpoint(whole, *x, use_reentrant=False, **y)
    found = grads()
    assert_close(found, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("masked", [False, True])
def test_write_cost_is_the_mean_of_the_gates(name, masked):
    module, given, mask = model(name, layers=2), tokens(), MASK if masked else None
    with tb.write_cost(module) as cost, tb.observe(module) as seen:
        out = module(given, mask=mask)
    assert torch.equal(out.logits, module(given, mask=mask).logits)
    if name != "selective":  # the cost includes tokens below the threshold
        shares = [(record.step / 0.1 + record.forgetting) for record in seen.memories.values()]
        assert_close(cost.value().float(), torch.stack(shares).nanmean())
    cost.value().backward()
    controls = [p for path, p in module.named_parameters() if "controls" in path]
    assert controls and all(p.grad is not None and p.grad.abs().sum() > 0 for p in controls)


def test_the_write_cost_closes_hard_gates():
    module = model("selective", dtype=torch.float32)
    optimizer = torch.optim.SGD([p for path, p in module.named_parameters() if "controls" in path], lr=0.5)
    for _ in range(40):
        optimizer.zero_grad()
        with tb.write_cost(module) as cost:
            module(tokens())
        cost.value().backward()
        optimizer.step()
    with tb.write_cost(module) as cost:
        module(tokens())
    assert cost.value() == 0
