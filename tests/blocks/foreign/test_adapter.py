"""Modules from elsewhere as blocks: they obey the laws, are described like any other, and wrong ones are refused."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign_modules import Stepping, register_lstm, register_pointwise, register_stepping
from torch import nn

import titans_build as tb
from titans_build.blocks.foreign import AdaptedState
from titans_build.blocks.state import named_tensors
from titans_build.registry import Unavailable, scratch

RECIPE = {"version": 1, "dim": 8, "vocab": 16, "layers": {"one": [{"type": "lstm", "layers": 2}]}, "stack": ["one"]}


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    with scratch():
        yield


@pytest.mark.parametrize(
    "register, spec",
    [
        (register_lstm, {"type": "lstm", "layers": 2}),
        (register_stepping, "stepping"),
        (register_pointwise, "pointwise"),
    ],
)
def test_it_obeys_every_law(register: Callable[[], type], spec: Any) -> None:
    register()
    tb.check_block(spec, dim=8, endurance=300, length=11)


def test_the_functions_signature_is_the_schema() -> None:
    register_lstm()
    found = tb.describe("lstm")
    assert found.summary == "A long short-term memory."
    (field,) = found.fields
    assert (field.name, field.type, field.default) == ("layers", "integer from 1 to 8", 1)
    assert field.description == "one above the other"
    assert Path(found.place.rpartition(":")[0]).name == "foreign_modules.py"
    with pytest.raises(tb.RecipeError, match="layer: unknown field of lstm; did you mean 'layers'"):
        tb.build_block({"type": "lstm", "layer": 2}, dim=8)
    with pytest.raises(tb.RecipeError, match="layers: expected integer from 1 to 8, got 9"):
        tb.build_block({"type": "lstm", "layers": 9}, dim=8)


def test_parameters_and_buffers_are_as_the_function_makes_them() -> None:
    register_stepping()
    block = tb.build_block("stepping", dim=5, seed=3)
    torch.manual_seed(3)
    made = Stepping(5)
    own = {**dict(block.inner.named_parameters()), **dict(block.inner.named_buffers())}
    expected = {**dict(made.named_parameters()), **dict(made.named_buffers())}
    assert own.keys() == expected.keys() and "scale" in own
    assert all(torch.equal(own[name], expected[name]) for name in own)


def test_a_parameter_that_the_function_leaves_without_values_is_named() -> None:
    @tb.adapt("careless")
    def careless(dim: int) -> nn.Module:
        made = nn.Linear(dim, dim)
        made.scale = nn.Parameter(torch.empty(dim))
        return made

    with pytest.raises(RuntimeError, match=r"inner\.scale \[3\] was left uninitialised"):
        tb.build_block("careless", dim=3)
    assert not torch.are_deterministic_algorithms_enabled()


def test_what_is_left_without_padding_is_what_the_module_makes_of_it() -> None:
    register_lstm()
    block = tb.build_block("lstm", dim=4)
    x, mask = torch.randn(2, 6, 4), torch.tensor([[1, 0, 1, 1, 0, 1], [0, 0, 1, 1, 0, 0]]).bool()
    with torch.no_grad():
        y, state = block(x, mask=mask)
        for row in range(2):
            expected, (hidden, _) = block.inner(x[row, mask[row]][None])
            torch.testing.assert_close(y[row, mask[row]], expected[0])
            torch.testing.assert_close(state.carried.hidden[row], hidden[:, 0])
    assert state.position.tolist() == [4, 2]


def test_rows_that_have_begun_and_rows_that_have_not_stand_side_by_side() -> None:
    register_stepping()
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


def test_a_model_with_it_is_saved_and_loaded(tmp_path: Path) -> None:
    register_lstm()
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


def test_a_recipe_reaches_it_through_imports_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_a_device_that_it_cannot_run_on_is_refused_when_it_is_built_and_not_before() -> None:
    @tb.adapt("picky", refuse=lambda device: f"it shuns {device.type}" if device.type == "cpu" else None)
    def picky(dim: int) -> nn.Module:
        return nn.Linear(dim, dim)

    recipe = {"version": 1, "dim": 8, "layers": {"one": ["picky", ["picky"]]}, "stack": ["one"]}
    assert tb.build(recipe, device="meta").init_state(1) is not None
    with pytest.raises(Unavailable, match=r"^model: 1 problem\n  picky: it shuns cpu$"):
        tb.build(recipe)
    with pytest.raises(Unavailable, match="picky: it shuns cpu"):
        tb.build_block("picky", dim=8)


def test_a_package_that_is_missing_is_named_when_it_is_built() -> None:
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
        (lambda x, h: (x[:, :1], h), ValueError, r"odd: the module made \[2, 1, 4\] of \[2, 3, 4\]"),
        (lambda x, h: ((x, h), h), ValueError, r"odd: the module made tuple of \[2, 3, 4\]"),
        (lambda x, h: (x, h[:, :2]), ValueError, r"odd: the module carries \[2, 2\] where .* declared as \[2, 4\]"),
        (lambda x, h: (x, [h]), TypeError, "odd: what the module carries is not what was declared: .* list, Tensor"),
        (lambda x, h: (x, None), TypeError, "odd: what the module carries is not what was declared"),
    ],
)
def test_what_a_module_makes_has_to_fit(function: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        of(function)(torch.randn(2, 3, 4))


def test_a_state_function_has_to_give_the_rows_it_is_asked_for() -> None:
    block = of(lambda x, h: (x, h), state=lambda module, rows: torch.zeros(1, 4))
    with pytest.raises(ValueError, match="odd: its state function gave 1 rows: expected 2"):
        block.init_state(2)


def test_states_of_others_are_refused() -> None:
    block = of(lambda x, h: (x, h))
    x, position = torch.randn(2, 3, 4), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(TypeError, match="state is Tensor: expected AdaptedState"):
        block(x, torch.zeros(2, 4))
    with pytest.raises(ValueError, match="state has 3 rows, the inputs have 2"):
        block(x, block.init_state(3))
    with pytest.raises(ValueError, match=r"odd: .* of another block: carried is \[2, 5\], expected \[2, 4\]"):
        block(x, AdaptedState(torch.zeros(2, 5), position))
    with pytest.raises(ValueError, match=r"odd: .* of another block: carried is a tuple of 1, expected \[2, 4\]"):
        block(x, AdaptedState((torch.zeros(2, 4),), position))
    with pytest.raises(TypeError, match=r"carried is torch\.float64, expected torch\.float32"):
        block(x, AdaptedState(torch.zeros(2, 4).double(), position))
    register_pointwise()
    with pytest.raises(TypeError, match="pointwise: state is AdaptedState: expected None"):
        tb.build_block("pointwise", dim=4)(x, block.init_state(2))


def test_a_declaration_has_to_make_sense() -> None:
    with pytest.raises(ValueError, match="adapt\\('odd'\\): step goes on from a state"):
        tb.adapt("odd", step=lambda module, x, h: (x, h))

    @tb.adapt("nothing")
    def nothing(dim: int) -> Any:
        return None

    with pytest.raises(TypeError, match=r"nothing: the function made NoneType: expected an nn\.Module"):
        tb.build_block("nothing", dim=4)
    with pytest.raises(ValueError, match="'lstm' is taken"):
        register_lstm()
        register_lstm()
    with pytest.raises(TypeError, match="first parameter must be dim"):

        @tb.adapt("nameless")
        def nameless(*, width: int) -> nn.Module:
            return nn.Linear(width, width)


def test_what_was_counted() -> None:
    register_lstm()
    block = tb.build_block("lstm", dim=8, device="meta")
    weights = sum(p.numel() for p in block.parameters() if p.dim() > 1)
    assert block.flops(10) == 10 * (2 * weights + 4 * 2 * 8)
    assert block.state_bytes() == 4 * 2 * 8 + 8


def test_the_package_is_imported_without_theirs() -> None:
    said = "import sys, titans_build; print([m for m in ('transformers', 'fla', 'mamba_ssm') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", said], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    "state, run, message",
    [
        (lambda module, rows: 3, None, "odd: its state function: a state is a tree of .* not int"),
        (None, lambda module, x, carried: x, r"odd: the module made Tensor: expected \(outputs, what it carries\)"),
        (None, lambda module, x, carried: (x, carried, 1), "odd: the module made 3 things: expected"),
    ],
)
def test_what_is_declared_and_is_not_so_is_named(state: Any, run: Any, message: str) -> None:
    tb.adapt("odd", state=state or (lambda module, rows: torch.zeros(rows, 4)), run=run)(
        lambda dim: nn.Linear(dim, dim)
    )
    with pytest.raises(TypeError, match=message):
        tb.build_block("odd", dim=4)(torch.zeros(2, 3, 4))


def test_a_module_that_is_made_once_for_all_is_refused() -> None:
    shared = nn.Linear(4, 4)
    tb.adapt("odd")(lambda dim: shared)
    with pytest.raises(ValueError, match="odd: the function made the same weight twice"):
        tb.build_block("odd", dim=4)


def test_what_adapt_is_given_has_to_be_what_it_takes() -> None:
    with pytest.raises(TypeError, match=r"adapt\('odd'\): state is 3: expected a function"):
        tb.adapt("odd", state=3)
    with pytest.raises(TypeError, match="expected the block's name, as in @adapt"):
        tb.adapt(nn.Linear)  # type: ignore[arg-type]
