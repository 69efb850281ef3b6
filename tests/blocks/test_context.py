"""The ``context`` block against its definition, computed token by token without its code."""

import pytest
import torch
from torch import Tensor

from titans_build.blocks.attention import Attention
from titans_build.blocks.build import build_block
from titans_build.blocks.flops import read_flops
from titans_build.blocks.laws import check_block
from titans_build.blocks.state import concatenate, named_tensors
from titans_build.registry import RecipeError, catalogue, validate

DIM, HEADS = 16, 2
MEMORY = {"type": "memory", "heads": 2, "chunk": 4}
ATTEND = {"type": "attention", "heads": HEADS}


def make(seed=0, **fields):
    spec = {
        "type": "context",
        "segment": 6,
        "persistent": 3,
        "memory": {"type": "memory", "heads": 2, "depth": 2, "expansion": 2, "chunk": 4},
        "attend": {"type": "attention", "heads": HEADS},
    } | fields
    block = build_block(spec, dim=DIM, dtype=torch.float64, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return block


def noise(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def attend_from_scratch(attention, persistent: Tensor, stream: list[Tensor]) -> Tensor:
    """The attention output at the last token of ``stream`` (tokens ``[dim]`` of one row), over ``[P | stream]``."""
    width = DIM // HEADS

    def project(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (attention.qkv.weight @ x).view(3, HEADS, width)

        def normed(part: Tensor, gain: Tensor) -> Tensor:
            return part / (part.square().mean(-1, keepdim=True) + 1e-6).sqrt() * gain

        return normed(q, attention.gain[:HEADS]), normed(k, attention.gain[HEADS:]), v

    def rotated(part: Tensor, position: int) -> Tensor:
        half = width // 2
        angle = position * 10000.0 ** (-2 * torch.arange(half, dtype=torch.float64) / width)
        pair = torch.complex(part[:, :half], part[:, half:]) * torch.polar(torch.ones_like(angle), angle)
        return torch.cat([pair.real, pair.imag], dim=-1)

    plain = project(stream[-1])[0]
    query = rotated(plain, len(stream) - 1)
    scores, values = [], []
    for token in persistent:
        _, key, value = project(token)
        scores.append((plain * key).sum(-1))
        values.append(value)
    for position, token in enumerate(stream):
        _, key, value = project(token)
        scores.append((query * rotated(key, position)).sum(-1))
        values.append(value)
    weights = (torch.stack(scores) / width**0.5).softmax(dim=0)
    return attention.out.weight @ (weights.unsqueeze(-1) * torch.stack(values)).sum(0).flatten()


def gate_from_scratch(gating, y: Tensor, m: Tensor) -> Tensor:
    def normed(x: Tensor, gain: Tensor) -> Tensor:
        return x / (x.square().mean() + 1e-6).sqrt() * gain

    return normed(y, gating.gain_a) / (1 + torch.exp(-normed(m, gating.gain_b)))


def token_by_token(block, x: Tensor) -> Tensor:
    """Outputs for one row ``[time, dim]``: read, attend, write and gate, for each token."""
    memory = block.memory.init_state(1)
    persistent = block.persistent if block.persistent is not None else x[:0]
    outputs = []
    for t, token in enumerate(x):
        if t % block.segment == 0:
            snapshot, stream = memory, []
        h = block.memory.read(token.view(1, 1, -1), snapshot).flatten()
        stream += [h, token]
        y = attend_from_scratch(block.attend, persistent, stream)
        written = y if block.write == "attended" else token
        m, memory = block.memory(written.view(1, 1, -1), memory)
        outputs.append(gate_from_scratch(block.gate, y, m.flatten()))
    return torch.stack(outputs)


@pytest.mark.parametrize("write", ["attended", "inputs"])
@pytest.mark.parametrize("persistent", [0, 3])
@pytest.mark.parametrize("segment", [1, 5, 6])
def test_outputs_equal_the_definition_computed_token_by_token(write, persistent, segment):
    block = make(write=write, persistent=persistent, segment=segment)
    x = noise(2, 23, DIM)
    with torch.no_grad():
        got, _ = block(x)
        for row in range(2):
            torch.testing.assert_close(got[row], token_by_token(block, x[row]), rtol=1e-9, atol=1e-10)


def test_any_causal_block_as_attention_and_any_memory(leaky):
    """The same definition with a leaky integrator as memory and as attention, computed here step by step."""
    block = make(memory="leaky", attend="leaky", persistent=2)

    def step(part, level, x):
        return torch.sigmoid(part.decay) * level + torch.tanh(part.weight @ x)

    x = noise(1, 20, DIM)
    memory = block.memory.start
    expected = []
    with torch.no_grad():
        for t, token in enumerate(x[0]):
            if t % 6 == 0:
                snapshot, attend = memory, block.attend.start
                for persistent in block.persistent:
                    attend = step(block.attend, attend, persistent)
            attend = step(block.attend, attend, snapshot * torch.tanh(token))
            attend = step(block.attend, attend, token)
            y = attend * torch.tanh(token)
            memory = step(block.memory, memory, y)
            expected.append(gate_from_scratch(block.gate, y, memory * torch.tanh(y)))
        got, state = block(x)
    torch.testing.assert_close(got[0], torch.stack(expected), rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(state.memory.level[0], memory, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("write", ["attended", "inputs"])
def test_outputs_do_not_depend_on_later_tokens(write):
    block = make(write=write)
    x = noise(2, 20, DIM)
    with torch.no_grad():
        y, _ = block(x)
        for t in range(20):
            changed = x.clone()
            changed[:, t] = 5 * noise(2, DIM, seed=t + 2)
            got, _ = block(changed)
            assert torch.equal(got[:, :t], y[:, :t])
            assert not torch.allclose(got[:, t], y[:, t])


def test_outputs_depend_on_writing():
    block = make()
    x = noise(1, 20, DIM)
    with torch.no_grad():
        forward = type(block.memory).forward
        # its own forward is called for each piece, in both calls
        block.memory.forward = forward.__get__(block.memory)
        y, _ = block(x)

        def forgets(self, x, state=None, *, mask=None):
            return forward(self, x, state, mask=mask)[0], state

        block.memory.forward = forgets.__get__(block.memory)
        got, _ = block(x)
    # the first segment reads the initial memory in both calls
    difference = (got - y).abs().amax(dim=(0, 2))
    assert difference[:6].max() == 0 and difference[6:].min() > 1e-3


def test_a_segment_reads_the_memory_at_its_start():
    block = make(segment=4)
    x = noise(1, 8, DIM)
    seen = []
    read = type(block.memory).read

    def watched(x, state):
        seen.append((x.shape[1], int(state.memory.position[0])))
        return read(block.memory, x, state)

    block.memory.read = watched
    with torch.no_grad():
        block(x)
        assert seen == [(4, 0), (4, 4)]
        seen.clear()
        state = None
        for t in range(8):
            _, state = block(x[:, t : t + 1], state)
    assert seen == [(1, 0)] * 4 + [(1, 4)] * 4


class Elsewhere(Tensor):
    """A tensor that says that it is not on a CPU."""

    is_cpu = property(lambda self: False)


@pytest.mark.parametrize(
    "attend, persistent", [({}, 3), ({"kv_heads": 1}, 0), ({"rope": None}, 2), ({"qk_norm": False}, 3)]
)
@pytest.mark.parametrize("before, time", [(0, 20), (2, 15), (4, 9), (3, 8)])
def test_what_depends_on_tokens_alone_is_computed_for_all_segments_at_once(attend, persistent, before, time):
    """On a GPU; outputs, gradients and the next state are those of a CPU."""
    block = make(segment=4, persistent=persistent, attend={**ATTEND, **attend})
    results, segments = [], []

    def watched(x, count, state):
        segments.append(count)
        return Attention.segments(block.attend, x, count, state)

    block.attend.segments = watched
    for kind in (Tensor, Elsewhere):
        with torch.no_grad():
            state = block(noise(2, before, DIM))[1] if before else None
        x = noise(2, time, DIM, seed=5).as_subclass(kind).requires_grad_()
        y, after = block(x, state)
        leaves = [x, *block.parameters()]
        ends = [y.square().sum(), *(t.sum() for _, t in named_tensors(after) if t.is_floating_point())]
        results.append(
            [y, *(t for _, t in named_tensors(after)), *torch.autograd.grad(sum(ends), leaves, materialize_grads=True)]
        )
    assert segments == [(before + time - 1) // 4 - -(-before // 4)]
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a.as_subclass(Tensor), b.as_subclass(Tensor), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("write", ["attended", "inputs"])
def test_full_segments_attend_in_parallel_only_if_inputs_are_written(write):
    block = make(write=write, segment=4)
    shapes = []
    every = type(block.attend).every

    def watched(x, state=None, *, step, mask=None):
        shapes.append(tuple(x.shape[:2]))
        return every(block.attend, x, state, step=step, mask=mask)

    block.attend.every = watched
    with torch.no_grad():
        _, state = block(noise(2, 2, DIM))
        shapes.clear()
        block(noise(2, 2 + 3 * 4 + 1, DIM), state)
    assert shapes == ([(2, 4), (6, 8), (2, 2)] if write == "inputs" else [(2, 4), (2, 8), (2, 8), (2, 8), (2, 2)])


@pytest.mark.parametrize("write", ["attended", "inputs"])
def test_rows_at_different_positions_of_their_segments(write):
    block = make(write=write, segment=5)
    phases = list(range(7))
    x, before = noise(len(phases), 13, DIM), noise(len(phases), 7, DIM, seed=2)
    mask = noise(len(phases), 13, seed=3) > -0.5
    with torch.no_grad():
        states = [
            block(before[row : row + 1, :phase])[1] if phase else block.init_state(1)
            for row, phase in enumerate(phases)
        ]
        y, after = block(x, concatenate(states), mask=mask)
        for row in phases:
            alone, ended = block(x[row : row + 1, mask[row]], states[row])
            torch.testing.assert_close(y[row, mask[row]], alone[0], rtol=1e-9, atol=1e-10)
            assert int(after.position[row]) == int(ended.position[0])


def test_the_state_does_not_grow():
    block = make()
    with torch.no_grad():
        shapes = [
            {path: tensor.shape for path, tensor in named_tensors(state)}
            for state in (block.init_state(2), *(block(noise(2, time, DIM))[1] for time in (1, 6, 40)))
        ]
    assert all(other == shapes[0] for other in shapes)
    assert not block.grows


def test_nested_contexts():
    inner = {"type": "context", "segment": 3, "persistent": 1, "memory": {"type": "memory", "heads": 2, "chunk": 2},
             "attend": {"type": "attention", "heads": 2}}  # fmt: skip
    outer = inner | {"segment": 4, "attend": inner}
    check_block(outer, dim=DIM, laws=["causal", "split", "row", "mask", "position"], length=13)


def test_every_parameter_gets_a_gradient():
    block = make()
    y, _ = block(noise(2, 20, DIM))
    (y * noise(2, 20, DIM, seed=5)).sum().backward()
    for name, parameter in block.named_parameters():
        assert parameter.grad is not None and bool((parameter.grad != 0).any()), name


def test_a_memory_must_have_read_and_write():
    with pytest.raises(RecipeError, match=r"memory.*read and write"):
        validate({"type": "context", "memory": "attention"}, dim=DIM)


@pytest.mark.parametrize(
    "memory",
    [
        {"type": "persistent", "tokens": 2, "of": MEMORY},
        [MEMORY, MEMORY | {"depth": 1}],
        {"type": "gate", "branches": [MEMORY, [MEMORY]]},
    ],
    ids=["persistent", "chain", "gate"],
)
def test_a_wrapper_around_memories_is_a_memory(memory):
    block = build_block(memory, dim=DIM, dtype=torch.float64)
    x = noise(2, 9, DIM)
    y, state = block(x)
    written = dict(named_tensors(block.write(x, block.init_state(2))))
    assert all(torch.equal(written[path], tensor) for path, tensor in named_tensors(state))
    # reading does not write, and tokens are read independently of each other
    recalled = block.read(x, state)
    torch.testing.assert_close(recalled[:, 4:5], block.read(x[:, 4:5], state))
    assert recalled.shape == y.shape and read_flops(block, 9) > 0
    spec = {"type": "context", "segment": 5, "persistent": 2, "memory": memory, "attend": ATTEND}
    check_block(spec, dim=DIM, laws=["causal", "split", "row", "rows", "mask", "meta"], length=13)


@pytest.mark.parametrize(
    ("memory", "place"),
    [
        ({"type": "persistent", "of": "attention"}, r"memory\.of: .*got 'attention'"),
        ([MEMORY, "ffn"], r"memory\.1: .*got 'ffn'"),
        ({"type": "gate", "branches": ["attention", MEMORY]}, r"memory\.branches\.0: .*got 'attention'"),
    ],
)
def test_a_wrapper_around_another_block_is_no_memory(memory, place):
    with pytest.raises(RecipeError, match=place):
        validate({"type": "context", "memory": memory}, dim=DIM)


def test_state_bytes_and_flops():
    block = make(persistent=16, segment=8)
    assert block.state_bytes() == sum(t.numel() * t.element_size() for _, t in named_tensors(block.init_state(1)))
    assert block.flops(16) > block.flops(8) > block.memory.flops(8)


def test_invalid_inputs_and_states_are_errors():
    block = build_block({"type": "context", "segment": 4, "attend": "attention"}, dim=DIM)
    x = torch.zeros(2, 3, DIM)
    with pytest.raises(ValueError, match=r"Context: x \[2, 3, 15\]: expected \[batch, time, 16\]"):
        block(x[..., 1:])
    with pytest.raises(TypeError, match=r"Context: x is torch.float64: expected torch.float32"):
        block(x.double())
    with pytest.raises(TypeError, match="Context: state is AttentionState: expected ContextState"):
        block(x, block.init_state(2).attend)
    with pytest.raises(ValueError, match=r"Context: the state has 3 rows .*, the inputs have 2"):
        block(x, block.init_state(3))


def test_flops_of_reading_a_custom_memory(leaky):
    plain = build_block({"type": "context", "segment": 4, "memory": "leaky"}, dim=DIM).flops(10)

    class Counted(leaky):
        def read_flops(self, length: int) -> int:
            return 7 * length

    catalogue.register("counted")(Counted)
    assert build_block({"type": "context", "segment": 4, "memory": "counted"}, dim=DIM).flops(10) == plain + 70


@pytest.mark.parametrize(
    "spec, message",
    [
        ({"type": "context", "segment": 2**20 + 1}, "segment: expected integer from 1 to 1048576, got 1048577"),
        ({"type": "context", "persistent": 2**16 + 1}, "persistent: expected integer from 0 to 65536, got 65537"),
        ({"type": "persistent", "tokens": 10**9, "of": "ffn"}, "tokens: expected integer from 1 to 65536"),
        ({"type": "attention", "window": 10**12}, "window: expected .* 1 to 16777216"),
        ({"type": "ffn", "hidden": 10**12}, "hidden: expected .* 1 to 1048576"),
    ],
)
def test_sizes_out_of_range_are_errors(spec, message):
    with pytest.raises(RecipeError, match=message):
        validate(spec, dim=DIM)


@pytest.mark.parametrize("write", ["attended", "inputs"])
def test_no_rows(write):
    spec = {"type": "context", "segment": 4, "memory": "memory", "attend": "attention", "write": write}
    block = build_block(spec, dim=16)
    y, state = block(torch.randn(0, 5, 16))
    assert y.shape == (0, 5, 16) and y.requires_grad and state.position.shape == (0,)
