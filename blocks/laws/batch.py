"""Laws about rows: none hears of another, states take them apart and together, and padding is not there."""

from __future__ import annotations

import torch

from ..state import State, concatenate, named_tensors, reset, select
from .subject import Subject


def row(subject: Subject) -> None:
    """Row b of a batch equals that row alone, also when rows are at different positions."""
    with torch.no_grad():
        x = subject.tokens(3, subject.length)
        y, state = subject.run(x)
        subject.check_rows(state, 3)
        for row in range(3):
            alone, ended = subject.run(x[row : row + 1])
            subject.same("row", f"row {row} in a batch of 3", y[row : row + 1], alone)
            subject.same_state("row", f"row {row} in a batch of 3", subject.row(state, row), ended)
        before, alone_before = _at_different_positions(subject)
        y, state = subject.run(x, before)
        for row in range(3):
            alone, ended = subject.run(x[row : row + 1], alone_before[row])
            subject.same("row", f"row {row} of rows at different positions", y[row : row + 1], alone)
            subject.same_state("row", f"row {row} of rows at different positions", subject.row(state, row), ended)


def _at_different_positions(subject: Subject) -> tuple[State, list[State]]:
    """Three rows after different numbers of tokens: as one state, and each alone."""
    read = [subject.reach + 3, 1, subject.length // 2]
    x = subject.tokens(3, max(read), salt=5)
    alone = [subject.run(x[row : row + 1, : read[row]])[1] for row in range(3)]
    if not subject.grows:
        return concatenate(alone), alone
    # states of different lengths cannot stand side by side: a mask brings the rows to different positions
    mask = torch.arange(max(read), device=subject.device) < torch.tensor(read, device=subject.device)[:, None]
    return subject.run(x, None, mask)[1], alone


def rows(subject: Subject) -> None:
    """select, reset and concatenate of a state's rows commute with running."""
    with torch.no_grad():
        x = subject.tokens(3, subject.length)
        _, before = subject.run(subject.tokens(3, 5, salt=1))
        subject.check_rows(before, 3)
        subject.check_rows(subject.fresh(3), 3)
        y, after = subject.run(x, before)
        order = [2, 0, 0]
        got, state = subject.run(x[order], select(before, order))
        subject.same("rows", "select, then run", got, y[order])
        subject.same_state("rows", "select, then run", state, select(after, order))
        parts = [select(before, [0]), select(before, slice(1, 3))]
        got, state = subject.run(x, concatenate(parts))
        subject.same("rows", "concatenate, then run", got, y)
        subject.same_state("rows", "concatenate, then run", state, after)
        fresh = subject.fresh(3)
        sizes = [[tensor.shape for _, tensor in named_tensors(s)] for s in (before, fresh)]
        if sizes[0] == sizes[1]:  # a state that has grown has no room for a fresh row
            got, state = subject.run(x, reset(before, [1], fresh))
            anew, anew_state = subject.run(x[1:2])
            subject.same("rows", "a row that was reset", got[1:2], anew)
            subject.same_state("rows", "a row that was reset", select(state, [1]), anew_state)
            subject.same("rows", "rows beside one that was reset", got[[0, 2]], y[[0, 2]])


def mask(subject: Subject) -> None:
    """Left, right and inner padding: outputs at real tokens and the state equal those of the unpadded row."""
    with torch.no_grad():
        rows, time = 5, subject.length + 3
        x = subject.tokens(rows, time)
        index = torch.arange(time, device=subject.device)
        mask = torch.stack(
            [
                index >= time // 3,  # left padding
                index < time // 2,  # right padding
                (index < time // 4) | (index >= time // 2),  # inner padding
                subject.noise(time, salt=7) > 0,  # scattered
                index < 0,  # no real token at all
            ]
        )
        # what stands at a masked token must not matter
        x = torch.where(mask.unsqueeze(-1), x, 100 * x)
        start: State = None
        alone: list[State] = [subject.fresh(1)] * rows
        for call in ("from a fresh state", "from rows at different positions", "one step"):
            if call == "one step":
                x, mask = x[:, :1], mask[:, :1]
            y, after = subject.run(x, start, mask)
            subject.check_rows(after, rows)
            for row in range(rows):
                real = mask[row]
                what = f"mask {call}, row {row} with {int(real.sum())} real tokens of {mask.shape[1]}"
                hidden = y[row, ~real]
                subject.same("mask", f"{what}: outputs at masked tokens", hidden, torch.zeros_like(hidden), 0.0)
                if real.any():
                    expected, alone[row] = subject.run(x[row : row + 1, real], alone[row])
                    subject.same("mask", f"{what}: outputs at real tokens", y[row, real], expected[0])
                subject.same_state("mask", what, subject.row(after, row), alone[row])
            start = after
