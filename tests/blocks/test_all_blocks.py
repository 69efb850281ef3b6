"""All registered blocks obey all laws, in every setting that changes their function."""

import pytest
import torch

from titans_build.blocks.build import build_block
from titans_build.blocks.foreign import Adapted
from titans_build.blocks.laws import LAWS, check_block
from titans_build.blocks.published_learners import LEARNERS
from titans_build.registry import catalogue, list_blocks, lookup

DIM = 16
MEMORY = {"type": "memory", "heads": 2, "chunk": 4}
ATTENTION = {"type": "attention", "heads": 2}
WINDOW = ATTENTION | {"window": 6}
CONTEXT = {"type": "context", "segment": 6, "persistent": 2, "memory": MEMORY, "attend": ATTENTION}

SPECS = {
    "attention": ATTENTION,
    "attention, window": WINDOW,
    "attention, one key head": WINDOW | {"kv_heads": 1, "qk_norm": False},
    "attention, no positions": WINDOW | {"rope": None},
    "attention, window of one token": ATTENTION | {"window": 1},
    "attention, window longer than the sequence": ATTENTION | {"heads": 4, "window": 70, "kv_heads": 2},
    "attention, one key head and no positions": ATTENTION | {"kv_heads": 1, "rope": None},
    "chain": [MEMORY, WINDOW, "ffn"],
    "context": CONTEXT,
    "context, silu and a window": CONTEXT | {"form": "silu", "attend": ATTENTION | {"window": 5}},
    "context, inputs written": CONTEXT | {"write": "inputs"},
    "context, inputs written, sum and a window": CONTEXT
    | {"write": "inputs", "form": "sum", "attend": ATTENTION | {"window": 5}},
    "context of a residual": CONTEXT | {"attend": {"type": "residual", "of": WINDOW}},
    "ffn": "ffn",
    "ffn, gelu": {"type": "ffn", "kind": "gelu"},
    "gate": {"type": "gate", "branches": [WINDOW, MEMORY]},
    "gate, silu": {"type": "gate", "branches": [WINDOW, MEMORY], "form": "silu"},
    "gate, sum": {"type": "gate", "branches": [WINDOW, MEMORY], "form": "sum"},
    "gate, three branches": {"type": "gate", "branches": [WINDOW, MEMORY, "ffn"]},
    "layer_norm": "layer_norm",
    "memory": MEMORY,
    "memory, deep": MEMORY | {"depth": 4, "chunk": 3, "expansion": 2, "activation": "silu"},
    "memory, relu without norm": MEMORY | {"activation": "relu", "norm": False},
    "memory, linear and online": MEMORY | {"depth": 1, "chunk": 1, "norm": False, "activation": "identity"},
    "memory, no convolution": MEMORY | {"conv": 0},
    "memory, convolution of one token": MEMORY | {"conv": 1},
    "memory, no momentum": MEMORY | {"momentum": False},
    "memory, no forgetting": MEMORY | {"forgetting": False},
    "memory, no momentum and no forgetting": MEMORY
    | {"momentum": False, "forgetting": False, "activation": "identity"},
    "memory, gates per chunk": MEMORY | {"gates": "chunk"},
    "memory, gates per chunk, no momentum and no convolution": MEMORY
    | {"gates": "chunk", "momentum": False, "conv": 0},
    "memory, no clipping": MEMORY | {"clip": None},
    "memory, read before written": MEMORY | {"retrieve": "before"},
    "memory, frozen": MEMORY | {"use": "read"},
    "memory, written only": MEMORY | {"use": "write"},
    "memory, learned momentum": MEMORY | {"learn_momentum": True},
    "memory, hard gates": MEMORY | {"gating": "hard_sigmoid"},
    "memory, hard gates per chunk": MEMORY | {"gating": "hard_sigmoid", "gates": "chunk"},
    "memory, threshold": MEMORY | {"threshold": 6.0},
    "memory, threshold and hard gates": MEMORY | {"threshold": 4.0, "momentum": False, "gating": "hard_sigmoid"},
    "memory, threshold, no clipping, read before written": MEMORY
    | {"threshold": 4.0, "clip": None, "retrieve": "before", "forgetting": False},
    "context, threshold and hard gates": CONTEXT
    | {"memory": MEMORY | {"gating": "hard_sigmoid", "threshold": 3.0, "momentum": False}},
    "persistent": {"type": "persistent", "tokens": 3, "of": {"type": "gate", "branches": [WINDOW, MEMORY]}},
    "persistent chain": {"type": "persistent", "tokens": 3, "of": [MEMORY, WINDOW]},
    "residual": {"type": "residual", "of": [WINDOW, MEMORY]},
    "rms_norm": "rms_norm",
    "self_modifying": {"type": "self_modifying", "heads": 2, "chunk": 4},
}

