"""The adapter on a CPU, where xFormers has no kernels: its masks are written out, and PyTorch attends under them."""

import math

import pytest
import torch

from titans_build.kernels.attention import Prefix, attention
from titans_build.kernels.attention import xformers as module
from titans_build.kernels.attention.parts import parts
from titans_build.kernels.attention.reference import visible_keys
from titans_build.kernels.attention.trial import Trial
from titans_build.kernels.attention.xformers import refuse_xformers, xformers_attention
from titans_build.kernels.dispatch import OPERATIONS, Backend, BackendError, BackendUnavailable, table

masks = pytest.importorskip("xformers.ops.fmha.attn_bias", reason="xFormers is for Linux")

CASES = [  # queries, keys, window, step
    (7, 7, None, 1),
    (5, 9, None, 1),
    (1, 9, 4, 1),
    (7, 7, 3, 1),
    (5, 12, 4, 1),
    (5, 12, 40, 1),
    (6, 12, None, 2),
    (4, 13, 5, 2),
    (4, 13, 1, 2),
    (3, 11, 4, 3),
]


def scores(q, k, attn_bias):
    score = torch.einsum("bthd,bshd->bhts", q, k) * q.shape[-1] ** -0.5
    return score if attn_bias is None else score + attn_bias.materialize(score.shape, score.dtype)


def whole(q, k, v, attn_bias):
    return torch.einsum("bhts,bshd->bthd", scores(q, k, attn_bias).softmax(-1), v)


def partial(q, k, v, attn_bias):
    return whole(q, k, v, attn_bias), scores(q, k, attn_bias).logsumexp(-1).transpose(1, 2)


def merge(*found):
    weights = torch.stack([lse for _, lse in found]).softmax(0)
    return sum(y * weight.unsqueeze(-1) for (y, _), weight in zip(found, weights))


