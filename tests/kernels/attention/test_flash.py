"""The adapter on a CPU, where FlashAttention does not run: what ``varlen_attn`` says that it does is written out."""

import inspect
import math

import pytest
import torch
from torch.nn.attention import varlen

from titans_build.kernels.attention import Prefix, attention
from titans_build.kernels.attention import flash as module
from titans_build.kernels.attention.flash import flash_attention, refuse_flash
from titans_build.kernels.attention.trial import Trial

CASES = [  # queries, keys, window, step, start
    (7, 7, None, 1, None),
    (5, 9, None, 1, [0, 3]),
    (7, 7, 3, 1, None),
    (5, 12, 4, 1, [12, 2]),
    (5, 12, 4, 1, [9, 20]),
    (6, 12, None, 2, None),
    (4, 13, 5, 2, [6, 0]),
    (7, 13, 40, 2, [9, 13]),
    (3, 11, 4, 3, None),
    (1, 1, None, 2, None),
]


def written_out(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux, scale, window_size):
    """Each sequence on its own, its queries at its last keys. The log-sum-exp of nothing is infinity, as there."""
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32 and return_aux.lse
    left, right = window_size
    outputs, sums = [], []
    for i in range(len(cu_seq_q) - 1):
        (a, b), (c, d) = cu_seq_q[i : i + 2].tolist(), cu_seq_k[i : i + 2].tolist()
        assert 0 <= b - a <= max_q and 0 <= d - c <= max_k
        place = torch.arange(b - a)[:, None] + (d - c) - (b - a)
        key, far = torch.arange(d - c), max_q + max_k
        seen = (key >= place - (left if left >= 0 else far)) & (key <= place + (right if right >= 0 else far))
        score = (torch.einsum("thd,shd->hts", q[a:b], k[c:d]) * scale).masked_fill(~seen, -math.inf)
        total = score.logsumexp(-1)
        blind = ~seen.any(-1)
        weight = torch.where(blind[:, None], 0.0, (score - total.masked_fill(blind, 0.0)[..., None]).exp())
        outputs.append(torch.einsum("hts,shd->thd", weight.to(v.dtype), v[c:d]))
        sums.append(total.masked_fill(blind, math.inf))
    return torch.cat(outputs), torch.cat(sums, dim=1).detach()


@pytest.fixture(autouse=True)
def stub(monkeypatch):
    assert set(inspect.signature(written_out).parameters) <= set(inspect.signature(varlen.varlen_attn).parameters) | {
        "q", "k", "v"
    }  # fmt: skip
    monkeypatch.setattr(varlen, "varlen_attn", written_out)


def tensors(time, keys, kv_heads, prefix, dtype):
    shapes = [(time, 4), (keys, kv_heads), (keys, kv_heads), (time, 4), (prefix, kv_heads), (prefix, kv_heads)]
    return [torch.randn(2, *shape, 8, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("dtype, most", [(torch.float64, 1e-12), (torch.bfloat16, 0.02)])
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("prefix", [0, 3])
@pytest.mark.parametrize("time, keys, window, step, start", CASES)
def test_against_the_reference(time, keys, window, step, start, prefix, kv_heads, dtype, most):
    """Outputs, and the gradients where nothing is merged."""
    inputs = tensors(time, keys, kv_heads, prefix, dtype)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    start = None if start is None else torch.tensor(start)

    def run(given, attend):
        q, k, v, *first = given
        y = attend(q, k, v, window, start, Prefix(*first) if prefix else None, step)
        if prefix or step > 1:
            return [y.detach()]
        grads = torch.autograd.grad(y, given[:3], torch.ones_like(y).cumsum(1))
        return [y.detach(), *grads]

    def reference(q, k, v, window, start, prefix, step):
        return attention(q, k, v, window=window, start=start, prefix=prefix, step=step, backend="reference")

    found, expected = run(inputs, flash_attention), run(exact, reference)
    assert found[0].dtype == dtype
    for mine, theirs in zip(found, expected, strict=True):
        assert (mine.double() - theirs).norm() <= most * theirs.norm() + 1e-12


@pytest.mark.parametrize(
    "facts, said",
    [
        (dict(device="cpu"), "runs on a GPU, not on cpu"),
        (dict(dtype=torch.float32), "takes float16 and bfloat16, not torch.float32"),
        (dict(width=12), "in steps of 8, not 12"),
        (dict(grad=True, several=True), "gives no gradient of the log-sum-exp"),
        (dict(masked=False), "others take the rest"),
        (dict(few=True), "others take the rest"),
        (dict(few=True, named=True), None),
        (dict(several=True), None),
        (dict(grad=True), None),
    ],
)
def test_refusals(monkeypatch, facts, said):
    monkeypatch.setattr(Trial, "refuse", lambda self, dtype, width: None)
    refused = refuse_flash(**{"device": "cuda", "dtype": torch.bfloat16, "width": 64, "plain": False} | facts)
    assert refused is None if said is None else said in refused


def test_reasons_that_it_is_missing(monkeypatch):
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    monkeypatch.setattr(varlen, "varlen_attn", lambda q, k, v, window_size: None)
    assert module._missing.__wrapped__() is None
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: False)
    assert "was built without FlashAttention" in module._missing.__wrapped__()
    monkeypatch.setattr(varlen, "varlen_attn", lambda q, k, v: None)
    assert "needs a PyTorch whose varlen_attn takes windows" in module._missing.__wrapped__()


def test_the_trial_passes_what_is_right_and_finds_what_is_not(monkeypatch):
    assert module._trial.failure(torch.bfloat16, 32, "cpu") is None

    def shifted(*given, window_size, **options):
        return written_out(*given, window_size=(window_size[0] + (window_size[0] > 0), window_size[1]), **options)

    monkeypatch.setattr(varlen, "varlen_attn", shifted)
    assert "gave wrong numbers when it was tried on this GPU" in module._trial.failure(torch.bfloat16, 32, "cpu")