SPECS |= {
    name: {"type": name, "heads": 2} | ({} if fields.get("chunk") == 1 else {"chunk": 4})
    for name, (_, fields) in LEARNERS.items()
}
SPECS |= {
    "memory, three keys and a window": MEMORY | {"keys": 3, "chunk": 6, "window": 4},
    "memory, resets and projected queries": MEMORY | {"reset": 8, "query": "projected", "retrieve": "anchor"},
    "memory, moves once a chunk, decays by channel": MEMORY
    | {
        "network": "gated_mlp",
        "optimizer": {"type": "muon", "scale": "update"},
        "retention": "channel",
        "read": "anchor",
    },
    "memory, slots and momentum of the momentum": MEMORY
    | {"network": "slots", "optimizer": {"type": "momentum", "order": 2}, "norm": False},
    "memory, factorised, gates that are constant": MEMORY | {"network": "factorised", "gates": "constant"},
}


def type_of(spec):
    return "chain" if isinstance(spec, list) else spec if isinstance(spec, str) else spec["type"]


def test_all_built_in_blocks_are_tested():
    built_in = {name for name in list_blocks() if lookup(name).source == catalogue.__name__.partition(".")[0]}
    elsewhere = {name for name in built_in if issubclass(lookup(name).cls, Adapted)}  # tested in foreign/
    assert {type_of(spec) for spec in SPECS.values()} == built_in - elsewhere


# every part of these is in another
COMBINED = {
    "attention, one key head and no positions", "context, inputs written",
    "memory, gates per chunk, no momentum and no convolution", "memory, no momentum and no forgetting",
    "context, silu and a window", "context, threshold and hard gates", "memory, hard gates per chunk",
    "memory, threshold and hard gates", "memory, threshold, no clipping, read before written",
    "persistent chain", "titans_channel", "memora", "yaad", "dla", "memory, three keys and a window",
    "memory, slots and momentum of the momentum", "memory, factorised, gates that are constant",
}  # fmt: skip


# whatever the rule, a memory calls the same linear layers in the same places
SAME_LAYERS = LEARNERS.keys() - {"atlas", "lact"}


def specs(slow):
    return [pytest.param(SPECS[name], id=name, marks=pytest.mark.slow if name in slow else ()) for name in SPECS]


@pytest.mark.parametrize("spec", specs(COMBINED))
def test_laws(spec):
    check_block(spec, dim=DIM, endurance=1000, laws=[law for law in LAWS if law != "hooked"])


@pytest.mark.parametrize("spec", specs(COMBINED | SAME_LAYERS))
def test_the_law_of_modified_layers(spec):
    # the law runs the block once for each layer and path; these tokens cross segments and chunks as well
    check_block(spec, dim=DIM, laws=["hooked"], length=13)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", sorted({type_of(spec) for spec in SPECS.values()} - {"chain", "gate", "persistent", *LEARNERS})
)
def test_laws_with_defaults(name):
    check_block(name)


@pytest.mark.parametrize(
    "change, error, message",
    [
        (dict(x=[1]), TypeError, "x: expected a tensor, got list"),
        (dict(x=torch.zeros(2, 3, 16, device="meta")), ValueError, "x is on meta: expected cpu"),
        (dict(mask=[True]), TypeError, "mask: expected a tensor, got list"),
        (dict(mask=torch.ones(2, 3)), TypeError, "mask is torch.float32: expected torch.bool"),
        (dict(mask=torch.ones(2, 3, dtype=torch.bool, device="meta")), ValueError, "mask is on meta: expected cpu"),
    ],
)
@pytest.mark.parametrize("name", ["memory", "attention", "rms_norm"])
def test_invalid_inputs_are_errors(name, change, error, message):
    block = build_block(name, dim=16)
    given = dict(x=torch.randn(2, 3, 16)) | change
    with pytest.raises(error, match=f": {message}"):
        block(given.pop("x"), **given)
