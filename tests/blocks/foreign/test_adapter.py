"""``adapt``: adapted modules obey the laws and are described like other blocks, and wrong ones raise clear errors."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import titans_build as tb
from titans_build.blocks.foreign import AdaptedState
from titans_build.blocks.foreign.adapter import run_grouped, run_grouped_by_length
from titans_build.blocks.state import named_tensors
from titans_build.registry import Unavailable

RECIPE = {"version": 1, "dim": 8, "vocab": 16, "layers": {"one": [{"type": "lstm", "layers": 2}]}, "stack": ["one"]}


pytestmark = pytest.mark.usefixtures("own_registry")


@pytest.mark.parametrize("spec", [{"type": "lstm", "layers": 2}, {"type": "stepping"}, {"type": "pointwise"}])
def test_adapted_modules_obey_the_laws(spec: dict[str, Any], request: pytest.FixtureRequest) -> None:
    request.getfixturevalue(spec["type"])
    tb.check_block(spec, dim=8, endurance=300, length=11)


@pytest.mark.usefixtures("lstm")
def test_the_signature_of_the_function_is_the_schema() -> None:
    found = tb.describe("lstm")
    assert found.summary == "A long short-term memory."
    (field,) = found.fields
    assert (field.name, field.type, field.default) == ("layers", "integer from 1 to 8", 1)
    assert field.description == "layers of the LSTM"
    assert Path(found.place.rpartition(":")[0]).name == "conftest.py"
    with pytest.raises(tb.RecipeError, match="layer: unknown field of lstm; did you mean 'layers'"):
        tb.build_block({"type": "lstm", "layer": 2}, dim=8)
    with pytest.raises(tb.RecipeError, match="layers: expected integer from 1 to 8, got 9"):
        tb.build_block({"type": "lstm", "layers": 9}, dim=8)


def test_parameters_and_buffers_are_those_of_the_created_module(stepping: Any) -> None:
    block = tb.build_block("stepping", dim=5, seed=3)
    torch.manual_seed(3)
    made = stepping.declaration.make(5)
    own = {**dict(block.inner.named_parameters()), **dict(block.inner.named_buffers())}
    expected = {**dict(made.named_parameters()), **dict(made.named_buffers())}
    assert own.keys() == expected.keys() and "scale" in own
    assert all(torch.equal(own[name], expected[name]) for name in own)


def test_an_uninitialized_parameter_is_an_error() -> None:
    @tb.adapt("careless")
    def careless(dim: int) -> nn.Module:
        made = nn.Linear(dim, dim)
        made.scale = nn.Parameter(torch.empty(dim))
        return made

    with pytest.raises(RuntimeError, match=r"inner\.scale \[3\] was left uninitialized"):
        tb.build_block("careless", dim=3)
    assert not torch.are_deterministic_algorithms_enabled()


class Running(nn.Module):
    """A running sum, whose state is an argument of any name."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(dim))
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor, cache: Tensor | None = None, **kwargs: Any) -> tuple[Tensor, Tensor]:
        total = self.dropout(x * self.scale).cumsum(dim=1)
        total = total if cache is None else total + cache.unsqueeze(1)
        return total, total[:, -1]


@pytest.mark.parametrize("argument", ["cache", "past_key_values"])
def test_a_module_that_loses_its_state_is_refused_when_built(argument: str) -> None:
    """An argument that ``forward`` does not know is among its ``**kwargs``, and nothing reads it."""

    @tb.adapt(
        "running",
        state=lambda module, rows: module.scale.new_zeros(rows, len(module.scale)),
        run=lambda module, x, state: module(x, **{argument: state}),
    )
    def running(dim: int) -> nn.Module:
        return Running(dim)

    if argument == "cache":
        before = torch.get_rng_state()
        block = tb.build_block("running", dim=4, seed=None)
        assert block.inner.training and block.inner.dropout.training and torch.equal(before, torch.get_rng_state())
    else:
        with pytest.raises(Unavailable, match="running: 8 tokens in two calls with its state have other outputs than"):
            tb.build_block("running", dim=4)


