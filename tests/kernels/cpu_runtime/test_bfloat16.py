"""Products with bfloat16 operands: where they are taken, how far off they may be, and what they leave alone.

The unit roundoff of bfloat16 is 2^-8, so that a product of two rounded numbers is off by at most 2^-7 + 2^-16 of its
size. Numbers of all sizes are off by 0.0024 of their product on average; what is made of a few products, one after the
other, by a few times that.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.nn.functional import linear

import titans_build as tb
from titans_build.kernels import dispatch
from titans_build.kernels import linear as linear_operation
from titans_build.kernels.attention import Prefix, attention
from titans_build.kernels.cpu_runtime import call
from titans_build.kernels.cpu_runtime.call import product_dtype
from titans_build.kernels.linear import cpu as product
from titans_build.kernels.linear import linear_of, project
from titans_build.kernels.memory import MemoryState, read_memory, titans_memory
from titans_build.kernels.norm_gate import swiglu

UNABLE = call.lacks_bfloat16()
able = pytest.mark.skipif(UNABLE is not None, reason=f"bfloat16 operands: {UNABLE}")
LARGEST = 2**-7 + 2**-16
TOLERANCE = 1e-2


@pytest.fixture
def setting():
    """Sets the precision; the one before is there again when the test ends."""
    before = torch.get_float32_matmul_precision()
    yield torch.set_float32_matmul_precision
    torch.set_float32_matmul_precision(before)


@pytest.fixture
def medium(setting):
    setting("medium")


def rounded(x):
    return x.detach().bfloat16().double()


def error_ratio(got, expected):
    return ((got.double() - expected).square().mean().sqrt() / expected.square().mean().sqrt()).item()


def assert_product(got, a, b, bias=None):
    """That ``got`` is ``a @ b`` of the rounded factors, but for the rounding of float32 sums."""
    exact = rounded(a) @ rounded(b)
    size = rounded(a).abs() @ rounded(b).abs()
    if bias is not None:
        exact, size = exact + bias, size + bias.abs()
    assert got.dtype == torch.float32 and got.shape == exact.shape
    terms = a.shape[1] + 2
    assert ((got.double() - exact).abs() <= terms * 2**-23 * size).all()
    true = a.detach().double() @ b.detach().double() + (0 if bias is None else bias)
    most = a.detach().abs().double() @ b.detach().abs().double()
    assert ((got.double() - true).abs() <= LARGEST * most + terms * 2**-23 * size).all()


# -- linear maps -------------------------------------------------------------------------------------------------------

SIZES = [
    (5, 1, 1), (7, 33, 5), (5, 2, 16), (130, 31, 40), (129, 512, 33), (300, 513, 64), (17, 1100, 48), (1024, 64, 12),
    (271, 96, 100),
]  # fmt: skip


@able
@pytest.mark.parametrize("tokens, width, out", SIZES)
@pytest.mark.parametrize("biased", [False, True])
def test_a_linear_map_and_its_gradients_are_products_of_rounded_factors(medium, tokens, width, out, biased):
    x, weight = (torch.randn(shape, requires_grad=True) for shape in ((tokens, width), (out, width)))
    bias = torch.randn(out, requires_grad=True) if biased else None
    y = project(x, weight, bias)
    assert_product(y, x, weight.t(), None if bias is None else bias.detach())
    grad = torch.randn(tokens, out)
    grad_x, grad_weight, *rest = torch.autograd.grad(y, [t for t in (x, weight, bias) if t is not None], grad)
    assert_product(grad_x, grad, weight)
    assert_product(grad_weight, grad.t(), x)
    if biased:
        torch.testing.assert_close(rest[0], grad.sum(0))


@able
def test_factors_in_any_strides(medium):
    x, weight = torch.randn(3, 40, 80)[:, 1::2, 7:71], torch.randn(64, 50).t()[:33]
    assert_product(project(x, weight).flatten(0, 1), x.reshape(-1, 64), weight.t())
    every_other = torch.randn(66, 128)[::2, ::2]
    assert_product(project(x, every_other).flatten(0, 1), x.reshape(-1, 64), every_other.t())
    expanded = torch.randn(1, 64).expand(20, 64)
    assert_product(project(expanded, weight), expanded, weight.t())


@able
def test_rounding_to_nearest_even_at_any_magnitude(medium):
    x = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8, 1 + 2**-8 + 2**-23, 3e38, 1e-37, 0.0, float("inf")])
    y = project(x[:, None].expand(8, 1), torch.ones(1, 1))[:, 0]
    assert y.tolist() == [1, 1 + 2**-6, -1, 1 + 2**-7, *x[4:6].bfloat16().tolist(), 0, float("inf")]
    assert project(torch.full((8, 3), float("nan")), torch.ones(2, 3)).isnan().all()


@able
def test_the_same_to_the_last_bit_with_any_number_of_threads(medium):
    x, weight = torch.randn(700, 600), torch.randn(130, 600)
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 2):
            torch.set_num_threads(threads)
            results.append(project(x, weight))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], other) for other in results[1:])


@able
def test_gradients_of_gradients(medium):
    x, weight = torch.randn(9, 20, requires_grad=True), torch.randn(7, 20, requires_grad=True)

    def twice(x, weight, run):
        first = torch.autograd.grad(run(x, weight).pow(3).sum(), (x, weight), create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), (x, weight))

    wide = [t.detach().double().requires_grad_() for t in (x, weight)]
    for got, expected in zip(twice(x, weight, project), twice(*wide, linear), strict=True):
        assert error_ratio(got, expected) < 2 * TOLERANCE  # a chain of six products


@able
def test_layer_whose_input_is_recomputed(medium):
    layer = torch.nn.Linear(32, 48, bias=False)
    inner, weight = torch.randn(2, 70, 64, requires_grad=True), layer.weight
    y = linear_of(layer, swiglu, inner)
    made = swiglu(inner.detach())
    assert_product(y.flatten(0, 1), made.flatten(0, 1), weight.t())
    grad = torch.randn_like(y)
    got = torch.autograd.grad(y, (inner, weight), grad)
    wide = [t.detach().double().requires_grad_() for t in (inner, weight)]
    expected = torch.autograd.grad(linear(swiglu(wide[0]), wide[1]), wide, grad.double())
    assert all(error_ratio(a, b) < TOLERANCE for a, b in zip(got, expected, strict=True))
    with torch.no_grad():
        assert torch.equal(linear_of(layer, swiglu, inner), y)


# -- memory and attention ----------------------------------------------------------------------------------------------


def memory_inputs(time, momentum=True, layers=2, width=64, hidden=128, heads=2):
    g = torch.Generator().manual_seed(0)
    randn = lambda *shape: torch.randn(*shape, generator=g)  # noqa: E731
    q, k = (torch.nn.functional.normalize(randn(2, time, heads, width), dim=-1) for _ in "qk")
    theta, eta, alpha = (
        scale * torch.rand(2, time, heads, generator=g) for scale in (0.02, 0.9 if momentum else 0, 0.05)
    )
    widths = [width, *[hidden] * (layers - 1), width]
    weights = [randn(2, heads, out, in_) / in_**0.5 for in_, out in itertools.pairwise(widths)]
    return [q, k, randn(2, time, heads, width), theta, eta, alpha, 1 + 0.1 * randn(heads, width), *weights]


def learned(leaves, dtype, backend, momentum=True, norm=True, **options):
    """Outputs, the state and every gradient."""
    leaves = [x.to(dtype).requires_grad_() for x in leaves]
    q, k, v, theta, eta, alpha, gain, *weights = leaves
    y, state = titans_memory(
        q, k, v, theta, eta if momentum else None, alpha, MemoryState.fresh(tuple(weights)),
        norm=gain if norm else None, backend=backend, **options,
    )  # fmt: skip
    outputs = [y, *state.weights, *(state.momentum if momentum else ())]
    g = torch.Generator().manual_seed(1)
    loss = sum((x * torch.randn(x.shape, generator=g).to(dtype)).sum() for x in outputs)
    grads = torch.autograd.grad(loss, leaves, allow_unused=True)
    return [x.detach() for x in outputs], [x for x in grads if x is not None]


@able
@pytest.mark.parametrize("time, chunk, options", [
    (5, 1, {}), (100, 64, {}), (130, 15, {}),
    (5, 1, {"momentum": False, "norm": False, "activation": "silu"}),
    (129, 128, {"momentum": False, "norm": False, "activation": "silu"}),
    (5, 1, {"clip": 0.5, "read": "before"}), (100, 64, {"clip": 0.5, "read": "before"}),
])  # fmt: skip
def test_a_memory_its_state_and_gradients(setting, time, chunk, options):
    leaves = memory_inputs(time, options.get("momentum", True))
    exact = learned(leaves, torch.float64, "reference", chunk=chunk, **options)
    # a memory may amplify what its inputs are off by; how much it does is seen where they, and no products, are rounded
    factors = [x if i in (3, 4, 5, 6) else rounded(x) for i, x in enumerate(leaves)]
    nearby = learned(factors, torch.float64, "reference", chunk=chunk, **options)
    wide = learned(leaves, torch.float32, "native", chunk=chunk, **options)
    setting("medium")
    got = learned(leaves, torch.float32, "native", chunk=chunk, **options)
    for parts in zip(got, wide, nearby, exact, strict=True):
        for x, other, near, expected in zip(*parts, strict=True):
            assert x.dtype == torch.float32 and not torch.equal(x, other)
            assert error_ratio(x, expected) < max(TOLERANCE, 2 * error_ratio(near, expected))
    setting("highest")
    again = learned(leaves, torch.float32, "native", chunk=chunk, **options)
    assert all(torch.equal(a, b) for a, b in zip(itertools.chain(*again), itertools.chain(*wide), strict=True))


@able
def test_the_state_is_float32_and_keeps_what_is_too_small_for_bfloat16(medium):
    """Sixty-four chunks write alike what is far below half a unit in the last place of a bfloat16 weight."""
    width, chunks, chunk, theta = 32, 64, 16, 2.0**-20
    q = torch.zeros(1, chunks * chunk, 1, width)
    k = torch.nn.functional.normalize(torch.randn(1, 1, 1, width), dim=-1).expand_as(q)
    v, weight = torch.zeros_like(q), 1 + torch.rand(1, 1, width, width)
    gates = torch.full((1, chunks * chunk, 1), theta)
    run = lambda dtype, backend: titans_memory(  # noqa: E731
        *(x.to(dtype) for x in (q, k, v, gates)), None, None, MemoryState.fresh((weight.to(dtype),)), chunk=chunk,
        backend=backend,
    )[1].weights[0]  # fmt: skip
    written = run(torch.float32, "native").double() - weight.double()
    expected = run(torch.float64, "reference") - weight.double()
    assert expected.abs().max() < 64 * 2**-8 and expected.abs().max() / chunks < 2**-10
    # what is written is off by its two products, and by the last place of a float32 weight at every one of the writes
    assert ((written - expected).abs() <= 3 * LARGEST * expected.abs().max() + chunks * 2**-24 * weight.max()).all()


@able
@pytest.mark.parametrize("window, kv_heads, prefix, step", [(None, 4, 0, 1), (50, 2, 5, 1), (33, 1, 0, 2)])
def test_attention_and_its_gradients(setting, window, kv_heads, prefix, step):
    time, width = 200, 48
    shapes = [(time // step, 4), (time, kv_heads), (time, kv_heads), (time // step, 4), (prefix, kv_heads)]
    leaves = [torch.randn(2, *shape, width) for shape in (*shapes, shapes[-1])]

    def run(dtype, backend):
        q, k, v, *rest = tensors = [x.to(dtype).requires_grad_() for x in leaves]
        y = attention(q, k, v, window=window, prefix=Prefix(*rest) if prefix else None, step=step, backend=backend)
        seed = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
        return [y.detach(), *torch.autograd.grad(y, tensors[: 6 if prefix else 3], seed)]

    exact, wide = run(torch.float64, "reference"), run(torch.float32, "native")
    setting("medium")
    for got, other, expected in zip(run(torch.float32, "native"), wide, exact, strict=True):
        assert not torch.equal(got, other) and error_ratio(got, expected) < TOLERANCE


@able
def test_reading_at_fixed_weights(setting):
    q, *_, gain, first, second = memory_inputs(150)

    def run(dtype, backend):
        leaves = [x.to(dtype).requires_grad_() for x in (q, gain, first, second)]
        y = read_memory(leaves[0], tuple(leaves[2:]), norm=leaves[1], backend=backend)
        seed = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
        return [y.detach(), *torch.autograd.grad(y, leaves, seed)]

    exact, wide = run(torch.float64, "reference"), run(torch.float32, "native")
    setting("medium")
    for got, other, expected in zip(run(torch.float32, "native"), wide, exact, strict=True):
        assert not torch.equal(got, other) and error_ratio(got, expected) < TOLERANCE


# -- whole models ------------------------------------------------------------------------------------------------------


def mac(seed=0):
    shape = {"dim": 64, "vocab": 64, "stack.0.repeat": 2}
    layer = "layers.mac.0"
    shape |= {f"{layer}.segment": 32, f"{layer}.memory.chunk": 16}
    shape |= {f"{layer}.memory.heads": 2, f"{layer}.attend.heads": 2}
    return tb.build(tb.load_recipe("mac", overrides=shape), seed=seed)


def step_of(model, text):
    """The loss and all gradients."""
    loss = model(text[:, :-1], targets=text[:, 1:]).loss
    return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]


def equal(a, b):
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b))


@able
def test_resetting_the_precision_restores_every_bit(setting):
    model, text = mac(), torch.randint(64, (2, 101))
    before = step_of(model, text)
    setting("medium")
    narrow = step_of(model, text)
    assert not equal(narrow, before) and equal(narrow, step_of(model, text))
    # some gradients are sums that cancel: a norm of all of them together
    length = torch.cat([g.flatten() for g in before[1:]]).norm()
    assert torch.cat([(a - b).flatten() for a, b in zip(narrow[1:], before[1:])]).norm() < 0.05 * length
    setting("high")
    assert equal(step_of(model, text), before)
    setting("highest")
    assert equal(step_of(model, text), before)


@able
def test_a_model_stays_causal_and_does_not_modify_inputs(medium):
    model, text = mac(), torch.randint(64, (2, 100))
    parameters = [p.detach().clone() for p in model.parameters()]
    first = model(text).logits
    for place in (40, 99):
        other = text.clone()
        other[:, place:] = (other[:, place:] + 1) % 64
        logits = model(other).logits
        assert torch.equal(logits[:, :place], first[:, :place])
        assert not torch.equal(logits[:, place], first[:, place])
    _, state = model(text[:, :64])[:2]
    kept = [x.clone() for x in tensors_of(state)]
    model(text[:, 64:], state)
    assert equal(list(tensors_of(state)), kept) and equal(list(model.parameters()), parameters)


def tensors_of(state):
    if isinstance(state, torch.Tensor):
        yield state
    elif isinstance(state, tuple):
        for part in state:
            yield from tensors_of(part)


@able
def test_training_goes_as_in_float32(setting):
    """To copy a text: the second half of every row is its first half."""
    half = torch.randint(64, (4, 33), generator=torch.Generator().manual_seed(0))
    text = torch.cat((half, half), dim=1)

    def train():
        model = mac()
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        losses = []
        for _ in range(30):
            loss = model(text[:, :-1], targets=text[:, 1:]).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return torch.tensor(losses)

    wide = train()
    setting("medium")
    narrow = train()
    assert wide[-1] < 0.5 * wide[0]
    assert ((narrow - wide).abs() < 0.02 * wide[0]).all()


# -- where they are taken ----------------------------------------------------------------------------------------------


@able
def test_bfloat16_is_used_only_where_it_is_allowed(setting):
    x, weight = torch.randn(8, 32), torch.randn(5, 32)
    plain = linear(x, weight)
    assert product_dtype(torch.float32) == torch.float32 and torch.equal(project(x, weight), plain)
    setting("medium")
    assert product_dtype(torch.float32) == torch.bfloat16 and not torch.equal(project(x, weight), plain)
    wide = x.double(), weight.double()
    assert product_dtype(torch.float64) == torch.float64 and torch.equal(project(*wide), linear(*wide))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(project(x, weight), linear(x, weight))
    assert torch.equal(project(x[:3], weight), project(x[:3], weight, backend="auto"))
    setting("highest")
    assert product_dtype(torch.float32) == torch.float32 and torch.equal(project(x, weight), plain)


@able
def test_the_setting_of_one_backend_counts_too_and_may_be_mixed(setting):
    before = torch.backends.mkldnn.matmul.fp32_precision
    try:
        torch.backends.mkldnn.matmul.fp32_precision = "bf16"
        assert product_dtype(torch.float32) == torch.bfloat16
        torch.backends.mkldnn.matmul.fp32_precision = "ieee"
        assert product_dtype(torch.float32) == torch.float32
    finally:
        torch.backends.mkldnn.matmul.fp32_precision = before
        setting("highest")


@able
def test_backward_uses_the_operands_of_forward(setting):
    layer = torch.nn.Linear(32, 5, bias=False)
    x, weight = torch.randn(20, 32, requires_grad=True), layer.weight
    grad = torch.randn(20, 5)
    q, k, v = (torch.randn(1, 70, 2, 16, requires_grad=True) for _ in range(3))

    def run():
        return project(x, weight), linear_of(layer, torch.tanh, x), attention(q, k, v)

    def back(made):
        seeds = (grad, grad, torch.ones_like(q))
        return torch.autograd.grad(made, (x, weight, q, k, v), seeds)

    wide = back(run())
    setting("medium")
    narrow = back(run())
    made = run()
    setting("highest")
    assert equal(back(made), narrow) and not equal(narrow, wide)
    made = run()
    setting("medium")
    assert equal(back(made), wide)


@able
def test_backends_by_name(setting, monkeypatch):
    x, weight = torch.randn(8, 32), torch.randn(5, 32)
    rows = {row.backend: row for row in dispatch.table() if row.operation == "linear"}
    assert "set_float32_matmul_precision('medium')" in rows["bfloat16"].reason and rows["torch"].chosen
    setting("medium")
    rows = {row.backend: row for row in dispatch.table() if row.operation == "linear"}
    assert rows["bfloat16"].chosen
    narrow = project(x, weight)
    for name in ("torch", "reference"):
        monkeypatch.setenv(dispatch.VARIABLE, f"linear={name}")
        torch.testing.assert_close(project(x, weight), linear(x, weight))
        assert not torch.equal(project(x, weight), narrow)
    monkeypatch.setenv(dispatch.VARIABLE, "linear=bfloat16")
    assert torch.equal(project(x, weight), narrow)
    setting("highest")
    with pytest.raises(dispatch.BackendError, match="is for bfloat16 operands"):
        project(x, weight)


def test_without_the_instructions_products_are_float32(setting, monkeypatch):
    x, weight = torch.randn(8, 32), torch.randn(5, 32)
    monkeypatch.setattr(call, "lacks_bfloat16", lambda: "needs a CPU that multiplies bfloat16")
    monkeypatch.setattr(linear_operation._linear, "_chosen", {})
    setting("medium")
    assert product_dtype(torch.float32) == torch.float32 and torch.equal(project(x, weight), linear(x, weight))
    rows = {row.backend: row for row in dispatch.table() if row.operation == "linear"}
    assert rows["bfloat16"].reason == "needs a CPU that multiplies bfloat16"


@able
def test_empty_and_odd_inputs_are_left_to_pytorch(medium):
    weight = torch.randn(5, 32)
    assert project(torch.randn(0, 32), weight).shape == (0, 5)
    assert project(torch.randn(8, 32), weight[:0]).shape == (8, 0)
    assert torch.equal(project(torch.randn(8, 0), weight[:, :0]), torch.zeros(8, 5))
    with pytest.raises(RuntimeError):
        project(torch.randn(8, 31), weight)
    with pytest.raises(RuntimeError):
        project(torch.randn(8, 32), weight.double())
    x = torch.randn(8, 32)
    assert torch.equal(torch.func.vmap(lambda row: project(row, weight))(x), linear(x, weight))
    assert torch.equal(product.linear(x[:1], weight), product.linear(x, weight)[:1])


@able
def test_gradients_of_a_batch_of_cotangents(medium):
    x, weight = torch.randn(9, 32, requires_grad=True), torch.randn(16, 32, requires_grad=True)
    y, cotangents = project(x, weight), torch.randn(3, 9, 16)
    together = torch.autograd.grad(y, (x, weight), cotangents, is_grads_batched=True, retain_graph=True)
    for i, cotangent in enumerate(cotangents):
        for got, alone in zip(together, torch.autograd.grad(y, (x, weight), cotangent, retain_graph=True)):
            assert error_ratio(got[i], alone.double()) < TOLERANCE
