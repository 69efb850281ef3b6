"""Packed documents: random packings against documents apart, boundaries, states, and wrong arguments."""

import itertools

import pytest
import torch

import titans_build as tb
from titans_build.blocks.block import Block
from titans_build.blocks.build import build_block
from titans_build.blocks.state import DocumentState, named_tensors, select
from titans_build.kernels.documents import GROUP_COST, NO_DOCUMENT, Documents, group_by_length

MEMORY = {"type": "memory", "heads": 1, "chunk": 3, "gates": "chunk", "conv": 3}
WINDOW = {"type": "attention", "heads": 1, "window": 4}
CONTEXT = {"type": "context", "segment": 4, "persistent": 1, "memory": MEMORY, "attend": WINDOW}
BLOCKS = {
    "memory": MEMORY,
    "attention": {"type": "attention", "heads": 1},
    "context": CONTEXT,
    "context inside of persistent": {"type": "persistent", "tokens": 6, "of": CONTEXT},
    "context without attention": {
        "type": "context",
        "segment": 3,
        "persistent": 0,
        "write": "inputs",
        "memory": {"type": "gate", "branches": [MEMORY, MEMORY]},
        "attend": {"type": "residual", "of": CONTEXT},
    },
    "persistent gate": {"type": "persistent", "tokens": 2, "of": {"type": "gate", "branches": [WINDOW, MEMORY]}},
}
DIM, TIME = 4, 18


def build(spec, dim=DIM):
    return build_block(spec, dim=dim, seed=0, dtype=torch.float64)


@pytest.mark.parametrize("calls, rows", [(2, 200), pytest.param(4, 500, marks=pytest.mark.slow)])
@pytest.mark.parametrize("seed", range(len(BLOCKS)))
def test_random_packings_are_the_documents_apart(seed, calls, rows):
    """Every row is another packing. The documents apart are rows of one batch, with padding."""
    block = build(list(BLOCKS.values())[seed])
    generator = torch.Generator().manual_seed(seed)
    for call in range(calls):
        begins = torch.rand(rows, TIME, generator=generator) < torch.rand(rows, 1, generator=generator)
        ids = begins.cumsum(dim=1) * 3
        mask = torch.rand(rows, TIME, generator=generator) < (0.7 if call % 2 else 2.0)
        x = torch.randn(rows, TIME, DIM, generator=generator, dtype=torch.float64)
        places = {}
        for b, t in mask.nonzero().tolist():
            places.setdefault((b, int(ids[b, t])), []).append(t)
        apart, valid = torch.zeros(len(places), TIME, DIM, dtype=torch.float64), torch.zeros(len(places), TIME).bool()
        for i, ((b, _), tokens) in enumerate(places.items()):
            apart[i, : len(tokens)], valid[i, : len(tokens)] = x[b, tokens], True
        with torch.no_grad():
            y, state = block(x, mask=mask, documents=ids)
            expected, ends = block(apart, mask=valid)
        assert not y[~mask].any()
        for i, ((b, _), tokens) in enumerate(places.items()):
            y[b, tokens] -= expected[i, : len(tokens)]
        assert float(y.abs().max()) < 1e-10
        last = {b: i for i, (b, _) in enumerate(places)}
        assert state.document[list(last)].tolist() == [id for _, id in (list(places)[i] for i in last.values())]
        one, two = select(state.state, list(last)), select(ends, list(last.values()))
        for (name, got), (_, wanted) in zip(named_tensors(one), named_tensors(two)):
            if got.shape != wanted.shape:  # a cache is as long as the longest row
                slots = min(got.shape[1], wanted.shape[1])
                got, wanted = got[:, -slots:], wanted[:, -slots:]
            torch.testing.assert_close(got, wanted, rtol=0, atol=1e-10, msg=name)


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("ends", [[0, 5, 9], [0, 0, 5, 5, 8, 9, 9], [0, 9, 9], [0, 9]])
def test_cu_seqlens(name, ends):
    block, x = build(BLOCKS[name]), torch.randn(1, 9, DIM, dtype=torch.float64)
    for dtype in (torch.int32, torch.int64):
        y, (state, document) = block(x, cu_seqlens=torch.tensor(ends, dtype=dtype))
        expected, end = [], block.init_state(1)
        for start, stop in itertools.pairwise(ends):
            end = block.init_state(1)
            if stop > start:
                piece, end = block(x[:, start:stop])
                expected.append(piece)
        torch.testing.assert_close(y, torch.cat(expected, dim=1), rtol=0, atol=1e-12)
        assert document.tolist() == [len(ends) - 2]
        for (path, got), (_, wanted) in zip(named_tensors(state), named_tensors(end)):
            torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12, msg=path)
    torch.testing.assert_close(block(x, cu_seqlens=ends)[0], y)


