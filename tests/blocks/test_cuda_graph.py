"""A MAC layer as CUDA graphs forward and backward, with a stub in place of the capture."""

import pytest
import torch

import titans_build as tb
from titans_build.blocks import cuda_graph
from titans_build.blocks.state import named_tensors
from titans_build.kernels.dispatch import integers
from titans_build.tools.gpu.counting import Counting

DIM = 16


def layer(seed=0, **options):
    recipe = {"type": "context", "segment": 4, "persistent": 2, "memory": {"type": "memory", "heads": 2, "chunk": 2}}
    torch.manual_seed(seed)
    return tb.build_block(recipe, dim=DIM, **options)


@pytest.fixture
def replays(monkeypatch):
    """Captures run what they captured at each replay. ``enabled`` is asked only of tensors on a GPU."""
    found = []

    def capture(function, warm_up=None):
        (warm_up or function)()
        function()

        def replay():
            found.append(function.__name__)
            function()

        return replay

    monkeypatch.setattr(cuda_graph, "capture", capture)
    return found


def run(block, x):
    """What ``Context.forward`` gives ``cuda_graph.call`` on a GPU."""
    return cuda_graph.call(block, block.forward, x)


def gradients(block, y, state, x):
    tensors = [x, *block.parameters()]
    loss = y.sum() + sum(t.square().sum() for _, t in named_tensors(state) if t.requires_grad)
    return [y, *torch.autograd.grad(loss, tensors, allow_unused=True)]


def test_outputs_and_gradients_are_those_without_a_graph(replays):
    block = layer()
    inputs = [torch.randn(2, 11, DIM, requires_grad=True) for _ in range(4)]
    expected = [gradients(block, *block(x), x) for x in inputs]
    kept = []
    for x, wanted in zip(inputs, expected):
        y, state = run(block, x)
        kept.append((y, y.detach().clone(), state))
        for got, want in zip(gradients(block, y, state, x), wanted):
            assert (got is None) == (want is None)
            if got is not None:
                torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    assert replays == ["forward", "backward"] * 3  # the first call shows what a call is like
    for y, copy, _ in kept:  # nothing that was returned is written to
        assert torch.equal(y, copy)


def test_gradients_of_several_steps_add_up(replays):
    block, x = layer(), torch.randn(2, 8, DIM)
    run(block, x)
    for _ in range(3):
        run(block, x)[0].sum().backward()
    found = [p.grad.clone() for p in block.parameters() if p.grad is not None]
    block.zero_grad()
    for _ in range(3):
        block(x)[0].sum().backward()
    assert len(replays) == 6
    for got, p in zip(found, [p for p in block.parameters() if p.grad is not None]):
        torch.testing.assert_close(got, p.grad, rtol=1e-5, atol=1e-6)


def test_calls_that_differ_run_as_usual(replays):
    block = layer()
    for time in (8, 9, 8, 9):
        run(block, torch.randn(2, time, DIM))
    with torch.no_grad():
        run(block, torch.randn(2, 9, DIM))
    assert replays == []
    with torch.no_grad():
        run(block, torch.randn(2, 9, DIM))
    assert replays == ["forward"]


def test_a_second_forward_pass_before_backward_runs_as_usual(replays):
    block, x = layer(), torch.randn(2, 8, DIM, requires_grad=True)
    run(block, x)
    first = run(block, x)
    second = run(block, (2 * x).detach().requires_grad_())
    run(block, torch.randn(2, 9, DIM)), run(block, torch.randn(2, 9, DIM))
    assert replays == ["forward"]
    (first[0].sum() + second[0].sum()).backward()
    assert replays == ["forward", "backward"]
    run(block, x)
    assert replays == ["forward", "backward", "forward"]


def test_backward_through_an_earlier_pass_is_an_error(replays):
    block, x = layer(), torch.randn(2, 8, DIM, requires_grad=True)
    run(block, x)
    y, _ = run(block, x)
    y.sum().backward(retain_graph=True)
    kept = run(block, x)
    with pytest.raises(RuntimeError, match="backward after a later forward pass"):
        y.sum().backward()
    del kept


def test_what_cannot_be_captured_runs_as_usual(monkeypatch, caplog):
    def refuse(*functions):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(cuda_graph, "capture", refuse)
    block, x = layer(), torch.randn(2, 8, DIM)
    for _ in range(3):
        y, _ = run(block, x)
    torch.testing.assert_close(y, block(x)[0])
    assert caplog.text.count("Context runs without a CUDA graph") == 1


def test_a_training_step_is_two_replays_and_does_not_wait(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setenv(cuda_graph.VARIABLE, "1")

    def capture(function, warm_up=None):
        (warm_up or function)()
        function()
        return lambda: gpu.launched("replay", [])

    monkeypatch.setattr(cuda_graph, "capture", capture)
    with Counting() as gpu:
        block = gpu.moved(layer(device="meta"))
        for _ in range(3):
            gpu.clear()
            y, state = block(gpu.empty(2, 11, DIM))
            forward = [launch.name for launch in gpu.launches]
            gpu.clear()
            y.sum().backward()
            backward = [launch.name for launch in gpu.launches]
        outputs = 1 + len(list(named_tensors(state)))
        assert forward == ["copy_", "replay", *["clone"] * outputs] and backward.count("replay") == 1
        assert integers(state.position) == [11, 11] and integers(state.memory.memory.position) == [11, 11]
        assert gpu.waits == []
