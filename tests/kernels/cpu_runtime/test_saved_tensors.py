"""Hooks on saved tensors, such as those that move them away until backward, may give them back in other strides."""

import pytest
import torch
from torch.testing import assert_close

import titans_build as tb

LAYOUTS = {
    "transposed": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
    "every second": lambda x: torch.stack([x, x], -1)[..., 0],
    "inside a larger one": lambda x: torch.cat([x, x], -1)[..., : x.shape[-1]] if x.dim() else x,
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("recipe", ["mac", "mag", "windows-and-mac"])
def test_gradients_are_the_same(recipe, layout):
    overrides = {"dim": 32}
    if recipe == "mac":
        overrides["layers.mac.0.segment"] = 8
    model = tb.build(tb.load_recipe(recipe, overrides=overrides), dtype=torch.float64, seed=0)
    tokens = torch.randint(256, (2, 25), generator=torch.Generator().manual_seed(0))
    found = []
    for unpack in (lambda x: x, LAYOUTS[layout]):
        with torch.autograd.graph.saved_tensors_hooks(lambda x: x, unpack):
            loss = model(tokens[:, :-1], targets=tokens[:, 1:]).loss
            found.append(torch.autograd.grad(loss, list(model.parameters()), allow_unused=True))
    assert_close(found[1], found[0], rtol=1e-12, atol=1e-14)
