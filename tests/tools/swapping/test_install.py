"""``tb.swap`` and ``tb.unswap``: exact at zero gates, exactly undone, refused as a whole."""

import copy
import json
import pickle

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import titans_build as tb
from titans_build.tools.swapping import SwapError, swaps

DIM = 16
MEMORY = {"type": "memory", "heads": 2, "chunk": 4}

ADDED = ("beside", "before", "after")


def tree(model):
    """Everything that a swap could change: names, objects, attributes, hooks, what trains."""
    modules = {name: (id(module), sorted(vars(module))) for name, module in model.named_modules()}
    hooks = {name: len(m._forward_hooks) + len(m._forward_pre_hooks) for name, m in model.named_modules()}
    values = {name: (id(p), p.requires_grad, p._version) for name, p in model.named_parameters()}
    return modules, hooks, values, list(model.state_dict())


@pytest.mark.parametrize("how", ADDED)
def test_a_zero_gate_changes_nothing(plain, randomised, tokens, how):
    model, t = plain(), tokens()
    expected = model(t)
    tb.swap(model, "layers.*", MEMORY, how)
    assert torch.equal(model(t), expected)
    assert not torch.equal(randomised(model)(t), expected)


@pytest.mark.parametrize("how", [*ADDED, "replace"])
def test_unswap_restores_objects_and_values(plain, randomised, tokens, how):
    model, t = plain(), tokens()
    model.embedding.weight.requires_grad_(False)
    before, expected = tree(model), model(t)
    plan = tb.swap(model, "layers.*", MEMORY, how, start=1, train="memory")
    assert not torch.equal(randomised(model)(t), expected) and tree(model) != before
    tb.unswap(model, plan)
    assert tree(model) == before
    assert torch.equal(model(t), expected)


def test_gradients_reach_the_gate_first_and_then_the_block(plain, tokens):
    model, t = plain(), tokens()
    tb.swap(model, "layers.*", MEMORY, "beside", every=2, train="memory")
    training = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert {name.split(".titans.")[0] for name in training} == {"layers.0", "layers.2"}
    model(t).square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for name, p in training.items() if name.endswith("gate"))
    optimizer = torch.optim.SGD(training.values(), lr=0.1)
    optimizer.step()
    optimizer.zero_grad()
    model(t).square().sum().backward()
    assert [name for name, p in training.items() if not p.grad.abs().sum() > 0] == []


def test_original_parameter_names_are_kept(plain, tokens):
    model, t = plain(), tokens()
    saved = {name: tensor + 1 for name, tensor in model.state_dict().items()}
    tb.swap(model, "layers.0", MEMORY, "replace")
    tb.swap(model, "layers.1", MEMORY, "beside")
    missing, unexpected = model.load_state_dict(saved, strict=False)
    assert unexpected == [] and all(name.startswith(("layers.0.block.", "layers.1.titans.")) for name in missing)
    tb.unswap(model)
    assert all(torch.equal(tensor, saved[name]) for name, tensor in model.state_dict().items())
    assert torch.isfinite(model(t)).all()


def test_a_record_repeats_the_swap(plain, tokens):
    model, t = plain(), tokens()
    record = json.loads(json.dumps(tb.swap(model, "layers.*", MEMORY, "after", gate=0.5, train="memory").record))
    other = plain(seed=1)
    plan = tb.swap(other, **record)
    assert plan == swaps(model)[0] == swaps(other)[0]
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(t), model(t))
    given = tb.swap(plain(), "layers.0", nn.Linear(DIM, DIM), "beside")
    with pytest.raises(SwapError, match="was given as a module, and has no record"):
        given.record  # noqa: B018


def test_a_record_repeats_a_list_in_the_place_of_a_layer():
    layer = nn.TransformerEncoderLayer(d_model=DIM, nhead=2, dim_feedforward=16, batch_first=True, dropout=0.0)
    one, two = (nn.TransformerEncoder(layer, num_layers=2).eval() for _ in range(2))
    plan = tb.swap(one, "layers.*", [MEMORY, "ffn"], "replace")
    assert plan.record["block"]["type"] == "layer"
    again = tb.swap(two, **json.loads(json.dumps(plan.record)))
    assert again.record == plan.record
    two.load_state_dict(one.state_dict())
    x = torch.randn(2, 7, DIM)
    assert torch.equal(one(x), two(x))


