"""Laws about rows: they are independent, states are divided and joined by rows, and padding has no effect."""

from __future__ import annotations

import torch

from ..state import State, concatenate, named_tensors, reset, select
from .subject import Result, Subject


def row(subject: Subject) -> None:
    """Row b of a batch equals that row alone, also when rows are at different positions."""
    with torch.no_grad():
        x = subject.tokens(3, subject.length)

        def compare(what: str, before: State, befores: list[State]) -> None:
            result = subject.run(x, before)
            subject.check_rows(result.state, 3)
            for row in range(3):
                expected = subject.run(x[row : row + 1], befores[row])
                subject.same_result(f"row {row} {what}", _select(result, [row]), expected)

        compare("in a batch of 3", None, [None] * 3)
        compare("of rows at different positions", *_at_different_positions(subject))


def _select(result: Result, rows: list[int]) -> Result:
    return Result(result.y[rows], select(result.state, rows))


def _at_different_positions(subject: Subject) -> tuple[State, list[State]]:
    """Three rows after different numbers of tokens: as one state, and as single ones."""
    counts = [subject.reach + 3, 1, subject.length // 2]
    x = subject.tokens(3, max(counts), salt=5)
    alone = [subject.run(x[row : row + 1, : counts[row]]).state for row in range(3)]
    if not subject.grows:
        return concatenate(alone), alone
    # states of different lengths cannot be concatenated; a mask has the same effect
    mask = torch.arange(max(counts), device=subject.device) < torch.tensor(counts, device=subject.device)[:, None]
    return subject.run(x, None, mask).state, alone


def rows(subject: Subject) -> None:
    """select, reset and concatenate of a state's rows commute with running."""
    with torch.no_grad():
        x = subject.tokens(3, subject.length)
        before, fresh = subject.run(subject.tokens(3, 5, salt=1)).state, subject.fresh(3)
        subject.check_rows(before, 3)
        subject.check_rows(fresh, 3)
        whole = subject.run(x, before)
        order = [2, 0, 0]
        subject.same_result("select, then run", subject.run(x[order], select(before, order)), _select(whole, order))
        parts = [select(before, [0]), select(before, slice(1, 3))]
        subject.same_result("concatenate, then run", subject.run(x, concatenate(parts)), whole)
        sizes = [[tensor.shape for _, tensor in named_tensors(s)] for s in (before, fresh)]
        if sizes[0] == sizes[1]:  # a fresh row does not fit into a state that has grown
            result = subject.run(x, reset(before, [1], fresh))
            subject.same_result("a row that was reset", _select(result, [1]), subject.run(x[1:2]))
            subject.same("outputs, rows beside one that was reset", result.y[[0, 2]], whole.y[[0, 2]])


def mask(subject: Subject) -> None:
    """Left, right and inner padding: outputs at valid tokens and the state equal those of the unpadded row."""
    with torch.no_grad():
        rows, time = 5, subject.length + 3
        index = torch.arange(time, device=subject.device)
        mask = torch.stack(
            [
                index >= time // 3,  # left padding
                index < time // 2,  # right padding
                (index < time // 4) | (index >= time // 2),  # inner padding
                subject.noise(time, salt=7) > 0,  # scattered
                index < 0,  # no valid token
            ]
        )
        x = subject.tokens(rows, time)
        x = torch.where(mask.unsqueeze(-1), x, 100 * x)
        start: State = None
        alone: list[State] = [subject.fresh(1)] * rows
        for call in ("from a fresh state", "from rows at different positions", "one step"):
            if call == "one step":
                x, mask = x[:, :1], mask[:, :1]
            y, start = subject.run(x, start, mask)
            subject.check_rows(start, rows)
            for row in range(rows):
                valid = mask[row]
                what = f"mask {call}, row {row} with {int(valid.sum())} valid tokens of {mask.shape[1]}"
                masked = y[row, ~valid]
                subject.same(f"{what}: outputs at masked tokens", masked, torch.zeros_like(masked), 0.0)
                if valid.any():
                    expected, alone[row] = subject.run(x[row : row + 1, valid], alone[row])
                    subject.same(f"{what}: outputs at valid tokens", y[row, valid], expected[0])
                subject.same_state(what, select(start, [row]), alone[row])
