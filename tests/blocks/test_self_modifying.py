"""Self-modifying Titans are the equations of HOPE (arXiv 2512.24695, eq. 83-93), with matrices as learners."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import titans_build as tb

DIM, HEADS, TIME, CHUNK = 8, 2, 11, 4


def block(chunk: int = CHUNK, **fields: object) -> tb.Block:
    built = tb.build_block({"type": "self_modifying", "heads": HEADS, "chunk": chunk, **fields}, dim=DIM).double()
    torch.manual_seed(0)
    for parameter in built.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return built


def unit(x: Tensor) -> Tensor:
    return x / (x.square().sum() + 1e-6).sqrt()


def loop(b: tb.Block, x: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
    """One row, token by token: ``[time, heads, width]``, and the learners after the last token."""
    width = DIM // HEADS
    projected = F.pad((b.inputs.weight @ x.T), (b.conv - 1, 0))
    streams = F.silu(torch.stack([(projected[:, t : t + b.conv] * b.convolution).sum(1) for t in range(len(x))]))
    learners = torch.stack(list(b.initial_weights))  # keys, values, step sizes, decays, memory
    outputs = torch.zeros(len(x), HEADS, width, dtype=x.dtype)
    for head in range(HEADS):
        m = [learners[i, head] for i in range(5)]
        for t in range(len(x)):
            if t % chunk == 0:
                at = list(m)
            q, x_t = (unit(s[head * width : (head + 1) * width]) for s in streams[t].split(DIM))
            key, value = unit(at[0] @ x_t), at[1] @ x_t
            eta = b.max_step * torch.sigmoid(b.gates[0, head] @ (at[2] @ x_t) + b.gate_bias[0, head])
            alpha = torch.sigmoid(b.gates[1, head] @ (at[3] @ x_t) + b.gate_bias[1, head])
            outputs[t, head] = at[4] @ q  # eq. 90
            for i in range(5):  # eq. 93
                target = unit(at[i] @ value)
                kept = m[i] @ (alpha * torch.eye(width, dtype=x.dtype) - eta * torch.outer(key, key))
                m[i] = kept - eta * torch.outer(at[i] @ key - target, key)
        learners[:, head] = torch.stack(m)
    return outputs, learners


@pytest.mark.parametrize("chunk", [1, CHUNK, 100])
def test_the_block_computes_the_equations(chunk: int) -> None:
    b, x = block(chunk), torch.randn(2, TIME, DIM, dtype=torch.float64)
    with torch.no_grad():
        y, state = b(x)
        for row in range(2):
            heads, learners = loop(b, x[row], chunk)
            normed = F.rms_norm(heads, heads.shape[-1:], eps=1e-6) * b.output_gain
            gated = normed.flatten(1) * F.silu(x[row] @ b.output_gate.weight.T)
            torch.testing.assert_close(y[row], gated @ b.output.weight.T, rtol=1e-9, atol=1e-9)
            torch.testing.assert_close(state.weights[row], learners, rtol=1e-9, atol=1e-9)


def test_reading_is_what_the_next_token_reads() -> None:
    b, x = block(), torch.randn(2, TIME, DIM, dtype=torch.float64)
    for cut in (3, 4, 8):
        state = b(x[:, :cut])[1]
        torch.testing.assert_close(b.read(x[:, cut : cut + 1], state), b(x)[0][:, cut : cut + 1])


def test_it_stays_finite_at_its_defaults() -> None:
    b = tb.build_block("self_modifying", dim=32, seed=0)
    with torch.no_grad():
        y, state = b(torch.randn(1, 2000, 32))
    assert y.isfinite().all() and state.weights.abs().max() < 10