@pytest.mark.parametrize("name", BLOCKS)
def test_the_first_document_goes_on_from_the_state_with_its_gradient(name):
    block = build(BLOCKS[name])
    x = torch.randn(3, 8, DIM, dtype=torch.float64, requires_grad=True)
    first = torch.zeros(3, 4, dtype=torch.int64)
    second = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 2], [0, 0, 0, 0]])  # goes on, begins, goes on
    y, state = block(x[:, :4], documents=first)
    z, _ = block(x[:, 4:], state, documents=second)
    weights = torch.randn(3, 8, DIM, dtype=torch.float64)
    got = torch.autograd.grad((torch.cat([y, z], dim=1) * weights).sum(), [x, *block.parameters()], allow_unused=True)
    rows = [[6, 2], [4, 3, 1], [8]]
    pieces = [torch.cat([block(piece)[0] for piece in x[b : b + 1].split(rows[b], dim=1)], dim=1) for b in range(3)]
    expected = torch.cat(pieces)
    wanted = torch.autograd.grad((expected * weights).sum(), [x, *block.parameters()], allow_unused=True)
    torch.testing.assert_close(torch.cat([y, z], dim=1), expected, rtol=0, atol=1e-12)
    for one, two in zip(got, wanted):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-11)


def test_a_state_of_a_call_without_documents_goes_on():
    block = build(MEMORY)
    x = torch.randn(2, 6, DIM, dtype=torch.float64)
    _, state = block(x[:, :3])
    y, after = block(x[:, 3:], state, documents=torch.full((2, 3), 7))
    torch.testing.assert_close(y, block(x)[0][:, 3:])
    z, kept = block(x, after)  # without documents: all tokens belong to document 7
    torch.testing.assert_close(z, block(x, after.state)[0])
    assert isinstance(kept, DocumentState) and kept.document.tolist() == [7, 7]


def test_cu_seqlens_go_on_from_a_state_unless_the_first_document_is_empty():
    block = build(MEMORY)
    x = torch.randn(1, 8, DIM, dtype=torch.float64)
    _, state = block(x[:, :4], cu_seqlens=[0, 4])
    torch.testing.assert_close(block(x[:, 4:], state, cu_seqlens=[0, 4])[0], block(x)[0][:, 4:])
    torch.testing.assert_close(block(x[:, 4:], state, cu_seqlens=[0, 0, 4])[0], block(x[:, 4:])[0])


class Cache(Block):
    """A block whose state grows: it returns the mean of all tokens so far."""

    grows = True

    def init_state(self, batch_size):
        return torch.zeros(batch_size, 0, self.dim, dtype=torch.float64)

    def forward(self, x, state=None, *, mask=None):
        seen = torch.cat([self.init_state(len(x)) if state is None else state, x], dim=1)
        return seen.cumsum(dim=1)[:, -x.shape[1] :], seen


def test_custom_blocks_are_given_each_document_as_a_row():
    block = Cache(DIM)
    x = torch.randn(1, 6, DIM, dtype=torch.float64)
    y, (state, _) = block(x, documents=torch.tensor([[0, 0, 0, 0, 1, 1]]))
    torch.testing.assert_close(y, torch.cat([block(x[:, :4])[0], block(x[:, 4:])[0]], dim=1))
    torch.testing.assert_close(state, x[:, 4:])


