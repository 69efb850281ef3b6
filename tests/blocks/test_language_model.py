"""The model: outputs, losses, invalid arguments, and continuing from a state."""

import copy
import math

import pytest
import torch
from torch.nn.functional import cross_entropy

from titans_build.blocks import state as st
from titans_build.blocks.build import materialize
from titans_build.blocks.language_model import LanguageModel
from titans_build.blocks.laws import LAWS, check_block

MEMORY = {"type": "memory", "heads": 2, "chunk": 4}
CONTEXT = {
    "type": "context",
    "segment": 5,
    "persistent": 2,
    "memory": MEMORY,
    "attend": {"type": "attention", "heads": 2},
}
WINDOW = {"type": "attention", "heads": 2, "window": 6}


def make(vocab=13, layers=([CONTEXT, "ffn"], [WINDOW, "ffn"]), tie=False, dtype=torch.float64, seed=0):
    with torch.device("meta"):
        model = LanguageModel(16, vocab=vocab, layers=layers, tie=tie)
    materialize(model, "cpu", dtype, seed)
    return model


def ids(*shape, vocab=13, seed=0):
    return torch.randint(vocab, shape, generator=torch.Generator().manual_seed(seed))


def test_forward_is_embedding_layers_norm_and_head():
    model = make()
    tokens = ids(2, 9)
    x = model.embedding[tokens]
    for layer in model.layers:
        x, _ = layer(x)
    hidden = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * model.norm.gain
    out = model(tokens)
    torch.testing.assert_close(out.hidden, hidden)
    torch.testing.assert_close(out.logits, hidden @ model.head.T)
    assert out.loss is None


def test_a_tied_head_is_the_embedding():
    model = make(tie=True)
    assert model.head is None
    out = model(ids(1, 4))
    torch.testing.assert_close(out.logits, out.hidden @ model.embedding.T)
    with pytest.raises(ValueError, match="tie"):
        make(vocab=None, tie=True)


def test_a_fresh_model_predicts_uniformly():
    tokens = ids(4, 33)
    loss = make()(tokens[:, :-1], targets=tokens[:, 1:]).loss
    assert abs(loss.item() - math.log(13)) < 0.1


def test_the_loss_is_the_mean_over_targets():
    model = make()
    tokens, targets = ids(2, 9), ids(2, 9, seed=1)
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[0, :3] = False
    targets[1, 5] = -100
    out = model(tokens, mask=mask, targets=targets)
    counted = mask & (targets != -100)
    torch.testing.assert_close(out.loss, cross_entropy(out.logits[counted], targets[counted]))
    assert model(tokens, targets=torch.full_like(targets, -100)).loss.item() == 0.0
    half = make(dtype=torch.bfloat16)
    assert half(tokens, targets=ids(2, 9)).loss.dtype == torch.float32


def test_split_sequences_equal_one_pass():
    model = make()
    tokens = ids(2, 23)
    whole = model(tokens)
    state, logits = None, []
    for piece in tokens.split([1, 7, 2, 12, 1], dim=1):
        out = model(piece, state=state)
        state = out.state
        logits.append(out.logits)
    torch.testing.assert_close(torch.cat(logits, dim=1), whole.logits)
    for (path, got), (_, expected) in zip(st.named_tensors(state), st.named_tensors(whole.state)):
        torch.testing.assert_close(got, expected, msg=path)


def test_tokens_embeddings_and_a_mask_of_true_are_equivalent():
    model = make()
    tokens = ids(2, 9)
    out = model(tokens)
    assert torch.equal(model(embeddings=model.embedding[tokens]).logits, out.logits)
    assert torch.equal(model(tokens, mask=torch.ones(2, 9, dtype=torch.bool)).logits, out.logits)


def test_without_a_vocabulary_it_maps_embeddings_to_hidden():
    model = make(vocab=None)
    x = torch.randn(2, 7, 16, dtype=torch.float64)
    out = model(embeddings=x)
    assert out.hidden.shape == x.shape and out.logits is None and out.loss is None
    assert not any("embedding" in name or "head" in name for name, _ in model.named_parameters())
    with pytest.raises(ValueError, match="no vocabulary"):
        model(ids(2, 7))
    with pytest.raises(ValueError, match="no vocabulary"):
        model(embeddings=x, targets=ids(2, 7))


