"""A token of decoding as one CUDA graph, with a stub in place of the capture."""

import pytest
import torch

import titans_build as tb
from titans_build.blocks import cuda_graph, decode_graph
from titans_build.blocks.state import map_state, named_tensors
from titans_build.tools.gpu.counting import Counting

CHANGES = {
    "lmm": {},
    "mag": {"layers.mag.0.of.branches.0.window": 8},
    "mal": {"layers.mal.0.of.1.window": 8},
    "mac": {"layers.mac.0.segment": 4, "layers.mac.0.memory.chunk": 8},
}


class Captures:
    """In place of ``capture``: runs the function at each replay, in the memory that it had when it was captured."""

    def __init__(self):
        self.captured = self.replayed = 0

    def __call__(self, function):
        self.captured += 1
        graph = function.__closure__[[*function.__code__.co_freevars].index("self")].cell_contents
        function()
        places = [x.data_ptr() for x in (graph._x, graph._before, graph._after)]

        def replay():
            self.replayed += 1
            assert places == [x.data_ptr() for x in (graph._x, graph._before, graph._after)]
            function()

        return replay


@pytest.fixture
def captures(monkeypatch):
    monkeypatch.setattr(decode_graph, "wanted", lambda model, x: not model.grows)
    captures = Captures()
    monkeypatch.setattr(cuda_graph, "capture", captures)
    return captures


def model_of(recipe, **options):
    changes = {"dim": 32, "stack.0.repeat": 2, **CHANGES[recipe]}
    return tb.build(tb.load_recipe(recipe, overrides=changes), **options)


@pytest.mark.parametrize("recipe", CHANGES)
@torch.no_grad()
def test_tokens_and_states_are_those_without_a_graph(recipe, captures, monkeypatch):
    model = model_of(recipe, seed=0)
    start = model(torch.randint(256, (2, 6))).state
    inputs = torch.randn(12, 2, 1, 32)
    graphed = model.decoder(2)
    state, found, snapshots = start, [], []
    for x in inputs:
        y, state = graphed(x, state)
        found.append(y.clone())
        snapshots.append((state, map_state(torch.clone, state)))
    # a segment of 4 begins at positions 8, 12 and 16
    assert captures.captured == 1 and captures.replayed == (9 if recipe == "mac" else 12)
    monkeypatch.setattr(decode_graph, "wanted", lambda model, x: False)
    plain, state = model.decoder(2), start
    for x, y, (got, copy) in zip(inputs, found, snapshots):
        expected, state = plain(x, state)
        torch.testing.assert_close(y, expected, rtol=0, atol=0)
        for (path, a), (_, b), (_, c) in zip(*map(named_tensors, (got, copy, state))):
            assert torch.equal(a, b), f"{path} was written to"
            torch.testing.assert_close(a, c, rtol=0, atol=0, msg=path)


@torch.no_grad()
def test_a_state_of_another_call_is_copied_and_freezing_captures_again(captures):
    model = model_of("lmm", seed=0)
    start, x = model(torch.randint(256, (1, 6))).state, torch.randn(1, 1, 32)
    decode = model.decoder(1)
    first, after = decode(x, start)
    first = first.clone()
    decode(x, after)
    torch.testing.assert_close(decode(x, start)[0], first, rtol=0, atol=0)
    with model.freeze_memory():
        frozen = decode(x, start)[1]
    assert captures.captured == 2
    for (path, a), (_, b) in zip(named_tensors(frozen), named_tensors(start)):
        assert "weights" not in path or torch.equal(a, b)


def test_what_cannot_be_captured_runs_as_usual(captures, monkeypatch, caplog):
    def refuse(function):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(cuda_graph, "capture", refuse)
    model = model_of("lmm", seed=0)
    with torch.no_grad():
        decode, start = model.decoder(1), model(torch.randint(256, (1, 6))).state
        for _ in range(2):
            y, _ = decode(torch.ones(1, 1, 32), start)
        assert bool(y.isfinite().all())
    assert caplog.text.count("decoding runs without a CUDA graph") == 1


@pytest.mark.parametrize("recipe", CHANGES)
def test_a_replay_in_place_of_the_launches_and_no_wait(recipe, monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setenv(cuda_graph.VARIABLE, "1")

    def capture(function):
        function()
        return lambda: gpu.launched("replay", [])

    monkeypatch.setattr(cuda_graph, "capture", capture)
    with Counting() as gpu, torch.no_grad():
        model = gpu.moved(model_of(recipe, device="meta"))
        state = model(gpu.empty(2, 6, dtype=torch.int64)).state
        decode = model.decoder(2)
        _, state = decode(gpu.empty(2, 1, 32), state)
        gpu.clear()
        decode(gpu.empty(2, 1, 32), state)
    assert [launch.name for launch in gpu.launches] == ["copy_", "copy_", "replay", "clone"] and not gpu.waits
