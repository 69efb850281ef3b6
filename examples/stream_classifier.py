"""Classify a stream of handwritten digits, one line of pixels at a time.

    python examples/stream_classifier.py            # half a minute on one core
    python examples/stream_classifier.py --quick    # a test of the program, in seconds

A stream is a sequence of digits, each of 8 lines of 8 pixels. The model classifies the digit after every line; between
lines only its state is kept. Several streams are read at a time, as rows of a batch. Their digits begin at different
times: the state of a row is reset when its digit ends, while the other rows continue.

The program prints the accuracy on held-out digits after each line: of the model, of the same model without its state,
and of logistic regression on the whole picture. It also checks that reading line by line gives the same scores as
reading each digit at once.

The digits come with scikit-learn: pip install ".[examples]"
"""

from __future__ import annotations

import argparse
from typing import NamedTuple

import torch
from torch import Tensor, nn

import titans_build as tb

LINES = 8
RECIPE = """
version: 1
dim: 64
layers:
  mag:
    - type: gate
      branches:
        - {type: attention, heads: 4, window: 8}
        - {type: memory, heads: 2, depth: 1, chunk: 4}
    - {type: ffn, hidden: 128}
stack: [{repeat: 2, of: [mag]}]
"""


class Digits(NamedTuple):
    """Pictures ``[digits, 8, 8]`` with values from 0 to 1, and their labels ``[digits]``."""

    pictures: Tensor
    labels: Tensor


def read_digits() -> tuple[Digits, Digits]:
    """1,397 digits for training, and the last 400 of the file for the test."""
    from sklearn.datasets import load_digits

    data = load_digits()
    pictures, labels = torch.from_numpy(data.images).float() / 16, torch.from_numpy(data.target).long()
    return Digits(pictures[:-400], labels[:-400]), Digits(pictures[-400:], labels[-400:])


class Classifier(nn.Module):
    """From a line of pixels to ten scores: a linear layer, the model, a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.body = tb.build(tb.load_recipe(RECIPE), seed=0)
        torch.manual_seed(0)
        self.into = nn.Linear(8, self.body.dim)
        self.out = nn.Linear(self.body.dim, 10)

    def forward(self, lines: Tensor, state: object = None) -> tuple[Tensor, object]:
        """``[rows, lines, 8]`` and a state -> scores ``[rows, lines, 10]`` and the next state."""
        read = self.body(embeddings=self.into(lines), state=state)
        return self.out(read.hidden), read.state


def train(digits: Digits, epochs: int, rows: int = 64) -> Classifier:
    """Train a classifier to predict the digit after every line."""
    model = Classifier()
    batches = len(digits.labels) // rows
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=epochs * batches)
    draws = torch.Generator().manual_seed(0)
    for epoch in range(epochs):
        total = 0.0
        for batch in torch.randperm(len(digits.labels), generator=draws)[: batches * rows].view(batches, rows):
            scores, _ = model(digits.pictures[batch])
            wanted = digits.labels[batch, None].expand(-1, LINES)
            loss = nn.functional.cross_entropy(scores.flatten(0, 1), wanted.flatten())
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            total += float(loss.detach())
        if epoch % max(1, epochs // 5) == 0 or epoch == epochs - 1:
            print(f"epoch {epoch:3d}: loss {total / batches:.3f}", flush=True)
    return model


@torch.no_grad()
def read_streams(model: Classifier, digits: Digits, streams: int = 8) -> Tensor:
    """The scores ``[digits, lines, 10]`` of all digits, read line by line in ``streams`` rows that start one by one."""
    fresh = model.body.init_state(streams)
    # stream s has the digits s, s + streams, ... and starts at tick s
    queues = [list(range(stream, len(digits.labels), streams)) for stream in range(streams)]
    scores, state = torch.zeros(len(digits.labels), LINES, 10), fresh
    for tick in range(LINES * max(map(len, queues)) + streams):
        ticks = [tick - stream for stream in range(streams)]
        reading = [row for row, at in enumerate(ticks) if 0 <= at < LINES * len(queues[row])]
        if not reading:
            break
        new = [row for row in reading if ticks[row] % LINES == 0]
        state = tb.state.reset(state, new, fresh)  # their last digit has ended
        now = tb.state.select(state, reading)
        at = [(queues[row][ticks[row] // LINES], ticks[row] % LINES) for row in reading]
        lines = torch.stack([digits.pictures[digit, line] for digit, line in at])
        output, now = model(lines[:, None], now)
        for (digit, line), score in zip(at, output[:, 0]):
            scores[digit, line] = score
        # put the new states of the rows that were read back between those of the other rows
        order = [len(reading) + row if row not in reading else reading.index(row) for row in range(streams)]
        state = tb.state.select(tb.state.concatenate([now, state]), order)
    return scores


def accuracy(scores: Tensor, digits: Digits) -> list[float]:
    """The accuracy after each line."""
    return [float(share) for share in (scores.argmax(-1) == digits.labels[:, None]).float().mean(0)]


@torch.no_grad()
def without_state(model: Classifier, digits: Digits) -> Tensor:
    """The scores ``[digits, lines, 10]`` if every line is read from a fresh state."""
    return model(digits.pictures.view(-1, 1, 8))[0].view(-1, LINES, 10)


def logistic_regression(train: Digits, test: Digits) -> float:
    """The accuracy of logistic regression on whole pictures."""
    from sklearn.linear_model import LogisticRegression

    fitted = LogisticRegression(max_iter=1000).fit(train.pictures.flatten(1).numpy(), train.labels.numpy())
    return float(fitted.score(test.pictures.flatten(1).numpy(), test.labels.numpy()))


def main(argv: list[str] | None = None) -> dict[str, list[float]]:
    """Train, read the streams, and print the accuracies. Returns them by the way of reading."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a test of the program with a few steps")
    parser.add_argument("--epochs", type=int, default=30, help="passes over the digits (default: 30)")
    arguments = parser.parse_args(argv)
    train_on, test_on = read_digits()
    if arguments.quick:
        train_on, test_on = Digits(*(part[:128] for part in train_on)), Digits(*(part[:20] for part in test_on))
    model = train(train_on, 1 if arguments.quick else arguments.epochs)
    scores = read_streams(model, test_on)
    with torch.no_grad():
        at_once = model(test_on.pictures)[0]
    difference = float((scores - at_once).abs().max())
    assert torch.allclose(scores, at_once, atol=1e-3), difference
    print(f"\n{len(test_on.labels)} held-out digits; line by line and at once differ by {difference:.1e} at most")
    found = {
        "state carried": accuracy(scores, test_on),
        "state dropped every line": accuracy(without_state(model, test_on), test_on),
        "logistic regression, whole picture": [logistic_regression(train_on, test_on)],
    }
    print(f"accuracy after line: {'':15}" + "".join(f"{line:7}" for line in range(1, LINES + 1)))
    for name, row in found.items():
        print(f"{name:36}" + " " * 7 * (LINES - len(row)) + "".join(f"{share:7.1%}" for share in row))
    return found


if __name__ == "__main__":
    main()
