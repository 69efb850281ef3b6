"""FlexAttention: forward on the CPU; its gradients by a kernel that is written out; its blocks one by one."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch.nn.attention import flex_attention as library

from titans_build.kernels.attention import Prefix, attention, flex
from titans_build.kernels.attention.reference import visible_keys
from titans_build.kernels.dispatch import BackendError

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")

TOLERANCE = 1e-10
CASES = [  # queries, keys, window, step, start
    (1, 7, None, 1, None),
    (5, 12, 4, 1, [6, 0]),
    (6, 13, 5, 2, [6, 0]),
    (150, 340, 40, 2, [20, 300]),
]


def tensors(time, keys, prefix, dtype=torch.float64, grad=False):
    shapes = [(time, 4), (keys, 2), (keys, 2), (time, 4), (prefix, 2), (prefix, 2)]
    return [torch.randn(2, *shape, 8, dtype=torch.float64).to(dtype).requires_grad_(grad) for shape in shapes]


def run(inputs, window, start, step, backend="flex"):
    q, k, v, *first = inputs
    first = Prefix(*first) if first[1].shape[1] else None
    start = None if start is None else torch.tensor(start)
    return attention(q, k, v, window=window, start=start, prefix=first, step=step, backend=backend)


@pytest.mark.parametrize("time, keys, window, step, start, prefix, dtype, most", [
    *((*case, prefix, torch.float64, TOLERANCE) for case, prefix in zip(CASES, (0, 3, 0, 3))),
    (*CASES[1], 0, torch.float64, TOLERANCE), (*CASES[-1], 3, torch.bfloat16, 0.02),
])  # fmt: skip
def test_against_the_reference(time, keys, window, step, start, prefix, dtype, most):
    inputs = tensors(time, keys, prefix, dtype)
    y, exact = run(inputs, window, start, step), [x.double() for x in inputs]
    expected = run(exact, window, start, step, "reference")
    assert y.dtype == dtype and (y.double() - expected).norm() <= most * expected.norm()


def test_a_query_that_sees_nothing_is_zero():
    inputs = tensors(5, 5, 0)
    y = run(inputs, 3, [5, 2], 1)
    assert torch.equal(y[0], torch.zeros_like(y[0])) and torch.equal(y[1, :2], torch.zeros_like(y[1, :2]))
    torch.testing.assert_close(y, run(inputs, 3, [5, 2], 1, "reference"), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("wanted", range(6))
def test_it_has_no_backward_on_the_cpu(wanted):
    inputs = [x.detach().requires_grad_(i == wanted) for i, x in enumerate(tensors(3, 3, 2))]
    with pytest.raises(BackendError, match="no backward on the CPU"):
        run(inputs, None, None, 1)


def written_out(q, k, v, *, block_mask, scale, enable_gqa, return_aux):
    """What ``flex_attention`` says it computes, from the mask function; its log-sum-exp has a gradient."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    score = q @ k.mT * scale
    if block_mask is not None:
        at = [torch.arange(size) for size in (q.shape[0], 1, q.shape[2], k.shape[2])]
        seen = block_mask.mask_mod(at[0].view(-1, 1, 1, 1), 0, at[2].view(-1, 1), at[3])
        score = score.masked_fill(~seen, -math.inf)
    y = score.softmax(-1) @ v
    return y if return_aux is None else (y, SimpleNamespace(lse=score.logsumexp(-1)))


@pytest.mark.parametrize("time, keys, window, step, start", CASES)
def test_gradients_of_merging_with_a_prefix(monkeypatch, time, keys, window, step, start):
    monkeypatch.setattr(flex, "_kernel", lambda device: written_out)
    inputs = [x.to("cpu").requires_grad_() for x in tensors(time, keys, 3)]
    q, k, v, *first = inputs
    # every query sees a key: the gradients of what is written out know no other
    start = None if start is None else [min(each, keys - 1 - (time - 1) * step) for each in start]
    begin = None if start is None else torch.tensor(start)
    mask = flex._block_mask(time, keys, window, begin, step, q.device)
    y = flex.merge(flex._attend(q, k, v, mask, with_sums=True), flex._attend(*first, None, with_sums=True))
    expected = run(inputs, window, start, step, "reference")
    seed = torch.randn_like(y)
    torch.testing.assert_close(y, expected, rtol=0, atol=TOLERANCE)
    for mine, theirs in zip(torch.autograd.grad(y, inputs, seed), torch.autograd.grad(expected, inputs, seed)):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("start", [None, [20, 300]])
@pytest.mark.parametrize(
    "time, keys, window, step",
    [
        (1, 1, None, 1),
        (128, 128, None, 1),
        (300, 300, None, 1),
        (300, 700, 129, 1),
        (257, 600, 1, 2),
        (500, 900, 256, 1),
    ],
)
def test_blocks_hold_every_visible_key(time, keys, window, step, start):
    """A block that is computed as it is has no hidden key, and one that is skipped no visible one."""
    begin = None if start is None else torch.tensor(start)
    mask = flex._block_mask(time, keys, window, begin, step, torch.device("cpu"))
    seen = visible_keys(time, keys, window, begin, "cpu", step)
    rows, columns = -(-time // flex.BLOCK), -(-keys // flex.BLOCK)
    room = torch.zeros(len(seen), rows * flex.BLOCK, columns * flex.BLOCK, dtype=torch.bool)
    room[:, :time, :keys] = seen
    blocks = room.unflatten(2, (columns, -1)).unflatten(1, (rows, -1)).transpose(2, 3)
    some, full = blocks.flatten(3).any(-1).any(0), torch.zeros(rows, columns, dtype=torch.bool)
    assert not (some & (mask.to_dense()[0, 0] == 0)).any()
    for row, (count, order) in enumerate(zip(mask.full_kv_num_blocks[0, 0], mask.full_kv_indices[0, 0])):
        full[row, order[:count].long()] = True
    padded = torch.zeros(rows * flex.BLOCK, dtype=torch.bool)
    padded[:time] = True
    inside = blocks | ~padded.view(1, rows, 1, -1, 1)
    assert inside.flatten(3).all(-1).all(0)[full].all()
    if window is None and start is None and time >= 300:
        assert full.any()
    if window is not None and window < 200:
        assert (mask.to_dense() == 0).any()


def test_blocks_are_kept_by_shape_and_window_and_bounded():
    flex._blocks.cache_clear()
    inputs = tensors(5, 12, 3)
    for window in (3, 4, 3, 3):
        run(inputs, window, None, 1)
    assert flex._blocks.cache_info()[:2] == (2, 2)
    for window in range(1, 60):
        flex._block_mask(5, 12, window, None, 1, torch.device("cpu"))
    assert flex._blocks.cache_info().currsize <= 32


@pytest.mark.slow
def test_compiled_once_for_all_lengths_and_windows(monkeypatch):
    """As on a GPU: one kernel for every length, window and start, not one for each."""
    compiled = torch.compile(library.flex_attention, backend="aot_eager")
    monkeypatch.setattr(flex, "_kernel", lambda device: compiled)
    for turn in range(3):
        with torch.compiler.set_stance("fail_on_recompile" if turn == 2 else "default"), torch.no_grad():
            for time, window in ((150 + 17 * turn, 40 + turn), (260 + 9 * turn, 90 + 7 * turn)):
                for start in None, [turn, 7]:
                    inputs = tensors(time, time + 30, 3)
                    y, expected = (run(inputs, window, start, 1, backend) for backend in ("flex", "reference"))
                    torch.testing.assert_close(y, expected, rtol=0, atol=TOLERANCE)
