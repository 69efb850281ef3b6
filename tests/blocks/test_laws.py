"""``check_block``: correct blocks pass all laws, and for each law a block that violates only this one is found."""

import copy
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from titans_build.blocks.block import Block
from titans_build.blocks.build import materialize
from titans_build.blocks.decode import decode_plan
from titans_build.blocks.language_model import LanguageModel
from titans_build.blocks.laws import LAWS, LawError, check_block
from titans_build.blocks.layers import RMSNorm
from titans_build.registry import catalogue

QUICK = {"dim": 8, "endurance": 1000}


def test_a_correct_block_passes(leaky):
    differences = check_block("leaky", **QUICK)
    assert list(differences) == list(LAWS)
    assert all(difference < 1e-9 for difference in differences.values())


def test_a_stateless_block_passes(leaky):
    class Double(Block):
        def forward(self, x, state=None, *, mask=None):
            return (2 * x if mask is None else (2 * x).masked_fill(~mask.unsqueeze(-1), 0.0)), None

    catalogue.register("double")(Double)
    check_block("double", **QUICK)


def test_built_blocks_and_models_are_copied(leaky):
    block = leaky(8)
    materialize(block, "cpu", torch.float32, 3)
    before = copy.deepcopy(block.state_dict())
    check_block(block, laws=["split", "gradient", "meta", "dtype"])
    assert all(torch.equal(before[name], tensor) for name, tensor in block.state_dict().items())
    assert block.weight.dtype == torch.float32

    model = LanguageModel(8, vocab=11, layers=[["leaky"], ["leaky", "leaky"]])
    materialize(model, "cpu", torch.float32, 0)
    check_block(model, endurance=300)


def test_selected_laws(leaky):
    assert list(check_block("leaky", dim=8, laws=["step", "causal"])) == ["causal", "step"]
    with pytest.raises(ValueError, match=r"unknown law 'causality'.*purity"):
        check_block("leaky", dim=8, laws=["causality"])


