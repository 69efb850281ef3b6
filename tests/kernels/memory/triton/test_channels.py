"""Decays by channel in the Triton kernels, in its interpreter, against the per-token reference and PyTorch."""

import pytest
import torch

from titans_build.tools.gpu import parity
from titans_build.tools.gpu.cases import Memory
from titans_build.tools.gpu.counting import Counting
from titans_build.tools.gpu.speed import layer_shapes, memory_operation
from titans_build.tools.gpu.timing import passes

pytest.importorskip("triton")
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")

SMALL = Memory("", d=6, chunk=4, time=9, heads=1, channels=True, precision="float64")
SLOW = pytest.mark.slow


@pytest.mark.parametrize("backend", ["triton", pytest.param("triton_batched", marks=SLOW)])
@pytest.mark.parametrize("changes", [
    dict(masked=True, started=True, clip=0.5),
    dict(depth=1, read="before", norm=False, momentum=False, window=3, batch=1),
    pytest.param(dict(saturated=True, window=3, deltas=True, read="anchor"), marks=SLOW),
    pytest.param(dict(depth=1, started=True, saturated=True), marks=SLOW),
    # several tiles of each
    pytest.param(dict(d=70, expansion=1, chunk=3, time=7, batch=1), marks=SLOW),
    pytest.param(dict(d=70, depth=1, chunk=3, time=7, batch=1), marks=SLOW),
    pytest.param(dict(chunk=70, time=72, batch=1), marks=SLOW),
    dict(precision="float32", batch=1, time=6),
    dict(precision="bfloat16", batch=1, time=6, d=16),
])  # fmt: skip
def test_writes_and_reads(changes, backend):
    case = SMALL._replace(**changes).case()
    row = parity.compare(case, backend, parity.answer(case), "cpu")
    assert row["passed"], row


@pytest.mark.parametrize("channels", [5, 200])
@pytest.mark.parametrize("momentum", [True, False])
def test_products_of_decays(momentum, channels):
    """Gates of 0 and 1 among them."""
    from titans_build.kernels.memory.channels_torch import channel_decay
    from titans_build.kernels.memory.triton.channels import triton_channel_decay

    torch.manual_seed(0)
    keep, added = torch.rand(2, 1, 9, channels, dtype=torch.float64), torch.rand(2, 1, 9, dtype=torch.float64)
    keep[:, :, 4, ::3], keep[:, :, 5, 1::3] = 0, 1
    leaves = [x.requires_grad_() for x in (keep, added)[: 1 + momentum]]
    found = []
    for function in (channel_decay, triton_channel_decay):
        results = [x for x in function(keep, added if momentum else None) if x is not None]
        assert len(results) == 2 + momentum
        random = torch.Generator().manual_seed(1)
        pushed = [torch.randn(x.shape, generator=random, dtype=x.dtype) for x in results]
        found.append([*results, *torch.autograd.grad(results, leaves, pushed)])
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("depth", [1, 2])
def test_the_number_of_launches_does_not_grow_with_the_sequence(depth):
    counts = []
    for time in (256, 1024):
        with Counting() as gpu:
            given = (1, time, 2, layer_shapes(64, 2, depth), 64, "auto", gpu.device, torch.bfloat16)
            operation = memory_operation(*given, kind="channels")
            gpu.clear()
            passes(*operation, True)()
        counts.append(len(gpu.launches))
    assert counts[0] == counts[1] < 450
