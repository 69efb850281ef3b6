"""What the memory keeps for backward, by the room that there is."""

from types import SimpleNamespace

import pytest
import torch

from titans_build.kernels.memory import MemoryState, chunkwise_torch, titans_memory
from titans_build.kernels.memory.chunkwise_torch import MemoryPlan, plan_memory

MIB = 2**20


@pytest.mark.parametrize(
    "room, keep, on_cpu, expected",
    [
        # 64 chunks, 1 MiB of state, 1 MiB of outputs
        (1000 * MIB, None, True, (1, True, 8)),
        (100 * MIB, None, True, (1, False, 8)),  # outputs of keys and queries take 128
        (63 * MIB, None, True, (8, False, 8)),
        (7 * MIB, None, True, (16, False, 16)),
        (1000 * MIB, 4, True, (4, False, 4)),
        (1000 * MIB, 1, True, (1, True, 8)),
        (10000 * MIB, None, False, (1, True, 64)),
        (2000 * MIB, None, False, (1, True, 19)),  # 13 MiB of work for each, in an eighth of the room
        (191 * MIB, None, False, (1, False, 8)),  # on a GPU, outputs are kept beside the states
        (63 * MIB, None, False, (8, False, 8)),
    ],
)
def test_the_rule(room, keep, on_cpu, expected):
    assert plan_memory(64, MIB, MIB, keep, room, on_cpu=on_cpu) == expected


def test_more_room_never_keeps_less():
    plans = [plan_memory(100, MIB, MIB, None, room * MIB, on_cpu=False) for room in range(1, 3000, 7)]
    intervals = [plan.interval for plan in plans]
    assert intervals == sorted(intervals, reverse=True) and intervals[-1] == 1
    assert all(plan.group <= 100 for plan in plans)


@pytest.mark.parametrize("plan", [(1, True, 20), (1, False, 20), (1, True, 3), (8, False, 8), (32, False, 20)])
def test_every_plan_has_the_same_results(plan, monkeypatch):
    torch.manual_seed(0)
    token = lambda *shape: torch.randn(2, 40, 2, *shape, dtype=torch.float64)  # noqa: E731
    given = [token(4), token(4), token(4), 0.1 * token().sigmoid(), token().sigmoid(), 0.1 * token().sigmoid()]
    weights = tuple(0.3 * torch.randn(2, 2, *shape, dtype=torch.float64) for shape in ((8, 4), (4, 8)))

    def run():
        leaves = [x.clone().requires_grad_() for x in (*given, *weights)]
        state = MemoryState.fresh(tuple(leaves[6:]))
        y, after = titans_memory(*leaves[:6], state, 2, backend="torch")
        return y, *torch.autograd.grad(y.sum() + after.weights[0].square().sum(), leaves)

    expected = run()
    monkeypatch.setattr(chunkwise_torch, "plan_memory", lambda *given, **named: MemoryPlan(*plan))
    for got, x in zip(run(), expected):
        torch.testing.assert_close(got, x, rtol=1e-10, atol=1e-12)


def test_the_room_on_a_gpu(monkeypatch):
    """Half of the memory less what is in use, which is asked when an eighth of the last answer is spent."""
    used, asked, gib = [0], [], 2**30

    def allocated(device):
        asked.append(used[0])
        return used[0]

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=64 * gib))
    monkeypatch.setattr(torch.cuda, "memory_allocated", allocated)
    monkeypatch.setattr(chunkwise_torch, "_rooms", {})
    q = SimpleNamespace(is_cuda=True, device="cuda:0")
    needed, rooms = gib // 16, []
    for _ in range(600):  # each keeps 64 MiB
        rooms.append(chunkwise_torch.room_of(q, needed))
        used[0] += needed
    assert rooms[0] == 32 * gib and rooms == sorted(rooms, reverse=True)
    assert rooms[-1] == chunkwise_torch.CHECKPOINT_BYTES
    assert all(room <= max(32 * gib - i * needed, 0) + chunkwise_torch.CHECKPOINT_BYTES for i, room in enumerate(rooms))
    assert len([place for place in asked if place < 24 * gib]) < 20
    used[0] = 0  # backward has freed all
    assert max(chunkwise_torch.room_of(q, gib) for _ in range(2)) == 32 * gib
    assert chunkwise_torch.room_of(torch.zeros(1), gib) == chunkwise_torch.CHECKPOINT_BYTES