def break_laws(Leaky):
    """``Leaky`` with one fault each. Created per test, because ``Leaky`` is the class of a fixture."""
    faults = []

    def breaks(law):
        return lambda cls: faults.append((law, cls)) or cls

    @breaks("purity")
    class UpdatesItsStateInPlace(Leaky):
        def forward(self, x, state=None, *, mask=None):
            if state is not None and x.shape[1] == 1 and mask is None and not torch.is_grad_enabled():
                state.level.copy_(self.update(state.level, x[:, 0]))
                return self.output(state.level, x[:, 0]).unsqueeze(1), state._replace(position=state.position + 1)
            return super().forward(x, state, mask=mask)

    @breaks("purity")
    class ScalesItsInput(Leaky):
        def forward(self, x, state=None, *, mask=None):
            if not x.requires_grad:
                x *= 0.5
            return super().forward(x, state, mask=mask)

    @breaks("determinism")
    class AddsNoise(Leaky):
        def output(self, level, x):
            return super().output(level, x) + 1e-13 * torch.rand_like(x)

    @breaks("meta")
    class HasATensorThatIsNoParameter(Leaky):
        def __init__(self, dim: int) -> None:
            super().__init__(dim)
            self.scale = torch.linspace(0, 1, dim).double()

        def output(self, level, x):
            return super().output(level, x) * self.scale.to(x.dtype)

    @breaks("meta")
    class ForgetsToInitialize(Leaky):
        def reset_parameters(self):
            torch.nn.init.ones_(self.start)
            torch.nn.init.ones_(self.decay)

    @breaks("meta")
    class InitializesFromOldValues(Leaky):
        def __init__(self, dim: int) -> None:
            super().__init__(dim)
            self.scale = torch.rand(())

        def reset_parameters(self):
            super().reset_parameters()
            self.weight.mul_(float(self.scale) if not self.scale.is_meta else 1.0)

    @breaks("causal")
    class LooksAhead(Leaky):
        def forward(self, x, state=None, *, mask=None):
            y, state = super().forward(x, state, mask=mask)
            ahead = torch.cat([y[:, 1:], torch.zeros_like(y[:, :1])], dim=1)
            return y + (0.01 * ahead if mask is None else 0), state

    @breaks("split")
    class LosesThePreviousToken(Leaky):
        def forward(self, x, state=None, *, mask=None):
            y, state = super().forward(x, state, mask=mask)
            before = torch.cat([torch.zeros_like(y[:, :1]), y[:, :-1]], dim=1)
            return y + (0.01 * before if mask is None else 0), state

    @breaks("step")
    class HasAWrongDecoder(Leaky):
        def forward(self, x, state=None, *, mask=None):
            return super().forward(x, state, mask=mask)

    @decode_plan(HasAWrongDecoder)
    def _(block, rows, time, step):
        def decode(x, state):
            y, state = block(x, state)
            return 1.001 * y, state

        return decode

    @breaks("step")
    class HasAWrongPathForOneToken(Leaky):
        def forward(self, x, state=None, *, mask=None):
            y, after = super().forward(x, state, mask=mask)
            return (y * 1.001 if x.shape[1] == 1 else y), after

    @breaks("documents")
    class IgnoresDocuments(Leaky):
        def forward(self, x, state=None, *, mask=None, documents=None):
            return super().forward(x, state, mask=mask)

    @breaks("row")
    class MixesRows(Leaky):
        def forward(self, x, state=None, *, mask=None):
            y, state = super().forward(x, state, mask=mask)
            return y + (0.01 * y.mean(dim=0, keepdim=True) if mask is None else 0), state

    @breaks("row")
    class UsesThePositionOfTheFirstRow(Leaky):
        period = 4

        def forward(self, x, state=None, *, mask=None):
            state = self.init_state(x.shape[0]) if state is None else state
            y, after = super().forward(x, state, mask=mask)
            real = torch.ones(x.shape[:2], dtype=torch.bool) if mask is None else mask
            start = state.position[:1] if mask is None else state.position
            phase = (start[:, None] + real.cumsum(dim=1)) % 4 * real
            return y + 0.01 * phase.unsqueeze(-1) * x, after

    @breaks("rows")
    class SharesATensorBetweenRows(Leaky):
        def init_state(self, batch_size):
            return super().init_state(batch_size)._replace(position=torch.zeros(1, dtype=torch.int64))

        def forward(self, x, state=None, *, mask=None):
            state = self.init_state(x.shape[0]) if state is None else state
            y, after = super().forward(x, state, mask=mask)
            return y, after._replace(position=state.position + x.shape[1])

    @breaks("mask")
    class WritesMaskedTokens(Leaky):
        def forward(self, x, state=None, *, mask=None):
            y, state = super().forward(x, state)
            return (y if mask is None else y.masked_fill(~mask.unsqueeze(-1), 0.0)), state

    @breaks("mask")
    class HasOutputsAtMaskedTokens(Leaky):
        def forward(self, x, state=None, *, mask=None):
            y, state = super().forward(x, state, mask=mask)
            return y if mask is None else y + 1e-3 * (~mask).unsqueeze(-1), state

    class HasALayer(Leaky):
        def __init__(self, dim: int) -> None:
            super().__init__(dim)
            self.layer = torch.nn.Linear(dim, dim)

        def reset_parameters(self):
            super().reset_parameters()
            self.layer.reset_parameters()

    @breaks("hooked")
    class ReadsTheWeightsOfALayer(HasALayer):
        def output(self, level, x):
            return super().output(level, torch.nn.functional.linear(x, self.layer.weight, self.layer.bias))

    @breaks("hooked")
    class ReadsTheWeightsForOneToken(HasALayer):
        def forward(self, x, state=None, *, mask=None):
            y, state = super().forward(x, state, mask=mask)
            one, layer = x.shape[1] == 1 and mask is None, self.layer
            z = torch.nn.functional.linear(y, layer.weight, layer.bias) if one else layer(y)
            return (z if mask is None else z.masked_fill(~mask.unsqueeze(-1), 0.0)), state

    @breaks("hooked")
    class DoesNotCallABlockInside(Leaky):
        def __init__(self, dim: int) -> None:
            super().__init__(dim)
            self.inside = RMSNorm(dim)

        def output(self, level, x):
            return super().output(level, self.inside.forward(x)[0])

    @breaks("gradient")
    class DetachesItsState(Leaky):
        def forward(self, x, state=None, *, mask=None):
            return super().forward(x, None if state is None else state._replace(level=state.level.detach()), mask=mask)

    @breaks("gradient")
    class HasAWrongBackward(Leaky):
        def output(self, level, x):
            y = super().output(level, x)
            return y.detach() + 1.001 * (y - y.detach())

    @breaks("rewind")
    class DetachesItsStateUnderAMask(Leaky):
        def forward(self, x, state=None, *, mask=None):
            y, after = super().forward(x, state, mask=mask)
            return y, after if mask is None else after._replace(level=after.level.detach())

    @breaks("save")
    class HasAStateThatNoFileSupports(Leaky):
        def init_state(self, batch_size):
            level, position = super().init_state(batch_size)
            return ComplexState(level, torch.zeros_like(level, dtype=torch.complex128), position)

        def forward(self, x, state=None, *, mask=None):
            level, phase, position = self.init_state(x.shape[0]) if state is None else state
            y, (level, position) = super().forward(x, type(super().init_state(1))(level, position), mask=mask)
            return y, ComplexState(level, phase, position)

    @breaks("dtype")
    class NarrowsItsState(Leaky):
        def forward(self, x, state=None, *, mask=None):
            y, state = super().forward(x, state, mask=mask)
            return y, state._replace(level=state.level.to(x.dtype))

    @breaks("position")
    class DriftsWithPosition(Leaky):
        def forward(self, x, state=None, *, mask=None):
            state = self.init_state(x.shape[0]) if state is None else state
            y, after = super().forward(x, state, mask=mask)
            real = torch.ones(x.shape[:2], dtype=torch.bool) if mask is None else mask
            at = (state.position[:, None] + real.cumsum(dim=1)) * real
            return y + 1e-6 * at.unsqueeze(-1).to(x.dtype), after

    @breaks("endurance")
    class Explodes(Leaky):
        def update(self, level, x):
            return 1.2 * level + 0 * self.decay + (x @ self.weight.T).to(level.dtype)

    return faults