@pytest.mark.usefixtures("lstm")
def test_padded_rows_give_the_outputs_of_the_unpadded_module() -> None:
    block = tb.build_block("lstm", dim=4)
    x, mask = torch.randn(2, 6, 4), torch.tensor([[1, 0, 1, 1, 0, 1], [0, 0, 1, 1, 0, 0]]).bool()
    with torch.no_grad():
        y, state = block(x, mask=mask)
        for row in range(2):
            expected, (hidden, _) = block.inner(x[row, mask[row]][None])
            torch.testing.assert_close(y[row, mask[row]], expected[0])
            torch.testing.assert_close(state.carried.hidden[row], hidden[:, 0])
    assert state.position.tolist() == [4, 2]


@pytest.mark.usefixtures("stepping")
def test_started_and_fresh_rows_in_one_batch() -> None:
    block = tb.build_block("stepping", dim=4)
    x = torch.randn(2, 5, 4)
    with torch.no_grad():
        _, begun = block(x[:1, :2])
        both = tb.state.concatenate([begun, block.init_state(1)])
        y, after = block(torch.cat([x[:1, 2:5], x[1:, :3]]), both)
        whole, _ = block(x)
    torch.testing.assert_close(y[0], whole[0, 2:])
    torch.testing.assert_close(y[1], whole[1, :3])
    assert after.position.tolist() == [5, 3]


@pytest.mark.usefixtures("lstm")
def test_models_and_states_are_saved_and_loaded(tmp_path: Path) -> None:
    model = tb.build(RECIPE)
    tokens = torch.randint(16, (2, 7))
    out = model(tokens)
    tb.save(model, tmp_path / "model")
    tb.save_state(out.state, tmp_path / "state", model)
    again = tb.load(tmp_path / "model")
    state = tb.load_state(tmp_path / "state", again)
    same = zip(named_tensors(state), named_tensors(out.state))
    assert all(one[0] == other[0] and torch.equal(one[1], other[1]) for one, other in same)
    torch.testing.assert_close(again(tokens, state).logits, model(tokens, out.state).logits)


