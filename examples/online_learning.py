"""Learn while in use: a memory kept over episodes against one that is reset with each.

    python examples/online_learning.py            # half a minute on one core
    python examples/online_learning.py --quick    # seconds: to see that it runs

In each life the ten digits have got new names, drawn at random. An episode shows twelve pictures; the model says a name
for each, and then is told the right one. The weights stay what they are: the names can be learned into the state alone.
After six episodes the life ends. The model was trained on many lives, with other pictures.

Printed is how often the name is right, episode by episode: with the memory kept over the episodes of a life, and with
one that starts each of them afresh. Beside them is the nearest neighbour among the pictures that have been named so far
in this life, which keeps them all, where the model's state stays as large as it was.

The digits come with scikit-learn: pip install 'titans-build[examples]'
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
"""The first of the pictures that nothing is trained on."""
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
      max_step: 3.0           # large steps, not clipped: what is told once is to be known
      clip: null
      retrieve: before        # at the picture alone it is asked what was told of pictures like it
    - {type: ffn, hidden: 128}
stack: [lmm, lmm]
"""


class Lives(NamedTuple):
    """What is shown, ``[lives, pictures, 9]``, and what it is called there, ``[lives, pictures]``."""

    pictures: Tensor
    names: Tensor


class World:
    """A part of the digits, from which lives are drawn."""

    def __init__(self, part: slice) -> None:
        from sklearn.datasets import load_digits
        from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

        data = load_digits()
        # nine features in which digits lie apart, found in the pictures that are trained on
        found = LinearDiscriminantAnalysis().fit(data.data[:HELD_OUT], data.target[:HELD_OUT])
        features = torch.from_numpy(found.transform(data.data)).float()
        self.pictures = (features / features[:HELD_OUT].std(0))[part]
        self.digits = torch.from_numpy(data.target[part]).long()

    def lives(self, count: int, draws: torch.Generator) -> Lives:
        """``count`` lives, each with names of its own."""
        shown = torch.randint(len(self.digits), (count, EPISODES * SHOWN), generator=draws)
        names = torch.rand(count, NAMES, generator=draws).argsort(dim=1)
        return Lives(self.pictures[shown], names.gather(1, self.digits[shown]))


class Learner(nn.Module):
    """Each picture is two tokens: the picture, at which a name is said; and the picture with its right name."""

    def __init__(self) -> None:
        super().__init__()
        self.body = tb.build(tb.load_recipe(RECIPE), seed=0)
        torch.manual_seed(0)
        self.into = nn.Linear(FEATURES + NAMES + 1, self.body.dim)
        self.out = nn.Linear(self.body.dim, NAMES)

    def forward(self, lives: Lives, state: object = None) -> tuple[Tensor, object]:
        """Some pictures of lives, and a state -> scores of the names ``[lives, pictures, 10]``, and the next state."""
        rows, time, _ = lives.pictures.shape
        asked = torch.cat([lives.pictures, torch.zeros(rows, time, NAMES + 1)], dim=2)
        told = torch.cat([lives.pictures, one_hot(lives.names, NAMES), torch.ones(rows, time, 1)], dim=2)
        tokens = torch.stack([asked, told], dim=2).flatten(1, 2)
        read = self.body(embeddings=self.into(tokens), state=state)
        return self.out(read.hidden[:, ::2]), read.state


def train(world: World, steps: int, rows: int = 16) -> Learner:
    """A learner that was trained on ``steps`` times ``rows`` lives."""
    model = Learner()
    optimiser = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, max_lr=5e-3, total_steps=steps)
    draws = torch.Generator().manual_seed(0)
    for step in range(steps):
        lives = world.lives(rows, draws)
        scores, _ = model(lives)
        loss = nn.functional.cross_entropy(scores.flatten(0, 1), lives.names.flatten())
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        if step % max(1, steps // 8) == 0 or step == steps - 1:
            print(f"step {step:4d}: loss {float(loss.detach()):.3f}", flush=True)
    return model


@torch.no_grad()
def live(model: Learner, lives: Lives, keep: bool) -> list[float]:
    """The share of right names in each episode; ``keep``: with the state of the episodes before."""
    found, state = [], None
    for start in range(0, EPISODES * SHOWN, SHOWN):
        episode = Lives(*(part[:, start : start + SHOWN] for part in lives))
        scores, state = model(episode, state if keep else None)
        found.append(float((scores.argmax(-1) == episode.names).float().mean()))
    return found


def nearest_neighbour(lives: Lives) -> list[float]:
    """The share of right names in each episode, with every picture of the life kept and looked through."""
    distance = torch.cdist(lives.pictures, lives.pictures)
    earlier = torch.ones_like(distance, dtype=torch.bool).tril(-1)
    nearest = distance.masked_fill(~earlier, torch.inf).argmin(dim=2)
    right = (lives.names.gather(1, nearest) == lives.names).float()
    right[:, 0] = 1 / NAMES  # nothing has been named yet
    return right.view(-1, EPISODES, SHOWN).mean((0, 2)).tolist()


def main(argv: list[str] | None = None) -> dict[str, list[float]]:
    """Train, live, and print how often the names are right, which is also returned."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a few steps, to see that it runs: no figures to quote")
    parser.add_argument("--steps", type=int, default=400, help="training steps (default: 400)")
    arguments = parser.parse_args(argv)
    model = train(World(slice(None, HELD_OUT)), 2 if arguments.quick else arguments.steps)
    count = 8 if arguments.quick else 200
    lives = World(slice(HELD_OUT, None)).lives(count, torch.Generator().manual_seed(1))
    found = {
        "memory kept": live(model, lives, keep=True),
        "memory reset with each episode": live(model, lives, keep=False),
        "nearest neighbour, all pictures kept": nearest_neighbour(lives),
    }
    print(f"\n{count} lives with held-out pictures; a guess is right {1 / NAMES:.0%} of the time")
    print(f"names right in episode: {'':14}" + "".join(f"{episode:7}" for episode in range(1, EPISODES + 1)))
    for name, row in found.items():
        print(f"{name:38}" + "".join(f"{share:7.1%}" for share in row))
    return found


if __name__ == "__main__":
    main()