def test_state_paths_mirror_the_stack():
    paths = [path for path, _ in st.named_tensors(make().init_state(2))]
    assert "layers.0.0.memory.memory.weights.1" in paths
    assert "layers.1.0.keys" in paths


def test_empty_sequences_do_not_change_the_state():
    model = make()
    state = model(ids(2, 5)).state
    out = model(ids(2, 0), state=state)
    assert out.logits.shape == (2, 0, 13) and out.state is state
    fresh = model(ids(2, 0)).state
    assert torch.equal(model(ids(2, 4), state=fresh).logits, model(ids(2, 4)).logits)


def test_arguments_are_not_modified():
    model = make()
    tokens, mask, targets = ids(2, 9), torch.rand(2, 9) > 0.3, ids(2, 9, seed=1)
    state = model(ids(2, 3)).state
    given = [tokens, mask, targets, *(tensor for _, tensor in st.named_tensors(state))]
    before = [tensor.detach().clone() for tensor in given]
    parameters = copy.deepcopy(model.state_dict())
    model(tokens, state, mask, targets).loss.backward()
    assert all(torch.equal(a, b) for a, b in zip(given, before))
    assert all(torch.equal(tensor, parameters[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        (lambda m: {}, ValueError, "either tokens .* or embeddings"),
        (lambda m: {"tokens": ids(2, 3), "embeddings": torch.zeros(2, 3, 16).double()}, ValueError, "not both"),
        (lambda m: {"tokens": ids(2, 3).int()}, TypeError, "tokens: expected torch.int64, got torch.int32"),
        (lambda m: {"tokens": ids(2, 3).double()}, TypeError, "tokens: expected torch.int64"),
        (lambda m: {"tokens": [[1, 2]]}, TypeError, "tokens: expected a tensor, got list"),
        (lambda m: {"tokens": ids(3)}, ValueError, r"tokens: expected \[batch, time\].*got \[3\]"),
        (lambda m: {"tokens": ids(0, 3)}, ValueError, "at least one row"),
        (lambda m: {"tokens": ids(2, 3) + 13}, ValueError, r"tokens: id \d+ is outside the vocabulary of 13"),
        (lambda m: {"tokens": ids(2, 3) - 13}, ValueError, r"tokens: id -\d+ is outside"),
        (lambda m: {"tokens": ids(2, 3).to("meta")}, ValueError, "tokens are on meta, the model is on cpu"),
        (lambda m: {"tokens": ids(2, 3), "mask": torch.ones(2, 3)}, TypeError, "mask: expected torch.bool"),
        (
            lambda m: {"tokens": ids(2, 3), "mask": torch.ones(2, 4, dtype=torch.bool)},
            ValueError,
            r"mask: .*\[2, 3\], got \[2, 4\]",
        ),
        (lambda m: {"tokens": ids(2, 3), "targets": ids(2, 4)}, ValueError, r"targets: .*\[2, 3\]"),
        (lambda m: {"tokens": ids(2, 3), "targets": ids(2, 3).int()}, TypeError, "targets: expected torch.int64"),
        (
            lambda m: {"tokens": ids(2, 3), "targets": ids(2, 3) - 99},
            ValueError,
            "targets: id -99|targets: id -8|targets: id -9",
        ),
        (
            lambda m: {"embeddings": torch.zeros(2, 3, 16)},
            TypeError,
            "embeddings: expected torch.float64, got torch.float32",
        ),
        (lambda m: {"embeddings": torch.zeros(2, 3, 8).double()}, ValueError, r"\[batch, time, 16\], got \[2, 3, 8\]"),
        (lambda m: {"embeddings": torch.full((2, 3, 16), torch.nan).double()}, ValueError, "NaN"),
        (lambda m: {"tokens": ids(2, 3), "state": m.init_state(3)}, ValueError, r"3 rows .*, the inputs have 2"),
        (
            lambda m: {"tokens": ids(2, 3), "state": make(layers=[["ffn"]]).init_state(2)},
            ValueError,
            "another model: layers.*expected",
        ),
        (
            lambda m: {
                "tokens": ids(2, 3),
                "state": make(layers=([CONTEXT, "ffn"], [WINDOW | {"window": 9}, "ffn"])).init_state(2),
            },
            ValueError,
            r"another model: layers.1.0.keys is \[2, 8, 2, 8\], expected \[2, 5, 2, 8\]",
        ),
        (
            lambda m: {"tokens": ids(2, 3), "state": st.to(m.init_state(2), dtype=torch.float32)},
            TypeError,
            "state .*float32",
        ),
        (
            lambda m: {"tokens": ids(2, 3), "state": st.to(m.init_state(2), device="meta")},
            ValueError,
            "state is on meta",
        ),
        (lambda m: {"tokens": ids(2, 3), "state": {"layers": []}}, TypeError, "state: .*dict"),
    ],
)
def test_invalid_arguments_are_errors(arguments, error, message):
    model = make()
    with pytest.raises(error, match=message):
        model(**arguments(model))


@pytest.mark.parametrize("size", [0, -1, 2.0, True])
def test_a_state_has_at_least_one_row(size):
    with pytest.raises(ValueError, match="batch_size"):
        make().init_state(size)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_embeddings_whose_squares_overflow_are_an_error(dtype):
    """Norms would make zeros of them."""
    model = make().to(dtype)
    x = torch.randn(1, 4, 16).to(dtype)
    mask = torch.ones(1, 4, dtype=torch.bool)
    x[0, 2] = 1e18
    assert model(embeddings=x).hidden[0, 2].any()
    x[0, 2], mask[0, 2] = 1e30, False
    with pytest.raises(ValueError, match="embeddings hold NaN, infinity or values too large to be squared"):
        model(embeddings=x)
    assert model(embeddings=x, mask=mask).hidden.isfinite().all()


def test_nan_inputs_without_the_check_and_at_masked_tokens():
    model = make()
    x = torch.randn(1, 4, 16, dtype=torch.float64)
    x[0, 1] = torch.nan
    assert model(embeddings=x, check_finite=False).hidden.isnan().any()
    mask = torch.tensor([[True, False, True, True]])
    got = model(embeddings=x, mask=mask).hidden[mask]
    torch.testing.assert_close(got, model(embeddings=x[:, [0, 2, 3]]).hidden[0])


def test_a_grown_state_is_accepted():
    model = make(layers=[[{"type": "attention", "heads": 2}]])
    assert model.grows
    tokens = ids(2, 9)
    state = model(tokens[:, :5]).state
    torch.testing.assert_close(model(tokens[:, 5:], state=state).logits, model(tokens).logits[:, 5:])


def test_gradients_flow_through_the_state():
    model = make()
    first = model(embeddings=torch.randn(1, 6, 16, dtype=torch.float64, requires_grad=True))
    tokens = ids(1, 4)
    model(tokens, state=first.state, targets=tokens).loss.backward()
    assert model.layers[0].blocks[0].memory.qkv.weight.grad.abs().max() > 0


def test_containers_of_a_state_are_errors():
    model = make()
    for other in (model(ids(1, 3)), model.generate(ids(1, 3), 1)):
        with pytest.raises(TypeError, match=r"state: expected a ModelState .*, got [A-Z][A-Za-z]*: give its .state"):
            model(ids(1, 3), state=other)
    with pytest.raises(TypeError, match=r"state: expected a ModelState .*, got tuple$"):
        model(ids(1, 3), state=tuple(model.init_state(1)))


def test_a_model_on_the_meta_device_is_an_error():
    model = make().to("meta")
    for given in ({"tokens": ids(1, 3).to("meta")}, {"embeddings": torch.zeros(1, 3, 16).double().to("meta")}):
        with pytest.raises(ValueError, match="the model is on the meta device: it has shapes, and no values"):
            model(**given)


@pytest.mark.parametrize("length", [-1, 2.0, True])
def test_flops_of_an_invalid_length_are_errors(length):
    with pytest.raises(ValueError, match="length: expected an integer >= 0"):
        make().flops(length)


@pytest.mark.parametrize("given", ["tokens", "embeddings"])
def test_states_of_inference_mode_can_be_trained_from(given):
    model, tokens = make(), ids(2, 5)
    with torch.inference_mode():
        inside = tokens.clone()
        mask = torch.tensor([[False, True, True, True, True], [True] * 5])
        state = model(inside).state
        # any embeddings
        inputs = {"tokens": inside} if given == "tokens" else {"embeddings": model.lookup(inside).clone()}
    before = {path: tensor.clone() for path, tensor in st.named_tensors(state)}
    loss = model(**inputs, state=state, mask=mask, targets=inside).loss
    loss.backward()
    ordinary = {name: x.clone() for name, x in inputs.items()}
    expected = model(**ordinary, state=st.trainable(state), mask=mask.clone(), targets=tokens).loss
    assert torch.equal(loss, expected) and loss.requires_grad
    assert all(torch.equal(before[path], tensor) for path, tensor in st.named_tensors(state))


def test_a_model_built_in_inference_mode_can_be_trained():
    with torch.inference_mode():
        model = make()
    model(ids(1, 3), targets=ids(1, 3)).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.filterwarnings("error")
def test_training_under_autocast_gives_no_warnings():
    model = make().float()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    tokens = ids(2, 17)
    losses = []
    always = torch.is_warn_always_enabled()
    torch.set_warn_always(True)  # PyTorch issues some warnings once per process
    try:
        for _ in range(6):
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(tokens[:, :-1], targets=tokens[:, 1:]).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
    finally:
        torch.set_warn_always(always)
    assert losses[-1] < losses[0]
    assert all(bool(p.grad.isfinite().all()) and p.grad.dtype == torch.float32 for p in model.parameters())


@pytest.mark.parametrize("token", [1, 7, 23])
def test_a_nonfinite_token_does_not_affect_earlier_outputs(token):
    model = make()
    x = torch.randn(2, 24, 16, dtype=torch.float64)
    spoiled = x.clone()
    spoiled[0, token] = math.nan
    with torch.no_grad():
        y, got = (model(embeddings=given, check_finite=False).hidden for given in (x, spoiled))
    torch.testing.assert_close(got[0, :token], y[0, :token])
    torch.testing.assert_close(got[1], y[1])
    assert bool(got[0, token].isnan().all())


def test_optimizer_step_and_state_dict():
    model = make()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    tokens = ids(2, 17)
    losses = []
    for _ in range(5):
        loss = model(tokens[:, :-1], targets=tokens[:, 1:]).loss
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    other = make(seed=1)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(tokens).logits, model(tokens).logits)


