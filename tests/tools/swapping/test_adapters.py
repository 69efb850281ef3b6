"""Blocks in torch's layers and in modules of other signatures: time first, padding masks, tuples, mappings."""

import copy
from typing import NamedTuple

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import titans_build as tb
from titans_build.tools.swapping import Adapter, SwapError
from titans_build.tools.swapping.infer import infer_adapter, input_width

DIM = 16
MEMORY = {"type": "memory", "heads": 2, "chunk": 4}

HOWS = ["beside", "before", "after", "replace"]
PLACES = ["layers.*", "layers.*.self_attn", "layers.*.norm1", "layers.0.linear1"]


def encoder(batch_first):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(DIM, 2, 2 * DIM, batch_first=batch_first, dropout=0.0)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=batch_first)


def vectors(rows=3, time=7, seed=0):
    return torch.randn(rows, time, DIM, generator=torch.Generator().manual_seed(seed))


def run(model, x, padding=None, batch_first=True):
    if batch_first:
        return model(x, src_key_padding_mask=padding)
    return model(x.transpose(0, 1), src_key_padding_mask=padding).transpose(0, 1)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize("how", HOWS)
def test_torch_encoders(randomised, how, where, batch_first):
    if where.endswith("linear1") and how in ("beside", "replace"):
        with pytest.raises(SwapError, match="does not return the width"):
            tb.swap(encoder(batch_first), where, MEMORY, how)
        return
    x, padding = vectors(), torch.zeros(3, 7, dtype=torch.bool)
    padding[0, :2] = padding[1, 4:] = True
    original = encoder(batch_first)
    model = copy.deepcopy(original)
    tb.swap(model, where, MEMORY, how)
    for gradients, training in ((True, True), (False, False), (True, False)):
        model.train(training), original.train(training)
        with torch.set_grad_enabled(gradients):
            if how != "replace":
                real = ~padding
                expected = run(original, x, padding, batch_first)
                assert_close(run(model, x, padding, batch_first)[real], expected[real], atol=1e-6, rtol=1e-5)
    randomised(model)
    with torch.no_grad():
        together = run(model, x, padding, batch_first)
        assert_close(together[1:2, :4], run(model, x[1:2, :4], None, batch_first), atol=1e-5, rtol=1e-4)
        assert_close(together[:1, 2:], run(model, x[:1, 2:], None, batch_first), atol=1e-5, rtol=1e-4)
        floating = torch.zeros(3, 7).masked_fill(padding, float("-inf"))
        assert_close(run(model, x, floating, batch_first)[~padding], together[~padding])
    with tb.memory(model):  # what a memory keeps is the row's own, whatever comes first in the tensor
        run(model, x[:2], None, batch_first)
        run(model, x[1:], None, batch_first)
    tb.unswap(model)
    assert model.use_nested_tensor == original.use_nested_tensor
    assert torch.equal(run(model, x, None, batch_first), run(original, x, None, batch_first))


class Attends(nn.Module):
    def __init__(self, batch_first):
        super().__init__()
        self.attention = nn.MultiheadAttention(DIM, 2, batch_first=batch_first)

    def forward(self, x, context=None, padding=None):
        context = x if context is None else context
        return self.attention(x, key=context, value=context, key_padding_mask=padding)[0]


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("how", HOWS)
def test_torch_attention(randomised, how, batch_first):
    torch.manual_seed(0)
    model, x = Attends(batch_first), vectors()
    put = (lambda x: x) if batch_first else (lambda x: x.transpose(0, 1))
    expected = model(put(x))
    tb.swap(model, "attention", MEMORY, how)
    if how != "replace":
        assert_close(model(put(x)), expected)
    randomised(model)
    padding = torch.zeros(3, 7, dtype=torch.bool).index_fill(1, torch.tensor([5, 6]), True)
    assert_close(put(model(put(x), padding=padding))[:, :5], put(model(put(x[:, :5]))), atol=1e-5, rtol=1e-4)
    single = model(x[0])  # [time, dim]: one sequence
    assert_close(single, put(model(put(x[:1])))[0], atol=1e-5, rtol=1e-4)
    if how == "replace":
        with pytest.raises(SwapError, match=r"attention: called with 'key'.*cross-attention cannot be replaced"):
            model(put(x), context=put(vectors(seed=1)))
    else:  # the mask is of the keys then, and says nothing of the queries
        assert model(put(x), context=put(vectors(time=4)), padding=padding[:, 3:]).shape == put(x).shape


