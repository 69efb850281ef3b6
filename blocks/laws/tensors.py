"""Laws about tensors: purity, determinism, initialization on the meta device, gradients, saving and dtypes."""

from __future__ import annotations

import copy
import itertools

import safetensors.torch
import torch
from torch import Tensor, nn

from ...registry import create
from ..build import materialize
from ..state import State, detach, map_state, named_tensors
from .subject import Result, Subject


def purity(subject: Subject) -> None:
    """Inputs and states that are passed in are bit-identical afterwards, and so are the parameters."""
    for time, masked, grad in itertools.product((1, subject.length), (False, True), (False, True)):
        with torch.set_grad_enabled(grad):
            state = subject.run(subject.tokens(2, 3, salt=1)).state
            x = subject.tokens(2, time)
            mask = subject.noise(2, time, salt=2) > -0.5 if masked else None
            given = {"x": x, **{f"state {path}": tensor for path, tensor in named_tensors(state)}}
            given |= {f"parameter {name}": tensor for name, tensor in subject.module.named_parameters()}
            if mask is not None:
                given["mask"] = mask
            before = {name: tensor.detach().clone() for name, tensor in given.items()}
            subject.run(x, state, mask)
        for name, tensor in given.items():
            subject.same(f"{name} after a call with time {time}", tensor.detach(), before[name], 0.0)


def determinism(subject: Subject) -> None:
    """Same inputs, same device, deterministic mode: bit-equal outputs, state and gradients."""
    mode, warn = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        runs = []
        for _ in range(2):
            x = subject.tokens(2, subject.length).requires_grad_()
            y, state = subject.run(x)
            runs.append((Result(y.detach(), detach(state)), subject.gradients(x, y)))
    finally:
        torch.use_deterministic_algorithms(mode, warn_only=warn)
    (first, gradients), (second, expected) = runs
    subject.same_result("of two runs", first, second, 0.0)
    for name, gradient in gradients.items():
        subject.same(f"gradients of {name} in two runs", gradient, expected[name], 0.0)


def meta(subject: Subject) -> None:
    """Built on the meta device and then materialized with the same seed = built directly."""
    given = subject.given
    if isinstance(given, nn.Module):
        direct, meta = copy.deepcopy(given), copy.deepcopy(given).to("meta")
    else:
        direct = create(given, dim=subject.dim)
        with torch.device("meta"):
            meta = create(given, dim=subject.dim)
    for module in (direct, meta):
        materialize(module, subject.device, subject.dtype, subject.seed)
    for name, tensor in direct.state_dict().items():
        subject.same(f"{name}, built on meta", meta.state_dict()[name], tensor, 0.0)
    x = subject.tokens(2, subject.length)
    with torch.no_grad():
        subject.same_result(
            "of the block built on meta", subject.run(x, module=meta), subject.run(x, module=direct), 0.0
        )


def gradient(subject: Subject) -> None:
    """Gradients flow through a passed state, agree with finite differences, and ``detach`` alone cuts them."""
    length = subject.length
    x = subject.tokens(2, length).requires_grad_()
    whole = subject.gradients(x, subject.run(x).y)
    for cut in (length // 2, max(2, length - 3)):
        first, state = subject.run(x[:, :cut])
        second, _ = subject.run(x[:, cut:], state)
        for name, gradient in subject.gradients(x, torch.cat([first, second], dim=1)).items():
            what = f"gradient of {name} through the state at {cut}"
            subject.same(what, gradient, whole[name], 10 * subject.tolerance)

    x = subject.tokens(2, 4).requires_grad_()
    _, state = subject.run(x)
    y, _ = subject.run(subject.tokens(2, 3, salt=2), detach(state))
    (leaked,) = torch.autograd.grad(y.sum(), x, allow_unused=True) if y.requires_grad else (None,)
    if leaked is not None:
        subject.fail("a gradient passes a detached state: the block keeps tensors outside its state")
    _finite_differences(subject)


def _finite_differences(subject: Subject) -> None:
    """Compare derivatives along a random direction of each input, state and parameter tensor, in float64."""
    module = copy.deepcopy(subject.module).double()
    with torch.no_grad():
        # the tokens below then cross the boundary of a chunk or segment
        first = subject.noise(2, max(1, subject.period - 3), subject.dim, salt=3, dtype=torch.float64)
        state = subject.run(first, module=module).state
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
        # small steps suffer from rounding, large ones cross points without derivative; one of them confirms it
        quotients = []
        for step in (1e-6, 1e-8, 1e-5, 1e-4):
            with torch.no_grad():
                ahead = evaluate(tensors | {name: tensor + step * direction})
                behind = evaluate(tensors | {name: tensor - step * direction})
            quotients.append(float(ahead - behind) / (2 * step))
            if abs(got - quotients[-1]) <= 1e-5 * max(abs(got), abs(quotients[-1])) + 1e-8 * size:
                break
        else:
            expected = min(quotients, key=lambda value: abs(got - value))
            subject.fail(
                f"{name} {list(tensor.shape)}: along a direction the derivative is {got:.8g}, "
                f"finite differences say {expected:.8g}",
                abs(got - expected),
            )


def save(subject: Subject) -> None:
    """The state survives a round trip through a file, bit by bit, and running goes on from it unchanged."""
    with torch.no_grad():
        state = subject.run(subject.tokens(2, 5)).state
        for kept in (state, subject.fresh(2)):
            tensors = {path: tensor.contiguous().clone() for path, tensor in named_tensors(kept)}
            loaded = safetensors.torch.load(safetensors.torch.save(tensors))
            names = iter(tensors)
            back = map_state(lambda old: loaded[next(names)].to(old.device), kept)  # noqa: B023
            subject.same_state("saved and loaded", back, kept, 0.0)
            x = subject.tokens(2, subject.length, salt=1)
            # not bit-identical: strides differ, and with them the order of sums
            subject.same_result("from a loaded state", subject.run(x, back), subject.run(x, kept))


def dtype(subject: Subject) -> None:
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
                    subject.fail(f"inputs {list(x.shape)} {dtype} gave outputs {y.dtype}")
                if not y.isfinite().all():
                    subject.fail(f"outputs {list(y.shape)} in {dtype} are not finite")
                for path, tensor in named_tensors(state):
                    if tensor.dtype != declared[path]:
                        subject.fail(
                            f"state {path} {list(tensor.shape)}: init_state declares {declared[path]}, "
                            f"a {dtype} model returned {tensor.dtype}"
                        )  # fmt: skip
