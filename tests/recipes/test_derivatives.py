"""Second derivatives and torch.func transforms of whole models."""

import pytest
import torch
from torch.func import functional_call, grad, jvp, vmap

import titans_build as tb

SIZES = {
    "lmm": {"dim": 16, "stack.0.repeat": 1},
    "mac": {"dim": 16, "layers.mac.0.segment": 8},
    "mag": {"dim": 16},
}


@pytest.fixture(params=SIZES)
def model(request):
    return tb.build(tb.load_recipe(request.param, overrides=SIZES[request.param]), seed=0, dtype=torch.float64)


def test_a_gradient_penalty_has_the_gradient_of_finite_differences(model):
    torch.manual_seed(0)
    x, direction = torch.randn(2, 1, 21, 16, dtype=torch.float64)

    def penalty(x, again=False):
        x = x.detach().requires_grad_()
        y = model(embeddings=x).hidden.square().sum()
        return x, torch.autograd.grad(y, x, create_graph=again)[0].square().sum()

    leaf, loss = penalty(x, again=True)
    slope = (torch.autograd.grad(loss, leaf)[0] * direction).sum()
    h = 1e-5
    expected = (penalty(x + h * direction)[1] - penalty(x - h * direction)[1]) / (2 * h)
    torch.testing.assert_close(slope, expected, rtol=1e-4, atol=0)


def test_transforms_of_functions(model):
    tokens = torch.randint(256, (2, 20), generator=torch.Generator().manual_seed(0))
    parameters = {name: x.detach() for name, x in model.named_parameters()}

    def loss(parameters, tokens):
        return functional_call(model, parameters, (tokens,), {"targets": tokens}).loss

    model(tokens, targets=tokens).loss.backward()
    expected = {name: torch.zeros_like(x) if x.grad is None else x.grad for name, x in model.named_parameters()}
    torch.testing.assert_close(grad(loss)(parameters, tokens), expected)
    per_row = vmap(grad(lambda parameters, row: loss(parameters, row[None])), (None, 0))(parameters, tokens)
    torch.testing.assert_close({name: x.mean(0) for name, x in per_row.items()}, expected)
    ones = {name: torch.ones_like(x) for name, x in parameters.items()}
    slope = jvp(lambda parameters: loss(parameters, tokens), (parameters,), (ones,))[1]
    torch.testing.assert_close(slope, sum(x.sum() for x in expected.values()))


def test_vmap_over_embeddings_and_over_what_decides_about_shapes(model):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 1, 9, 16, generator=generator, dtype=torch.float64)
    tokens = torch.randint(256, (3, 1, 9), generator=generator)
    block = tb.build_block("memory", dim=16)
    with torch.no_grad():
        expected = torch.stack([model(embeddings=row).hidden for row in x])
        torch.testing.assert_close(vmap(lambda row: model(embeddings=row).hidden)(x), expected)
        calls = {
            "mask": lambda row, flag: model(row, mask=flag),
            "documents": lambda row, flag: model(row, documents=flag.cumsum(1)),
            "state": lambda row, flag: model(row, model.init_state(1)._replace(recipe=flag.sum(1))),
            "NeuralMemory: mask": lambda row, flag: block(torch.zeros(1, 9, 16), mask=flag),
        }
        for name, call in calls.items():
            with pytest.raises(ValueError, match=f"^{name}: vmap cannot map over it"):
                vmap(call)(tokens, tokens > 99)
