"""Forecast a time series, weekly carbon dioxide at Mauna Loa, with a neural memory.

    python examples/forecasting.py            # half a minute on one core
    python examples/forecasting.py --quick    # a test of the program, in seconds

The model is LMM (memories and feed-forward networks, no attention) on vectors instead of tokens. Its input for a week
is the change since the week before, and its output the change over the next 1, 4, 13 and 26 weeks. The season and the
rate of growth must be in its state. It is trained on the series up to 1992. It then reads the following years, one week
at a time, with constant weights. Its errors are compared with those of two simple forecasts: the last value (naive),
and the value of the same week in the year before plus the growth of a year (seasonal naive).

The series comes with statsmodels: pip install ".[examples]"
"""

from __future__ import annotations

import argparse
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

import titans_build as tb

AHEAD = (1, 4, 13, 26)
"""Forecast horizons in weeks."""
YEAR = 52
RECIPE = """
version: 1
dim: 32
layers:
  lmm:
    - {type: memory, heads: 2, depth: 1, chunk: 16}
    - {type: ffn, hidden: 64}
stack: [{repeat: 2, of: [lmm]}]
"""


class Series(NamedTuple):
    """One row for each week after the first year."""

    level: Tensor
    """``[weeks]``, parts per million."""
    steps: Tensor
    """``[weeks, 1]``: the change since the week before, over its standard deviation."""
    held_out: int
    """The first week of the test years."""


def read_series() -> Series:
    """The series with its gaps filled. The row of a week contains nothing of a later week."""
    from statsmodels.datasets import co2

    data = co2.load_pandas().data["co2"]
    # a missing week gets the value before it: interpolation would use the future
    level = data.ffill().to_numpy()
    weeks = np.arange(YEAR, len(level))
    steps = level[weeks] - level[weeks - 1]
    held_out = int((data.index[weeks].year < 1993).sum())
    steps /= steps[:held_out].std()
    return Series(torch.from_numpy(level[weeks]).float(), torch.from_numpy(steps).float()[:, None], held_out)


class Forecaster(nn.Module):
    """From the change of a week to the forecast changes: a linear layer, the model, a linear layer."""

    def __init__(self, scale: Tensor) -> None:
        super().__init__()
        self.body = tb.build(tb.load_recipe(RECIPE), seed=0)
        torch.manual_seed(0)
        self.into = nn.Linear(1, self.body.dim)
        self.out = nn.Linear(self.body.dim, len(AHEAD))
        self.register_buffer("scale", scale)  # [ahead]: the root mean square of the changes

    def forward(self, steps: Tensor, state: object = None) -> tuple[Tensor, object]:
        """``[rows, weeks, 1]`` and a state -> changes ``[rows, weeks, ahead]`` in ppm, and the next state."""
        read = self.body(embeddings=self.into(steps), state=state)
        return self.out(read.hidden) * self.scale, read.state


def changes(level: Tensor) -> Tensor:
    """``[weeks, ahead]``: the targets; NaN after the end of the series."""
    wanted = torch.full((len(level), len(AHEAD)), torch.nan)
    for column, ahead in enumerate(AHEAD):
        wanted[:-ahead, column] = level[ahead:] - level[:-ahead]
    return wanted


def train(series: Series, epochs: int, piece: int = 128, rows: int = 8) -> Forecaster:
    """Train a forecaster on the years before ``series.held_out``, targets included.

    In an epoch each row starts at a random week and reads piece by piece. The state is carried from piece to piece;
    gradients are computed within a piece.
    """
    level, steps = series.level[: series.held_out], series.steps[: series.held_out]
    wanted = changes(level)
    scale = wanted.nan_to_num().pow(2).mean(0).sqrt()
    model = Forecaster(scale)
    pieces = (len(level) - 4 * piece) // piece
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=epochs * pieces)
    draws = torch.Generator().manual_seed(0)
    for epoch in range(epochs):
        starts = torch.randint(len(level) - pieces * piece, (rows,), generator=draws)
        state, total = None, 0.0
        for number in range(pieces):
            weeks = starts[:, None] + number * piece + torch.arange(piece)
            forecast, state = model(steps[weeks], state)
            state = tb.state.detach(state)
            miss = (forecast - wanted[weeks]) / scale
            loss = miss[~miss.isnan()].abs().mean()
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            total += float(loss.detach())
        if epoch % max(1, epochs // 5) == 0 or epoch == epochs - 1:
            print(f"epoch {epoch:3d}: error {total / pieces:.3f} of a typical change", flush=True)
    return model


@torch.no_grad()
def forecast(model: Forecaster, series: Series, carry: bool) -> Tensor:
    """Forecasts ``[held-out weeks, ahead]`` in ppm, week by week. ``carry``: with the state of all weeks before."""
    _, state = model(series.steps[None, : series.held_out])
    found = []
    for week in range(series.held_out, len(series.steps)):
        change, after = model(series.steps[None, week : week + 1], state if carry else None)
        state = after
        found.append(change[0, 0])
    return series.level[series.held_out :, None] + torch.stack(found)


def errors(series: Series, found: Tensor) -> list[float]:
    """Mean absolute error in ppm for each of ``AHEAD``, over the held-out weeks with a known target."""
    late = series.level[series.held_out :]
    return [
        float((found[: len(late) - ahead, column] - late[ahead:]).abs().mean()) for column, ahead in enumerate(AHEAD)
    ]


def without_a_model(series: Series) -> dict[str, Tensor]:
    """The simple forecasts ``[held-out weeks, ahead]``."""
    weeks = torch.arange(series.held_out, len(series.level))
    now, growth = series.level[weeks], series.level[weeks] - series.level[weeks - YEAR]
    return {
        "naive": now[:, None].expand(-1, len(AHEAD)),
        "seasonal naive": torch.stack([series.level[weeks + ahead - YEAR] + growth for ahead in AHEAD], dim=1),
    }


def main(argv: list[str] | None = None) -> dict[str, list[float]]:
    """Train, forecast, and print the errors. Returns them by the name of the forecast."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a test of the program with a few steps")
    parser.add_argument("--epochs", type=int, default=40, help="passes over the series (default: 40)")
    arguments = parser.parse_args(argv)
    series = read_series()
    print(f"{len(series.level)} weeks, of which the last {len(series.level) - series.held_out} are held out")
    model = train(series, 1 if arguments.quick else arguments.epochs)
    forecasts = without_a_model(series)
    forecasts["LMM, state dropped every week"] = forecast(model, series, carry=False)
    forecasts["LMM, state carried"] = forecast(model, series, carry=True)
    print(f"\nmean absolute error in ppm, weeks ahead: {'':9}" + "".join(f"{ahead:8}" for ahead in AHEAD))
    found = {name: errors(series, forecast) for name, forecast in forecasts.items()}
    for name, row in found.items():
        print(f"{name:50}" + "".join(f"{error:8.3f}" for error in row))
    return found


if __name__ == "__main__":
    main()