@pytest.fixture(autouse=True)
def written_out(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(module, "_library", lambda: module._Library(whole, partial, merge, masks, True))


def tensors(time, keys, heads=4, kv_heads=2, prefix=3, rows=2):
    shapes = [(time, heads), (keys, kv_heads), (keys, kv_heads), (time, heads), (prefix, kv_heads), (prefix, kv_heads)]
    return [torch.randn(rows, *shape, 8, dtype=torch.float64, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize("time, keys, window, step", CASES)
def test_the_masks_together_are_the_definition(time, keys, window, step):
    """Every key in sight is in one part's mask, and no other is in any."""
    q, _, v, *_ = tensors(time, keys, kv_heads=4)
    place = torch.arange(keys, dtype=torch.float64).view(1, keys, 1, 1)
    seen = torch.zeros(time, keys)
    for part in parts(q, place.expand(1, keys, 4, 8), v, window, None, None, step):
        bias = module.mask(module._library(), part).materialize((time, part.k.shape[1]))
        assert set(bias.unique().tolist()) <= {0.0, -math.inf}
        seen[:, part.k[0, :, 0, 0].long()] += (bias == 0).float()
    assert torch.equal(seen, visible_keys(time, keys, window, None, q.device, step)[0].float())


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("prefix", [0, 3])
@pytest.mark.parametrize("time, keys, window, step", CASES)
def test_against_the_reference(time, keys, window, step, prefix, kv_heads):
    """MAC's segments among them: persistent tokens, and queries at every second key."""
    inputs = tensors(time, keys, kv_heads=kv_heads, prefix=prefix)
    q, k, v, *first = inputs
    first = Prefix(*first) if prefix else None
    y = xformers_attention(q, k, v, window, None, first, step)
    expected = attention(q, k, v, window=window, prefix=first, step=step, backend="reference")
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)
    seed = torch.randn_like(y)
    for mine, theirs in zip(
        *(torch.autograd.grad(out, inputs, seed, allow_unused=True, materialize_grads=True) for out in (y, expected))
    ):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)


def test_no_query_and_no_row():
    for shape in ((2, 0, 2, 8), (0, 3, 2, 8)):
        q = torch.zeros(shape)
        assert xformers_attention(q, q, q, None, None, None, 1).shape == shape


@pytest.mark.parametrize(
    "facts, said",
    [
        (dict(device="cpu"), "runs on a GPU, not on cpu"),
        (dict(dtype=torch.float32), "takes float16 and bfloat16, not torch.float32"),
        (dict(width=12), "in steps of 8, not 12"),
        (dict(width=264), "heads of up to 256 numbers"),
        (dict(start=True), "rows that all begin at one key"),
        (dict(gaps=True), "a key of their own in every stream"),
        (dict(grad=True, deterministic=True), "differ from run to run"),
    ],
)
def test_refusals(monkeypatch, facts, said):
    monkeypatch.setattr(Trial, "refuse", lambda self, dtype, width: None)
    whatever = {"device": "cuda", "dtype": torch.bfloat16, "width": 64, "plain": True, "named": True}
    assert refuse_xformers(**whatever) is None
    assert said in refuse_xformers(**{**whatever, **facts})


def missing(monkeypatch, **changed):
    """What is said of the installation."""
    for name, value in changed.items():
        monkeypatch.setattr(module, name, value)
    return module._installed.__wrapped__()


def test_reasons_that_it_is_missing(monkeypatch):
    built = module._library()
    assert missing(monkeypatch) is None
    assert "has no FlashAttention" in missing(monkeypatch, _library=lambda: built._replace(built=False))

    def broken():
        raise ImportError("undefined symbol")

    assert "cannot be loaded beside PyTorch" in missing(monkeypatch, _library=broken)
    monkeypatch.setattr(module.importlib.metadata, "version", lambda name: "0.0.34.post1+cu130")
    assert "needs xFormers 0.0.35 or newer, not 0.0.34.post1+cu130" in missing(monkeypatch)
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    assert missing(monkeypatch) == "needs xFormers: pip install 'titans-build[gpu]'"


def test_an_installed_version_is_used(monkeypatch):
    """The names that the adapter imports, in the version that is installed."""
    monkeypatch.undo()
    library = module._library()
    assert callable(library.whole) and callable(library.partial) and callable(library.merge)
    said = module._installed()
    assert said is None or "has no FlashAttention beside PyTorch" in said


def test_the_table_and_the_error_say_why():
    rows = {row.backend: row for row in table("cpu") if row.operation == "attention"}
    assert rows["xformers"].reason == "runs on a GPU, not on cpu" and not rows["xformers"].available
    q = torch.zeros(1, 1, 1, 8)
    with pytest.raises(BackendError, match="xformers cannot run: runs on a GPU, not on cpu"):
        attention(q, q, q, backend="xformers")


def misaligned():
    """Keys that begin in the middle of 16 bytes, and queries with steps that are no multiple of them."""
    torch.manual_seed(1)
    q = torch.randn(2, 7, 3, 12)[..., :8]
    k, v = (torch.randn(2, 7, 3, 8 + offset)[..., offset:] for offset in (3, 8))
    return q, k, v


def test_tensors_are_aligned_for_its_kernels(monkeypatch):
    given = []
    spy = lambda *tensors, attn_bias: (given.extend(tensors), whole(*tensors, attn_bias=attn_bias))[1]  # noqa: E731
    monkeypatch.setattr(module, "_library", lambda: module._Library(spy, partial, merge, masks, True))
    q, k, v = misaligned()
    expected = attention(q, k, v, window=3, backend="reference")
    torch.testing.assert_close(xformers_attention(q, k, v, 3, None, None, 1), expected)
    assert [x.data_ptr() == y.data_ptr() for x, y in zip(given, (q, k, v))] == [False, False, True]
    assert not any(step % 8 for x in given for step in x.stride()[:-1]) and not any(x.data_ptr() % 16 for x in given)


TOO_WIDE = """No operator found for `memory_efficient_attention_backward` with inputs:
     query       : shape=(2, 40, 2, 64) (torch.bfloat16)
`fa2B@2.8` is not supported because:
    requires device with capability >= (8, 0)
    operator wasn't built
`cutlassB-pt` is not supported because:
    operator wasn't built"""


def unable(*given, **named):
    raise NotImplementedError(TOO_WIDE)


def trial(monkeypatch, dtype=torch.bfloat16, **changed):
    library = module._Library(whole, partial, merge, masks, True)._replace(**changed)
    monkeypatch.setattr(module, "_library", lambda: library)
    return module._trial.failure(dtype, 32, "cpu")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_trial_passes_what_is_right(monkeypatch, dtype):
    torch.use_deterministic_algorithms(True)
    try:
        with torch.inference_mode():
            assert trial(monkeypatch, dtype) is None
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


def test_a_trial_finds_what_does_not_run(monkeypatch):
    said = "NotImplementedError: requires device with capability >= (8, 0); operator wasn't built"
    assert (
        trial(monkeypatch, whole=unable)
        == f"failed when it was tried on this GPU: BackendUnavailable: {said.split(': ', 1)[1]}"
    )
    assert "operator wasn't built" in trial(monkeypatch, merge=unable)

    def broken(*given, **named):
        raise RuntimeError("CUDA error: no kernel image is available\nmore")

    said = trial(monkeypatch, partial=broken)
    assert said == "failed when it was tried on this GPU: RuntimeError: CUDA error: no kernel image is available"


class Backwards(torch.autograd.Function):
    """Right forward, and not back."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return 1.1 * grad


def test_a_trial_finds_wrong_numbers(monkeypatch):
    forward = lambda *given, attn_bias: 1.1 * whole(*given, attn_bias=attn_bias)  # noqa: E731
    assert "gave wrong numbers when it was tried on this GPU, off by up to 10%" in trial(monkeypatch, whole=forward)
    back = lambda *given, attn_bias: Backwards.apply(whole(*given, attn_bias=attn_bias))  # noqa: E731
    assert "gave wrong numbers" in trial(monkeypatch, whole=back)
    spoiled = lambda *given, attn_bias: whole(*given, attn_bias=attn_bias) * float("nan")  # noqa: E731
    assert "off by up to inf" in trial(monkeypatch, whole=spoiled)


def test_a_failed_trial_is_a_refusal(monkeypatch):
    monkeypatch.setattr(module, "_installed", lambda: None)
    monkeypatch.setattr(module._trial, "_found", {})
    monkeypatch.setattr(module._trial, "failure", lambda dtype, width: f"{dtype}, {width}")
    assert refuse_xformers(device="cuda", dtype=torch.float16, width=72) == "torch.float16, 96"
    rows = {row.backend: row for row in table("cuda", torch.bfloat16) if row.operation == "attention"}
    assert rows["xformers"].reason == "torch.bfloat16, 32" and rows["flex"].chosen


@pytest.fixture
def failing(monkeypatch):
    """An operation on a device without values, whose first choice fails at the call."""
    operation = OPERATIONS["attention"]

    def run(q, k, v, *others):
        raise BackendUnavailable("needs more than there is")

    monkeypatch.setattr(operation, "_chosen", {})
    monkeypatch.setattr(operation, "_unavailable", {})
    backends = {"xformers": Backend("xformers", run), "sdpa": operation.backends["sdpa"]}
    monkeypatch.setattr(operation, "backends", backends)


def test_a_backend_that_fails_at_the_call_is_replaced(failing):
    q = torch.zeros(1, 5, 2, 8, device="meta")
    for _ in range(2):
        assert attention(q, q, q, window=3).shape == q.shape
    rows = {row.backend: row for row in table("meta") if row.operation == "attention"}
    assert rows["xformers"].reason == "needs more than there is" and rows["sdpa"].chosen


def test_a_named_backend_that_fails_at_the_call_is_an_error(failing, monkeypatch):
    q = torch.zeros(1, 5, 2, 8, device="meta")
    said = "attention: xformers is named and cannot run: needs more than there is"
    for _ in range(2):
        with pytest.raises(BackendError, match=said):
            attention(q, q, q, backend="xformers")
    monkeypatch.setenv("TITANS_BUILD_BACKEND", "attention=xformers")
    with pytest.raises(BackendError, match=said):
        attention(q, q, q)
