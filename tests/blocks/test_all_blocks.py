"""Every built-in block, in every kind of setting that changes its function, obeys every law."""

import pytest
import torch

from titans_build.blocks.build import build_block
from titans_build.blocks.foreign import Adapted
from titans_build.blocks.laws import check_block
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
    "chain": [MEMORY, WINDOW, "ffn"],
    "context": CONTEXT,
    "context, inputs written": CONTEXT | {"write": "inputs"},
    "ffn": "ffn",
    "ffn, gelu": {"type": "ffn", "kind": "gelu"},
    "gate": {"type": "gate", "branches": [WINDOW, MEMORY]},
    "layer_norm": "layer_norm",
    "memory": MEMORY,
    "memory, deep": MEMORY | {"depth": 4, "chunk": 3, "expansion": 2},
    "memory, linear and online": MEMORY | {"depth": 1, "chunk": 1, "norm": False, "activation": "identity"},
    "memory, no convolution": MEMORY | {"conv": 0},
    "memory, no momentum": MEMORY | {"momentum": False},
    "memory, nothing forgotten": MEMORY | {"forgetting": False},
    "memory, gates per chunk": MEMORY | {"gates": "chunk"},
    "memory, no bound on surprise": MEMORY | {"clip": None},
    "memory, read before written": MEMORY | {"retrieve": "before"},
    "memory, frozen": MEMORY | {"use": "read"},
    "memory, written only": MEMORY | {"use": "write"},
    "memory, learned momentum": MEMORY | {"learn_momentum": True},
    "memory, hard gates": MEMORY | {"gating": "hard_sigmoid"},
    "memory, surprising tokens alone": MEMORY | {"threshold": 6.0},
    "context, hard gates, surprising tokens alone": CONTEXT
    | {"memory": MEMORY | {"gating": "hard_sigmoid", "threshold": 3.0, "momentum": False}},
    "persistent": {"type": "persistent", "tokens": 3, "of": {"type": "gate", "branches": [WINDOW, MEMORY]}},
    "residual": {"type": "residual", "of": [WINDOW, MEMORY]},
    "rms_norm": "rms_norm",
}


def type_of(spec):
    return "chain" if isinstance(spec, list) else spec if isinstance(spec, str) else spec["type"]


def test_no_built_in_block_is_missing_here():
    built_in = {name for name in list_blocks() if lookup(name).source == catalogue.__name__.partition(".")[0]}
    elsewhere = {name for name in built_in if issubclass(lookup(name).cls, Adapted)}  # in tests of their own
    assert {type_of(spec) for spec in SPECS.values()} == built_in - elsewhere


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_it_obeys_every_law(spec):
    check_block(spec, dim=DIM, endurance=1000)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted({type_of(spec) for spec in SPECS.values()} - {"chain", "gate", "persistent"}))
def test_with_its_defaults_it_obeys_every_law(name):
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
def test_inputs_that_do_not_fit_are_refused_in_words(name, change, error, message):
    block = build_block(name, dim=16)
    given = dict(x=torch.randn(2, 3, 16)) | change
    with pytest.raises(error, match=f": {message}"):
        block(given.pop("x"), **given)