def test_a_recipe_imports_the_module_that_registers_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "their_gru.py").write_text(
        "import titans_build as tb\n"
        "from torch import nn\n"
        "@tb.adapt('their_gru', state=lambda gru, rows: gru.weight_ih_l0.new_zeros(rows, gru.hidden_size),\n"
        "          run=lambda gru, x, h: (lambda y, h: (y, h[0]))(*gru(x, h[None].contiguous())))\n"
        "def their_gru(dim: int) -> nn.Module:\n"
        "    return nn.GRU(dim, dim, batch_first=True)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    recipe = {"version": 1, "dim": 8, "imports": ["their_gru"], "layers": {"one": ["their_gru"]}, "stack": ["one"]}
    with pytest.raises(tb.RecipeError, match="imports"):
        tb.load_recipe(recipe)
    assert "their_gru" not in sys.modules
    model = tb.build(tb.load_recipe(recipe, allow_imports=True))
    assert model(embeddings=torch.randn(1, 3, 8)).hidden.shape == (1, 3, 8)


def test_an_unsupported_device_is_an_error_at_building_only() -> None:
    @tb.adapt("picky", refuse=lambda device: f"does not run on {device.type}" if device.type == "cpu" else None)
    def picky(dim: int) -> nn.Module:
        return nn.Linear(dim, dim)

    recipe = {"version": 1, "dim": 8, "layers": {"one": ["picky", ["picky"]]}, "stack": ["one"]}
    assert tb.build(recipe, device="meta").init_state(1) is not None
    with pytest.raises(Unavailable, match=r"^model: 1 problem\n  picky: does not run on cpu$"):
        tb.build(recipe)
    with pytest.raises(Unavailable, match="picky: does not run on cpu"):
        tb.build_block("picky", dim=8)


def test_a_missing_package_is_an_error_at_building() -> None:
    @tb.adapt("lacking")
    def lacking(dim: int) -> nn.Module:
        import no_such_package  # type: ignore[import-not-found]

        return no_such_package.Layer(dim)

    recipe = tb.load_recipe({"version": 1, "dim": 8, "layers": {"one": ["lacking"]}, "stack": ["one"]})
    with pytest.raises(Unavailable, match="lacking: No module named 'no_such_package'"):
        tb.build(recipe)


def of(function: Any, **declared: Any) -> Any:
    """A block that calls ``function(x, state)`` where a module would stand."""
    given = {"state": lambda module, rows: torch.zeros(rows, 4), "run": lambda module, x, h: function(x, h)}

    @tb.adapt("odd", **(given | declared))
    def odd(dim: int) -> nn.Module:
        return nn.Linear(dim, dim)

    return tb.build_block("odd", dim=4)


@pytest.mark.parametrize(
    "function, error, message",
    [
        (lambda x, h: (x[:, :1], h), ValueError, r"odd: .* \[1, 1, 4\] for inputs \[1, 8, 4\]"),
        (lambda x, h: ((x, h), h), ValueError, r"odd: .* tuple for inputs \[1, 8, 4\]"),
        (lambda x, h: (x, h[:, :2]), ValueError, r"odd: .* \[1, 2\], declared as \[1, 4\]"),
        (lambda x, h: (x, [h]), TypeError, "odd: .* differs from the declared one: .* list, Tensor"),
        (lambda x, h: (x, None), TypeError, "odd: .* differs from the declared one"),
    ],
)
def test_outputs_and_states_must_fit_the_declaration(function: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        of(function)


def test_a_state_function_must_return_the_requested_rows() -> None:
    block = of(lambda x, h: (x, h), state=lambda module, rows: torch.zeros(1, 4))
    with pytest.raises(ValueError, match="odd: its state function returned 1 rows: expected 2"):
        block.init_state(2)


@pytest.mark.usefixtures("pointwise")
def test_states_of_other_blocks_are_errors() -> None:
    block = of(lambda x, h: (x, h))
    x, position = torch.randn(2, 3, 4), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(TypeError, match="state is Tensor: expected AdaptedState"):
        block(x, torch.zeros(2, 4))
    with pytest.raises(ValueError, match=r"state has 3 rows .*, the inputs have 2"):
        block(x, block.init_state(3))
    with pytest.raises(ValueError, match=r"odd: .* of another block: carried is \[2, 5\], expected \[2, 4\]"):
        block(x, AdaptedState(torch.zeros(2, 5), position))
    with pytest.raises(ValueError, match=r"odd: .* of another block: carried is absent, expected \[2, 4\]"):
        block(x, AdaptedState((torch.zeros(2, 4),), position))
    with pytest.raises(TypeError, match=r"carried is torch\.float64, expected torch\.float32"):
        block(x, AdaptedState(torch.zeros(2, 4).double(), position))
    with pytest.raises(TypeError, match="pointwise: state is AdaptedState: expected None"):
        tb.build_block("pointwise", dim=4)(x, block.init_state(2))


@pytest.mark.usefixtures("lstm")
def test_invalid_declarations_are_errors() -> None:
    with pytest.raises(ValueError, match="adapt\\('odd'\\): step continues from a state"):
        tb.adapt("odd", step=lambda module, x, h: (x, h))

    @tb.adapt("nothing")
    def nothing(dim: int) -> Any:
        return None

    with pytest.raises(TypeError, match=r"nothing: the function returned NoneType: expected an nn\.Module"):
        tb.build_block("nothing", dim=4)
    with pytest.raises(ValueError, match="'lstm' is taken"):
        tb.adapt("lstm")(nothing.declaration.make)
    with pytest.raises(TypeError, match="first parameter must be dim"):

        @tb.adapt("nameless")
        def nameless(*, width: int) -> nn.Module:
            return nn.Linear(width, width)


@pytest.mark.usefixtures("lstm")
def test_flops_and_bytes() -> None:
    block = tb.build_block("lstm", dim=8, device="meta")
    weights = sum(p.numel() for p in block.parameters() if p.dim() > 1)
    assert block.flops(10) == 10 * (2 * weights + 4 * 2 * 8)
    assert block.state_bytes() == 4 * 2 * 8 + 8


def test_other_libraries_are_not_imported_with_the_package() -> None:
    said = "import sys, titans_build; print([m for m in ('transformers', 'fla', 'mamba_ssm') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", said], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    "state, run, message",
    [
        (lambda module, rows: 3, None, "odd: its state function: a state is a tree of .* not int"),
        (None, lambda module, x, carried: x, r"odd: the module returned Tensor: expected \(outputs, state\)"),
        (None, lambda module, x, carried: (x, carried, 1), "odd: the module returned 3 values: expected"),
    ],
)
def test_wrong_functions_are_errors(state: Any, run: Any, message: str) -> None:
    tb.adapt("odd", state=state or (lambda module, rows: torch.zeros(rows, 4)), run=run)(
        lambda dim: nn.Linear(dim, dim)
    )
    with pytest.raises(TypeError, match=message):
        tb.build_block("odd", dim=4)


