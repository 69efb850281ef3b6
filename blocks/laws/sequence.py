"""Laws about time: causality, going back, and independence of splits and of the absolute position."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable

import torch
from torch import Tensor

from ..state import DocumentState, State, map_state, named_tensors, nbytes, select
from .subject import Result, Subject

FAR = 2**21
"""A position at which the outputs must equal those at position 0."""


def causal(subject: Subject) -> None:
    """Changing token t changes no output before t, and no output before t has a gradient at it."""
    length, period = subject.length, subject.period
    places = {1, 2, length // 3, length // 2, period - 1, period, period + 1, length - 1}
    x = subject.tokens(2, length)
    with torch.no_grad():
        for state in (None, subject.run(subject.tokens(2, 3, salt=1)).state):
            y = subject.run(x, state).y
            for t in sorted(place for place in places if 0 < place < length):
                changed = x.clone()
                changed[:, t] = 3 * subject.noise(2, subject.dim, salt=2)
                subject.same(
                    f"outputs before token {t} after a change of it", subject.run(changed, state).y[:, :t], y[:, :t]
                )
    for t in (length // 2, min(period, length - 1)):
        x = subject.tokens(2, length).requires_grad_()
        later = subject.gradients(x, subject.run(x).y[:, :t])["x"][:, t:]
        subject.same(f"gradient of outputs before token {t} at tokens from {t} on", later, torch.zeros_like(later))


def split(subject: Subject) -> None:
    """Any cut of the time axis, at any point, gives the uncut outputs and final state."""
    with torch.no_grad():
        x = subject.tokens(2, subject.length)
        whole = subject.run(x)
        for cut in subject.cut_points():
            subject.same_result(f"cut at {cut} of {subject.length}", _run_pieces(subject, x, [cut]), whole)
        cuts = torch.arange(2, subject.length - 1, 2 + subject.length // 9).tolist()
        subject.same_result(f"cut at {cuts}", _run_pieces(subject, x, cuts), whole)


def step(subject: Subject) -> None:
    """Single tokens are a split, also by a decoder; so is one token before or after a longer piece."""
    with torch.no_grad():
        x = subject.tokens(2, subject.length)
        whole, last = subject.run(x), subject.length - 1
        for what, cuts in (
            ("one token, then the rest", [1]),
            ("the last token alone", [last]),
            ("one token at a time", range(1, last + 1)),
        ):
            subject.same_result(what, _run_pieces(subject, x, cuts), whole)
    outputs, state = [], subject.fresh(2)
    with torch.inference_mode():
        decode = subject.decoder(2)
        for token in x.split(1, dim=1):
            y, state = decode(token, state)
            outputs.append(y.clone())
        subject.same_result("one token at a time by a decoder", Result(torch.cat(outputs, dim=1), state), whole)


def _run_pieces(subject: Subject, x: Tensor, cuts: Iterable[int]) -> Result:
    """Run the pieces of ``x`` between ``cuts``, each from the state after the one before."""
    state: State = None
    outputs = []
    for start, stop in itertools.pairwise([0, *cuts, x.shape[1]]):
        y, state = subject.run(x[:, start:stop], state)
        outputs.append(y)
    return Result(torch.cat(outputs, dim=1), state)


def rewind(subject: Subject) -> None:
    """The state after any prefix of a call, by going back, equals that of the prefix run alone, as do its gradients."""
    time, rows = min(subject.length, subject.reach + 3), 3
    x = subject.tokens(rows, time)
    mask = subject.noise(rows, time, salt=7) > -0.5
    with torch.no_grad():
        start = subject.run(subject.tokens(rows, 3, salt=1)).state
    for before, counts in ((None, [0, 1, time - 1]), (start, [time // 2, time, min(subject.period, time)])):
        for given in (None, mask):
            with torch.no_grad():
                subject.run(x, before, given)  # the call that is gone back into
                states = [subject.rewind(x, before, counts, given), subject.rewind(x, before, counts[1], given)]
                for row, count in enumerate(counts):
                    one = slice(row, row + 1)
                    valid = slice(None) if given is None else given[row, :count]
                    alone = None if before is None else select(before, one)
                    prefix = x[one, :count][:, valid]
                    expected = subject.run(prefix, alone).state if prefix.shape[1] else alone or subject.fresh(1)
                    what = f"back to {counts} of {time} tokens{'' if given is None else ' with a mask'}, row {row}"
                    subject.same_state(what, select(states[0], one), expected)
                    if count == counts[1]:
                        subject.same_state(f"{what}, all rows to {count}", select(states[1], one), expected)
    x, counts = subject.tokens(2, 6).requires_grad_(), [3, 5]
    got = subject.gradients(x, subject.run(x[:, :2], subject.rewind(x, None, counts)).y)
    ends = [subject.run(x[row : row + 1, :count]).state for row, count in enumerate(counts)]
    apart = [subject.run(x[row : row + 1, :2], end).y for row, end in enumerate(ends)]
    for name, gradient in subject.gradients(x, torch.cat(apart)).items():
        subject.same(f"gradient of {name} through a state gone back to", got[name], gradient, 10 * subject.tolerance)


def documents(subject: Subject) -> None:
    """Documents packed in rows give the outputs, gradients and final states of each as a row of its own.

    Their lengths are around the period. Also with padding, cut anywhere, and before more tokens.
    """
    reach = max(2, min(subject.reach, 64))
    rows = [[reach, 1, reach + 1], [1, reach - 1, 2, 2], [2 * reach + 2]]
    time = max(map(sum, rows)) + 2
    ids = torch.zeros(len(rows), time, dtype=torch.int64, device=subject.device)
    mask = torch.zeros_like(ids, dtype=torch.bool)
    for b, lengths in enumerate(rows):
        found = torch.arange(len(lengths), device=subject.device).repeat_interleave(torch.tensor(lengths))
        ids[b, b : b + len(found)], mask[b, b : b + len(found)] = 3 * found, True
        ids[b, b + len(found) :] = 3 * (len(lengths) - 1)
    x = subject.tokens(len(rows), time).requires_grad_()
    y, _ = subject.run(x, None, mask, documents=ids)
    alone, ends = [], []
    for b, lengths in enumerate(rows):
        pieces, end, at = [torch.zeros_like(y[b, :b])], None, b
        for length in lengths:
            piece, end = subject.run(x[b : b + 1, at : at + length])
            pieces, at = [*pieces, piece[0]], at + length
        alone.append(torch.cat([*pieces, torch.zeros_like(y[b, at:])]))
        ends.append(end)
    expected = torch.stack(alone)
    subject.same("outputs of packed documents", y.detach(), expected.detach())
    gradients = subject.gradients(x, expected)
    for name, gradient in subject.gradients(x, y).items():
        subject.same(f"gradient of packed documents at {name}", gradient, gradients[name])
    with torch.no_grad():
        more = subject.tokens(len(rows), 3, salt=3)
        following = [subject.run(more[b : b + 1], end) for b, end in enumerate(ends)]
        for cut in (1, reach, reach + 1, time - 1):
            first = subject.run(x[:, :cut], None, mask[:, :cut], documents=ids[:, :cut])
            second = subject.run(x[:, cut:], first.state, mask[:, cut:], documents=ids[:, cut:])
            subject.same(f"packed documents cut at {cut}", torch.cat([first.y, second.y], dim=1), expected.detach())
            after, last = subject.run(more, second.state)
            last = last.state if isinstance(last, DocumentState) else last._replace(document=last.document * 0)
            for b, alone_after in enumerate(following):
                subject.same(f"outputs after packed documents cut at {cut}", after[b : b + 1], alone_after.y)
                wanted = alone_after.state
                if hasattr(wanted, "document"):
                    wanted = wanted._replace(document=wanted.document * 0)
                subject.same_state(f"after packed documents cut at {cut}", select(last, [b]), wanted)


def position(subject: Subject) -> None:
    """Outputs do not depend on the absolute position: a fresh state moved to 2^21 gives those of one at 0."""
    offset = FAR // subject.period * subject.period
    with torch.no_grad():
        near = subject.fresh(2)
        is_position = iter([path.rpartition(".")[2] == "position" for path, _ in named_tensors(near)])
        far = map_state(lambda tensor: tensor + offset if next(is_position) else tensor, near)
        # the second call uses what the first has put into the state
        for call in (1, 2):
            x = subject.tokens(2, subject.length, salt=call)
            before = near
            (expected, near), (y, far) = subject.run(x, near), subject.run(x, far)
            subject.same(f"outputs of call {call} at position {offset}", y, expected)
        _refuse_other_counters(subject, before, near)


def _refuse_other_counters(subject: Subject, before: State, after: State) -> None:
    """Refuse an integer tensor not named ``position`` that increased by a multiple of the number of tokens.

    It was not moved to the far position. A number of used slots is no such counter, because it never exceeds the
    slots of the buffer in the same node of the state.
    """
    length, tensors = subject.length, dict(named_tensors(after))
    for path, old in named_tensors(before):
        node, _, name = path.rpartition(".")
        new = tensors[path]
        if name == "position" or new.is_floating_point() or new.is_complex() or new.dtype == torch.bool:
            continue
        increase = new - old
        buffers = [t for other, t in tensors.items() if other.rpartition(".")[0] == node and t.dim() > 2]
        if (
            increase.numel()
            and bool(((increase > 0) & (increase % length == 0)).all())
            and not any(int(new.max()) <= tensor.shape[1] for tensor in buffers)
        ):
            subject.fail(
                f"state {path} {list(new.shape)} counts tokens (it grew by {int(increase.flatten()[0])} in {length}): "
                "name that tensor 'position' (int64), so that it can be moved to check that outputs ignore it"
            )


def endurance(subject: Subject) -> None:
    """Many tokens of noise and of one repeated token: finite, and the state's bytes constant."""
    module = copy.deepcopy(subject.initial).float()
    total = min(subject.endurance, 2048) if subject.grows else subject.endurance
    repeated = subject.noise(1, 1, subject.dim, salt=1, dtype=torch.float32)
    with torch.no_grad():
        state = subject.fresh(2, module)
        size, done = nbytes(state), 0
        while done < total:
            time = min(509, total - done)
            noise = subject.noise(1, time, subject.dim, salt=2 + done, dtype=torch.float32)
            y, state = subject.run(torch.cat([noise, repeated.expand_as(noise)]), state, module=module)
            done += time
            for name, tensor in [("outputs", y), *((f"state {path}", t) for path, t in named_tensors(state))]:
                finite = tensor.isfinite().reshape(2, -1).all(dim=1)
                if not finite.all():
                    inputs = "noise" if not finite[0] else "one repeated token"
                    subject.fail(f"{name} {list(tensor.shape)} not finite within {done} tokens of {inputs}")
            if not subject.grows and nbytes(state) != size:
                subject.fail(
                    f"state of {size} bytes, {nbytes(state)} after {done} tokens; if intended, declare grows = True"
                )
