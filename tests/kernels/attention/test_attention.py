"""Every backend against a loop over queries, and the properties that no mask arithmetic may lose."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from titans_build.kernels.attention import Prefix, attention, flash, flex, sdpa
from titans_build.kernels.attention.reference import visible_keys
from titans_build.kernels.dispatch import BackendError

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")

D = 8
TOLERANCE = 1e-10
FAST = ["native", "sdpa"]


def tensors(rows, time, keys, heads, kv_heads, prefix, dtype=torch.float64, grad=True):
    """q, k, v, and the three of a prefix."""
    shapes = [(time, heads), (keys, kv_heads), (keys, kv_heads), (time, heads), (prefix, kv_heads), (prefix, kv_heads)]
    return [torch.randn(rows, *shape, D, dtype=dtype, requires_grad=grad) for shape in shapes]


def by_definition(q, k, v, pq, pk, pv, window, start, step=1):
    """One query of one head of one row at a time."""
    rows, time, heads, _ = q.shape
    keys, group = k.shape[1], heads // k.shape[2]
    y = []
    for row in range(rows):
        for i in range(time):
            place = keys - 1 - (time - 1 - i) * step
            first = 0 if window is None else max(0, place - window + 1)
            first = first if start is None else max(first, int(start[row]))
            for head in range(heads):
                near, early = k[row, first : place + 1, head // group], pk[row, :, head // group]
                score = torch.cat((early @ pq[row, i, head], near @ q[row, i, head])) / math.sqrt(D)
                value = torch.cat((pv[row, :, head // group], v[row, first : place + 1, head // group]))
                y.append(score.softmax(0) @ value if len(score) else value.sum(0))
    return torch.stack(y).view(q.shape)


def run(inputs, window, start, backend, step=1):
    q, k, v, *prefix = inputs
    prefix = Prefix(*prefix) if prefix[1].shape[1] else None
    return attention(q, k, v, window=window, start=start, prefix=prefix, step=step, backend=backend)


def gradients(y, inputs, seed):
    return torch.autograd.grad(y, inputs, seed, allow_unused=True, materialize_grads=True)


@pytest.mark.parametrize("prefix", [0, 3])
@pytest.mark.parametrize("start", [None, [0, 3], [6, 4]])
@pytest.mark.parametrize("window", [None, 1, 3, 20])
@pytest.mark.parametrize("time, keys", [(1, 1), (1, 7), (5, 5), (4, 9)])
def test_the_reference_is_the_definition(time, keys, window, start, prefix):
    start = None if start is None else torch.tensor(start)
    inputs = tensors(2, time, keys, 4, 2, prefix)
    y, expected = run(inputs, window, start, "reference"), by_definition(*inputs, window, start)
    seed = torch.randn_like(y)
    torch.testing.assert_close(y, expected, rtol=0, atol=TOLERANCE)
    for mine, theirs in zip(gradients(y, inputs, seed), gradients(expected, inputs, seed)):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("prefix", [0, 3])
@pytest.mark.parametrize("start", ["none", "cache", "inside"])
@pytest.mark.parametrize("window", [None, 1, 2, 64, 65, 130, 1000])
@pytest.mark.parametrize(
    "time, past, kv_heads", [(1, 0, 4), (1, 90, 2), (2, 5, 4), (20, 0, 4), (150, 0, 1), (200, 90, 2)]
)
@pytest.mark.parametrize("backend", FAST)
def test_fast_paths_against_the_reference(time, past, kv_heads, window, start, prefix, backend):
    """Short and long, one block and many, window in and out of reach, with and without all else, gradients too."""
    keys = time + past
    start = {"none": None, "cache": [past, past // 2], "inside": [past + time // 2, 0]}[start]
    start = None if start is None else torch.tensor(start)
    inputs = tensors(2, time, keys, 4, kv_heads, prefix)
    y, expected = (run(inputs, window, start, name) for name in (backend, "reference"))
    seed = torch.randn_like(y)
    torch.testing.assert_close(y, expected, rtol=0, atol=TOLERANCE)
    for mine, theirs in zip(gradients(y, inputs, seed), gradients(expected, inputs, seed)):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("prefix", [0, 3])
@pytest.mark.parametrize("start", [None, [3, 0]])
@pytest.mark.parametrize("window", [None, 1, 7, 90])
@pytest.mark.parametrize("time, past, step", [(1, 3, 2), (6, 0, 2), (70, 5, 2), (5, 2, 3)])
@pytest.mark.parametrize("backend", [*FAST, "reference"])
def test_queries_at_every_second_key(time, past, step, window, start, prefix, backend):
    start = None if start is None else torch.tensor(start)
    inputs = tensors(2, time, past + time * step, 2, 1, prefix)
    y = run(inputs, window, start, backend, step)
    if backend == "reference":
        expected = by_definition(*inputs, window, start, step)
    else:  # the loops of the definition are slow
        expected = run(inputs, window, start, "reference", step)
    seed = torch.randn_like(y)
    torch.testing.assert_close(y, expected, rtol=0, atol=TOLERANCE)
    for mine, theirs in zip(gradients(y, inputs, seed), gradients(expected, inputs, seed)):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("prefix", [0, 3])
@pytest.mark.parametrize("window", [None, 70])
@pytest.mark.parametrize("past, start", [(0, None), (20, [20, 3])])
@pytest.mark.parametrize("time, kv_heads", [(1, 2), (90, 4), (90, 2)])
def test_devices_without_the_merge(monkeypatch, time, past, start, kv_heads, window, prefix):
    """The path of accelerators: prefix scores by features side by side, groups of heads repeated under a mask."""
    monkeypatch.setattr(sdpa, "MERGING_DEVICES", ())
    start = None if start is None else torch.tensor(start)
    inputs = tensors(2, time, time + past, 4, kv_heads, prefix)
    y, expected = (run(inputs, window, start, backend) for backend in ("sdpa", "reference"))
    seed = torch.randn_like(y)
    torch.testing.assert_close(y, expected, rtol=0, atol=TOLERANCE)
    for mine, theirs in zip(gradients(y, inputs, seed), gradients(expected, inputs, seed)):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("backend", [*FAST, "reference"])
@pytest.mark.parametrize("time, window", [(1, None), (5, None), (5, 3), (90, 7)])
def test_a_query_that_sees_nothing_is_zero_with_finite_gradients(time, window, backend):
    inputs = tensors(2, time, time, 2, 2, 0)
    blind = torch.tensor([time, time // 2])
    y = run(inputs, window, blind, backend)
    assert torch.equal(y[0], torch.zeros_like(y[0]))
    assert torch.equal(y[1, : time // 2], torch.zeros_like(y[1, : time // 2]))
    for gradient in gradients(y.square().sum() + y.sum(), inputs, None):
        assert gradient.isfinite().all()
        assert torch.equal(gradient[0], torch.zeros_like(gradient[0]))


@pytest.mark.parametrize("time, window, kv_heads", [(3, None, 2), (20, None, 1), (20, 5, 2), (70, 6, 1)])
def test_gradcheck(time, window, kv_heads):
    inputs = [x[..., :2].detach().requires_grad_() for x in tensors(1, time, time + 2, 2, kv_heads, 2)]
    start = torch.tensor([1])
    assert torch.autograd.gradcheck(
        lambda *a: run(a, window, start, "sdpa"), inputs, fast_mode=time > 30, nondet_tol=1e-12
    )


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("prefix", [0, 3])
@pytest.mark.parametrize("time, window", [(1, None), (4, None), (100, None), (200, 64)])
def test_lower_precision(time, window, prefix, dtype, tolerance):
    """Error ratio of outputs and gradients against float64 on the same rounded inputs."""
    inputs = [x.detach().requires_grad_() for x in tensors(2, time, time + 5, 4, 2, prefix, dtype)]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    start = torch.tensor([0, 3])
    y, expected = run(inputs, window, start, "sdpa"), run(exact, window, start, "reference")
    seed = torch.randn_like(y)
    assert y.dtype == dtype
    pairs = zip([y, *gradients(y, inputs, seed)], [expected, *gradients(expected, exact, seed.double())])
    for mine, theirs in pairs:
        if theirs.numel() and theirs.abs().max() > 0:
            assert (mine - theirs).square().mean().sqrt() <= tolerance * theirs.square().mean().sqrt()


def test_a_window_costs_its_width_not_the_length():
    """Storage written for scores and masks grows with time, not with its square."""

    def largest(time):
        inputs = tensors(1, time, time, 1, 1, 2, torch.float32, grad=False)
        with torch.profiler.profile(profile_memory=True) as profile:
            run(inputs, 64, None, "sdpa")
        return max(event.cpu_memory_usage for event in profile.events())

    assert largest(2048) < 5 * largest(512)


@pytest.mark.parametrize("prefix", [0, 3])
@pytest.mark.parametrize("window, start, step", [(None, [3, 0], 1), (20, [3, 0], 1), (20, None, 1), (None, None, 2)])
@pytest.mark.parametrize("devices", [("cpu",), ()])
def test_large_masks_are_made_in_parts(monkeypatch, devices, window, start, step, prefix):
    monkeypatch.setattr(sdpa, "MERGING_DEVICES", devices)
    monkeypatch.setattr(sdpa, "LARGEST_MASK", 2000)
    made = []

    def spy(*arguments):
        made.append(visible_keys(*arguments).numel())
        return visible_keys(*arguments)

    monkeypatch.setattr(sdpa, "visible_keys", spy)
    sdpa._kept_mask.cache_clear()
    start = None if start is None else torch.tensor(start)
    inputs = tensors(2, 90, 90 * step + 7, 4, 2, prefix)
    y, expected = (run(inputs, window, start, backend, step) for backend in ("sdpa", "reference"))
    seed = torch.randn_like(y)
    torch.testing.assert_close(y, expected, rtol=0, atol=TOLERANCE)
    for mine, theirs in zip(gradients(y, inputs, seed), gradients(expected, inputs, seed)):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=TOLERANCE)
    assert made and max(made) <= 4000


class Sizes(TorchDispatchMode):
    """The largest number of elements of a tensor that an operator returned."""

    def __init__(self):
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        out = function(*arguments, **(keywords or {}))
        for x in torch.utils._pytree.tree_leaves(out):
            if isinstance(x, torch.Tensor):
                self.largest = max(self.largest, x.untyped_storage().nbytes())
        return out


@pytest.mark.filterwarnings("ignore:dtype of input and weights")
@pytest.mark.parametrize("backend, window, start, step, prefix", [
    ("flash", None, True, 1, 16), ("flash", 4096, True, 1, 0), ("flash", None, False, 2, 16),
    ("flex", None, False, 1, 16), ("flex", 4096, True, 2, 0),
    ("sdpa", None, False, 1, 16), ("sdpa", 4096, True, 1, 16), ("sdpa", None, False, 2, 0),
])  # fmt: skip
def test_no_mask_is_as_large_as_the_square_of_the_length(monkeypatch, backend, window, start, step, prefix):
    """131,072 tokens: memory for one head of width 64 in bfloat16, with the fused kernels themselves left out."""
    time = 131_072
    make = lambda count: torch.empty(1, count, 1, 64, dtype=torch.bfloat16, device="meta")  # noqa: E731
    q, k = make(time), make(time * step)
    first = Prefix(q, make(prefix), make(prefix)) if prefix else None
    start = torch.zeros(1, dtype=torch.int64, device="meta") if start else None
    fused = lambda q, k, v, **options: q.new_empty((*q.shape[:-1], v.shape[-1]))  # noqa: E731

    def kernel(q, k, v, *, return_aux, **options):
        lse = SimpleNamespace(lse=q.new_empty(q.shape[:-1], dtype=torch.float32))
        return fused(q, k, v) if return_aux is None else (fused(q, k, v), lse)

    monkeypatch.setattr(sdpa.F, "scaled_dot_product_attention", fused)
    monkeypatch.setattr(flex, "_kernel", lambda device: kernel)
    flex._blocks.cache_clear()
    run = {"flash": flash.flash_attention, "flex": flex.flex_attention, "sdpa": sdpa.sdpa_attention}[backend]
    with Sizes() as sizes:
        assert run(q, k, k, window, start, first, step).shape == q.shape
    assert 2 * q.nbytes <= 2 * sizes.largest and sizes.largest <= 2**27, "a square has 2^34"


def test_inputs_are_left_alone_and_may_be_strided():
    inputs = tensors(2, 150, 160, 4, 2, 3, grad=False)
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs]
    copies = [x.clone() for x in strided]
    start = torch.tensor([0, 4])
    y = run(strided, 70, start, "sdpa")
    torch.testing.assert_close(y, run(inputs, 70, start, "sdpa"), rtol=0, atol=TOLERANCE)
    assert all(torch.equal(x, copy) for x, copy in zip(strided, copies))
    assert start.tolist() == [0, 4]


def test_unfilled_slots_do_not_matter():
    inputs = tensors(2, 3, 9, 2, 2, 2, grad=False)
    start = torch.tensor([4, 2])
    y = run(inputs, None, start, "sdpa")
    for x in inputs[1:3]:
        x[0, :4] = 1e4
        x[1, :2] = -1e4
    torch.testing.assert_close(run(inputs, None, start, "sdpa"), y, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("window, prefix", [(None, 0), (None, 3), (70, 3)])
def test_compiled_whole(window, prefix):
    inputs = tensors(1, 150, 150, 2, 2, prefix, torch.float32, grad=False)
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(
        compiled(inputs, window, None, "auto"), run(inputs, window, None, "auto"), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"q": (2, 5, 8)}, ValueError, r"q \[2, 5, 8\]: expected"),
        ({"k": (2, 7, 2, 4), "v": (2, 7, 2, 4)}, ValueError, r"k \[2, 7, 2, 4\]: expected \[2, keys, kv_heads, 8\]"),
        ({"v": (2, 6, 2, 8)}, ValueError, r"v \[2, 6, 2, 8\]: expected the shape of k"),
        ({"k": (2, 4, 2, 8), "v": (2, 4, 2, 8)}, ValueError, r"k has 4 keys for 5 queries"),
        ({"k": (2, 7, 3, 8), "v": (2, 7, 3, 8)}, ValueError, r"k has 3 heads: expected a divisor of q's 4"),
        ({"window": 0}, ValueError, r"window is 0: expected at least 1"),
        ({"start": torch.zeros(2)}, TypeError, r"start is torch.float32: expected torch.int64"),
        ({"start": torch.zeros(3, dtype=torch.int64)}, ValueError, r"start \[3\]: expected \[2\]"),
        ({"prefix": [(2, 4, 4, 8), (2, 3, 2, 8), (2, 3, 2, 8)]}, ValueError, r"prefix.q \[2, 4, 4, 8\]"),
        (
            {"prefix": [(2, 5, 4, 8), (2, 3, 2, 8), (2, 2, 2, 8)]},
            ValueError,
            r"prefix.v \[2, 2, 2, 8\]: expected \[2, 3, 2, 8\]",
        ),
        ({"backend": "xla"}, BackendError, r"attention: backend='xla': no such backend"),
    ],
)
def test_wrong_arguments(change, error, message):
    arguments = {"q": (2, 5, 4, 8), "k": (2, 7, 2, 8), "v": (2, 7, 2, 8)} | change
    q, k, v = (torch.randn(arguments.pop(name)) for name in "qkv")
    if "prefix" in arguments:
        arguments["prefix"] = Prefix(*(torch.randn(shape) for shape in arguments["prefix"]))
    with pytest.raises(error, match=message):
        attention(q, k, v, **arguments)


X = torch.randn(2, 5, 4, 8)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"q": [1]}, TypeError, "q: expected a tensor, got list"),
        ({"k": X.double()}, TypeError, "k is torch.float64: expected the dtype of q, torch.float32"),
        ({"v": X.bfloat16()}, TypeError, "v is torch.bfloat16: expected the dtype of q, torch.float32"),
        ({"prefix": Prefix(X.double(), X, X)}, TypeError, "prefix.q is torch.float64: expected the dtype of q"),
        ({"prefix": Prefix(X, X, X.double())}, TypeError, "prefix.v is torch.float64: expected the dtype of q"),
        ({"prefix": (X, X, X)}, TypeError, r"prefix: expected a Prefix\(q, k, v\) or None, got tuple"),
        ({"prefix": Prefix(X, X[0], X[0])}, ValueError, r"prefix.k \[5, 4, 8\]: expected \[2, tokens, 4, 8\]"),
        ({"q": X.int(), "k": X.int(), "v": X.int()}, TypeError, "q is torch.int32: expected a floating-point dtype"),
        ({"k": X.to("meta")}, ValueError, "k is on meta: expected the device of q, cpu"),
        ({"start": torch.zeros(2).long().to("meta")}, ValueError, "start is on meta: expected the device of q, cpu"),
        ({"start": [0, 0]}, TypeError, "start: expected a tensor, got list"),
        ({"window": 1.5}, TypeError, "window is 1.5: expected a whole number"),
        ({"step": True}, TypeError, "step is True: expected a whole number"),
        ({"step": None}, TypeError, "step is None: expected a whole number"),
        ({"step": 0}, ValueError, "step is 0: expected at least 1"),
    ],
)
@pytest.mark.parametrize("autocast", [False, True])
def test_arguments_of_other_kinds(change, error, message, autocast):
    arguments = {"q": X, "k": X, "v": X} | change
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast), pytest.raises(error, match=message):
        attention(arguments.pop("q"), arguments.pop("k"), arguments.pop("v"), **arguments)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("prefix", [0, 3])
@pytest.mark.parametrize(
    "time, window, start, step",
    [
        (20, None, None, 1),
        (20, 5, None, 1),
        (20, None, [4, 0], 1),
        (7, 7, [0, 9], 3),
        (1, 4, None, 1),
        (1, None, [9, 0], 1),
    ],
)
@pytest.mark.parametrize("backend", [*FAST, "reference"])
def test_nonfinite_keys_and_values_are_confined_to_queries_that_see_them(
    backend, time, window, start, step, prefix, value
):
    keys = 23 if step == 1 else 21
    inputs = tensors(2, time, keys, 4, 2, prefix, grad=False)
    start = None if start is None else torch.tensor(start)
    expected = run(inputs, window, start, backend, step)
    seen = torch.zeros(2, time, 4, dtype=torch.bool)
    visible = visible_keys(time, keys, window, start, "cpu", step).expand(2, -1, -1)
    for name, row, key, head in (("k", 0, 8, 1), ("v", 1, 3, 0), ("v", 1, 20, 1)):
        inputs["qkv".index(name)][row, key, head, 2] = value
        seen[row, :, 2 * head : 2 * head + 2] |= visible[row, :, key, None]
    for tensor in inputs:
        tensor.requires_grad_()
    y = run(inputs, window, start, backend, step)
    assert seen.any() and not seen.all()
    assert torch.equal(y.isnan().all(-1), seen)
    torch.testing.assert_close(y[~seen], expected[~seen], rtol=0, atol=TOLERANCE)
    gradients = torch.autograd.grad(y[~seen].sum(), inputs, allow_unused=True, materialize_grads=True)
    assert all(bool(gradient.isfinite().all()) for gradient in gradients)


@pytest.mark.parametrize("prefix", [0, 3])
@pytest.mark.parametrize("backend, time, window, start", [
    *((name, *case) for name in (*FAST, "reference")
      for case in ((70, 20, None), (20, None, [4, 0]), (20, None, [0, 0]), (1, 4, None))),
    ("flex", 20, 4, [4, 0]),
])  # fmt: skip
def test_scores_that_overflow_do_not_reach_queries_that_do_not_see_the_key(backend, time, window, start, prefix):
    inputs = tensors(2, time, time + 3, 4, 2, prefix, torch.float32, grad=False)
    start = None if start is None else torch.tensor(start)
    expected = run(inputs, window, start, backend)
    hidden = torch.ones(2, time, 4, dtype=torch.bool)
    for key in (1, time // 2):
        inputs[1][0, key, 1, 2] = torch.finfo(torch.float32).max
        hidden[0, :, 2:] &= ~visible_keys(time, time + 3, window, start, "cpu").expand(2, -1, -1)[0, :, key, None]
    y = run(inputs, window, start, backend)
    torch.testing.assert_close(y[hidden], expected[hidden], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("place", range(6))
def test_any_layout_of_the_inputs(place):
    inputs = tensors(2, 20, 20, 4, 2, 3, grad=False)
    inputs[place] = inputs[place].mT.contiguous().mT  # its last dimension is not dense
    inputs = [x.requires_grad_() for x in inputs]
    y, expected = run(inputs, None, None, "sdpa"), run(inputs, None, None, "reference")
    torch.testing.assert_close(y, expected, rtol=0, atol=TOLERANCE)
    for seed in (torch.randn_like(y).mT.contiguous().mT, torch.ones(()).double().expand_as(y)):
        for mine, theirs in zip(gradients(y, inputs, seed), gradients(expected, inputs, seed)):
            torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-9)
        y, expected = run(inputs, None, None, "sdpa"), run(inputs, None, None, "reference")


@pytest.mark.parametrize("window", [None, 5])
def test_saved_tensors_in_other_layouts(window):
    inputs = tensors(2, 40, 40, 4, 2, 3)
    expected = run(inputs, window, None, "sdpa")
    seed = torch.randn_like(expected)

    def packed(x):
        other = torch.empty(x.shape[::-1], dtype=x.dtype).permute(*range(x.dim())[::-1])
        return other.copy_(x.detach())

    with torch.autograd.graph.saved_tensors_hooks(packed, lambda x: x):
        y = run(inputs, window, None, "sdpa")
    for mine, theirs in zip(gradients(y, inputs, seed), gradients(expected, inputs, seed)):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=TOLERANCE)