@pytest.mark.parametrize("where", ["decoder.layers.*", "decoder.layers.*.multihead_attn", "encoder.layers.*"])
def test_encoder_and_decoder_padding(randomised, where):
    torch.manual_seed(0)
    model = nn.Transformer(DIM, 2, 1, 1, 2 * DIM, dropout=0.0, batch_first=True)
    source, target = vectors(2, 6), vectors(2, 5, seed=1)
    padding = torch.zeros(2, 6, dtype=torch.bool).index_fill(1, torch.tensor([4, 5]), True)
    expected = model(source, target, src_key_padding_mask=padding, memory_key_padding_mask=padding)
    tb.swap(model, where, MEMORY, "beside")
    out = model(source, target, src_key_padding_mask=padding, memory_key_padding_mask=padding)
    assert_close(out, expected, atol=1e-6, rtol=1e-5)
    randomised(model)
    out = model(source, target, src_key_padding_mask=padding, memory_key_padding_mask=padding)
    assert_close(out, model(source[:, :4], target), atol=1e-5, rtol=1e-4)
    late = torch.zeros(2, 5, dtype=torch.bool).index_fill(1, torch.tensor([4]), True)
    assert_close(
        model(source, target, tgt_key_padding_mask=late)[:, :4], model(source, target[:, :4]), atol=1e-5, rtol=1e-4
    )


class Pair(NamedTuple):
    y: torch.Tensor
    note: str


