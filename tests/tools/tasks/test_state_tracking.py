from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import titans_build as tb
from titans_build.registry import RecipeError


@pytest.mark.parametrize(("group", "order"), [("Z2", 2), ("Z5", 5), ("S3", 6), ("S5", 120), ("A4", 12), ("A5", 60)])
def test_state_tracking_elements_form_the_group(make: Callable[..., Any], group: str, order: int):
    task = make("state_tracking", 1, group=group).task
    assert task.vocab == order and task.references() == {"any element": 1 / order}
    product, everything = task.product, np.arange(order)
    assert (product[0] == everything).all() and (product[:, 0] == everything).all()
    assert all((np.sort(line) == everything).all() for line in (*product, *product.T))
    a, b, c = np.random.default_rng(0).integers(0, order, (3, 500))
    assert (product[product[a, b], c] == product[a, product[b, c]]).all()
    assert (product == product.T).all() == group.startswith("Z")


@pytest.mark.parametrize("group", ["S3", "A5"])
def test_state_tracking_targets_are_products_of_matrices(make: Callable[..., Any], group: str):
    made = make("state_tracking", 5, group=group, length=30)
    # the later permutation is applied last: its matrix stands on the left
    matrices = np.eye(len(made.task.elements[0]), dtype=int)[made.task.elements].swapaxes(1, 2)
    for tokens, targets in zip(made.tokens, made.targets):
        products = itertools.accumulate((matrices[token] for token in tokens), lambda before, next: next @ before)
        assert all((product == matrices[target]).all() for product, target in zip(products, targets))


def test_state_tracking_alternating_elements_are_even(make: Callable[..., Any]):
    elements = make("state_tracking", 1, group="A5").task.elements
    signs = np.linalg.det(np.eye(5)[elements])
    assert len(elements) == 60 and np.allclose(signs, 1)


def test_state_tracking_cyclic_groups_are_sums(make: Callable[..., Any]):
    for modulus in (2, 5):
        made = make("state_tracking", 20, group=f"Z{modulus}", length=50)
        assert (made.targets == made.tokens.cumsum(1) % modulus).all()
    # no token and no position says anything: the last one alone decides
    assert abs(made.right(made.tokens) - 1 / 5) < 2 * made.slack()


def test_state_tracking_first_target(make: Callable[..., Any]):
    made, whole = make("state_tracking", 4, length=12, first=8), make("state_tracking", 4, length=12)
    assert not made.counts[:, :8].any() and made.counts[:, 8:].all()
    assert (made.tokens == whole.tokens).all() and (made.targets[:, 8:] == whole.targets[:, 8:]).all()


def test_state_tracking_invalid_fields(make: Callable[..., Any]):
    with pytest.raises(RecipeError, match="first: expected under the length 12, got 12"):
        make("state_tracking", 1, length=12, first=12)
    for group in ("S6", "Z1", "A3", "Z100", "D4"):
        with pytest.raises(RecipeError, match="group"):
            make("state_tracking", 1, group=group)


def test_state_tracking_splits_share_no_row():
    rows = [tb.open_source("state_tracking", rows=200, split=split).batch(0).tokens for split in ("train", "test")]
    assert not {tuple(row) for row in rows[0].tolist()} & {tuple(row) for row in rows[1].tolist()}
