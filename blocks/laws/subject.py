"""``Subject``: a block under test, with inputs for it and comparisons of its outputs and states."""

from __future__ import annotations

import copy
import itertools
import math
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn

from ...registry import create
from ..build import materialize
from ..decode import Decoder, decoder
from ..language_model import LanguageModel
from ..state import State, named_tensors, rewind


class LawError(AssertionError):
    """A block violates a law.

    ``law``: the name of the law, or ``shape`` if the outputs do not have the shape of the inputs. ``difference``: the
    largest difference, if the law compares tensors.
    """

    def __init__(self, law: str, message: str, difference: float | None = None) -> None:
        super().__init__(f"law {law!r}: {message}")
        self.law = law
        self.difference = difference


class Result(NamedTuple):
    """Outputs ``[rows, time, dim]`` and the state after them."""

    y: Tensor
    state: State


class Subject:
    """A copy of a block or model with randomized parameters, and the methods that the laws use."""

    def __init__(
        self,
        block: Any,
        dim: int,
        *,
        dtype: torch.dtype,
        seed: int,
        length: int | None,
        cuts: int | None,
        endurance: int,
        device: torch.device | str,
    ) -> None:
        self.given = block
        self.dtype, self.seed, self.cuts, self.endurance, self.device = dtype, seed, cuts, endurance, device
        self.tolerance = {torch.float64: 1e-9, torch.float32: 1e-4}.get(dtype, 2e-2)
        self.law = "meta"
        """The law that is being checked."""
        self.largest = 0.0
        """The largest difference seen under it."""
        if isinstance(block, nn.Module):
            initial: Any = copy.deepcopy(block)
            self.dim = int(initial.dim)
        else:
            self.dim = dim
            # not created on the meta device, which only the law "meta" tests
            initial = create(block, dim=dim)
            try:
                materialize(initial, "cpu", torch.float32, seed)
            except RuntimeError as error:
                raise LawError("meta", str(error)) from error
        self.initial = initial.to(device=device)
        self.module = copy.deepcopy(self.initial).to(dtype)
        with torch.no_grad():
            trained = [parameter for parameter in self.module.parameters() if parameter.requires_grad]
            for index, parameter in enumerate(trained):
                scale = 0.3 * (parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 1.0)
                parameter.add_(scale * self.noise(*parameter.shape, salt=1000 + index, dtype=parameter.dtype))
        self.period, self.grows = int(self.module.period), bool(self.module.grows)
        buffers = [tensor.shape[1] for _, tensor in named_tensors(self.fresh(1)) if tensor.dim() > 2]
        self.reach = max([self.period, *buffers])
        """Tokens after which every chunk, segment and buffer has been filled once."""
        shortest = max(19, self.reach + self.reach // 2 + 5)
        self.length = length or next(n for n in itertools.count(shortest) if _is_prime(n))

    def run(
        self,
        x: Tensor,
        state: State = None,
        mask: Tensor | None = None,
        module: Any = None,
        documents: Tensor | None = None,
    ) -> Result:
        """Run ``module``, by default the subject, on ``x`` [rows, time, dim].

        The outputs of a model are its logits, or its hidden values if it has no vocabulary.
        """
        module = self.module if module is None else module
        if isinstance(module, LanguageModel):
            out = module(embeddings=x, state=state, mask=mask, documents=documents, check_finite=False)
            return Result(out.hidden if out.logits is None else out.logits, out.state)
        y, state = module(x, state, mask=mask, documents=documents)
        if y.shape != x.shape:  # otherwise a residual connection could broadcast them
            raise LawError("shape", f"inputs {list(x.shape)} gave outputs {list(y.shape)}: expected the same shape")
        return Result(y, state)

    def rewind(self, x: Tensor, state: State, count: int | list[int], mask: Tensor | None = None) -> State:
        """The state after the first ``count`` tokens of ``run(x, state, mask)``."""
        if not isinstance(self.module, LanguageModel):
            return rewind(self.module, state, x, count, mask=mask)
        out = self.module(embeddings=x, state=state, mask=mask, check_finite=False, rewindable=True)
        return out.rewind(count)

    def decoder(self, rows: int, module: Any = None) -> Decoder:
        """The decoder of ``module``, by default of the subject, with the outputs of :meth:`run`."""
        model = self.module if module is None else module
        if not isinstance(model, LanguageModel):
            return decoder(model, rows)
        decode = model.decoder(rows)

        def run(x: Tensor, state: State) -> tuple[Tensor, State]:
            hidden, state = decode(x, state)
            return hidden if model.vocab is None else model.predict(hidden), state

        return run

    def fresh(self, rows: int, module: Any = None) -> State:
        """``init_state`` of ``module``, by default of the subject, without gradients."""
        with torch.no_grad():
            return (self.module if module is None else module).init_state(rows)

    def noise(self, *shape: int, salt: int = 0, dtype: torch.dtype | None = None) -> Tensor:
        """Standard normal noise, determined by ``shape``, ``salt`` and the seed."""
        generator = torch.Generator().manual_seed(self.seed * 7919 + salt)
        drawn = torch.randn(*shape, generator=generator, dtype=torch.float64)
        return drawn.to(device=self.device, dtype=dtype or self.dtype)

    def tokens(self, rows: int, time: int, salt: int = 0) -> Tensor:
        """Noise as inputs ``[rows, time, dim]``."""
        return self.noise(rows, time, self.dim, salt=salt)

    def gradients(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        """Gradients of a random weighting of ``y`` at ``x`` and all parameters. Zeros if there are none."""
        trained = {name: tensor for name, tensor in self.module.named_parameters() if tensor.requires_grad}
        leaves = {"x": x, **trained}
        if not y.requires_grad:
            return {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}
        loss = (y * self.noise(*y.shape, salt=1)).sum()
        found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True, materialize_grads=True)
        return dict(zip(leaves, found))

    def cut_points(self) -> list[int]:
        """All positions, or, if there are too many, those around multiples of the period and evenly spaced ones."""
        inner = range(2, self.length - 1)
        if self.cuts is None or len(inner) <= self.cuts:
            return list(inner)
        near = [k + d for k in range(self.period, self.length, self.period) for d in (-1, 0, 1)]
        near = near[:: max(1, math.ceil(len(near) / (self.cuts // 2)))]
        even = [round(i * (self.length - 3) / (self.cuts // 2)) + 2 for i in range(self.cuts // 2)]
        return sorted({k for k in [*near, *even] if k in inner})

    def fail(self, message: str, difference: float | None = None) -> NoReturn:
        raise LawError(self.law, message, difference)

    def same(self, what: str, got: Tensor, expected: Tensor, tolerance: float | None = None) -> None:
        """Raise ``LawError`` unless the tensors agree.

        ``tolerance`` is relative to the largest expected value, but at least absolute. 0: bit-identical.
        """
        tolerance = self.tolerance if tolerance is None else tolerance
        if got.shape != expected.shape or got.dtype != expected.dtype:
            kinds = (f"{list(tensor.shape)} {tensor.dtype}" for tensor in (got, expected))
            self.fail(f"{what}: got {next(kinds)}, expected {next(kinds)}")
        if got.numel() == 0 or torch.equal(got, expected):
            return
        wide = torch.complex128 if got.is_complex() else torch.float64
        error = (got.to(wide) - expected.to(wide)).abs()
        scale = max(1.0, float(expected.to(wide).abs().nan_to_num().max()))
        difference = float(error.max())
        if not difference <= tolerance * scale:
            place = [int(i) for i in torch.unravel_index(error.nan_to_num(nan=math.inf).argmax(), error.shape)]
            self.fail(
                f"{what}, {list(got.shape)}: largest difference {difference:.3g} at {place} "
                f"(values up to {scale:.3g}, tolerance {tolerance * scale:.1g})",
                difference,
            )
        self.largest = max(self.largest, difference)

    def same_state(self, what: str, got: State, expected: State, tolerance: float | None = None) -> None:
        """``same`` for all tensors of two states. Integers must be equal."""
        tensors, wanted = dict(named_tensors(got)), dict(named_tensors(expected))
        if tensors.keys() != wanted.keys():
            odd = sorted(tensors.keys() ^ wanted.keys())
            self.fail(f"{what}: the state's structure changed: {', '.join(odd)} on one side only")
        for path, tensor in tensors.items():
            if self.grows and tensor.shape != wanted[path].shape:
                continue  # padding may have enlarged a growing state; later outputs show whether it is right
            exact = not (tensor.is_floating_point() or tensor.is_complex())
            self.same(f"{what}, state {path}", tensor, wanted[path], 0.0 if exact else tolerance)

    def same_result(self, what: str, got: Result, expected: Result, tolerance: float | None = None) -> None:
        """``same`` for outputs and states."""
        self.same(f"outputs, {what}", got.y, expected.y, tolerance)
        self.same_state(what, got.state, expected.state, tolerance)

    def check_rows(self, state: State, rows: int) -> None:
        """Raise ``LawError`` unless dimension 0 of all tensors of the state is ``rows``."""
        for path, tensor in named_tensors(state):
            if tensor.dim() == 0 or tensor.shape[0] != rows:
                raise LawError("rows", f"state {path} is {list(tensor.shape)}: dimension 0 must be the {rows} rows")


def _is_prime(number: int) -> bool:
    return all(number % divisor for divisor in range(2, math.isqrt(number) + 1))
