"""The loss against sums by hand. Labels are aligned with their own tokens, and shifted inside."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from titans_build.huggingface import TitansBuildForCausalLM
from titans_build.tools.huggingface.model import next_token_loss


def by_hand(logits: Tensor, labels: Tensor, counts: Callable[[int, int], bool] = lambda row, t: True) -> float:
    """The mean over pairs of a token and the next, of minus the logarithm of its probability."""
    losses = []
    for row in range(len(labels)):
        for t in range(labels.shape[1] - 1):
            if counts(row, t) and labels[row, t + 1] != -100:
                scores = logits[row, t].tolist()
                total = sum(math.exp(score) for score in scores)
                losses.append(math.log(total) - scores[int(labels[row, t + 1])])
    return sum(losses) / len(losses)


def test_loss_against_sums_by_hand(model: TitansBuildForCausalLM, tokens: Tensor) -> None:
    labels = tokens.clone()
    labels[0, 4:6] = -100
    with torch.no_grad():
        out = model(tokens, labels=labels)
    assert out.loss.item() == pytest.approx(by_hand(out.logits, labels), rel=1e-12)
    # the model itself takes targets that are shifted already
    targets = torch.cat([labels[:, 1:], torch.full((3, 1), -100)], dim=1)
    assert_close(out.loss, model.model(tokens, targets=targets).loss)


@pytest.mark.parametrize("at_padding", [-100, 0, 7])
@pytest.mark.parametrize("places", [[0, 1, 2], [11, 11], [4, 4, 4], [0, 5, 5, 9, 11]])
def test_padding_does_not_change_the_loss(
    model: TitansBuildForCausalLM, tokens: Tensor, places: list[int], at_padding: int
) -> None:
    labels = tokens.clone()
    labels[1, 3:5] = -100

    def padded(rows: Tensor, value: int) -> Tensor:
        """``rows`` with ``value`` before each of ``places``."""
        parts = [torch.nn.functional.pad(part, (0, 1), value=value) for part in rows.tensor_split(places, dim=1)]
        return torch.cat(parts, dim=1)[:, :-1]

    mask, inputs = padded(torch.ones_like(tokens), 0), padded(tokens, 0)
    with torch.no_grad():
        for count in (None, 7):
            alone = model(tokens, labels=labels, num_items_in_batch=count).loss
            out = model(inputs, attention_mask=mask, labels=padded(labels, at_padding), num_items_in_batch=count)
            assert_close(out.loss, alone)


def test_rows_of_unequal_lengths_have_the_sum_of_their_losses(model: TitansBuildForCausalLM, tokens: Tensor) -> None:
    mask = torch.ones_like(tokens)
    mask[0, 6:] = mask[1, :4] = 0
    with torch.no_grad():
        rows = [
            model(row[m.bool()][None], labels=row[m.bool()][None], num_items_in_batch=1).loss
            for row, m in zip(tokens, mask)
        ]
        assert_close(model(tokens, attention_mask=mask, labels=tokens).loss, sum(rows) / (int(mask.sum()) - 3))


def test_no_prediction_from_padding() -> None:
    logits, labels = torch.randn(1, 4, 5), torch.tensor([[0, 1, 2, 3]])
    mask = torch.tensor([[False, True, True, True]])
    expected = by_hand(logits, labels, lambda row, t: t > 0)
    assert next_token_loss(logits, labels, mask).item() == pytest.approx(expected, rel=1e-5)


def test_losses_of_parts_add_up() -> None:
    logits, labels = torch.randn(4, 7, 5), torch.randint(5, (4, 7))
    labels[1, 2:] = -100  # parts of unequal counts
    count = (labels[:, 1:] != -100).sum()
    parts = sum(next_token_loss(logits[rows], labels[rows], count=count) for rows in ([0], [1], [2, 3]))
    assert_close(parts, next_token_loss(logits, labels))
    assert_close(parts, next_token_loss(logits, labels, count=int(count)))


def test_loss_without_labels_is_zero() -> None:
    assert next_token_loss(torch.randn(1, 3, 5), torch.full((1, 3), -100)).item() == 0


def test_half_precision_is_summed_in_float32() -> None:
    logits, labels = torch.randn(1, 300, 50).bfloat16(), torch.randint(50, (1, 300))
    assert next_token_loss(logits, labels).dtype == torch.float32
    assert_close(next_token_loss(logits, labels), next_token_loss(logits.float(), labels))
