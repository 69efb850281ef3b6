"""The law about gradients."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from ..state import State, detach, map_state, named_tensors
from .subject import LawError, Subject


def gradient(subject: Subject) -> None:
    """Gradients flow through a passed state, agree with finite differences, and ``detach`` alone cuts them."""
    length = subject.length
    x = subject.tokens(2, length).requires_grad_()
    whole = gradients(subject, x, subject.run(x)[0])
    for cut in (length // 2, max(2, length - 3)):
        first, state = subject.run(x[:, :cut])
        second, _ = subject.run(x[:, cut:], state)
        for name, gradient in gradients(subject, x, torch.cat([first, second], dim=1)).items():
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


def gradients(subject: Subject, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """Gradients of a random weighting of ``y`` at ``x`` and at every parameter; zeros where there is none."""
    leaves = {"x": x, **dict(subject.module.named_parameters())}
    if not y.requires_grad:
        return {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}
    loss = (y * subject.noise(*y.shape, salt=1)).sum()
    found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True, materialize_grads=True)
    return dict(zip(leaves, found))
