from __future__ import annotations

import torch

import titans_build as tb
from titans_build.blocks.laws.check import LAWS


def test_bottleneck_laws(bottleneck: None) -> None:
    # it says where it is: the only law that it cannot obey
    laws = [law for law in LAWS if law != "position"]
    tb.check_block(
        {"type": "bottleneck", "of": [{"type": "memory", "heads": 2, "chunk": 4}, "ffn"], "after": 5},
        dim=8,
        laws=laws,
        endurance=200,
        cuts=4,
    )


def test_outputs_after_the_bottleneck_depend_on_its_features_alone(bottleneck: None) -> None:
    block = tb.create({"type": "bottleneck", "of": [{"type": "attention", "heads": 2}, "ffn"], "after": 3}, dim=8)
    torch.manual_seed(0)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(2, 9, 8)
    y, state = block(x)
    assert not y[:, :3].any() and y[:, 3:].abs().min() > 0
    later = x.clone()
    later[:, 4:] = torch.randn(2, 5, 8)
    assert torch.equal(block(later)[0], y)
    earlier = x.clone()
    earlier[0, 0] += 1
    changed = (block(earlier)[0] - y).abs().amax(-1)
    assert (changed[0, 3:] > 0).all() and not changed[1].any()
    # positions differ in their code alone
    inside, _ = block.of(x[:, :4])
    features = torch.nn.functional.rms_norm(inside[:, 3:], (8,), block.norm.gain, block.norm.eps)
    torch.testing.assert_close(y[:, 3:] - features, (y[:1, 3:] - features[:1]).expand(2, -1, -1))
    assert torch.equal(state.position, torch.tensor([9, 9]))