def test_dry_run(plain):
    model = plain()
    before = tree(model)
    plan = tb.swap(model, "layers.*", MEMORY, "beside", train="memory", dry_run=True)
    assert tree(model) == before and swaps(model) == []
    shown = str(plan)
    assert "Plain: memory beside 3 modules" in shown and "layers.1" in shown and "others do not train" in shown
    assert plan == tb.swap(model, "layers.*", MEMORY, "beside", train="memory")
    assert plan.parameters == sum(p.numel() for n, p in model.named_parameters() if "titans" in n)


def test_blocks_take_dtype_device_and_mode_of_their_module(plain, randomised, tokens):
    model = plain().bfloat16().eval()
    tb.swap(model, "layers.*", MEMORY, "beside")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert not any(module.training for module in model.modules())
    assert randomised(model)(tokens()).dtype == torch.bfloat16
    with torch.device("meta"):
        model = plain()
    tb.swap(model, "layers.*", MEMORY, "replace")
    assert {p.device.type for p in model.parameters()} == {"meta"}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model = plain()
        tb.swap(model, "layers.*", MEMORY, "replace")
        assert torch.isfinite(model(tokens()).float()).all()


def test_a_block_given_as_a_module_or_a_function(plain, tokens):
    model, t = plain(), tokens()
    shared = nn.Linear(DIM, DIM)
    before = shared.weight.clone()
    tb.swap(model, "layers.*", shared, "beside", gate=1.0)
    held = [layer.titans.block.module for layer in model.layers]
    assert len({id(module.weight) for module in [*held, shared]}) == 4  # each place has a copy of its own
    model(t).sum().backward()
    assert shared.weight.grad is None and torch.equal(shared.weight, before)
    built = tb.build_block(MEMORY, dim=DIM)
    tb.swap(model, "layers.0", lambda dim: tb.build_block(MEMORY, dim=dim), "after")
    tb.swap(model, "layers.1", built, "after")
    assert isinstance(model.layers[1].titans_2.block, type(built))


def test_several_swaps_on_one_module(plain, tokens):
    model, t = plain(), tokens()
    expected, before = model(t), tree(model)
    first = tb.swap(model, "layers.*", MEMORY, "beside")
    second = tb.swap(model, ["layers.0", "layers.1"], "ffn", "replace")
    third = tb.swap(model, "layers.0", MEMORY, "after", gate=1.0)
    assert swaps(model) == [first, second, third]
    with pytest.raises(SwapError, match=r"there is a later swap at layers\.0: undo it before the one at layers\.0"):
        tb.unswap(model, first)
    tb.unswap(model, third)
    tb.unswap(model, second)
    assert torch.equal(model(t), expected)
    tb.unswap(model)
    assert tree(model) == before
    with pytest.raises(SwapError, match="no swaps"):
        tb.unswap(model)
    with pytest.raises(SwapError, match="not one of the swaps"):
        tb.unswap(_swapped(model), first)


def _swapped(model):
    tb.swap(model, "head", MEMORY, "before")
    return model


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
@pytest.mark.parametrize("how", ["beside", "replace"])
def test_frozen_parameters_stay_frozen_until_the_last_swap_is_undone(plain, how, order):
    model = plain()
    before = tree(model)
    plans = [
        tb.swap(model, "layers.0", MEMORY, "beside", train="memory"),
        tb.swap(model, "layers.1", MEMORY, how, train="memory"),
    ]
    tb.unswap(model, plans[order[0]])
    training = {
        name.split(".titans.")[0].split(".block.")[0] for name, p in model.named_parameters() if p.requires_grad
    }
    assert training == {f"layers.{order[1]}"}
    tb.unswap(model, plans[order[1]])
    assert tree(model) == before


def test_a_function_draws_from_the_seed(plain):
    def held(**more):
        model = plain()
        state = torch.get_rng_state()
        plan = tb.swap(model, "layers.*", lambda dim: nn.Linear(dim, dim), "beside", **more)
        assert torch.equal(torch.get_rng_state(), state)
        return (
            [] if more.get("dry_run") else [model.get_submodule(path).titans.block.module.weight for path in plan.paths]
        )

    first, again, other = held(), held(), held(seed=7)
    assert all(map(torch.equal, first, again)) and not torch.equal(first[0], first[1])
    assert not torch.equal(first[0], other[0])
    held(dry_run=True), held(dry_run=True, seed=None)


def test_unswap_refuses_a_module_that_was_wrapped(plain):
    model = plain()
    tb.swap(model, "layers.*", MEMORY, "replace")
    model.layers[1] = nn.Sequential(model.layers[1])
    before = tree(model)
    with pytest.raises(SwapError, match=r"layers\.1: at layers\.1 there is a Sequential now"):
        tb.unswap(model)
    assert tree(model) == before