def test_states_are_checked_after_moving_the_model():
    model = make()
    model(ids(1, 3), state=model.init_state(1))
    model.float()
    assert model(ids(1, 3), state=model.init_state(1)).logits.dtype == torch.float32


def test_flops_and_bytes_are_sums_over_the_blocks():
    model = make()
    assert model.flops(10) == sum(layer.flops(10) for layer in model.layers) + model.norm.flops(10) + 2 * 16 * 13 * 10
    assert model.state_bytes() == st.nbytes(model.init_state(1))
    assert model.period == 20


@pytest.mark.parametrize("vocab", [pytest.param(None, marks=pytest.mark.slow), 13])
def test_laws(vocab):
    check_block(make(vocab), endurance=600, laws=[law for law in LAWS if law != "hooked"])
    check_block(make(vocab), laws=["hooked"], length=13)


# -- going back --------------------------------------------------------------------------------------------------------


def same_states(got, expected):
    for (path, one), (_, two) in zip(st.named_tensors(got), st.named_tensors(expected), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-10, msg=path)


def test_going_back_into_a_call():
    model, tokens = make(), ids(3, 14)
    before = model(ids(3, 4, seed=1)).state
    out = model(tokens, before, rewindable=True)
    assert out.rewind(0) is before and out.rewind(14) is out.state
    assert len(out) == 4  # as without rewindable
    for count in range(1, 14):
        same_states(out.rewind(count), model(tokens[:, :count], before).state)
    for counts in ([3, 0, 14], torch.tensor([14, 6, 1])):
        got = out.rewind(counts)
        for row, count in enumerate(map(int, counts)):
            alone = model(tokens[row : row + 1, :count], st.select(before, [row])).state
            same_states(st.select(got, [row]), alone)


