"""Every operation by every backend it has: named, it runs and agrees with the reference, or says why it does not."""

import dataclasses

import pytest
import torch

from titans_build.kernels.attention import attention
from titans_build.kernels.attention.decode import Cache, cached_attention
from titans_build.kernels.dispatch import OPERATIONS, VARIABLE, BackendError
from titans_build.kernels.linear import project
from titans_build.kernels.memory import MemoryState, read_memory, titans_memory
from titans_build.kernels.norm_gate import gate, gated_norm, l2_norm, rms_norm, swiglu
from titans_build.kernels.norm_gate.decode import feed_forward
from titans_build.kernels.rotary import normed_rotation, rotate
from titans_build.kernels.scan import linear_scan
from titans_build.kernels.short_conv import causal_convolution, query, query_key_value
from titans_build.kernels.short_conv.decode import Layers, memory_inputs


def new(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


WEIGHTS = (new(1, 2, 8, 4), new(1, 2, 4, 8))
CACHE = Cache(*[new(1, 3, 2, 4)] * 2, *[torch.tensor([3])] * 2, None, None)
LAYERS = Layers(new(48, 16), None, 2, new(6, 16), new(6))
STATE = MemoryState.fresh(WEIGHTS)
TOKEN, GATES = new(1, 1, 2, 4), torch.sigmoid(new(1, 1, 2))
CALLS = {
    "attention": lambda **chosen: attention(*[new(1, 5, 2, 8)] * 3, window=3, **chosen),
    "convolution": lambda **chosen: causal_convolution(new(1, 5, 4), new(4, 3), **chosen),
    "rms_norm": lambda **chosen: rms_norm(new(5, 4), new(4), **chosen),
    "l2_norm": lambda **chosen: l2_norm(new(5, 4), **chosen),
    "rotary": lambda **chosen: rotate(new(1, 2, 2, 4), torch.tensor([[3, 4]]), **chosen),
    "normed_rotation": lambda **chosen: normed_rotation(new(1, 3, 2, 4), new(3, 4), range(3), 100.0, first=1, **chosen)[
        0
    ],
    "cached_attention": lambda **chosen: cached_attention(new(1, 1, 6, 4), None, CACHE, heads=2, window=4, **chosen),
    "projection": lambda **chosen: project(new(1, 16), new(8, 16), **chosen),
    "linear": lambda **chosen: project(new(9, 16), new(8, 16), **chosen),
    "gated_projection": lambda **chosen: feed_forward(new(1, 16), new(64, 16), new(16, 32), **chosen),
    "memory_inputs": lambda **chosen: memory_inputs(new(1, 1, 16), None, LAYERS, **chosen),
    "gate": lambda **chosen: gate(new(5, 4), new(5, 4).flip(0), new(4), new(4), **chosen),
    "gated_norm": lambda **chosen: gated_norm(new(5, 2, 4), new(2, 4), new(5, 8), **chosen),
    "swiglu": lambda **chosen: swiglu(new(5, 8), **chosen),
    "memory_read": lambda **chosen: read_memory(TOKEN, WEIGHTS, **chosen),
    "memory": lambda **chosen: titans_memory(TOKEN, TOKEN, TOKEN, GATES, GATES, GATES, STATE, **chosen),
    "query": lambda **chosen: query(new(1, 1, 8), new(24, 3), new(1, 2, 24), 2, **chosen),
    "query_key_value": lambda **chosen: query_key_value(new(1, 5, 24), new(24, 3), new(1, 2, 24), 2, **chosen),
    "linear_scan": lambda **chosen: linear_scan(new(1, 5, 4), new(1, 5, 4).flip(1), **chosen),
}
pytestmark = [
    pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile"),
    pytest.mark.parametrize("name", CALLS),
]


def test_every_operation_is_here(name):
    assert CALLS.keys() == OPERATIONS.keys()


@pytest.mark.parametrize("by", ["argument", "environment"])
def test_a_named_backend_runs_or_says_why_not(name, by, monkeypatch):
    expected = CALLS[name](backend="reference")
    operation, ran = OPERATIONS[name], []
    for backend in operation.backends.values():
        spy = lambda *given, run=backend.run, **options: (ran.append(run), run(*given, **options))[1]  # noqa: E731
        monkeypatch.setattr(operation, "_chosen", {})
        monkeypatch.setitem(operation.backends, backend.name, dataclasses.replace(backend, run=spy))
        chosen = {"backend": backend.name} if by == "argument" else {}
        monkeypatch.setenv(VARIABLE, f"{name}={backend.name}" if by == "environment" else "")
        try:
            found = CALLS[name](**chosen)
        except BackendError as error:
            assert f"{backend.name} cannot run: " in str(error) and name in str(error)
            assert not ran
            continue
        assert ran.pop() is backend.run and not ran
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_an_unknown_backend_is_an_error(name, monkeypatch):
    with pytest.raises(BackendError, match=f"{name}: backend='quickest': no such backend"):
        CALLS[name](backend="quickest")
    monkeypatch.setenv(VARIABLE, f"{name}=quickest")
    with pytest.raises(BackendError, match=f"{name}: {VARIABLE}={name}=quickest: no such backend; expected auto, "):
        CALLS[name]()
