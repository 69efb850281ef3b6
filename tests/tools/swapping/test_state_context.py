"""``tb.memory`` carries states from call to call, and nothing else does."""

import copy
import gc
import threading
import weakref

import pytest
import torch
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import titans_build as tb
from titans_build.recipes import StorageError
from titans_build.tools.swapping import SwapError

MEMORY = {"type": "memory", "heads": 2, "chunk": 4}


@pytest.mark.parametrize("how", ["beside", "before", "after", "replace"])
@pytest.mark.parametrize("cuts", [[1], [4], [8], [1, 2, 3], [3, 8]])
def test_a_sequence_in_parts_gives_the_outputs_of_the_whole(swapped, tokens, how, cuts):
    model, t = swapped(how), tokens()
    whole = model(t)
    with tb.memory(model) as m:
        parts = [model(part) for part in torch.tensor_split(t, cuts, dim=1)]
    assert_close(torch.cat(parts, dim=1), whole)
    with tb.memory(model) as uncut:
        model(t)
    for mine, other in zip(*[[x for _, x in tb.state.named_tensors(state)] for state in (m.state, uncut.state)]):
        assert_close(mine, other)
    assert torch.equal(model(t), whole)  # outside of it every call is fresh


def test_states_can_be_kept_forked_selected_and_assigned(swapped, tokens):
    model, t = swapped(), tokens(3)
    whole = model(t)
    with tb.memory(model) as m:
        assert m.state is None and m.names == ["layers.0", "layers.1", "layers.2"]
        model(t[:, :4])
        kept = m.state
        copied = [tensor.clone() for _, tensor in tb.state.named_tensors(kept)]
        for _ in range(2):  # a fork is using it twice
            assert_close(model(t[:, 4:]), whole[:, 4:])
            m.state = kept
        m.state = tb.state.select(kept, [2, 0, 0])
        assert_close(model(t[[2, 0, 0], 4:]), whole[[2, 0, 0], 4:])
        m.state = tb.state.reset(kept, [1], m.init_state(1))  # rows at different positions
        assert_close(model(t[:, 4:])[[0, 2]], whole[[0, 2], 4:])
        m.state = tb.state.reset(kept, [1], m.init_state(1))
        assert_close(model(t[:, 4:])[1:2], model_alone(model, t[1:2, 4:]))
        m.state = m.init_state(3)
        assert_close(model(t), whole)
    assert all(torch.equal(a, b) for a, (_, b) in zip(copied, tb.state.named_tensors(kept)))
    with tb.memory(model, kept):
        assert_close(model(t[:, 4:]), whole[:, 4:])


def model_alone(model, t):
    with tb.memory(model):
        return model(t)


def test_gradients_flow_through_a_carried_state(swapped, tokens):
    model, t = swapped(), tokens()
    model(t).square()[:, 5:].sum().backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    with tb.memory(model):
        model(t[:, :5])
        model(t[:, 5:]).square().sum().backward()
    for parameter, gradient in zip(model.parameters(), expected):
        if gradient.abs().sum() > 0:
            assert_close(parameter.grad, gradient, atol=1e-4, rtol=1e-3)


def test_a_state_of_inference_mode_can_be_trained_from(swapped, tokens):
    model, t = swapped(), tokens()
    whole = model(t)
    with tb.memory(model) as m, torch.inference_mode():
        model(t[:, :4])
    with tb.memory(model, m.state):
        y = model(t[:, 4:])
    assert_close(y, whole[:, 4:])
    y.sum().backward()


def test_a_failed_call_changes_no_state(swapped, tokens):
    model, t = swapped(), tokens()
    whole = model(t)

    def fail():
        raise RuntimeError("in the middle")

    with tb.memory(model) as m:
        model(t[:, :4])
        kept = m.state
        model.between = fail
        with pytest.raises(RuntimeError, match="in the middle"):
            model(t[:, 4:])
        model.between = None
        assert m.state is kept
        assert_close(model(t[:, 4:]), whole[:, 4:])


def test_a_failed_call_that_raises_the_exception_being_handled(swapped, tokens):
    model, t = swapped(), tokens()
    same = ValueError("once more")

    def fail():
        raise same

    with tb.memory(model) as m:
        model(t)
        kept, model.between = m.state, fail
        try:
            raise same
        except ValueError:
            with pytest.raises(ValueError, match="once more"):
                model(t)
        assert m.state is kept


def test_blocks_without_a_state_have_rows(swapped, tokens):
    model, t = swapped(block="ffn"), tokens(3)
    with tb.memory(model) as m:
        model(t)
        m.state = tb.state.select(m.state, [2, 0])
        assert tb.state.batch_size(m.state) == 2
        assert_close(model(t[[2, 0]]), model_alone(model, t[[2, 0]]))


