"""Laws about tensors: which are left alone, come out the same again, survive a file, and of which dtype they are."""

from __future__ import annotations

import copy

import safetensors.torch
import torch
from torch import nn

from ...registry import create
from ..build import materialise
from ..state import detach, map_state, named_tensors
from .gradient import gradients
from .subject import LawError, Subject


def purity(subject: Subject) -> None:
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


def determinism(subject: Subject) -> None:
    """Same inputs, same device, deterministic mode: bit-equal outputs, state and gradients."""
    mode, warn = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        runs = []
        for _ in range(2):
            x = subject.tokens(2, subject.length).requires_grad_()
            y, state = subject.run(x)
            runs.append((y.detach(), detach(state), gradients(subject, x, y)))
    finally:
        torch.use_deterministic_algorithms(mode, warn_only=warn)
    subject.same("determinism", "outputs of two runs", runs[0][0], runs[1][0], 0.0)
    subject.same_state("determinism", "two runs", runs[0][1], runs[1][1], 0.0)
    for name, gradient in runs[0][2].items():
        subject.same("determinism", f"gradients of {name} in two runs", gradient, runs[1][2][name], 0.0)


def meta(subject: Subject) -> None:
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


def save(subject: Subject) -> None:
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
                    raise LawError("dtype", f"inputs {list(x.shape)} {dtype} gave outputs {y.dtype}")
                if not y.isfinite().all():
                    raise LawError("dtype", f"outputs {list(y.shape)} in {dtype} are not finite")
                for path, tensor in named_tensors(state):
                    if tensor.dtype != declared[path]:
                        raise LawError(
                            "dtype", f"state {path} {list(tensor.shape)}: init_state declares {declared[path]}, "
                            f"a {dtype} model returned {tensor.dtype}"
                        )  # fmt: skip
