"""States contain the fingerprint of the recipe, and a model rejects those of another recipe with equal shapes."""

from __future__ import annotations

import copy

import pytest
import torch

from titans_build import state as st
from titans_build.blocks.fingerprint import Fingerprint
from titans_build.recipes import build, load_recipe, load_state, save_state

RECIPE = {
    "version": 1,
    "name": "sixteen",
    "dim": 16,
    "vocab": 32,
    "layers": {"a": [{"type": "memory", "heads": 2, "chunk": 16}]},
    "stack": ["a"],
}
OTHER = load_recipe(RECIPE | {"name": "thirty-two"}, {"layers.a.0.chunk": 32})
TOKENS = torch.arange(10).view(2, 5)


def shapes(state):
    return {path: (tensor.shape, tensor.dtype) for path, tensor in st.named_tensors(state)}


def test_a_state_of_another_recipe_with_equal_shapes_is_an_error():
    model, other = build(RECIPE), build(OTHER)
    foreign = other(TOKENS).state
    assert shapes(foreign) == shapes(model(TOKENS).state)
    named = (
        rf"of another recipe: it is of 'thirty-two' \({OTHER.fingerprint}\), "
        rf"the model of 'sixteen' \({model.recipe.fingerprint}\)"
    )
    with pytest.raises(ValueError, match=named):
        model(TOKENS, foreign)
    with pytest.raises(ValueError, match=named):
        model(embeddings=torch.zeros(2, 1, 16), state=foreign)
    with pytest.raises(ValueError, match=named):
        model.generate(TOKENS, 3, foreign)
    with pytest.raises(ValueError, match=named):
        model.generate(TOKENS[:, :0], 3, foreign, logits=torch.zeros(2, 32))


def test_a_single_row_of_another_recipe_is_an_error():
    model = build(RECIPE)
    mixed = st.concatenate([model.init_state(1), build(OTHER).init_state(1)])
    with pytest.raises(ValueError, match="of another recipe"):
        model(TOKENS, mixed)
    model(TOKENS[:1], st.select(mixed, [0]))


def test_fingerprints_do_not_depend_on_weights_and_names():
    state = build(RECIPE, seed=0)(TOKENS).state
    build(RECIPE, seed=1)(TOKENS, state)
    build(RECIPE | {"name": "otherwise"})(TOKENS, state)


@pytest.mark.parametrize(
    "operation",
    [
        lambda s: st.select(s, [1, 0]),
        lambda s: st.select(s, torch.tensor([True, True])),
        lambda s: st.concatenate([st.select(s, [1]), st.select(s, [0])]),
        lambda s: st.reset(s, [0], s),
        lambda s: st.where(torch.tensor([True, False]), s, s),
        lambda s: st.to(st.detach(s), "cpu", torch.float32),
        lambda s: copy.deepcopy(st.detach(s)),
    ],
)
def test_operations_on_states_keep_the_fingerprint(operation):
    model = build(RECIPE)
    state = operation(model(TOKENS).state)
    assert all(tensor.shape[0] == 2 for _, tensor in st.named_tensors(state))
    assert torch.equal(model(TOKENS, state).state.recipe, state.recipe)


def test_models_without_a_recipe_share_a_fingerprint():
    assert Fingerprint().number == 0
    Fingerprint().check(torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match="of a recipe with fingerprint ffffffffffffffff"):
        Fingerprint().check(torch.full((2,), -1))


def test_fingerprints_on_the_meta_device_are_not_compared():
    model = build(RECIPE, device="meta")
    assert model.init_state(2).recipe.is_meta
    Fingerprint().check(model.init_state(2).recipe)


def test_fields_that_change_no_function_are_no_part_of_the_fingerprint(tmp_path):
    """Saved states and models of one ``keep`` are those of any other, and of the fingerprint before this rule."""
    plain, kept = load_recipe(RECIPE), load_recipe(RECIPE, {"layers.a.0.keep": 4})
    assert kept.fingerprint == plain.fingerprint == plain.earlier_fingerprint != kept.earlier_fingerprint
    model, other = build(plain, seed=0), build(kept, seed=0)
    state = model(TOKENS).state
    torch.testing.assert_close(other(TOKENS, state).logits, model(TOKENS, state).logits)
    save_state(state, tmp_path / "state", model)
    load_state(tmp_path / "state", other)

    earlier = Fingerprint(kept.earlier_fingerprint).number
    other(TOKENS, state._replace(recipe=torch.full_like(state.recipe, earlier)))
    with pytest.raises(ValueError, match="of another recipe"):
        model(TOKENS, state._replace(recipe=torch.full_like(state.recipe, earlier)))
