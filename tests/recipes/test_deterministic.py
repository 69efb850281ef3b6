"""``torch.use_deterministic_algorithms(True)``: all operations support it, and two runs are bit-identical."""

import pytest
import torch

import titans_build as tb
from titans_build.blocks.state import detach, named_tensors
from titans_build.kernels.dispatch import OPERATIONS, VARIABLE
from titans_build.recipes.loading import base_names

IN_PYTORCH = "attention=sdpa,memory=torch," + ",".join(
    f"{name}=torch" for name, operation in OPERATIONS.items() if name != "memory" and "torch" in operation.backends
)
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]


@pytest.fixture
def deterministic(monkeypatch):
    """Deterministic mode, in which ``torch.empty`` is filled with NaN, on several threads."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)


def step(module, tokens, state=None, mask=None):
    """Outputs, state and gradients."""
    module.zero_grad()
    out = module(tokens[:, :-1], state, mask, tokens[:, 1:])
    out.loss.backward()
    found = {"logits": out.logits, "loss": out.loss, **dict(named_tensors(out.state))}
    return found | {name: p.grad for name, p in module.named_parameters() if p.grad is not None}, out.state


@pytest.mark.parametrize("setting", ["auto", IN_PYTORCH], ids=["best", "pytorch"])
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", base_names())
def test_two_runs_are_bit_equal(name, device, setting, deterministic, monkeypatch):
    monkeypatch.setenv(VARIABLE, setting)
    torch.manual_seed(0)
    recipe = tb.load_recipe(name, overrides={"dim": 32, "vocab": 40, "stack.0.repeat": 1})
    tokens = torch.randint(0, 40, (3, 151), device=device)
    mask = torch.rand(3, 150, device=device) < 0.8
    runs = []
    for _ in range(2):
        module = tb.build(recipe, seed=0, device=device)
        first, state = step(module, tokens)
        again, _ = step(module, tokens, state._replace(layers=detach(state.layers)), mask)
        generated = module.generate(tokens[:, :5], max_new_tokens=4, temperature=1.0, seed=3).tokens
        runs.append({**first, **{f"again {key}": x for key, x in again.items()}, "generated": generated})
    for key, x in runs[0].items():
        assert torch.equal(x, runs[1][key]), key
        assert x.isfinite().all(), key