def test_going_back_with_a_mask_counts_the_positions_of_the_call():
    model, tokens = make(), ids(2, 9)
    mask = torch.tensor([[False] * 3 + [True] * 6, [True] * 4 + [False] * 5])
    out = model(tokens, mask=mask, rewindable=True)
    got = out.rewind([5, 7])
    same_states(st.select(got, [0]), model(tokens[:1, 3:5]).state)
    same_states(st.select(got, [1]), model(tokens[1:, :4]).state)
    same_states(out.rewind(0), model.init_state(2))


def test_going_back_in_packed_documents():
    model, tokens = make(), ids(2, 12)
    documents = torch.tensor([[0] * 4 + [2] * 8, [5] * 7 + [6] * 5])
    before = model(ids(2, 4, seed=1), documents=torch.tensor([[0] * 4, [1] * 4])).state  # row 0 goes on
    out = model(tokens, before, documents=documents, rewindable=True)
    for count in (2, 4, 5, 9):
        same_states(out.rewind(count), model(tokens[:, :count], before, documents=documents[:, :count]).state)
    got = out.rewind([3, 8])
    same_states(
        st.select(got, [0]),
        model(torch.cat([ids(2, 4, seed=1)[:1], tokens[:1, :3]], 1)).state._replace(document=got.document[:1]),
    )
    same_states(st.select(got, [1]), model(tokens[1:, 7:8]).state._replace(document=got.document[1:]))
    assert got.document.tolist() == [0, 6]
    lengths = torch.tensor([0, 3, 3, 8, 12])
    out = model(tokens[:1], cu_seqlens=lengths, rewindable=True)
    for count, start in ((2, 0), (3, 0), (5, 3), (8, 3), (9, 8)):
        got = out.rewind(count)
        same_states(got.layers, model(tokens[:1, start:count]).state.layers)