def test_an_interrupted_call_has_no_effect(swapped, tokens):
    model, t = swapped(), tokens()
    whole, mask = model(t), torch.ones(2, 9).index_fill(1, torch.tensor([0, 1]), 0)
    x = torch.randn(2, 9, 16)
    alone = model.layers[1](x)

    def interrupt():
        raise KeyboardInterrupt

    def interrupted(inner):
        model.between = interrupt
        with pytest.raises(KeyboardInterrupt):  # which hooks do not see
            inner(t, attention_mask=mask)
        model.between = None

    interrupted(model)
    assert torch.equal(model(t), whole)
    assert torch.equal(model.layers[1](x), alone)
    with tb.memory(model) as m:
        model(t[:, :4])
        kept = m.state
        interrupted(model)
        assert m.state is kept
        assert_close(model(t[:, 4:]), whole[:, 4:])
        interrupted(model)
    assert torch.equal(model.layers[1](x), alone)


def test_a_module_that_calls_itself_is_refused(swapped, tokens):
    model, t = swapped(), tokens()

    def again():
        model.between = None
        model(t)

    model.between = again
    with pytest.raises(SwapError, match="Plain: called inside its own call"):
        model(t)
    assert torch.isfinite(model(t)).all()


def test_nested_calls_and_nested_contexts(swapped, tokens):
    model, t = swapped(), tokens()
    other, whole = copy.deepcopy(model), model(t)
    model.between = lambda: other(t[:1, :3])
    with tb.memory(model) as m, tb.memory(other) as theirs:
        try:
            raise ValueError("being handled")
        except ValueError:
            y = model(t)
        assert_close(y, whole)
        assert tb.state.batch_size(m.state) == 2 and tb.state.batch_size(theirs.state) == 1
    with tb.memory(model) as outer, tb.memory(model) as inner:
        model.between = None
        model(t)
        assert outer.state is None and inner.state is not None  # the innermost carries


def test_each_thread_has_its_own_state(swapped, tokens):
    model, t = swapped(), tokens(4)
    whole, done = model(t), {}

    def work(row):
        with tb.memory(model):
            done[row] = torch.cat([model(part) for part in t[row : row + 1].split(2, dim=1)], dim=1)

    threads = [threading.Thread(target=work, args=(row,)) for row in range(4)]
    with tb.memory(model) as m:
        for thread in threads:
            thread.start()
        y = model(t)
        for thread in threads:
            thread.join()
    assert_close(y, whole)
    assert_close(torch.cat([done[row] for row in range(4)]), whole)
    assert tb.state.batch_size(m.state) == 4


def replica(module):
    """As nn.DataParallel makes one for each device."""
    twin = module._replicate_for_data_parallel()
    for name, parameter in module._parameters.items():
        setattr(twin, name, None if parameter is None else parameter.view_as(parameter))  # a plain tensor
    for name, child in module._modules.items():
        twin._modules[name] = replica(child)
    return twin


def test_data_parallel_replicas(swapped, tokens):
    model, t = swapped(), tokens()
    whole, done = model(t), []
    mask = torch.ones(2, 9).index_fill(1, torch.tensor([0, 1]), 0)

    def work():
        try:
            done.append(replica(model)(t, attention_mask=mask))
        except SwapError as error:
            done.append(str(error))

    def run():
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        return done.pop()

    assert_close(run()[:, 2:], model(t[:, 2:]))
    with tb.memory(model):
        assert "layers.0: nn.DataParallel runs copies" in run()
    assert torch.equal(model(t), whole)


def test_a_module_called_twice_is_refused_with_a_carried_state(swapped, tokens):
    model, t = swapped(), tokens()
    model.layers[1] = model.layers[0]
    assert torch.isfinite(model(t)).all()  # each call is fresh
    with tb.memory(model) as m:
        with pytest.raises(SwapError, match=r"layers\.0: called twice in one call of the model"):
            model(t)
        assert m.state is None


def test_save_and_load(swapped, tokens, tmp_path):
    model, t = swapped(), tokens()
    whole = model(t)
    with tb.memory(model) as m:
        with pytest.raises(StorageError, match="no state to save yet"):
            m.save(tmp_path / "nothing")
        model(t[:, :4])
    m.save(tmp_path / "state")
    twin = swapped()
    with tb.memory(twin) as theirs:
        theirs.load(tmp_path / "state")
        for mine, other in zip(*[[x for _, x in tb.state.named_tensors(state)] for state in (m.state, theirs.state)]):
            assert torch.equal(mine, other)
        assert_close(twin(t[:, 4:]), whole[:, 4:])


