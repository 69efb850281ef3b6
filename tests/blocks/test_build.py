"""Building blocks, and initializing parameters of modules on the meta device."""

import pytest
import torch
from torch import nn

from titans_build.blocks.block import Block, as_rows
from titans_build.blocks.build import build_block, materialize
from titans_build.blocks.laws import LawError, check_block
from titans_build.registry import RecipeError, catalogue


def test_a_seed_determines_the_block():
    first, again, other = (build_block("memory", dim=16, seed=seed) for seed in (3, 3, 4))
    for name, parameter in first.named_parameters():
        assert torch.equal(parameter, again.get_parameter(name))
    assert not torch.equal(first.qkv.weight, other.qkv.weight)


def test_the_global_generator_is_used_without_a_seed_only():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    build_block("ffn", dim=16, seed=5)
    assert torch.equal(torch.rand(3), expected)
    torch.manual_seed(0)
    drawn = build_block("ffn", dim=16, seed=None)
    torch.manual_seed(0)
    assert torch.equal(drawn.up.weight, build_block("ffn", dim=16, seed=None).up.weight)
    assert not torch.equal(torch.rand(3), expected)


def test_another_dtype_gives_rounded_parameters():
    wide, narrow = build_block("ffn", dim=16), build_block("ffn", dim=16, dtype=torch.bfloat16)
    assert torch.equal(wide.up.weight.bfloat16(), narrow.up.weight)


def test_lists_are_chains_and_errors_have_paths():
    assert type(build_block(["ffn", "ffn"], dim=16)).__name__ == "Chain"
    with pytest.raises(RecipeError, match=r"dept.*depth"):
        build_block({"type": "memory", "dept": 2}, dim=16)
    with pytest.raises(TypeError, match="already built"):
        build_block(build_block("ffn", dim=16), dim=16)


class Holder(Block):
    """Has its own parameters, a module that is no block, and blocks inside a container."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        self.scale = nn.Parameter(torch.empty(dim))
        self.linear = nn.Sequential(nn.Linear(dim, dim))
        self.blocks = nn.ModuleList([Counted(dim), Counted(dim)])

    def reset_parameters(self):
        super().reset_parameters()
        nn.init.ones_(self.scale)


class Counted(Block):
    resets = 0

    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        self.weight = nn.Parameter(torch.empty(dim))

    def reset_parameters(self):
        type(self).resets += 1
        nn.init.ones_(self.weight)


def test_each_parameter_is_initialized_once_by_its_block():
    Counted.resets = 0
    with torch.device("meta"):
        block = Holder(8)
    materialize(block, "cpu", torch.float32, 0)
    assert Counted.resets == 2
    assert block.linear[0].weight.std() > 0


class OfModules(Block):
    """Modules of torch, of which ``reset_parameters`` sets one weight."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        self.scale = nn.Parameter(torch.empty(dim))
        self.linear = nn.Sequential(nn.Linear(dim, dim), nn.GRU(dim, dim), nn.BatchNorm1d(dim))
        self.out = nn.Linear(dim, dim)

    def reset_parameters(self):
        nn.init.ones_(self.scale)
        nn.init.zeros_(self.out.weight)


def test_modules_of_torch_are_initialized_by_themselves_unless_the_block_does_it():
    with catalogue.scratch():
        catalogue.register("of_modules")(OfModules)
        block, again = build_block("of_modules", dim=8, seed=1), build_block("of_modules", dim=8, seed=1)
    limit = 8**-0.5
    for name in ("linear.0.weight", "linear.0.bias", "linear.1.weight_hh_l0", "out.bias"):
        parameter = block.get_parameter(name)
        assert 0 < parameter.abs().max() <= limit and torch.equal(parameter, again.get_parameter(name))
    assert not block.out.weight.any() and block.linear[2].running_var.eq(1).all()
    assert block.linear[2].num_batches_tracked == 0


@pytest.mark.parametrize(
    "values",
    [torch.ones(8), torch.ones(8, 8, dtype=torch.bool).tril(), torch.arange(8), torch.ones(8, dtype=torch.complex64)],
    ids=lambda values: str(values.dtype),
)
def test_an_uninitialized_parameter_or_buffer_is_an_error(values):
    class Forgets(Holder):
        def __init__(self, dim: int) -> None:
            super().__init__(dim)
            if values.is_floating_point():
                self.table = nn.Parameter(values)
            else:
                self.register_buffer("table", values)

    with catalogue.scratch():
        catalogue.register("forgets")(Forgets)
        with pytest.raises(RuntimeError, match=r"table \[8.*\] was left uninitialized"):
            build_block("forgets", dim=8)
        with pytest.raises(LawError, match="law 'meta': table"):
            check_block("forgets", dim=8)


def test_dtypes_by_name():
    assert next(build_block("ffn", dim=8, dtype="bfloat16").parameters()).dtype == torch.bfloat16


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"dtype": torch.int32}, "expected a dtype for parameters .*, got torch.int32"),
        ({"dtype": "flaot64"}, "unknown dtype 'flaot64'; did you mean 'float64'"),
        ({"device": "gpu"}, "unknown device 'gpu'"),
        ({"device": "cuda:99"}, "device cuda:99: "),
    ],
)
def test_unavailable_devices_are_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        build_block("ffn", dim=8, **arguments)
    with pytest.raises(ValueError, match=message):
        check_block("ffn", dim=8, laws=["split"], **arguments)


def test_expanding_a_state_to_rows_does_not_copy():
    state = as_rows((torch.zeros(1, 4), None), 100)
    assert state[0].shape == (100, 4) and state[0].untyped_storage().nbytes() == 16