def test_going_back_does_not_see_later_changes_of_the_inputs():
    model, tokens = make(), ids(2, 9)
    expected = model(tokens[:, :5]).state
    out = model(tokens, rewindable=True)
    tokens.zero_()
    same_states(out.rewind(5), expected)


def test_gradients_after_going_back_are_those_of_the_prefix():
    model = make()
    x = torch.randn(2, 8, 16, dtype=torch.float64, requires_grad=True)
    more = ids(2, 3)

    def gradients(state):
        return torch.autograd.grad(model(more, state).logits.square().sum(), [x, model.layers[1].blocks[0].qkv.weight])

    out = model(embeddings=x, rewindable=True)
    out.logits.sum().backward()  # the graph of the call is gone
    got = gradients(out.rewind([5, 5]))
    for one, two in zip(got, gradients(model(embeddings=x[:, :5]).state)):
        torch.testing.assert_close(one, two)


@pytest.mark.parametrize(
    "count, error, message",
    [
        (10, ValueError, "rewind: row 0: 10 tokens: expected 0 to 9"),
        ([3, -1], ValueError, "rewind: row 1: -1 tokens: expected 0 to 9"),
        ([1, 2, 3], ValueError, r"rewind: numbers of tokens \[3\]: expected one, or \[2\]"),
        (True, TypeError, "rewind: expected a number of tokens, .*got True"),
        (2.0, TypeError, "rewind: expected a number of tokens"),
        ("3", TypeError, "rewind: expected a number of tokens"),
        (torch.ones(2), TypeError, "rewind: expected a number of tokens"),
    ],
)
def test_invalid_numbers_of_tokens_to_go_back_to(count, error, message):
    with pytest.raises(error, match=message):
        make()(ids(2, 9), rewindable=True).rewind(count)


def test_going_back_into_a_call_that_was_not_rewindable():
    with pytest.raises(RuntimeError, match=r"rewindable=True"):
        make()(ids(2, 9)).rewind(3)