def test_a_shared_module_is_an_error() -> None:
    shared = nn.Linear(4, 4)
    tb.adapt("odd")(lambda dim: shared)
    with pytest.raises(ValueError, match="odd: the function returned weight of an earlier call"):
        tb.build_block("odd", dim=4)


def test_arguments_of_adapt_are_checked() -> None:
    with pytest.raises(TypeError, match=r"adapt\('odd'\): state is 3: expected a function"):
        tb.adapt("odd", state=3)
    with pytest.raises(TypeError, match="expected the block's name, as in @adapt"):
        tb.adapt(nn.Linear)  # type: ignore[arg-type]


class Summing:
    """Running sums. Records the shapes of its inputs."""

    def __init__(self) -> None:
        self.shapes: list[tuple[int, int]] = []

    def __call__(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        self.shapes.append((x.shape[0], x.shape[1]))
        y = state.unsqueeze(1) + x.cumsum(dim=1)
        return y, y[:, -1]


def test_rows_of_equal_length_run_together_without_padding() -> None:
    x, state, run = torch.randn(5, 6, 3), torch.randn(5, 3), Summing()
    lengths = [4, 0, 6, 4, 1]
    y, after = run_grouped_by_length(run, x, state, lengths)
    assert sorted(run.shapes) == [(1, 1), (1, 6), (2, 4)]
    for row, length in enumerate(lengths):
        expected = state[row] + x[row, :length].cumsum(dim=0)
        torch.testing.assert_close(y[row, :length], expected)
        assert not y[row, length:].any()
        torch.testing.assert_close(after[row], expected[-1] if length else state[row])


def test_one_length_is_one_call() -> None:
    x, state, run = torch.randn(2, 6, 3), torch.randn(2, 3), Summing()
    y, _ = run_grouped_by_length(run, x, state, [6, 6])
    assert run.shapes == [(2, 6)] and y.shape == x.shape


def test_gradients_of_grouped_rows() -> None:
    x, state = torch.randn(3, 4, 2, requires_grad=True), torch.zeros(3, 2)
    y, _ = run_grouped_by_length(Summing(), x, state, [2, 4, 2])
    y[2].sum().backward()
    assert x.grad is not None
    assert x.grad[2, :2].all() and not x.grad[:2].any() and not x.grad[2, 2:].any()


def test_each_group_receives_its_number() -> None:
    x, state = torch.ones(4, 1, 1), torch.zeros(4, 1)
    y, _ = run_grouped(lambda x, state, group: (x * group, state), x, state, [7, 2, 7, 5])
    assert y.flatten().tolist() == [7, 2, 7, 5]
