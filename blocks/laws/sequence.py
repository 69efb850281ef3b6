"""Laws about time: no token hears of later ones, and nothing depends on how a sequence was cut or where it stands."""

from __future__ import annotations

import copy
import itertools

import torch
from torch import Tensor

from ..state import State, map_state, named_tensors, nbytes
from .gradient import gradients
from .subject import LawError, Subject

FAR = 2**21
"""The position at which outputs must still be those of the first tokens."""


def causal(subject: Subject) -> None:
    """Changing token t changes no output before t, and no output before t has a gradient at it."""
    length, period = subject.length, subject.period
    places = {1, 2, length // 3, length // 2, period - 1, period, period + 1, length - 1}
    x = subject.tokens(2, length)
    with torch.no_grad():
        _, later = subject.run(subject.tokens(2, 3, salt=1))
        for state in (None, later):
            y, _ = subject.run(x, state)
            for t in sorted(place for place in places if 0 < place < length):
                changed = x.clone()
                changed[:, t] = 3 * subject.noise(2, subject.dim, salt=2)
                got, _ = subject.run(changed, state)
                subject.same("causal", f"outputs before token {t} after a change of it", got[:, :t], y[:, :t])
    for t in (length // 2, min(period, length - 1)):
        x = subject.tokens(2, length).requires_grad_()
        y, _ = subject.run(x)
        ahead = gradients(subject, x, y[:, :t])["x"][:, t:]
        what = f"gradient of outputs before token {t} at tokens from {t} on"
        subject.same("causal", what, ahead, torch.zeros_like(ahead))


def split(subject: Subject) -> None:
    """Any cut of the time axis, at any point, gives the uncut outputs and final state."""
    with torch.no_grad():
        x = subject.tokens(2, subject.length)
        y, state = subject.run(x)
        for cut in subject.cut_points():
            pieces = [(0, cut), (cut, subject.length)]
            _in_pieces(subject, "split", f"cut at {cut} of {subject.length}", x, y, state, pieces)
        bounds = [0, *torch.arange(2, subject.length - 1, 2 + subject.length // 9).tolist(), subject.length]
        _in_pieces(subject, "split", f"cut at {bounds[1:-1]}", x, y, state, list(itertools.pairwise(bounds)))


def step(subject: Subject) -> None:
    """Time = 1 repeated is a split, called or by a prepared decoder; so is one token before or after a longer piece."""
    with torch.no_grad():
        x, last = subject.tokens(2, subject.length), subject.length
        y, state = subject.run(x)
        _in_pieces(subject, "step", "one token, then the rest", x, y, state, [(0, 1), (1, last)])
        _in_pieces(subject, "step", "the last token alone", x, y, state, [(0, last - 1), (last - 1, last)])
        _in_pieces(subject, "step", "one token at a time", x, y, state, [(t, t + 1) for t in range(last)])
    outputs, running = [], subject.fresh(2)
    with torch.inference_mode():
        decode = subject.decoder(2)
        for token in x.split(1, dim=1):
            out, running = decode(token, running)
            outputs.append(out.clone())
        subject.same("step", "outputs, one token at a time by a decoder", torch.cat(outputs, dim=1), y)
        subject.same_state("step", "one token at a time by a decoder", running, state)


def _in_pieces(
    subject: Subject, law: str, what: str, x: Tensor, y: Tensor, state: State, pieces: list[tuple[int, int]]
) -> None:
    running: State = None
    outputs = []
    for start, stop in pieces:
        piece, running = subject.run(x[:, start:stop], running)
        outputs.append(piece)
    subject.same(law, f"outputs, {what}", torch.cat(outputs, dim=1), y)
    subject.same_state(law, what, running, state)


def position(subject: Subject) -> None:
    """Outputs do not depend on the absolute position: a fresh state moved to 2^21 gives those of one at 0."""
    offset = FAR // subject.period * subject.period
    with torch.no_grad():
        near = subject.fresh(2)
        places = iter([path.rpartition(".")[2] == "position" for path, _ in named_tensors(near)])
        far = map_state(lambda tensor: tensor + offset if next(places) else tensor, near)
        # the second call sees what the first has put into the state
        for call in (1, 2):
            x = subject.tokens(2, subject.length, salt=call)
            before = near
            (expected, near), (y, far) = subject.run(x, near), subject.run(x, far)
            subject.same("position", f"outputs of call {call}, {offset} tokens further on", y, expected)
        _refuse_hidden_counters(before, near, subject.length)


def _refuse_hidden_counters(before: State, after: State, length: int) -> None:
    """Refuse an integer leaf, not named ``position``, that ``length`` more tokens moved by a multiple of their number.

    The law could not move it to a far position. A count of slots in use is no such counter, and nothing that could
    be moved: it never exceeds the slots of the buffer beside it.
    """
    leaves = dict(named_tensors(after))
    for path, old in named_tensors(before):
        node, _, name = path.rpartition(".")
        new = leaves[path]
        if name == "position" or new.is_floating_point() or new.is_complex() or new.dtype == torch.bool:
            continue
        moved = new - old
        beside = [t for other, t in leaves.items() if other.rpartition(".")[0] == node and t.dim() > 2]
        if (
            moved.numel()
            and bool(((moved > 0) & (moved % length == 0)).all())
            and not any(int(new.max()) <= tensor.shape[1] for tensor in beside)
        ):
            raise LawError(
                "position",
                f"state {path} {list(new.shape)} counts tokens (it grew by {int(moved.flatten()[0])} in {length}): "
                "name that leaf 'position' (int64), by which positions are shifted to check that outputs ignore them",
            )


def endurance(subject: Subject) -> None:
    """Many tokens of noise and of one repeated token: finite, and the state's bytes constant."""
    module = copy.deepcopy(subject.initial).float()
    total = min(subject.endurance, 2048) if subject.grows else subject.endurance
    piece = min(total, 509)
    repeated = subject.noise(1, 1, subject.dim, salt=1, dtype=torch.float32)
    with torch.no_grad():
        state = subject.fresh(2, module)
        size, done = nbytes(state), 0
        while done < total:
            time = min(piece, total - done)
            noise = subject.noise(1, time, subject.dim, salt=2 + done, dtype=torch.float32)
            y, state = subject.run(torch.cat([noise, repeated.expand_as(noise)]), state, module=module)
            done += time
            for name, tensor in [("outputs", y), *((f"state {path}", t) for path, t in named_tensors(state))]:
                finite = tensor.isfinite().reshape(2, -1).all(dim=1)
                if not finite.all():
                    row = "noise" if not finite[0] else "one repeated token"
                    raise LawError("endurance", f"{name} {list(tensor.shape)} not finite within {done} tokens of {row}")
            if not subject.grows and nbytes(state) != size:
                raise LawError(
                    "endurance",
                    f"state of {size} bytes, {nbytes(state)} after {done} tokens; if meant, declare grows = True",
                )