class Returns(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.linear, self.kind = nn.Linear(DIM, DIM), kind

    def forward(self, x, *, scale=1.0):
        y = self.linear(x) * scale
        return {"tuple": (y, "note"), "list": [y, "note"], "mapping": {"y": y, "note": "note"}}.get(
            self.kind, Pair(y, "note")
        )


class Holds(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.inner = Returns(kind)

    def forward(self, x):
        return self.inner(scale=2.0, x=x)


@pytest.mark.parametrize("kind", ["tuple", "list", "mapping", "named"])
@pytest.mark.parametrize("how", ["beside", "before", "after"])
def test_keyword_calls_and_returned_containers(how, kind):
    torch.manual_seed(0)
    model, x = Holds(kind), vectors()
    expected = model(x)
    tb.swap(model, "inner", MEMORY, how, gate=1.0)
    out = model(x)
    assert type(out) is type(expected)
    (y, note), (before, _) = (list(one.values()) if kind == "mapping" else list(one) for one in (out, expected))
    block = model.inner.titans
    added = block.block(block.norm(before if how == "after" else x)[0])[0]
    scaled = model.inner.linear(x + added) * 2 if how == "before" else before + added
    assert note == "note"
    assert_close(y, scaled)


def test_a_block_in_the_place_of_a_layer_is_pre_normed_and_residual():
    model, x = encoder(True), vectors()
    tb.swap(model, "layers.*", [MEMORY, "ffn"])
    for layer in model.layers:
        with torch.no_grad():
            for part in layer.block.blocks:
                for parameter in part.parameters():
                    parameter.zero_()
    assert torch.equal(model(x), x)


def test_a_custom_adapter():
    class Odd(nn.Module):
        def forward(self, flag, *, states):
            return states, flag, None

    model, x = nn.ModuleDict({"odd": Odd()}), vectors()
    adapter = Adapter(argument="states", returns=3, time_first=True)
    with pytest.raises(SwapError, match="the width of the input of Odd is unknown"):
        tb.swap(model, "odd", MEMORY, adapter=adapter)
    tb.swap(model, "odd", MEMORY, adapter=adapter, dim=DIM)
    y, *rest = model["odd"](1, states=x.transpose(0, 1))
    assert rest == [None, None]
    assert_close(y.transpose(0, 1), tb.build_block(MEMORY, dim=DIM)(x)[0])


class Unpacks(nn.Module):
    """``y, h = inner(x)``: a tensor in the place of the tuple would be taken apart by its rows."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x, *more):
        y, _ = self.inner(x, *more)
        return y


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(DIM, DIM)

    def forward(self, x, both=True):
        y = self.linear(x)
        return (y, None) if both else y


class Outputs(Branches):
    """Returns a tuple that has a name."""

    def forward(self, x, both=True):
        outputs = (self.linear(x), None)
        if both:
            outputs += (None,)
        return outputs


def test_a_replaced_module_that_returned_a_tuple():
    pair = Unpacks(nn.Linear(DIM, DIM))
    for inner in (nn.GRU(DIM, DIM, batch_first=True), nn.Sequential(nn.ReLU(), nn.LSTM(DIM, DIM, batch_first=True))):
        model, x = Unpacks(inner), vectors(2)
        tb.swap(model, "inner", MEMORY, dim=DIM)
        assert_close(model(x), tb.build_block(MEMORY, dim=DIM)(x)[0])
    model = Unpacks(nn.GRU(DIM, DIM, batch_first=True))
    tb.swap(model, "inner", MEMORY)
    with pytest.raises(SwapError, match=r"inner: called with 'hx'.*nor a module that is given a state"):
        model(x, torch.zeros(1, 2, DIM))
    for kind in (Branches, Outputs):
        message = rf"inner: the source of {kind.__name__}\.forward\(x, both\) does not say what"
        with pytest.raises(SwapError, match=message):
            tb.swap(Unpacks(kind()), "inner", MEMORY)
    tb.swap(pair, "inner", MEMORY)
    assert pair.inner.adapter == Adapter()


def test_after_reads_the_output():
    torch.manual_seed(0)
    for module, given in (
        (nn.Embedding(5, DIM), torch.tensor([[1, 2, 3, 4]])),
        (nn.Linear(3, DIM), torch.randn(2, 4, 3)),
        (nn.Sequential(nn.Linear(3, 5), nn.Linear(5, DIM)), torch.randn(2, 4, 3)),
        (nn.GRU(3, DIM // 2, bidirectional=True, batch_first=True), torch.randn(2, 4, 3)),
    ):
        model = nn.ModuleDict({"inner": module})
        before = model["inner"](given)
        before = before[0] if isinstance(before, tuple) else before
        (row,) = tb.swap(model, "inner", MEMORY, "after", gate=1.0).rows
        site = model["inner"].titans
        out = model["inner"](given)
        assert row.dim == DIM
        assert_close(out[0] if isinstance(out, tuple) else out, before + site.block(site.norm(before)[0])[0])


@pytest.mark.parametrize("inner", [nn.Conv1d(DIM, DIM, 3), nn.Sequential(nn.BatchNorm1d(DIM), nn.ReLU())])
def test_channels_first_modules_are_refused(inner):
    with pytest.raises(
        SwapError, match=r"inner: .* reads \[batch, channels, \.\.\.\], and a block \[batch, time, dim\]"
    ):
        tb.swap(nn.ModuleDict({"inner": inner}), "inner", MEMORY, "beside", dim=DIM)


def test_nested_tensors_stay_off_until_the_last_swap_is_undone():
    model, x = encoder(True).eval(), vectors()
    padding = torch.zeros(3, 7, dtype=torch.bool).index_fill(1, torch.tensor([5, 6]), True)
    first = tb.swap(model, "layers.0", MEMORY, "beside")
    tb.swap(model, "layers.1", MEMORY, "beside")
    tb.unswap(model, first)
    with torch.no_grad():  # a batch that is packed, as it would be without a swap, could not be read
        assert torch.isfinite(model(x, src_key_padding_mask=padding)).all()
    tb.unswap(model)
    assert model.use_nested_tensor and vars(model).keys() == vars(encoder(True)).keys()


def test_a_mask_of_other_tokens_is_refused():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(DIM, DIM)

        def forward(self, x, attention_mask=None):
            return self.inner(x)

    model, x = Masked(), vectors()
    tb.swap(model, "inner", MEMORY, "beside")
    with pytest.raises(SwapError, match=r"inner: reads 3 rows of 7 tokens, and the mask of the call is \[3, 5\]"):
        model(x, attention_mask=torch.ones(3, 5))
    with pytest.raises(SwapError, match=r"adapter='time_first'"):
        model(x.transpose(0, 1), attention_mask=torch.ones(3, 7))


@pytest.mark.parametrize(
    "module, expected, wide",
    [
        (nn.Linear(3, 5), Adapter(), 3),
        (nn.LayerNorm(6), Adapter(), 6),
        (nn.Sequential(nn.GELU(), nn.Linear(4, 2)), Adapter(), 4),
        (nn.GRU(3, 5), Adapter(foreign=("hx",), returns=2, time_first=True), 3),
        (nn.LSTM(3, 5, batch_first=True), Adapter(foreign=("hx",), returns=2), 3),
        (nn.GELU(), Adapter(), None),
    ],
)
def test_inferred_adapter_and_width(module, expected, wide):
    assert infer_adapter(module) == expected
    assert input_width(module) == wide
