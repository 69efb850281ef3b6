"""Random memories for the tests of the operation, and what it means that backends agree."""

import itertools

import pytest
import torch

from titans_build.kernels.cpu_runtime import library
from titans_build.kernels.memory import MemoryState, Options, Tokens, run_memory, titans_memory

UNBUILT = library.refuse(device="cpu", dtype=torch.float64)


@pytest.fixture(autouse=True)
def built(request):
    """Skips the C backends where there is no compiler."""
    parameters = request.node.callspec.params.values() if hasattr(request.node, "callspec") else ()
    if UNBUILT is not None and any(x in ("native", "native_step") for x in parameters if isinstance(x, str)):
        pytest.skip(f"C kernels: {UNBUILT}")


@pytest.fixture(scope="session")
def memory_case():
    return MemoryCase


class MemoryCase:
    """Random inputs of a memory, with gates that include exact 0 and 1."""

    def __init__(self, *, batch=2, time=14, heads=2, d_in=4, d_out=4, depth=2, expansion=2, norm=True, momentum=True,
                 forgetting=True, phases=None, mask=None, seed=0, scale=0.5, step=0.2, forget=0.5,
                 deltas=False):  # fmt: skip
        torch.manual_seed(seed)
        rand = lambda *shape: torch.rand(*shape, dtype=torch.float64)  # noqa: E731
        randn = lambda *shape: torch.randn(*shape, dtype=torch.float64)  # noqa: E731
        self.q, self.k, self.v = (
            randn(batch, time, heads, d_in),
            randn(batch, time, heads, d_in),
            randn(batch, time, heads, d_out),
        )
        self.k = self.k / self.k.norm(dim=-1, keepdim=True)
        self.theta, eta, alpha = (
            step * rand(batch, time, heads),
            rand(batch, time, heads),
            forget * rand(batch, time, heads),
        )
        for gate, values in ((self.theta, (0.0,)), (eta, (0.0, 1.0)), (alpha, (0.0, 1.0) if forget > 0.1 else (0.0,))):
            for value in values:
                gate[torch.rand(gate.shape) < 0.1] = value
        self.eta, self.alpha = eta if momentum else None, alpha if forgetting else None
        widths = [d_in, *[d_in * expansion] * (depth - 1), d_out]
        part = lambda: tuple(scale * randn(batch, heads, o, i) for i, o in itertools.pairwise(widths))  # noqa: E731
        self.delta = 0.3 + 2 * rand(batch, time, heads) if deltas else None
        self.norm = randn(heads, d_out) if norm else None
        weights = part()
        position = torch.tensor(phases or [0] * batch)
        anchor = tuple(torch.where((position == 0).view(-1, 1, 1, 1), w, a) for w, a in zip(weights, part()))
        self.state = MemoryState(weights, part() if momentum else (), anchor, position)
        self.mask = mask
        self.leaves = [
            x.requires_grad_()
            for x in (
                self.q,
                self.k,
                self.v,
                self.theta,
                self.eta,
                self.alpha,
                self.delta,
                self.norm,
                *weights,
                *self.state.momentum,
            )
            if x is not None
        ]
        if phases is not None:
            self.state = self.state._replace(anchor=tuple(a.detach().requires_grad_() for a in anchor))
            self.leaves += self.state.anchor

    @property
    def tokens(self):
        return Tokens(self.q, self.k, self.v, self.theta, self.eta, self.alpha, self.delta)

    def run(self, state=None, tokens=slice(None), objective=None, backend="auto", **options):
        cut = lambda x: None if x is None else x[:, tokens]  # noqa: E731
        given = self.tokens.map(cut)
        state, mask = self.state if state is None else state, cut(self.mask)
        if objective is None:
            return titans_memory(*given[:6], state, norm=self.norm, mask=mask, backend=backend, **options)
        options = {"chunk": 16, "activation": "gelu", "clip": None, "read": "after", **options}
        return run_memory(given, state, self.norm, mask, Options(objective=objective, **options), backend)

    def gradients(self, outputs):
        torch.manual_seed(1)
        total = sum((x * torch.randn_like(x)).sum() for x in outputs)
        grads = torch.autograd.grad(total, self.leaves, allow_unused=True)
        return [torch.zeros_like(x) if g is None else g for g, x in zip(grads, self.leaves)]

    @staticmethod
    def tensors(result):
        y, state = result
        return [y, *state.weights, *state.momentum, *state.anchor]

    @staticmethod
    def assert_equal(got, expected, tolerance=1e-10):
        for a, b in zip(got, expected, strict=True):
            assert a.shape == b.shape
            scale = max(1.0, b.abs().max().item()) if b.numel() else 1.0
            assert (a - b).abs().max().item() <= tolerance * scale if b.numel() else True

    def assert_agrees(self, **options):
        """The fast backends against both references: outputs, final state, every gradient."""
        oracle = self.tensors(self.run(backend="reference", **options))
        oracle_grads = self.gradients(oracle)
        for backend in ("torch", "closed_form", *(["native"] if UNBUILT is None else [])):
            result = self.tensors(self.run(backend=backend, **options))
            self.assert_equal(result, oracle)
            self.assert_equal(self.gradients(result), oracle_grads)