@pytest.mark.parametrize("copying", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize("how", ["beside", "replace"])
def test_copies_are_independent(plain, randomised, tokens, copying, how):
    model, t = plain(), tokens()
    original = model(t)
    tb.swap(model, "layers.*", MEMORY, how, train="memory")
    expected = randomised(model)(t)
    twin = copying(model)
    assert torch.equal(twin(t), expected)
    with tb.memory(model) as m:
        twin(t)  # not the model that is carried
        assert m.state is None
    tb.unswap(twin)
    assert torch.equal(twin(t), original) and all(p.requires_grad for p in twin.parameters())
    assert torch.equal(model(t), expected)


def test_a_replaced_module_follows_the_model(plain):
    model = plain()
    held = model.layers[0]
    tb.swap(model, "layers.0", MEMORY, "replace")
    model.double().eval()
    assert not held.training
    held.layer_idx = 7  # which callers look at
    assert model.layers[0].layer_idx == 7 and model.layers[0].original is held
    with pytest.raises(AttributeError, match="no attribute 'layer_index'"):
        model.layers[0].layer_index  # noqa: B018
    tb.unswap(model)
    assert model.layers[0] is held and held[0].weight.dtype == torch.float64
    tb.swap(model, "layers.0", nn.Identity(), "replace", dim=DIM)  # without parameters that are moved
    model.float()
    tb.unswap(model)
    assert held[0].weight.dtype == torch.float32


@pytest.mark.parametrize(
    "change, said",
    [
        ({"how": "besides"}, "how: expected replace, beside, before or after, got 'besides'; did you mean 'beside'"),
        ({"train": "memori"}, "train: expected all or memory, got 'memori'; did you mean 'memory'"),
        ({"every": 0}, "every: expected an integer >= 1, got 0"),
        ({"start": -1}, "start: expected an integer >= 0, got -1"),
        ({"start": 9}, "3 modules match, and start=9 is past the last"),
        ({"gate": "open"}, "gate: expected a number, got 'open'"),
        ({"block": {"type": "memori"}}, "layers.1: type: unknown block 'memori'; did you mean 'memory'"),
        ({"block": {"type": "memory", "heads": 3}}, "layers.0: heads: 3 heads do not divide the width 16"),
        ({"block": 3}, "block: expected a description"),
        ({"block": lambda dim: dim}, "the function returned 16 for the width 16: expected a module"),
        ({"block": tb.build_block(MEMORY, dim=8)}, "NeuralMemory is of dim 8, expected 16"),
        ({"adapter": "hf_atention"}, "unknown 'hf_atention'; did you mean 'hf_attention'"),
        ({"adapter": {"argumnt": "x"}}, "unknown field 'argumnt'; did you mean 'argument'"),
        ({"adapter": {"argument": "inputs"}}, "has no argument 'inputs'; did you mean 'input'"),
        ({"where": "layers"}, "layers: ModuleList has no forward"),
        ({"where": "embedding"}, "the width of the input of Embedding is unknown: give it, dim="),
        ({"where": "layers.*.0", "how": "replace"}, "does not return the width 16"),
        ({"dim": 0}, "dim: expected an integer >= 1, got 0"),
        ({"dim": {"layers.9": 16}}, "dim: 'layers.9' is no module of this swap; did you mean 'layers.2'"),
        ({"where": 3}, "where: expected a pattern such as 'layers.*.self_attn', or a list of them, got 3"),
        ({"seed": "1"}, "seed: expected an integer, or None for torch's own generator, got '1'"),
        ({"gate": float("nan")}, "gate: expected a number, got nan"),
        ({"adapter": {"returns": "two"}}, "adapter: returns: expected NonNegativeInt | None, got 'two'"),
        ({"adapter": {"along": "key"}}, "adapter: along: expected tuple[str, ...], got 'key'"),
    ],
)
def test_wrong_arguments_leave_the_model_unchanged(plain, change, said):
    model = plain()
    before = tree(model)
    with pytest.raises(SwapError) as raised:
        tb.swap(model, **{"where": "layers.*", "block": MEMORY, "how": "beside", **change})
    assert said in str(raised.value)
    assert tree(model) == before


def test_a_swap_that_fails_half_way_is_undone(plain, monkeypatch):
    model = plain()
    before = tree(model)

    def refuse(name, module):
        raise RuntimeError("no more modules")

    monkeypatch.setattr(model.layers[2], "add_module", refuse)
    with pytest.raises(RuntimeError, match="no more"):
        tb.swap(model, "layers.*", MEMORY, "beside", train="memory")
    monkeypatch.undo()
    assert tree(model) == before


def test_models_that_cannot_be_swapped_into(plain):
    with pytest.raises(TypeError, match="expected a module, got int"):
        tb.swap(3, "layers.*", MEMORY)
    with pytest.raises(SwapError, match="swap first, then compile"):
        tb.swap(torch.compile(plain()), "layers.*", MEMORY)
    with pytest.raises(SwapError, match="is changed in its recipe"):
        tb.swap(tb.build("lmm", device="meta"), "layers.*", MEMORY)
    with pytest.raises(SwapError, match=r"also needs input2, which a block in its place does not read"):
        tb.swap(nn.ModuleDict({"both": nn.Bilinear(DIM, DIM, DIM)}), "both", MEMORY)
    holder = nn.ModuleDict({"block": tb.build_block("ffn", dim=DIM)})
    with pytest.raises(SwapError, match="blocks nest in a recipe"):
        tb.swap(holder, "block", MEMORY)


def test_a_call_that_does_not_fit_is_refused(plain, tokens):
    model = plain()
    with pytest.raises(SwapError, match=r"layers\.1: Sequential does not return the width 32"):
        tb.swap(model, "layers.1", MEMORY, "beside", dim=2 * DIM)
    tb.swap(model, "layers.1", MEMORY, "before", dim=2 * DIM)
    with pytest.raises(SwapError, match=r"layers\.1: reads \[2, 9, 16\], and the block in it is of dim 32"):
        model(tokens())
    tb.unswap(model)
    tb.swap(model, "layers.1", MEMORY, "beside")
    with pytest.raises(SwapError, match=r"layers\.1: input: expected \[batch, time, dim\], got \[2, 16\]"):
        model.layers[1](torch.randn(2, DIM))
    tb.swap(model, "layers.2", MEMORY, "before")
    with pytest.raises(SwapError, match=r"layers\.2: called without 'input'"):
        model.layers[2]()
    tb.swap(model, "layers.0", lambda dim: nn.Linear(dim, 3), "beside")
    with pytest.raises(SwapError, match=r"layers\.0: the block made \[2, 9, 3\] of \[2, 9, 16\]"):
        model(tokens())


class Widens(nn.Module):
    """Reads another width than it returns, as the second layer of BERT's feed-forward network does."""

    def __init__(self):
        super().__init__()
        self.dense, self.norm = nn.Linear(24, DIM), nn.LayerNorm(DIM)

    def forward(self, hidden_states, residual):
        return self.norm(self.dense(hidden_states) + residual)


def test_widths_that_do_not_fit_are_refused_by_the_swap():
    model = nn.ModuleDict({"output": Widens(), "mlp": nn.Sequential(nn.Linear(DIM, 24), nn.GELU(), nn.Linear(24, 8))})
    for how in ("replace", "beside"):
        with pytest.raises(SwapError, match=r"mlp: Sequential does not return the width 16"):
            tb.swap(model, "mlp", MEMORY, how)
    with pytest.raises(SwapError, match=r"output: Widens does not return the width 24"):
        tb.swap(model, "output", MEMORY, "beside")
    before = model["output"](torch.ones(1, 3, 24), torch.ones(1, 3, DIM))
    plan = tb.swap(model, "output", MEMORY, "after")
    assert plan.rows[0].dim == DIM
    tb.swap(model, "output", MEMORY, "before")
    assert torch.equal(model["output"](torch.ones(1, 3, 24), torch.ones(1, 3, DIM)), before)


@pytest.mark.parametrize("inner", [False, True])
def test_a_swap_into_a_compiled_model(plain, tokens, inner):
    model, t = plain(2), tokens()
    (model.layers[0] if inner else model).compile(backend="eager")
    before = model(t)
    tb.swap(model, "layers.*", MEMORY, "beside", gate=0.5)
    expected = plain(2)
    tb.swap(expected, "layers.*", MEMORY, "beside", gate=0.5)
    assert_close(model(t), expected(t))
    tb.unswap(model)
    assert_close(model(t), before)


@pytest.mark.parametrize("how", ["beside", "replace"])
def test_compiled_models(plain, randomised, tokens, how):
    model, t = plain(2), tokens()
    tb.swap(model, "layers.*", MEMORY, how)
    expected = randomised(model)(t)
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        assert_close(compiled(t), expected)
        with tb.memory(compiled):
            assert_close(torch.cat([compiled(t[:, :4]), compiled(t[:, 4:])], dim=1), expected)
    compiled(t).sum().backward()
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="without fullgraph=True"):
        torch.compile(model, backend="eager", fullgraph=True)(t)
