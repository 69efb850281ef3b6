"""A few new tokens over a cache: every backend is the three operations of it, one after the other."""

import itertools

import pytest
import torch

from titans_build.kernels.attention.decode import Cache, cached_attention

BACKENDS = ["native", "torch"]


def case(dtype, batch, time, heads, kv_heads, d, window, slots, persistent, normed):
    torch.manual_seed(0)
    randn = lambda *shape: torch.randn(*shape, dtype=dtype)  # noqa: E731
    slots = slots if window is None else window - 1
    cached = torch.randint(0, slots + 1, (batch,))
    held = (torch.arange(slots) >= slots - cached[:, None])[..., None, None]
    keys, values = (randn(batch, slots, kv_heads, d) * held for _ in range(2))
    prefix = [randn(1, persistent, kv_heads, d).expand(batch, -1, -1, -1) if persistent else None for _ in range(2)]
    cache = Cache(keys, values, cached, torch.randint(0, 2**40, (batch,)), *prefix)
    gain = randn(heads + kv_heads, d) if normed else None
    return randn(batch, time, heads + 2 * kv_heads, d), gain, cache


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("window, slots", [(None, 0), (None, 7), (1, 0), (2, 1), (5, 4), (40, 39)])
@pytest.mark.parametrize("heads, kv_heads, d", [(4, 4, 8), (4, 2, 64), (3, 1, 6)])
def test_equals_the_three_operations(backend, dtype, window, slots, heads, kv_heads, d):
    choices = (1, 3), (1, 3), (0, 5), (None, 1e4), (True, False)
    for batch, time, persistent, base, normed in itertools.product(*choices):
        projected, gain, cache = case(dtype, batch, time, heads, kv_heads, d, window, slots, persistent, normed)
        options = dict(heads=heads, window=window, base=base)
        found = cached_attention(projected, gain, cache, **options, backend=backend)
        expected = cached_attention(projected, gain, cache, **options, backend="reference")
        for a, b in zip(found, expected, strict=True):
            assert a.shape == b.shape
            torch.testing.assert_close(a, b, rtol=0, atol=1e-10 if dtype == torch.float64 else 1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_inputs_are_not_modified(backend):
    given = projected, gain, cache = case(torch.float32, 2, 2, 4, 2, 8, 5, 4, 3, True)
    tensors = [projected, gain, *cache]
    before = [x.clone() for x in tensors]
    cached_attention(*given, heads=4, window=5, base=1e4, backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(before, tensors))


def test_views_of_larger_tensors():
    projected, gain, cache = case(torch.float64, 2, 2, 4, 2, 8, 5, 4, 3, True)
    wide = lambda x: torch.cat([x, x], dim=1)[:, x.shape[1] :]  # noqa: E731
    heads_last = lambda x: x.transpose(1, 2).contiguous().transpose(1, 2)  # noqa: E731
    expected = cached_attention(projected, gain, cache, heads=4, window=5, base=1e4)
    for change in (wide, heads_last):
        seen = cache._replace(keys=change(cache.keys), values=change(cache.values))
        found = cached_attention(change(projected), gain.t().contiguous().t(), seen, heads=4, window=5, base=1e4)
        for a, b in zip(found, expected):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_other_dtypes_run_without_the_kernel():
    projected, gain, cache = case(torch.float32, 1, 1, 4, 4, 8, 5, 4, 3, True)
    half = lambda x: x.bfloat16() if x is not None and x.is_floating_point() else x  # noqa: E731
    y, keys, _ = cached_attention(half(projected), half(gain), Cache(*map(half, cache)), heads=4, window=5)
    assert y.dtype == keys.dtype == torch.bfloat16
    expected = cached_attention(projected, gain, cache, heads=4, window=5)[0]
    assert (y - expected).norm() < 0.03 * expected.norm()