class Shifted(Block):
    """A memory whose documents begin from a state that this block changes."""

    def __init__(self, dim):
        super().__init__(dim)
        self.of = tb.create(MEMORY, dim=dim)

    def init_state(self, batch_size):
        fresh = self.of.init_state(batch_size)
        return fresh._replace(convolution=fresh.convolution + 1)

    def forward(self, x, state=None, *, mask=None, documents=None):
        if documents is not None:
            documents = documents.starting(self.init_state(1))
        elif state is None:
            state = self.init_state(len(x))
        return self.of(x, state, mask=mask, documents=documents)


def test_a_custom_block_may_change_the_state_that_documents_begin_from():
    block = Shifted(DIM).double()
    with torch.no_grad():
        block.of.reset_parameters()
    x = torch.randn(1, 6, DIM, dtype=torch.float64)
    y, _ = block(x, documents=torch.tensor([[0, 0, 0, 1, 1, 1]]))
    torch.testing.assert_close(y, torch.cat([block(x[:, :3])[0], block(x[:, 3:])[0]], dim=1))


def test_states_that_grow_and_do_not_fit_together_are_an_error():
    block = Cache(DIM)
    x = torch.randn(2, 4, DIM, dtype=torch.float64)
    _, state = block(x, documents=torch.zeros(2, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match="some rows go on from the state and others begin a document"):
        block(x[:, :2], state, documents=torch.tensor([[0, 0], [1, 1]]))


@pytest.mark.parametrize("name", ["mac", "mag", "lmm", "transformer"])
def test_a_model_has_the_loss_and_the_state_of_documents_apart(name):
    model = tb.build(tb.load_recipe(name, overrides={"dim": 16}), seed=0).double()
    lengths = [[7, 1, 12], [20], [10, 10]]
    tokens = torch.randint(256, (3, 20), generator=torch.Generator().manual_seed(0))
    ids = torch.stack([torch.arange(len(row)).repeat_interleave(torch.tensor(row)) for row in lengths])
    out = model(tokens, documents=ids)
    total, count, ends = 0.0, 0, []
    for row, pieces in zip(tokens, lengths):
        for piece in row.split(pieces):
            alone = model(piece[None])
            total += float(torch.nn.functional.cross_entropy(alone.logits.detach()[0, :-1], piece[1:], reduction="sum"))
            count += len(piece) - 1
        ends.append(alone)
    assert float(out.loss) == pytest.approx(total / count, rel=1e-12)
    for b, alone in enumerate(ends):
        torch.testing.assert_close(out.logits[b, -1], alone.logits[0, -1], rtol=0, atol=1e-12)
    more = torch.randint(256, (3, 3), generator=torch.Generator().manual_seed(1))
    after = model(more, out.state)
    assert after.state.document.tolist() == [2, 0, 1]
    for b, alone in enumerate(ends):
        torch.testing.assert_close(after.logits[b], model(more[b : b + 1], alone.state).logits[0], rtol=0, atol=1e-12)
    given = model(tokens, documents=ids, targets=tokens)  # targets that are given are taken as they are
    assert float(given.loss) == pytest.approx(
        float(torch.nn.functional.cross_entropy(out.logits.flatten(0, 1), tokens.flatten())), rel=1e-12
    )
    generated = model.generate(tokens, 3, state=out.state)
    assert generated.state.document.tolist() == [2, 0, 1]


@pytest.mark.parametrize("name", ["mac", "mag", "lmm", "transformer"])
def test_a_model_takes_a_call_without_valid_tokens(name):
    model = tb.build(tb.load_recipe(name, overrides={"dim": 16}), seed=0).double()
    tokens, ids = torch.randint(256, (2, 4)), torch.tensor([[0, 0, 1, 1], [0, 0, 0, 0]])
    state = model(tokens, documents=ids).state
    expected = model(tokens, state, documents=ids + 1)
    for count, mask in ((0, None), (4, torch.zeros(2, 4, dtype=torch.bool))):
        out = model(tokens[:, :count], state, mask, documents=ids[:, :count])
        assert out.logits.shape == (2, count, 256) and float(out.loss) == 0
        assert torch.equal(out.state.document, state.document)
        torch.testing.assert_close(
            model(tokens, out.state, documents=ids + 1).logits, expected.logits, rtol=0, atol=1e-12
        )


def test_a_row_that_is_reset_begins():
    model = tb.build(tb.load_recipe("lmm", overrides={"dim": 16}), seed=0).double()
    tokens, ids = torch.randint(256, (2, 6)), torch.zeros(2, 6, dtype=torch.int64)
    state = model(tokens, documents=ids).state
    anew = tb.state.reset(state, [1], model.init_state(1))
    torch.testing.assert_close(
        model(tokens, anew, documents=ids).logits[1], model(tokens[1:]).logits[0], rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("rows", [1, 2])
def test_a_row_of_a_state_after_packed_documents_is_reset(rows):
    block = build(MEMORY)
    x, ids = torch.randn(2, 6, DIM, dtype=torch.float64), torch.full((2, 6), 3)
    _, state = block(x, documents=ids)
    anew = tb.state.reset(state, [1], block.init_state(rows))
    assert isinstance(anew, DocumentState) and anew.document.tolist() == [3, NO_DOCUMENT]
    y, _ = block(x, anew, documents=ids)
    torch.testing.assert_close(y[1:], block(x[1:])[0], rtol=0, atol=1e-12)
    torch.testing.assert_close(y[:1], block(torch.cat([x, x], dim=1)[:1])[0][:, 6:], rtol=0, atol=1e-12)


def test_documents_of_a_row_without_valid_tokens_leave_its_state():
    block = build(MEMORY)
    x, mask = torch.randn(2, 4, DIM, dtype=torch.float64), torch.tensor([[True] * 4, [False] * 4])
    _, state = block(x, documents=torch.zeros(2, 4, dtype=torch.int64))
    _, after = block(x, state, mask=mask, documents=torch.tensor([[0, 1, 1, 2], [5, 4, 3, 2]]))
    assert after.document.tolist() == [2, 0]
    for (_, old), (_, new) in zip(named_tensors(state.state), named_tensors(after.state)):
        assert torch.equal(old[1], new[1])


@pytest.mark.parametrize(
    ("named", "error", "message"),
    [
        ({"documents": torch.tensor([[0, 0, 1, 0], [0, 0, 0, 0]])}, ValueError, "id 0 at row 0, token 3 follows 1"),
        ({"documents": torch.zeros(2, 3, dtype=torch.int64)}, ValueError, r"expected .batch, time. = \[2, 4\]"),
        ({"documents": torch.zeros(2, 4)}, TypeError, "expected an int64 tensor .batch, time., got torch.float32"),
        ({"documents": [[0, 0, 0, 0]] * 2}, TypeError, "expected an int64 tensor .batch, time., got list"),
        ({"cu_seqlens": torch.tensor([0, 4])}, ValueError, "one packed row, got 2 rows"),
        ({"cu_seqlens": [0, 4], "documents": torch.zeros(2, 4, dtype=torch.int64)}, ValueError, "not both"),
    ],
)  # fmt: skip
def test_wrong_documents_are_one_error(named, error, message):
    x = torch.randn(2, 4, DIM, dtype=torch.float64)
    model = tb.build(tb.load_recipe("lmm", overrides={"dim": DIM}), seed=0)
    with pytest.raises(error, match=message):
        build(MEMORY)(x, **named)
    with pytest.raises(error, match=message):
        model(torch.zeros(2, 4, dtype=torch.int64), **named)


@pytest.mark.parametrize(
    ("ends", "error"),
    [([0, 3], ValueError), ([0, 5], ValueError), ([1, 4], ValueError), ([0, 3, 2, 4], ValueError), ([4], ValueError),
     (torch.tensor([0.0, 4.0]), TypeError), (torch.tensor([[0, 4]]), ValueError), ("0,4", TypeError)],
)  # fmt: skip
def test_wrong_boundaries_are_one_error(ends, error):
    with pytest.raises(error, match="cu_seqlens"):
        build(MEMORY)(torch.randn(1, 4, DIM, dtype=torch.float64), cu_seqlens=ends)


def test_a_state_of_other_rows_is_an_error():
    block = build(MEMORY)
    x, ids = torch.randn(2, 4, DIM, dtype=torch.float64), torch.zeros(2, 4, dtype=torch.int64)
    _, state = block(x, documents=ids)
    with pytest.raises(ValueError, match="the state has 1 rows"):
        block(x, select(state, [0]), documents=ids)


def test_a_wrong_document_of_a_state_is_an_error():
    x, ids = torch.randn(2, 4, DIM, dtype=torch.float64), torch.zeros(2, 4, dtype=torch.int64)
    for block in (build(MEMORY), build("ffn")):
        _, (state, _) = block(x, documents=ids)
        for document in (torch.zeros(2), [0, 0]):
            with pytest.raises(TypeError, match=r"document of the state: expected int64 \[2\]"):
                block(x, DocumentState(state, document), documents=ids)
        with pytest.raises(ValueError, match="the state has 1 rows"):
            block(x, DocumentState(state, torch.tensor([0])), documents=ids)


@pytest.mark.parametrize("name", BLOCKS)
def test_masked_inputs_that_are_not_numbers_reach_no_gradient(name):
    block, x = build(BLOCKS[name]), torch.randn(1, 6, DIM, dtype=torch.float64)
    mask, ids = torch.tensor([[True, True, False, True, True, False]]), torch.tensor([[0, 0, 0, 1, 1, 1]])
    x[~mask] = torch.nan
    block(x, mask=mask, documents=ids)[0].square().sum().backward()
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in block.parameters())


@pytest.mark.parametrize("name", BLOCKS)
def test_outputs_at_masked_tokens_are_zero_where_a_layer_has_a_bias(name):
    block, x = build(BLOCKS[name]), torch.randn(1, 6, DIM, dtype=torch.float64)
    mask, ids = torch.tensor([[True, True, False, True, True, False]]), torch.tensor([[0, 0, 0, 1, 1, 1]])
    for layer in block.modules():
        if isinstance(layer, torch.nn.Linear):
            layer.register_forward_hook(lambda layer, inputs, y: y + 1)
    y, _ = block(x, mask=mask, documents=ids)
    assert not y[~mask].any()
    apart = torch.cat([block(x[:, start : start + 2])[0] for start in (0, 3)], dim=1)
    torch.testing.assert_close(y[mask], apart[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", BLOCKS)
def test_a_call_without_tokens_keeps_the_state(name):
    block, x = build(BLOCKS[name]), torch.randn(2, 6, DIM, dtype=torch.float64)
    ids = torch.tensor([[0, 0, 0, 1, 1, 1], [2] * 6])
    for before in (None, block(x, documents=ids)[1]):
        y, after = block(x[:, :0], before, documents=ids[:, :0])
        assert y.shape == (2, 0, DIM)
        assert before is None or torch.equal(after.document, before.document)
        torch.testing.assert_close(
            block(x, after, documents=ids)[0], block(x, before, documents=ids)[0], rtol=0, atol=1e-12
        )
    y, (_, document) = block(x[:1, :0], cu_seqlens=[0, 0, 0])
    assert y.shape == (1, 0, DIM) and document.tolist() == [1]


def test_documents_on_the_meta_device_are_an_error():
    block = build_block(MEMORY, dim=DIM, device="meta")
    with pytest.raises(ValueError, match="documents: the inputs are on the meta device"):
        block(torch.zeros(1, 2, DIM, device="meta"), documents=torch.zeros(1, 2, dtype=torch.int64, device="meta"))


def test_ids_may_be_far_apart():
    ids = torch.tensor([[-(2**63) + 1, 2**62]])  # the difference does not fit into 64 bits
    assert Documents(ids).length == [1, 1]


@pytest.mark.parametrize("ends", [[0, 3, 6], [0, 0, 3, 3, 6, 6]])
def test_going_back_takes_boundaries_as_a_list_and_keeps_empty_documents(ends):
    model = tb.build(tb.load_recipe("lmm", overrides={"dim": 16}), seed=0).double()
    tokens = torch.randint(256, (1, 6), generator=torch.Generator().manual_seed(0))
    out = model(tokens, cu_seqlens=ends, rewindable=True)
    for count in (2, 4, 6):
        expected = (
            out.state if count == 6 else model(tokens[:, :count], cu_seqlens=[*filter(count.__gt__, ends), count]).state
        )
        for state in (out.rewind(count), tb.state.rewind(model, None, tokens, count, cu_seqlens=ends)):
            for (path, got), (_, wanted) in zip(named_tensors(state), named_tensors(expected)):
                assert torch.equal(got, wanted), path


@pytest.mark.parametrize(
    "named", [{"documents": torch.zeros(2, 5, dtype=torch.int64)}, {"mask": torch.ones(2, 5, dtype=torch.bool)}]
)
def test_going_back_refuses_arguments_that_the_call_refuses(named):
    x = torch.randn(2, 4, DIM, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"\[2, 5\]: expected \[batch, time\] = \[2, 4\]"):
        tb.state.rewind(build(MEMORY), None, x, 2, **named)
    with pytest.raises(ValueError, match="cu_seqlens: expected boundaries from 0 to the number of tokens, 4"):
        tb.state.rewind(build(MEMORY), None, x[:1], 2, cu_seqlens=[0, 3])


def test_packed_documents_are_not_observed():
    model = tb.build(tb.load_recipe("lmm", overrides={"dim": 16}), seed=0)
    tokens = torch.zeros(1, 4, dtype=torch.int64)
    with tb.observe(model), pytest.raises(ValueError, match="packed documents cannot be observed"):
        model(tokens, documents=tokens)
    other = tb.build(tb.load_recipe("lmm", overrides={"dim": 16}), seed=0)
    with tb.observe(model):  # does not see other models, nor tokens that are read again
        other(tokens, documents=tokens)
        tb.state.rewind(model, None, tokens, 2, documents=tokens)


@pytest.mark.parametrize("name", [pytest.param("model", marks=pytest.mark.slow), "block"])
def test_compiled_modules_run_packed_documents_eagerly(name):
    ids = [torch.tensor([[0, 0, 0, 1, 1, 1]]), torch.tensor([[0, 1, 1, 1, 2, 2]])]
    if name == "model":
        module, x = tb.build(tb.load_recipe("mag", overrides={"dim": 16}), seed=0), torch.zeros(1, 6, dtype=torch.int64)
    else:
        module, x = build(MEMORY), torch.randn(1, 6, DIM, dtype=torch.float64)
    compiled = torch.compile(module, backend="eager")
    for documents in ids:
        got, expected = compiled(x, documents=documents), module(x, documents=documents)
        torch.testing.assert_close(got[0], expected[0], rtol=0, atol=0)


def test_groups_waste_little():
    generator = torch.Generator().manual_seed(0)
    for count in (1, 2, 30, 1000):
        lengths = torch.randint(1, 600, (count,), generator=generator).tolist()
        groups = group_by_length([(length, i) for i, length in enumerate(lengths)])
        assert sorted(i for group in groups for i in group) == list(range(count))
        cost = sum(GROUP_COST + len(group) * max(lengths[i] for i in group) for group in groups)
        assert cost <= GROUP_COST + count * max(lengths)
        assert cost <= sum(lengths) + count * GROUP_COST
    assert cost < 1.05 * sum(lengths)


def test_documents_without_padding_are_unpacked_and_packed_to_themselves():
    ids = torch.tensor([[0, 0, 1], [2, 3, 3]])
    documents = Documents(ids)
    groups = documents.groups()
    x = torch.randn(2, 3, 5)
    assert torch.equal(documents.pack([documents.unpack(x, group) for group in groups], groups), x)
