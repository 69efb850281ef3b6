"""Decoding keeps to the layout of the state and to its cost."""

import torch

from titans_build.kernels.memory import MemoryState, titans_memory


def test_anchor_is_the_weights_at_the_chunk_start():
    torch.manual_seed(0)
    state = MemoryState.fresh((torch.randn(1, 1, 4, 4),))
    token = lambda: torch.randn(1, 1, 1, 4)  # noqa: E731
    gate = torch.full((1, 1, 1), 0.1)
    anchors = []
    with torch.no_grad():
        for _ in range(7):
            _, state = titans_memory(token(), token(), token(), gate, gate, gate, state, chunk=3)
            anchors.append((state.anchor[0].clone(), state.weights[0].clone()))
    assert torch.equal(anchors[2][0], anchors[2][1]) and torch.equal(anchors[5][0], anchors[5][1])
    assert torch.equal(anchors[3][0], anchors[2][1]) and torch.equal(anchors[4][0], anchors[2][1])
    assert not torch.equal(anchors[4][0], anchors[4][1])
