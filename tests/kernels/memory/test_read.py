import pytest
import torch

from titans_build.kernels.cpu_runtime import library
from titans_build.kernels.memory import MemoryState, read_memory, titans_memory
from titans_build.kernels.memory.decode import prepare_read


def test_reading_is_the_operation_without_the_write():
    torch.manual_seed(0)
    weights = tuple(torch.randn(2, 3, 4, 4, dtype=torch.float64) for _ in range(3))
    gain = torch.randn(3, 4, dtype=torch.float64)
    q = torch.randn(2, 5, 3, 4, dtype=torch.float64)
    zero = torch.zeros(2, 5, 3, dtype=torch.float64)
    y, _ = titans_memory(q, q, q, zero, None, None, MemoryState.fresh(weights), norm=gain, backend="reference")
    assert torch.allclose(read_memory(q, weights, "gelu", gain), y, atol=1e-12)


def test_reading_keeps_no_hidden_value_and_differentiates():
    torch.manual_seed(0)
    weights = tuple(torch.randn(1, 2, o, i, dtype=torch.float64, requires_grad=True) for o, i in ((6, 3), (3, 6)))
    gain = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    q = torch.randn(1, 4, 2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda q, g, *w: read_memory(q, w, "silu", g), (q, gain, *weights))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        read_memory(q, weights, "silu", gain)
    assert sum(kept) == sum(x.numel() for x in (q, gain, *weights))


@pytest.mark.skipif(library._compiler() is None, reason="no C compiler")
def test_one_query_can_be_prepared():
    weights = tuple(torch.randn(1, 2, o, i) for o, i in ((6, 4), (4, 6)))
    q = torch.randn(1, 1, 2, 4)
    with torch.no_grad():
        read = prepare_read(q, [(6, 4), (4, 6)], "gelu", None)
        assert read is not None and torch.equal(read(weights), read_memory(q, weights, backend="native_step"))
