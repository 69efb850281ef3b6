"""Attention against a dense implementation, for split, padded and batched sequences at any position."""

import itertools

import pytest
import torch

from titans_build.blocks.attention import Attention
from titans_build.blocks.build import materialize
from titans_build.blocks.state import map_state, named_tensors, select
from titans_build.registry import RecipeError, create, validate

DIM = 16
FIELDS = [
    {"window": 5},
    {"window": 1},
    {"window": None},
    {"window": 70, "kv_heads": 2},
    {"window": None, "kv_heads": 1, "rope": None},
    {"window": 4, "heads": 2, "qk_norm": False},
]
each = pytest.mark.parametrize("fields", FIELDS, ids=lambda fields: "-".join(f"{k}={v}" for k, v in fields.items()))
prefixed = pytest.mark.parametrize("prefix", [0, 3])


def make(dtype=torch.float64, **fields):
    block = Attention(DIM, **fields)
    materialize(block, "cpu", dtype, seed=0)
    if block.gain is not None:
        with torch.no_grad():  # gains of one would hide mistakes
            block.gain.uniform_(0.5, 2.0, generator=torch.Generator().manual_seed(1))
    return block


def noise(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def fresh(block, rows, prefix):
    return block.prefix(noise(1, prefix, DIM, seed=9).expand(rows, -1, -1))[1] if prefix else block.init_state(rows)


def densely(block, x, tokens):
    """Dense attention from a fresh state: complex rotation, repeated key heads, a full mask."""
    heads, d = block.heads, block.head_dim

    def project(x):
        q, k, v = block.qkv(x).split((heads * d, block.kv_heads * d, block.kv_heads * d), dim=-1)
        q, k, v = (y.unflatten(-1, (-1, d)) for y in (q, k, v))
        if block.gain is not None:
            q, k = (y / (y.square().mean(-1, keepdim=True) + 1e-6).sqrt() for y in (q, k))
            q, k = q * block.gain[:heads], k * block.gain[heads:]
        return q, *(y.repeat_interleave(heads // block.kv_heads, dim=2) for y in (k, v))

    def turn(y):
        if block.rope is None:
            return y
        angle = torch.arange(y.shape[1])[:, None] * block.rope ** (-torch.arange(0, d, 2).double() / d)
        pairs = torch.complex(y[..., : d // 2], y[..., d // 2 :]) * torch.polar(torch.ones_like(angle), angle)[:, None]
        return torch.cat((pairs.real, pairs.imag), dim=-1)

    q, k, v = project(x)
    _, early_k, early_v = project(tokens)
    time, early = x.shape[1], tokens.shape[1]
    near = torch.ones(time, time, dtype=torch.bool).tril()
    if block.window is not None:
        near = near.triu(1 - block.window)
    score = torch.cat(
        (torch.einsum("bthd,bshd->bhts", q, early_k), torch.einsum("bthd,bshd->bhts", turn(q), turn(k))), dim=-1
    )
    seen = torch.cat((torch.ones(time, early, dtype=torch.bool), near), dim=1)
    weight = (score / d**0.5).masked_fill(~seen, float("-inf")).softmax(dim=-1)
    return block.out(torch.einsum("bhts,bshd->bthd", weight, torch.cat((early_v, v), dim=1)).flatten(2))


def same(mine, theirs, tolerance=1e-10):
    torch.testing.assert_close(mine, theirs, rtol=0, atol=tolerance)


def same_state(mine, theirs):
    assert [path for path, _ in named_tensors(mine)] == [path for path, _ in named_tensors(theirs)]
    for (_, x), (_, y) in zip(named_tensors(mine), named_tensors(theirs)):
        same(x, y)


@each
@prefixed
@pytest.mark.parametrize("time", [1, 3, 12, 150])
def test_against_the_dense_form_with_gradients(fields, prefix, time):
    block = make(**fields)
    x, tokens = noise(2, time, DIM).requires_grad_(), noise(2, prefix, DIM, seed=9).requires_grad_()
    y, _ = block(x, block.prefix(tokens)[1] if prefix else None)
    expected = densely(block, x, tokens)
    same(y, expected)
    wanted, seed = [x, tokens, *block.parameters()], noise(2, time, DIM, seed=3)
    for mine, theirs in zip(
        torch.autograd.grad(y, wanted, seed, allow_unused=True, materialize_grads=True),
        torch.autograd.grad(expected, wanted, seed, allow_unused=True, materialize_grads=True),
    ):
        same(mine, theirs, 1e-9)


@each
@prefixed
def test_all_splits_give_the_whole(fields, prefix):
    block, x = make(**fields), noise(2, 19, DIM)
    start = fresh(block, 2, prefix)
    whole, end = block(x, start)
    for cut in range(1, 19):
        first, state = block(x[:, :cut], start)
        second, state = block(x[:, cut:], state)
        same(torch.cat((first, second), dim=1), whole)
        same_state(state, end)


@each
@prefixed
@pytest.mark.parametrize("time", [9, 160])
def test_one_token_at_a_time(fields, prefix, time):
    block, x = make(**fields), noise(2, time, DIM)
    state = start = fresh(block, 2, prefix)
    whole, end = block(x, start)
    steps = []
    for t in range(time):
        y, state = block(x[:, t : t + 1], state)
        steps.append(y)
    same(torch.cat(steps, dim=1), whole)
    same_state(state, end)


@each
@prefixed
@pytest.mark.parametrize("more", [1, 4, 80])
def test_masks_and_rows_at_different_positions(fields, prefix, more):
    """Left, right, inner and whole-row padding in two calls, against each row without padding."""
    block = make(**fields)
    hide = [(), (0, 1, 2), (5, 6), (2, 4, 5), range(7)]
    mask = torch.ones(5, 7 + more, dtype=torch.bool)
    for row, holes in enumerate(hide):
        mask[row, list(holes)] = False
    mask[3, 7 + more // 2 :] = False
    x = noise(5, 7 + more, DIM)
    y, state = block(x[:, :7], fresh(block, 5, prefix), mask=mask[:, :7])
    z, state = block(x[:, 7:], state, mask=mask[:, 7:])
    y = torch.cat((y, z), dim=1)
    assert torch.equal(y[~mask], torch.zeros_like(y[~mask]))
    for row in range(5):
        alone, end = block(x[row : row + 1, mask[row]], fresh(block, 1, prefix))
        same(y[row : row + 1, mask[row]], alone)
        mine = select(state, [row])
        if block.window is None:  # the batch has as many slots as its longest row needs
            spare = mine.keys.shape[1] - end.keys.shape[1]
            assert not mine.keys[:, :spare].any() and not mine.values[:, :spare].any()
            mine = mine._replace(keys=mine.keys[:, spare:], values=mine.values[:, spare:])
        same_state(mine, end)


@each
@prefixed
def test_rows_at_different_positions_without_masks(fields, prefix):
    block = make(**fields)
    mask = torch.arange(6) < torch.tensor([[6], [2], [0]])
    before, x = noise(3, 6, DIM), noise(3, 90, DIM, seed=1)
    _, state = block(before, fresh(block, 3, prefix), mask=mask)
    for time in (1, 2, 90):
        y, _ = block(x[:, :time], state)
        for row, read in enumerate([6, 2, 0]):
            both = torch.cat((before[row, :read], x[row, :time]))[None]
            same(y[row], block(both, fresh(block, 1, prefix))[0][0, read:])


def test_a_fully_masked_batch_does_not_change_the_state():
    block, x = make(window=5), noise(2, 3, DIM)
    _, state = block(x)
    y, after = block(x, state, mask=torch.zeros(2, 3, dtype=torch.bool))
    assert torch.equal(y, torch.zeros_like(y))
    same_state(after, state)


@each
@prefixed
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_positions_are_exact_after_millions_of_tokens(fields, prefix, dtype, tolerance):
    block, x = make(dtype, **fields), noise(2, 100, DIM, dtype=dtype)
    start = block.prefix(noise(2, prefix, DIM, dtype=dtype))[1] if prefix else block.init_state(2)
    far = start._replace(position=start.position + torch.tensor([2**21, 2**40 + 1]))
    same(block(x, far)[0], block(x, start)[0], tolerance)


@each
@prefixed
def test_arguments_are_not_modified(fields, prefix):
    block, x = make(**fields), noise(2, 8, DIM)
    mask = torch.ones(2, 8, dtype=torch.bool)
    mask[1, 3] = False
    _, state = block(x, fresh(block, 2, prefix), mask=mask)
    before = map_state(torch.clone, (x, mask, state))
    with torch.no_grad():
        for time, given in itertools.product((1, 8), (mask, None)):
            block(x[:, :time], state, mask=None if given is None else given[:, :time])
    for (_, mine), (_, theirs) in zip(named_tensors((x, mask, state)), named_tensors(before)):
        assert torch.equal(mine, theirs)


@prefixed
def test_the_state_is_bounded_and_shares_no_larger_memory(prefix):
    block = make(window=5)
    _, state = block(noise(2, 500, DIM), fresh(block, 2, prefix))
    assert state.keys.shape == (2, 4, 4, 4) and state.cached.tolist() == [4, 4] and state.position.tolist() == [500] * 2
    assert sum(x.untyped_storage().nbytes() for x in (state.keys, state.values)) <= 8 * (2 * 2 * 4 * 16) * 2
    assert block.state_bytes() == 2 * 4 * 16 * 8 + 2 * 8 and not block.grows


def test_without_a_window_the_state_grows_until_bound_is_called():
    block = make()
    assert block.grows
    assert block(noise(1, 30, DIM))[1].keys.shape[1] == 30
    free, _ = block(noise(1, 30, DIM))
    block.bound(30)
    bound, state = block(noise(1, 30, DIM))
    assert not block.grows and state.keys.shape[1] == 29
    same(bound, free)
    block.bound(40)
    assert block.window == 30, "the tighter bound holds"


def test_bfloat16():
    exact = make(window=5)
    block = make(torch.bfloat16, window=5)
    x = noise(2, 40, DIM).bfloat16()
    tokens = noise(2, 3, DIM, seed=9).bfloat16()
    y, state = block(x, block.prefix(tokens)[1])
    exact.load_state_dict({name: p.double() for name, p in block.state_dict().items()})
    expected, _ = exact(x.double(), exact.prefix(tokens.double())[1])
    assert y.dtype == state.keys.dtype == state.values.dtype == torch.bfloat16
    assert (y - expected).square().mean().sqrt() < 2e-2 * expected.square().mean().sqrt()


def test_persistent_tokens_attend_causally_to_each_other():
    block, tokens = make(window=2, rope=None), noise(1, 6, DIM)
    y, state = block.prefix(tokens)
    block.window = None  # the window does not apply to persistent tokens
    same(y, block(tokens)[0])
    assert state.position.tolist() == [0] and state.prefix_keys.shape == (1, 6, 4, 4)


@pytest.mark.parametrize("fields", [{"window": 6}, {"window": None, "kv_heads": 2}])
def test_flops_count_the_visible_pairs(fields):
    block = make(**fields)
    for length in (1, 5, 6, 7, 40):
        pairs = sum(min(i + 1, block.window or length) for i in range(length))
        weights = sum(p.numel() for p in block.parameters() if p is not block.gain)
        assert block.flops(length) == 2 * length * weights + pairs * block.heads * block.head_dim * 4


def test_every_parameter_has_a_gradient():
    block = make(window=5)
    block(noise(2, 8, DIM))[0].square().sum().backward()
    assert all(p.grad.abs().max() > 0 for p in block.parameters())


@pytest.mark.parametrize(
    "dim, fields, path, message",
    [
        (18, {"heads": 4}, "heads", "expected a divisor of the width 18, got 4"),
        (16, {"heads": 4, "kv_heads": 3}, "kv_heads", "expected a divisor of heads = 4, got 3"),
        (12, {"heads": 4}, "rope", "expected null, or heads of even width: 12 / 4 = 3"),
        (16, {"window": 0}, "window", "got 0"),
        (16, {"rope": 1.0}, "rope", "got 1.0"),
    ],
)
def test_problems(dim, fields, path, message):
    with pytest.raises(RecipeError) as caught:
        create({"type": "attention", **fields}, dim=dim)
    (problem,) = caught.value.problems
    assert problem.path == path and message in problem.message


def test_problems_without_a_width():
    assert validate({"type": "attention", "heads": 5})["heads"] == 5
    create({"type": "attention", "rope": None}, dim=12)


def test_the_constructor_raises_the_errors_of_a_recipe():
    with pytest.raises(ValueError, match="heads: expected a divisor of the width 18"):
        Attention(18, heads=4)


def test_invalid_arguments_are_errors():
    block = make(window=5)
    with pytest.raises(ValueError, match=r"Attention: x \[2, 3, 15\]: expected \[batch, time, 16\]"):
        block(noise(2, 3, 15))
    with pytest.raises(ValueError, match=r"Attention: mask \[2, 4\]: expected \[2, 3\]"):
        block(noise(2, 3, DIM), mask=torch.ones(2, 4, dtype=torch.bool))
    with pytest.raises(TypeError, match=r"mask is torch.int64: expected torch.bool"):
        block(noise(2, 3, DIM), mask=torch.ones(2, 3, dtype=torch.int64))
    with pytest.raises(TypeError, match=r"Attention: x is torch.float16: expected torch.float64, as the block's"):
        block(noise(2, 3, DIM).half())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        make(dtype=torch.float32)(noise(2, 3, DIM).bfloat16())
    with pytest.raises(TypeError, match="Attention: state is a tuple of 2: expected AttentionState"):
        block(noise(2, 3, DIM), (None, None))
    with pytest.raises(ValueError, match=r"state has 3 rows .*, the inputs have 2"):
        block(noise(2, 3, DIM), block.init_state(3))
    with pytest.raises(ValueError, match=r"tokens \[2, 3\]"):
        block.prefix(noise(2, 3))
    with pytest.raises(ValueError, match=r"bound: tokens is 0"):
        block.bound(0)


@prefixed
@pytest.mark.parametrize("time", [1, 90])
def test_compiles_in_one_graph(prefix, time):
    block = make(torch.float32, window=5)
    _, state = block(noise(1, 9, DIM, dtype=torch.float32), map_state(torch.Tensor.detach, fresh32(block, prefix)))
    x = noise(1, time, DIM, seed=1, dtype=torch.float32)
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, state)[0], block(x, state)[0], rtol=1e-5, atol=1e-6)


def fresh32(block, prefix):
    return block.prefix(noise(1, prefix, DIM, dtype=torch.float32))[1] if prefix else block.init_state(1)