class ComplexState(NamedTuple):
    level: Tensor
    phase: Tensor
    position: Tensor


@pytest.mark.parametrize("law", LAWS)
def test_a_violation_is_found_under_its_law(leaky, law):
    faults = [cls for broken, cls in break_laws(leaky) if broken == law]
    assert faults
    for cls in faults:
        with catalogue.scratch():
            catalogue.register("broken")(cls)
            with pytest.raises(LawError, match=f"law '{law}': ") as caught:
                check_block("broken", **QUICK)
        assert caught.value.law == law, cls


def test_a_growing_state_must_be_declared(leaky):
    class KeepsAllInputs(Block):
        def init_state(self, batch_size):
            return (torch.zeros(batch_size, 0, self.dim),)

        def forward(self, x, state=None, *, mask=None):
            seen = torch.cat([self.init_state(x.shape[0])[0] if state is None else state[0], x], dim=1)
            return x, (seen,)

    catalogue.register("keeps_all")(KeepsAllInputs)
    with pytest.raises(LawError, match="grows"):
        check_block("keeps_all", laws=["endurance"], **QUICK)
    KeepsAllInputs.grows = True
    check_block("keeps_all", laws=["endurance"], **QUICK)


@pytest.mark.parametrize("length", [0, 3, 9.0, True])
def test_an_invalid_length_is_an_error(length):
    with pytest.raises(ValueError, match="length: expected an integer >= 4"):
        check_block("ffn", dim=8, length=length)


@pytest.mark.parametrize("length", [4, 5, 6])
def test_short_sequences(leaky, length):
    check_block("leaky", dim=8, length=length, endurance=50)


def test_a_single_law():
    assert list(check_block("ffn", dim=8, laws="split")) == ["split"]


def test_outputs_of_another_shape_are_an_error(leaky):
    class DropsAFeature(leaky):
        def forward(self, x, state=None, *, mask=None):
            y, state = super().forward(x, state, mask=mask)
            return y[..., :-1], state

    catalogue.register("narrow")(DropsAFeature)
    with pytest.raises(LawError, match=r"law 'shape': inputs \[2, 3, 8\] gave outputs \[2, 3, 7\]"):
        check_block("narrow", **QUICK)


class CountingState(NamedTuple):
    level: Tensor
    seen: Tensor


def test_a_counter_of_tokens_must_be_named_position(leaky):
    class CountsUnderAnotherName(leaky):
        """Outputs depend on a position that the law does not move."""

        def init_state(self, batch_size):
            return CountingState(*super().init_state(batch_size))

        def forward(self, x, state=None, *, mask=None):
            level, seen = self.init_state(x.shape[0]) if state is None else state
            y, (level, after) = super().forward(x, type(leaky.init_state(self, 1))(level, seen), mask=mask)
            real = torch.ones(x.shape[:2], dtype=torch.bool) if mask is None else mask
            at = (seen[:, None] + real.cumsum(dim=1)) * real
            return y + 1e-6 * at.unsqueeze(-1).to(x.dtype), CountingState(level, after)

    catalogue.register("counts")(CountsUnderAnotherName)
    with pytest.raises(LawError, match=r"law 'position': state seen \[2\] counts tokens .*'position' \(int64\)"):
        check_block("counts", **QUICK)


@pytest.mark.parametrize("window", [5, None])
def test_a_number_of_used_slots_is_no_counter_of_tokens(window):
    check_block({"type": "attention", "heads": 2, "window": window}, laws=["position"], **QUICK)


def test_errors_contain_shapes_and_the_largest_difference(leaky):
    faults = dict(break_laws(leaky))
    catalogue.register("broken")(faults["mask"])
    with pytest.raises(LawError, match=r"law 'mask': .*masked tokens, \[.*\]: largest difference 0.001") as caught:
        check_block("broken", **QUICK)
    assert caught.value.difference == pytest.approx(1e-3)


def test_exceptions_of_the_block_are_reported_under_the_law(leaky):
    class Refuses(leaky):
        def forward(self, x, state=None, *, mask=None):
            if mask is not None:
                raise RuntimeError("no masks here")
            return super().forward(x, state)

    catalogue.register("refuses")(Refuses)
    with pytest.raises(LawError, match="law 'mask': raised RuntimeError: no masks here"):
        check_block("refuses", dim=8, laws=["mask"])


def test_parameters_that_start_at_zero_are_randomized(leaky):
    class ZeroInitialized(leaky):
        """A parameter that starts at zero multiplies its fault."""

        def __init__(self, dim: int) -> None:
            super().__init__(dim)
            self.late = torch.nn.Parameter(torch.empty(dim))

        def reset_parameters(self):
            super().reset_parameters()
            torch.nn.init.zeros_(self.late)

        def forward(self, x, state=None, *, mask=None):
            y, after = super().forward(x, state, mask=mask)
            return y + self.late * (state is None), after

    catalogue.register("zero")(ZeroInitialized)
    with pytest.raises(LawError, match="law 'split'"):
        check_block("zero", dim=8, laws=["split"])
