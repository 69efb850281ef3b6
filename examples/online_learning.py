"""Learn during use: a memory that is kept over episodes against one that is reset in each.

    python examples/online_learning.py            # half a minute on one core
    python examples/online_learning.py --quick    # a test of the program, in seconds

A life assigns new random names to the ten digits. It has six episodes of twelve pictures. The model predicts the name
of each picture and is then given the right one. Its weights are constant, so it can learn the names only in its state.
It is trained on many lives with other pictures.

The program prints the accuracy in each episode: with the memory kept over the episodes of a life, with the memory reset
at each episode, and of the nearest neighbor among all pictures named before in this life. The nearest neighbor stores
every picture, while the state of the model has a constant size.

The digits come with scikit-learn: pip install ".[examples]"
"""

from __future__ import annotations

import argparse
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

import titans_build as tb

EPISODES, SHOWN = 6, 12
"""Episodes of a life, and pictures in each."""
NAMES, FEATURES = 10, 9
HELD_OUT = -400
"""The first held-out picture."""
RECIPE = """
version: 1
dim: 64
layers:
  lmm:
    - type: memory
      heads: 1
      depth: 1
      norm: false             # a matrix: the delta rule with learned steps
      activation: identity
      chunk: 8
      conv: 0
      momentum: false
      max_step: 3.0           # large steps without clipping: one example must suffice
      clip: null
      retrieve: before        # a picture without a name reads what was written for similar ones
    - {type: ffn, hidden: 128}
stack: [lmm, lmm]
"""


class Lives(NamedTuple):
    """Pictures ``[lives, pictures, 9]`` and their names ``[lives, pictures]``."""

    pictures: Tensor
    names: Tensor


class World:
    """The digits from which lives are drawn."""

    def __init__(self, part: slice) -> None:
        from sklearn.datasets import load_digits
        from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

        data = load_digits()
        # nine discriminant features, fitted to the training pictures
        found = LinearDiscriminantAnalysis().fit(data.data[:HELD_OUT], data.target[:HELD_OUT])
        features = torch.from_numpy(found.transform(data.data)).float()
        self.pictures = (features / features[:HELD_OUT].std(0))[part]
        self.digits = torch.from_numpy(data.target[part]).long()

    def lives(self, count: int, draws: torch.Generator) -> Lives:
        """``count`` lives, each with its own names."""
        shown = torch.randint(len(self.digits), (count, EPISODES * SHOWN), generator=draws)
        names = torch.rand(count, NAMES, generator=draws).argsort(dim=1)
        return Lives(self.pictures[shown], names.gather(1, self.digits[shown]))


class Learner(nn.Module):
    """Each picture is two tokens: the picture, where the name is predicted, and the picture with its right name."""

    def __init__(self) -> None:
        super().__init__()
        self.body = tb.build(tb.load_recipe(RECIPE), seed=0)
        torch.manual_seed(0)
        self.into = nn.Linear(FEATURES + NAMES + 1, self.body.dim)
        self.out = nn.Linear(self.body.dim, NAMES)

    def forward(self, lives: Lives, state: object = None) -> tuple[Tensor, object]:
        """Pictures of lives and a state -> scores of the names ``[lives, pictures, 10]`` and the next state."""
        rows, time, _ = lives.pictures.shape
        unnamed = torch.cat([lives.pictures, torch.zeros(rows, time, NAMES + 1)], dim=2)
        named = torch.cat([lives.pictures, one_hot(lives.names, NAMES), torch.ones(rows, time, 1)], dim=2)
        tokens = torch.stack([unnamed, named], dim=2).flatten(1, 2)
        read = self.body(embeddings=self.into(tokens), state=state)
        return self.out(read.hidden[:, ::2]), read.state


def train(world: World, steps: int, rows: int = 16) -> Learner:
    """Train a learner on ``steps`` batches of ``rows`` lives."""
    model = Learner()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=5e-3, total_steps=steps)
    draws = torch.Generator().manual_seed(0)
    for step in range(steps):
        lives = world.lives(rows, draws)
        scores, _ = model(lives)
        loss = nn.functional.cross_entropy(scores.flatten(0, 1), lives.names.flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % max(1, steps // 8) == 0 or step == steps - 1:
            print(f"step {step:4d}: loss {float(loss.detach()):.3f}", flush=True)
    return model


@torch.no_grad()
def live(model: Learner, lives: Lives, keep: bool) -> list[float]:
    """The accuracy in each episode. ``keep``: with the state of the episodes before."""
    found, state = [], None
    for start in range(0, EPISODES * SHOWN, SHOWN):
        episode = Lives(*(part[:, start : start + SHOWN] for part in lives))
        scores, state = model(episode, state if keep else None)
        found.append(float((scores.argmax(-1) == episode.names).float().mean()))
    return found


def nearest_neighbor(lives: Lives) -> list[float]:
    """The accuracy in each episode of the nearest neighbor among all earlier pictures of the life."""
    distance = torch.cdist(lives.pictures, lives.pictures)
    earlier = torch.ones_like(distance, dtype=torch.bool).tril(-1)
    nearest = distance.masked_fill(~earlier, torch.inf).argmin(dim=2)
    right = (lives.names.gather(1, nearest) == lives.names).float()
    right[:, 0] = 1 / NAMES  # nothing has been named yet
    return right.view(-1, EPISODES, SHOWN).mean((0, 2)).tolist()


def main(argv: list[str] | None = None) -> dict[str, list[float]]:
    """Train, run the lives, and print the accuracies. Returns them by the method."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a test of the program with a few steps")
    parser.add_argument("--steps", type=int, default=400, help="training steps (default: 400)")
    arguments = parser.parse_args(argv)
    model = train(World(slice(None, HELD_OUT)), 2 if arguments.quick else arguments.steps)
    count = 8 if arguments.quick else 200
    lives = World(slice(HELD_OUT, None)).lives(count, torch.Generator().manual_seed(1))
    found = {
        "memory kept": live(model, lives, keep=True),
        "memory reset with each episode": live(model, lives, keep=False),
        "nearest neighbor, all pictures kept": nearest_neighbor(lives),
    }
    print(f"\n{count} lives with held-out pictures; a guess is right {1 / NAMES:.0%} of the time")
    print(f"accuracy in episode: {'':17}" + "".join(f"{episode:7}" for episode in range(1, EPISODES + 1)))
    for name, row in found.items():
        print(f"{name:38}" + "".join(f"{share:7.1%}" for share in row))
    return found


if __name__ == "__main__":
    main()
