"""Tokens that are not finite: what comes before them, and beside them, is as if they had not come."""

import pytest
import torch

from titans_build.kernels.memory import MemoryState, titans_memory

TIME = 13


def inputs():
    torch.manual_seed(0)
    token = lambda *shape: torch.randn(2, TIME, 3, *shape, dtype=torch.float64)  # noqa: E731
    return dict(
        q=token(4), k=token(4), v=token(4), theta=0.02 * token().sigmoid(), eta=token().sigmoid(),
        alpha=0.1 * token().sigmoid(),
    )  # fmt: skip


def fresh():
    torch.manual_seed(1)
    state = MemoryState.fresh(
        (0.3 * torch.randn(2, 3, 8, 4, dtype=torch.float64), 0.3 * torch.randn(2, 3, 4, 8, dtype=torch.float64))
    )
    return state._replace(position=torch.tensor([0, 2]))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["q", "k", "v", "theta", "eta", "alpha"])
@pytest.mark.parametrize("backend", ["native", "torch", "closed_form", "reference"])
def test_earlier_tokens_and_other_heads_do_not_hear_of_it(backend, name, value):
    given, places = inputs(), {(0, 6, 1): 6, (1, 0, 0): 0, (1, 9, 2): 9}
    expected, _ = titans_memory(**given, state=fresh(), chunk=5, backend=backend)
    for place in places:
        given[name][place] = value
    y, state = titans_memory(**given, state=fresh(), chunk=5, backend=backend)
    first = {(row, head): token for row, token, head in places}
    for row in range(2):
        for head in range(3):
            until = first.get((row, head), TIME)
            torch.testing.assert_close(y[row, :until, head], expected[row, :until, head], rtol=1e-10, atol=1e-12)
            if until < TIME:
                assert not bool(y[row, until, head].isfinite().all())
    assert state.position.tolist() == [TIME, TIME + 2]


@pytest.mark.parametrize("backend", ["native", "torch", "closed_form"])
def test_what_stands_at_masked_tokens_does_not_matter(backend):
    given = inputs()
    mask = torch.ones(2, TIME, dtype=torch.bool)
    mask[0, 6] = mask[1, 0] = False
    y, state = titans_memory(**given, state=fresh(), chunk=5, mask=mask, backend=backend)
    for name in ("q", "k", "v", "theta", "eta", "alpha"):
        given[name][~mask] = float("nan")
    got, after = titans_memory(**given, state=fresh(), chunk=5, mask=mask, backend=backend)
    assert torch.equal(got, y) and torch.equal(after.weights[0], state.weights[0])
