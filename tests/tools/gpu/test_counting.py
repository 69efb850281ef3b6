"""What a counted GPU counts."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

import titans_build as tb
from titans_build.kernels.attention import attention
from titans_build.kernels.memory import LearnerState, learn
from titans_build.tools.gpu.counting import Counting
from titans_build.tools.gpu.speed import layer_shapes, memory_operation
from titans_build.tools.gpu.timing import passes

pytest.importorskip("triton")


def names(gpu):
    return [launch.name for launch in gpu.launches]


def test_operators_are_launches_with_flops_and_bytes_and_views_are_not():
    with Counting() as gpu:
        x = torch.nn.Parameter(gpu.empty(4, 8))
        y = x.mT.view(8, 4) @ x
        assert y.is_cuda and y.device.type == "cuda" and not y.is_cpu and not y.is_meta
        y.sum().backward()
    assert names(gpu) == ["mm", "sum", "ones_like", "mm", "mm", "add"] and x.grad.is_cuda
    assert gpu.launches[0].flops == 2 * 8 * 4 * 8 and gpu.launches[0].bytes == 4 * (32 + 32 + 64)
    assert not gpu.waits


@pytest.mark.parametrize(
    "wait",
    [
        lambda x, n: bool((x > 0).all()), lambda x, n: x.sum().item(), lambda x, n: n.tolist(), lambda x, n: int(n[0]),
        lambda x, n: x.cpu(), lambda x, n: n.to("cpu"), lambda x, n: torch.tensor([1, 2], device=x.device),
        lambda x, n: torch.zeros(3).to(x.device), lambda x, n: n.nonzero(), lambda x, n: n[n > 0],
    ],
)  # fmt: skip
def test_what_makes_the_host_wait(wait):
    with Counting() as gpu:
        x, n = gpu.empty(4, 4), torch.arange(3, device=gpu.empty(1).device)
        assert not gpu.waits
        wait(x, n)
    assert len(gpu.waits) == 1


def test_answers_are_those_of_a_state_in_order_and_integers_have_values():
    with Counting() as gpu:
        x = gpu.empty(4, 4)
        assert bool(x.isfinite().all()) and not bool(x.isnan().any()) and x.sum().item() == 0
        assert (torch.arange(3, device=x.device) + 1).tolist() == [1, 2, 3]


def test_autocast_casts_and_a_parameter_once():
    with Counting() as gpu:
        x, w = gpu.empty(4, 8), torch.nn.Parameter(gpu.empty(8, 8))
        with gpu.autocast(torch.bfloat16):
            y = F.linear(F.linear(x, w), w)
            assert y.dtype == torch.bfloat16
            assert F.scaled_dot_product_attention(*[x.view(1, 1, 4, 8)] * 3).dtype == torch.bfloat16
    assert names(gpu) == ["_to_copy", "_to_copy", "mm", "mm", "_to_copy", "_to_copy", "_to_copy", "attention"]


@pytest.mark.parametrize("time, keys, window", [(5, 5, None), (7, 7, 3), (4, 9, 6), (4, 9, 100), (2, 9, 3)])
def test_attention_counts_the_keys_that_queries_see(time, keys, window):
    seen = sum(min(keys - time + i, window or keys) for i in range(1, time + 1))
    with Counting() as gpu:
        x = gpu.empty(1, keys, 2, 8, dtype=torch.bfloat16)
        attention(x[:, :time], x, x, window=window)
    assert gpu.launches[-1].flops == 2 * seen * 2 * 16


def test_a_training_step_of_a_model():
    with Counting() as gpu:
        model = gpu.moved(tb.build("lmm", overrides={"stack.0.repeat": 1}, device="meta"))
        tokens = gpu.empty(2, 128, dtype=torch.int64)
        with gpu.autocast(torch.bfloat16):
            model(tokens, targets=tokens).loss.backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in model.parameters())
    kernels = {launch.name: launch for launch in gpu.launches if launch.programs}
    assert kernels.keys() >= {"write_kernel", "read_kernel", "write_backward_kernel"}
    write = kernels["write_kernel"]
    assert write.programs == 2 * 4 and write.arguments["b"] == 64 and write.arguments["keys"] == (2, 8, 64, 64)


@pytest.mark.parametrize("kind", ["plain", "gated", "channels", "window", "thresholds"])
def test_the_memory_never_waits(kind):
    with Counting() as gpu:
        operation = memory_operation(
            1, 100, 2, layer_shapes(64, 2, 2), 64, "auto", gpu.device, torch.bfloat16, kind=kind
        )
        gpu.clear()
        passes(*operation, True)()
    assert gpu.launches and not gpu.waits


def test_a_matrix_with_decays_by_channel_and_chunks_of_one_token_is_solved_for_many_at_once():
    with Counting() as gpu:
        q, k, v, theta, eta = (gpu.empty(1, 64, 2, *width) for width in ((8,), (8,), (8,), (), ()))
        state = LearnerState.fresh([gpu.empty(1, 2, 8, 8)])
        gpu.clear()
        learn(q, k, v, theta, eta, gpu.empty(1, 64, 2, 8), state, chunk=1, network="linear", retention="channel")
    assert 0 < len(gpu.launches) < 2 * 64  # and not hundreds, as chunk after chunk
