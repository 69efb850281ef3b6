"""The laws that every block obeys, checked by running it: ``check_block`` is what makes a custom block safe to nest."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterable

import safetensors.torch
import torch
from torch import Tensor, nn

from ..registry import Spec, create
from .block import Block, materialise
from .language_model import LanguageModel
from .placing import as_device, as_dtype
from .state import State, concatenate, detach, map_state, named_tensors, nbytes, reset, select
from .subject import LawError, Subject

FAR = 2**21
"""The position at which outputs must still be those of the first tokens."""


def check_block(
    block: Spec | Block | LanguageModel,
    dim: int = 64,
    *,
    dtype: torch.dtype = torch.float64,
    laws: Iterable[str] | None = None,
    seed: int = 0,
    length: int | None = None,
    cuts: int | None = 48,
    endurance: int = 100_000,
    device: torch.device | str = "cpu",
) -> dict[str, float]:
    """Check that a block obeys the laws; return the largest difference seen under each law.

    ``block``: a registered name, ``{"type": name, ...}``, a list, a built block or a whole model. What is passed in
    is copied, and every parameter of the copy is randomised first: a zero at the start hides what it multiplies.
    ``dim``: the width (that of a built block is its own). ``dtype``: what most laws run in; tolerances follow it.
    ``laws``: names from ``LAWS``, all by default. ``length``: tokens in a sequence; by default a prime, and so no
    multiple of any chunk, segment or window, that passes the block's period and fills its buffers. ``cuts``: at
    most so many cut points, ``None`` for every one (short sequences are always cut everywhere). ``endurance``:
    tokens streamed under that law, which takes most of the time.

    Raises ``LawError`` at the first law that fails, naming the law, the shapes and the largest difference. Laws are
    checked in an order in which the first to fail is the cause and not a consequence. Raises ``RecipeError`` for a
    description that is wrong, and ``ValueError`` for another argument that is.
    """
    if length is not None and (isinstance(length, bool) or not isinstance(length, int) or length < 4):
        raise ValueError(f"length: expected an integer >= 4, so that there is something to cut, got {length!r}")
    device, dtype = as_device(device), as_dtype(dtype)
    chosen = list(LAWS) if laws is None else [laws] if isinstance(laws, str) else list(laws)
    for law in chosen:
        if law not in LAWS:
            raise ValueError(f"unknown law {law!r}: the laws are {', '.join(LAWS)}")
    subject = Subject(block, dim, dtype=dtype, seed=seed, length=length, cuts=cuts, endurance=endurance, device=device)
    differences = {}
    for law in LAWS:
        if law in chosen:
            subject.largest = 0.0
            try:
                LAWS[law](subject)
            except LawError:
                raise
            except Exception as error:
                raise LawError(law, f"raised {type(error).__name__}: {error}") from error
            differences[law] = subject.largest
    return differences


def _purity(subject: Subject) -> None:
    """Inputs and states that are passed in are bit-identical afterwards, and so are the parameters."""
    for time in (1, subject.length):
        for masked in (False, True):
            for grad in (False, True):
                with torch.set_grad_enabled(grad):
                    _, state = subject.run(subject.tokens(2, 3, salt=1))
                    x = subject.tokens(2, time)
                    mask = subject.noise(2, time, salt=2) > -0.5 if masked else None
                    watched = {"x": x, **{f"state {path}": tensor for path, tensor in named_tensors(state)}}
                    watched |= {f"parameter {name}": tensor for name, tensor in subject.module.named_parameters()}
                    if mask is not None:
                        watched["mask"] = mask
                    before = {name: tensor.detach().clone() for name, tensor in watched.items()}
                    subject.run(x, state, mask)
                for name, tensor in watched.items():
                    subject.same("purity", f"{name} after a call with time {time}", tensor.detach(), before[name], 0.0)


def _determinism(subject: Subject) -> None:
    """Same inputs, same device, deterministic mode: bit-equal outputs, state and gradients."""
    mode, warn = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        runs = []
        for _ in range(2):
            x = subject.tokens(2, subject.length).requires_grad_()
            y, state = subject.run(x)
            runs.append((y.detach(), detach(state), _gradients(subject, x, y)))
    finally:
        torch.use_deterministic_algorithms(mode, warn_only=warn)
    subject.same("determinism", "outputs of two runs", runs[0][0], runs[1][0], 0.0)
    subject.same_state("determinism", "two runs", runs[0][1], runs[1][1], 0.0)
    for name, gradient in runs[0][2].items():
        subject.same("determinism", f"gradients of {name} in two runs", gradient, runs[1][2][name], 0.0)


def _gradients(subject: Subject, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """Gradients of a random weighting of ``y`` at ``x`` and at every parameter; zeros where there is none."""
    leaves = {"x": x, **dict(subject.module.named_parameters())}
    if not y.requires_grad:
        return {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}
    loss = (y * subject.noise(*y.shape, salt=1)).sum()
    found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True, materialize_grads=True)
    return dict(zip(leaves, found))


def _meta(subject: Subject) -> None:
    """Built on the meta device and then materialised with the same seed = built directly."""
    given = subject.given
    if isinstance(given, nn.Module):
        direct, meta = copy.deepcopy(given), copy.deepcopy(given).to("meta")
    else:
        direct = create(given, dim=subject.dim)
        with torch.device("meta"):
            meta = create(given, dim=subject.dim)
    for module in (direct, meta):
        materialise(module, subject.device, subject.dtype, subject.seed)
    for name, tensor in direct.state_dict().items():
        subject.same("meta", f"{name}, built on meta", meta.state_dict()[name], tensor, 0.0)
    x = subject.tokens(2, subject.length)
    with torch.no_grad():
        (y, state), (expected, expected_state) = subject.run(x, module=meta), subject.run(x, module=direct)
    subject.same("meta", "outputs of the block built on meta", y, expected, 0.0)
    subject.same_state("meta", "of the block built on meta", state, expected_state, 0.0)


def _causal(subject: Subject) -> None:
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
        ahead = _gradients(subject, x, y[:, :t])["x"][:, t:]
        what = f"gradient of outputs before token {t} at tokens from {t} on"
        subject.same("causal", what, ahead, torch.zeros_like(ahead))


def _split(subject: Subject) -> None:
    """Any cut of the time axis, at any point, gives the uncut outputs and final state."""
    with torch.no_grad():
        x = subject.tokens(2, subject.length)
        y, state = subject.run(x)
        for cut in subject.cut_points():
            pieces = [(0, cut), (cut, subject.length)]
            _in_pieces(subject, "split", f"cut at {cut} of {subject.length}", x, y, state, pieces)
        bounds = [0, *torch.arange(2, subject.length - 1, 2 + subject.length // 9).tolist(), subject.length]
        _in_pieces(subject, "split", f"cut at {bounds[1:-1]}", x, y, state, list(itertools.pairwise(bounds)))


def _step(subject: Subject) -> None:
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


def _row(subject: Subject) -> None:
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


def _rows(subject: Subject) -> None:
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


def _mask(subject: Subject) -> None:
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


def _gradient(subject: Subject) -> None:
    """Gradients flow through a passed state, agree with finite differences, and ``detach`` alone cuts them."""
    length = subject.length
    x = subject.tokens(2, length).requires_grad_()
    whole = _gradients(subject, x, subject.run(x)[0])
    for cut in (length // 2, max(2, length - 3)):
        first, state = subject.run(x[:, :cut])
        second, _ = subject.run(x[:, cut:], state)
        for name, gradient in _gradients(subject, x, torch.cat([first, second], dim=1)).items():
            what = f"gradient of {name} through a state passed on at {cut}"
            subject.same("gradient", what, gradient, whole[name], 10 * subject.tolerance)

    x = subject.tokens(2, 4).requires_grad_()
    _, state = subject.run(x)
    y, _ = subject.run(subject.tokens(2, 3, salt=2), detach(state))
    (leaked,) = torch.autograd.grad(y.sum(), x, allow_unused=True) if y.requires_grad else (None,)
    if leaked is not None:
        raise LawError("gradient", "a gradient passes a detached state: the block keeps tensors outside its state")
    _finite_differences(subject)


def _finite_differences(subject: Subject) -> None:
    """The derivative along a random direction in each tensor: inputs, state and parameters, in float64."""
    module = copy.deepcopy(subject.module).double()
    with torch.no_grad():
        # a few tokens across a chunk or segment boundary
        warm = subject.noise(2, max(1, subject.period - 3), subject.dim, salt=3, dtype=torch.float64)
        _, state = subject.run(warm, module=module)
    paths = [path for path, tensor in named_tensors(state) if tensor.is_floating_point()]
    tensors = {
        "x": subject.noise(2, 7, subject.dim, salt=4, dtype=torch.float64),
        **{f"state {path}": tensor for path, tensor in named_tensors(state) if path in paths},
        **{f"parameter {name}": parameter.detach() for name, parameter in module.named_parameters()},
    }
    weights: Tensor | None = None

    def evaluate(values: dict[str, Tensor]) -> Tensor:
        nonlocal weights
        given = dict(named_tensors(state)) | {path: values[f"state {path}"] for path in paths}
        leaves = iter(given.values())
        replaced = map_state(lambda _: next(leaves), state)
        own = {name: values[f"parameter {name}"] for name, _ in module.named_parameters()}

        class Call(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.inner = module

            def forward(self, x: Tensor) -> tuple[Tensor, State]:
                return subject.run(x, replaced, module=self.inner)

        y, after = torch.func.functional_call(Call(), {f"inner.{k}": v for k, v in own.items()}, (values["x"],))
        outputs = [y, *(t for _, t in named_tensors(after) if t.is_floating_point())]
        if weights is None:
            weights = subject.noise(sum(t.numel() for t in outputs), salt=5, dtype=torch.float64)
        return torch.cat([t.double().flatten() for t in outputs]) @ weights

    leaves = {name: tensor.clone().requires_grad_() for name, tensor in tensors.items()}
    total = evaluate(leaves)
    if not total.requires_grad:
        return
    found = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    size = max(1.0, abs(float(total.detach())))
    for index, ((name, tensor), gradient) in enumerate(zip(tensors.items(), found)):
        if tensor.numel() == 0:
            continue
        direction = subject.noise(*tensor.shape, salt=6 + index, dtype=torch.float64)
        direction = direction / direction.norm() * max(1.0, float(tensor.detach().norm()))
        got = 0.0 if gradient is None else float((gradient.detach() * direction).sum())
        # a small step drowns in rounding, a large one crosses kinks: a right derivative is confirmed by one of them
        seen = []
        for step in (1e-6, 1e-5, 1e-4):
            with torch.no_grad():
                ahead = evaluate(tensors | {name: tensor + step * direction})
                behind = evaluate(tensors | {name: tensor - step * direction})
            seen.append(float(ahead - behind) / (2 * step))
            if abs(got - seen[-1]) <= 1e-5 * max(abs(got), abs(seen[-1])) + 1e-8 * size:
                break
        else:
            expected = min(seen, key=lambda value: abs(got - value))
            raise LawError(
                "gradient",
                f"{name} {list(tensor.shape)}: along a direction the derivative is {got:.8g}, "
                f"finite differences say {expected:.8g}",
                abs(got - expected),
            )


def _save(subject: Subject) -> None:
    """The state survives a round trip through a file, bit by bit, and running goes on from it unchanged."""
    with torch.no_grad():
        _, state = subject.run(subject.tokens(2, 5))
        for kept in (state, subject.fresh(2)):
            tensors = {path: tensor.contiguous().clone() for path, tensor in named_tensors(kept)}
            loaded = safetensors.torch.load(safetensors.torch.save(tensors))
            names = iter(tensors)
            back = map_state(lambda old: loaded[next(names)].to(old.device), kept)  # noqa: B023
            subject.same_state("save", "saved and loaded", back, kept, 0.0)
            x = subject.tokens(2, subject.length, salt=1)
            (y, after), (expected, expected_after) = subject.run(x, back), subject.run(x, kept)
            # strides differ, and with them the order of sums
            subject.same("save", "outputs from a loaded state", y, expected)
            subject.same_state("save", "after running from a loaded state", after, expected_after)


def _dtype(subject: Subject) -> None:
    """A bfloat16 model keeps the state dtype its block declares: that of ``init_state``."""
    with torch.no_grad():
        for dtype in (torch.bfloat16, torch.float32):
            module = copy.deepcopy(subject.initial).to(dtype)
            state = subject.fresh(2, module)
            declared = {path: tensor.dtype for path, tensor in named_tensors(state)}
            for time, masked in ((subject.length, False), (1, False), (5, True)):
                x = subject.noise(2, time, subject.dim, dtype=dtype)
                mask = torch.ones(2, time, dtype=torch.bool, device=subject.device) if masked else None
                if mask is not None:
                    mask[0, 1] = False
                y, state = subject.run(x, state, mask, module=module)
                if y.dtype != dtype:
                    raise LawError("dtype", f"inputs {list(x.shape)} {dtype} gave outputs {y.dtype}")
                if not y.isfinite().all():
                    raise LawError("dtype", f"outputs {list(y.shape)} in {dtype} are not finite")
                for path, tensor in named_tensors(state):
                    if tensor.dtype != declared[path]:
                        raise LawError(
                            "dtype", f"state {path} {list(tensor.shape)}: init_state declares {declared[path]}, "
                            f"a {dtype} model returned {tensor.dtype}"
                        )  # fmt: skip


def _position(subject: Subject) -> None:
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


def _endurance(subject: Subject) -> None:
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


LAWS: dict[str, Callable[[Subject], None]] = {
    "purity": _purity,
    "determinism": _determinism,
    "meta": _meta,
    "causal": _causal,
    "split": _split,
    "step": _step,
    "row": _row,
    "rows": _rows,
    "mask": _mask,
    "gradient": _gradient,
    "save": _save,
    "dtype": _dtype,
    "position": _position,
    "endurance": _endurance,
}
"""Every law by name, in the order they are checked; the first line of each function says what it demands."""
