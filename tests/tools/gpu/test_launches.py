"""Launches and waits of the packaged models on a GPU, counted without one."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

import titans_build as tb
from titans_build.blocks.state import detach
from titans_build.kernels.memory import MemoryState, titans_memory
from titans_build.tools.gpu.counting import Counting

pytest.importorskip("triton")

SEGMENT = 32


def model_of(gpu: Counting, recipe: str, segment: int = SEGMENT) -> Any:
    changes = {"dim": 64, "stack.0.repeat": 1} | ({"layers.mac.0.segment": segment} if recipe == "mac" else {})
    return gpu.moved(tb.build(tb.load_recipe(recipe, overrides=changes), device="meta"))


@pytest.mark.parametrize("recipe", ["transformer", "lmm", "mag", "mal", "mac"])
def test_a_training_step_and_decoding_do_not_wait(recipe: str) -> None:
    with Counting() as gpu:
        model = model_of(gpu, recipe)
        state = None
        for _ in range(2):  # the second from the state of the first, in the middle of a segment
            out = model(gpu.empty(2, 100, dtype=torch.int64), state, targets=gpu.empty(2, 100, dtype=torch.int64))
            out.loss.backward()
            state = detach(out.state)
        with torch.no_grad():
            decode = model.decoder(2)
            for _ in range(3):
                _, state = decode(gpu.empty(2, 1, model.dim), state)
        assert gpu.waits == []


@pytest.mark.parametrize("kind", ["mask", "documents"])
@pytest.mark.parametrize("recipe", ["mag", "mac", "tnt"])
def test_masks_and_documents_are_waited_for_once_and_on_a_cpu_never(recipe: str, kind: str) -> None:
    given = dict(mask=torch.arange(100) >= torch.tensor([[0], [40]]), documents=(torch.arange(200) // 40).view(2, 100))[
        kind
    ]
    for device in ("cpu", "cuda"):
        with Counting() as gpu:
            model, tokens = model_of(gpu, recipe), gpu.empty(2, 100, dtype=torch.int64)
            there = given if device == "cpu" else given.to(gpu.device, non_blocking=True)
            model(tokens, targets=tokens, **{kind: there}).loss.backward()
        # the position of a memory whose documents go on in another segment is not known
        more = recipe == "mac" and kind == "documents"
        assert len(gpu.waits) <= (device == "cuda") + more


@pytest.mark.parametrize("segment", [SEGMENT, 64], ids=["half a chunk", "a chunk"])
def test_launches_of_a_segment_of_a_mac_layer(segment: int) -> None:
    """Under autocast. With ``TITANS_BUILD_CUDA_GRAPHS=1``, all segments are a replay: see ``test_cuda_graph.py``."""
    launches = []
    for segments in (1, 3, 4, 5):  # the first run makes constants
        with Counting() as gpu:
            model = model_of(gpu, "mac", segment)
            tokens = gpu.empty(2, segment * segments, dtype=torch.int64)
            with gpu.autocast(torch.bfloat16):
                loss = model(tokens, targets=tokens).loss
            forward = len(gpu.launches)
            loss.backward()
            launches.append((forward, len(gpu.launches) - forward))
    for before, after in itertools.pairwise(launches[1:]):
        assert after[0] - before[0] <= 33
        assert after[1] - before[1] <= 80


def launches_of(recipe: str, length: int) -> tuple[int, int]:
    """Those of a layer's forward and backward pass under autocast."""
    with Counting() as gpu:
        changes = {"stack.0.repeat": 1, "vocab": 32}
        model = gpu.moved(tb.build(tb.load_recipe(recipe, overrides=changes), device="meta"))
        tokens = gpu.empty(1, length, dtype=torch.int64)
        with gpu.autocast(torch.bfloat16):
            loss = model(tokens, targets=tokens).loss
        forward = len(gpu.launches)
        loss.backward()
        return forward, len(gpu.launches) - forward


def test_launches_of_a_chunk_of_wide_heads() -> None:
    """Heads of 256, which have no fused kernel: 19 for a chunk."""
    launches_of("lmm-1.3b", 128)  # makes constants
    before, after = launches_of("lmm-1.3b", 256), launches_of("lmm-1.3b", 512)
    assert after[0] - before[0] <= 4 * 7 and after[1] - before[1] <= 4 * 12


@pytest.mark.slow
def test_stretches_between_resets_of_wide_heads_share_launches() -> None:
    """Each has 384 chunks. The chunk of the global memory is launches more, and another group of chunks is."""
    before, after = (sum(launches_of("tnt-1.3b", length)) for length in (4096, 6144))
    assert after - before <= 120


def test_tokens_in_half_precision_are_cast_by_the_kernels() -> None:
    """Queries, keys, values, outputs and their gradients. Gates are cast, and the gradient of the keys is a sum."""
    with Counting() as gpu:
        q, k, v = (gpu.empty(2, 128, 2, 64, dtype=torch.bfloat16).requires_grad_() for _ in "qkv")
        theta, eta, alpha = (gpu.empty(2, 128, 2, dtype=torch.bfloat16) for _ in "tea")
        weights = tuple(gpu.empty(2, 2, 64, 64) for _ in range(2))
        y, _ = titans_memory(q, k, v, theta, eta, alpha, MemoryState.fresh(weights), 64)
        y.backward(gpu.empty(*y.shape, dtype=y.dtype))
        assert y.dtype == q.grad.dtype == k.grad.dtype == torch.bfloat16
        sizes = [launch.bytes for launch in gpu.launches if launch.name == "_to_copy"]
        assert len(sizes) == 3 and max(sizes) <= theta.numel() * (2 + 4)


def test_a_long_sequence_takes_no_more_launches_of_the_memory() -> None:
    launches = []
    for time in (128, 1024):
        with Counting() as gpu:
            model, tokens = model_of(gpu, "lmm"), gpu.empty(2, time, dtype=torch.int64)
            model(tokens, targets=tokens).loss.backward()
        launches.append(len(gpu.launches))
    assert launches[0] == launches[1]


def test_generation_waits_for_each_sampled_token_alone() -> None:
    with Counting() as gpu:
        model = model_of(gpu, "mag")
        model.generate(gpu.empty(2, 20, dtype=torch.int64), max_new_tokens=3, seed=torch.Generator())
        assert len(gpu.waits) == 3 and all("sampling" in wait for wait in gpu.waits)