def test_states_with_different_rows_are_not_saved(swapped, tmp_path):
    model = swapped()
    with tb.memory(model) as m:
        model.layers[0](torch.randn(2, 4, 16))
        model.layers[1](torch.randn(3, 4, 16))
        with pytest.raises(StorageError, match="not saved: state has different numbers of rows"):
            m.save(tmp_path / "state")
    assert list(tmp_path.iterdir()) == []


def test_states_and_files_of_other_models_are_refused(plain, swapped, tokens, tmp_path):
    model, t = swapped(), tokens()
    with tb.memory(model) as m:
        model(t)
        m.save(tmp_path / "state")
        with pytest.raises(SwapError, match=r"layers\.0: the state of tb\.memory has 2 rows and the call 1"):
            model(t[:1])
        with pytest.raises(SwapError, match=r"expected what m\.state was, with 3 sites, got tuple"):
            m.state = (1, 2)
    others = [swapped(block={**MEMORY, "chunk": 8}), swapped(every=2), swapped("after")]
    for other in others:
        with tb.memory(other) as theirs:
            with pytest.raises(SwapError):
                theirs.state = m.state
            with pytest.raises(StorageError, match="the state is of other memories"):
                theirs.load(tmp_path / "state")
            assert theirs.state is None
    data = bytearray((tmp_path / "state").read_bytes())
    data[-5] ^= 64
    (tmp_path / "damaged").write_bytes(data)
    (tmp_path / "short").write_bytes(data[:100])
    for name, said in (("damaged", "damaged"), ("short", "safetensors file"), ("none", "no such file")):
        with pytest.raises(StorageError, match=said):
            m.load(tmp_path / name)
    with pytest.raises(SwapError, match="Plain has no memory in it"):
        tb.memory(plain())


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("carries", [False, True])
def test_checkpointed_layers_start_from_the_state_of_their_call(swapped, tokens, reentrant, carries):
    model, t = swapped(), tokens(time=9)
    left, right = torch.ones(2, 9), torch.ones(2, 9)
    left[0, :3], right[1, 5:] = 0, 0

    def gradients(checkpointing):
        model.reentrant = checkpointing
        model.zero_grad()
        losses = []
        with tb.memory(model) as m:
            for number, mask in enumerate((left, right, None)):
                if carries and m.state is not None:
                    m.state = tb.state.detach(m.state)
                else:
                    m.state = None
                losses.append(model(t.roll(number, 1), attention_mask=mask).pow(number + 2).sum())
        model(t.flip(0))  # and a call that no gradient comes from
        sum(losses).backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    for got, expected in zip(gradients(reentrant), gradients(None)):
        assert_close(got, expected, atol=1e-4, rtol=1e-4)


def test_a_checkpointed_model_after_a_backward_pass_whose_outputs_are_kept(swapped, tokens):
    model, t = swapped(), tokens()
    mask = torch.ones(2, 9).index_fill(1, torch.tensor([0, 1, 2]), 0)
    model(t).square().sum().backward()
    expected = [parameter.grad.clone() for parameter in model.parameters()]
    kept = model(t, attention_mask=mask)
    kept.sum().backward()
    model.zero_grad()
    first = model.embedding.weight.view_as(model.embedding.weight)  # an input that requires gradients
    checkpoint(lambda _: model(t), first, use_reentrant=True).square().sum().backward()
    for parameter, gradient in zip(model.parameters(), expected):
        assert_close(parameter.grad, gradient)


def test_states_are_freed_after_the_backward_pass(swapped, tokens):
    model, t = swapped(), tokens()
    model.reentrant = False
    with tb.memory(model) as m:
        model(t[:, :4])
        m.state = tb.state.detach(m.state)
        started_from = [weakref.ref(tensor) for _, tensor in tb.state.named_tensors(m.state)]
        loss = model(t[:, 4:]).sum()
        m.state = None
    assert any(reference() is not None for reference in started_from)  # what is computed again starts from it
    loss.backward()
    del loss
    gc.collect()
    assert [reference() for reference in started_from] == [None] * len(started_from)


def test_a_checkpointed_model(swapped, tokens):
    model, t = swapped(), tokens()
    mask = torch.ones(2, 9).index_fill(1, torch.tensor([0]), 0)
    model(t, attention_mask=mask).square().sum().backward()
    expected = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    checkpoint(lambda: model(t, attention_mask=mask), use_reentrant=False).square().sum().backward()
    for parameter, gradient in zip(model.parameters(), expected):
        assert_close(parameter.grad, gradient)
