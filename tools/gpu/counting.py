"""Counts what a GPU would have to do for a model, on a machine without one: launches, waits, FLOPs and bytes.

    with Counting() as gpu:
        model = gpu.moved(tb.build("mag-170m", device="meta"))
        tokens = gpu.empty(1, 32768, dtype=torch.int64)
        with gpu.autocast(torch.bfloat16):
            model(tokens, targets=tokens).loss.backward()
    gpu.launches, gpu.waits

Tensors of the counted GPU have shapes and no numbers: they are on PyTorch's ``meta`` device, and say that its type is
``"cuda"``, so that the library runs as it does on a GPU. Integers of few elements, such as positions, do have values.
Kernels of Triton are not run (``triton_runtime.recording``), and attention is that of xFormers. A question about values
is counted as a wait, and answered as if everything was in order: ``all`` is true, ``any`` is false, numbers are 0.
"""

from __future__ import annotations

import contextlib
import math
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from ...kernels import linear, rotary, triton_runtime
from ...kernels.attention import flash, xformers

VALUES = 2**16
"""Integer tensors of at most so many elements have values."""
AUTOCAST = {
    F.linear, torch.matmul, torch.mm, torch.bmm, torch.addmm, torch.baddbmm, torch.einsum, F.conv1d,
    F.scaled_dot_product_attention, Tensor.matmul, Tensor.__matmul__, Tensor.__rmatmul__, Tensor.mm, Tensor.bmm,
    Tensor.addmm, Tensor.baddbmm,
}  # fmt: skip
"""Functions whose operands autocast rounds."""
NO_LAUNCH = {
    "empty",
    "lift_fresh",
    "empty_like",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
    "detach",
    "alias",
    "_unsafe_view",
}
ONCE = {"_fixed_point"}
"""Functions whose results a GPU keeps for all calls."""
PACKAGE = Path(__file__).parents[2]


class Launch(NamedTuple):
    """One kernel."""

    name: str
    flops: float
    """Those of matrix products and attention; other kernels are bound by ``bytes``."""
    bytes: int
    """Every operand and every result moved once."""
    programs: int = 0
    """Of a Triton kernel."""
    arguments: dict[str, Any] = {}  # noqa: RUF012 - never written
    """Of a Triton kernel, by name; tensors as their shapes."""


class _Device(str):
    """Tensors are made on ``meta`` where this is given as their device."""

    type, index = "cuda", 0  # type: ignore[assignment]


DEVICE: Any = _Device("meta")


class DeviceTensor(Tensor):
    """A tensor of the counted GPU."""

    device = property(lambda self: DEVICE)
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)
    is_meta = property(lambda self: False)
    made_by = ""
    """The operator whose result this is."""

    # of tensors that have values, PyTorch does not notice a copy to the host

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def numpy(self, *, force: bool = False) -> Any:
        return self.cpu().numpy(force=force)

    def cpu(self, *args: Any, **kwargs: Any) -> Tensor:
        _active[-1].waited()
        return _values(self)

    def to(self, *args: Any, **kwargs: Any) -> Tensor:
        if any(str(x) == "cpu" for x in (*args, *kwargs.values()) if not isinstance(x, Tensor)):
            return self.cpu().to(*args, **kwargs)
        return super().to(*args, **kwargs)


_active: list[Counting] = []


class Counting(contextlib.ExitStack):
    """The counted GPU, while this context is entered. ``launches`` and ``waits`` are in order.

    ``record``: is called with every launch of a Triton kernel, as ``triton_runtime.recording`` says.
    """

    device = DEVICE

    def __init__(self, record: Callable[..., None] | None = None) -> None:
        super().__init__()
        self._record = record
        self.launches: list[Launch] = []
        self.waits: list[str] = []
        """Where the host waits: ``kernels/memory/overflow.py:36``."""
        self._casts: dict[int, tuple[Tensor, Tensor]] = {}
        self.operators: dict[str, Callable[..., Any]] = {}
        """The package's own, and the functions that they call."""

    def __enter__(self) -> Counting:
        from ...kernels.norm_gate import triton as norm_gate
        from ...kernels.rotary import triton as rotation
        from ...kernels.short_conv import triton as short_conv

        super().__enter__()
        for kept in (rotary._tables_of_few, rotary._tables_of_segment):  # else counts depend on what ran before
            kept.cache_clear()
        for name, module in (("gated", norm_gate), ("normed_rotation", rotation), ("convolution", short_conv)):
            self.operators[f"titans_build::{name}"] = module.run_forward
            self.operators[f"titans_build::{name}_backward"] = module.run_backward
        _active.append(self)
        self.callback(_active.remove, self)
        self.enter_context(triton_runtime.recording(self._kernel))
        self.enter_context(patch.object(xformers, "_library", lambda: _XFormers(self)))
        self.enter_context(patch.object(xformers._trial, "refuse", lambda *facts: None))
        self.enter_context(patch.object(flash._trial, "refuse", lambda *facts: "xFormers stands for it"))
        self.enter_context(patch.object(linear, "_ORDINARY", (*linear._ORDINARY, DeviceTensor)))
        self.enter_context(_Dispatched(self))
        self.enter_context(_Called(self))
        return self

    def clear(self) -> None:
        """Forget what was counted."""
        self.launches.clear()
        self.waits.clear()
        self._casts.clear()

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """A tensor of the counted GPU; integers are 0."""
        return torch.empty(shape, dtype=dtype, device=DEVICE)

    def moved(self, model: nn.Module) -> nn.Module:
        """``model``, built on the device ``meta``, with parameters and buffers on the counted GPU."""
        moved: dict[int, Tensor] = {}  # a shared parameter stays one
        for module in model.modules():
            for name, p in list(module.named_parameters(recurse=False)):
                there = nn.Parameter(p.detach().to("meta").as_subclass(DeviceTensor), p.requires_grad)
                setattr(module, name, moved.setdefault(id(p), there))
            for name, x in list(module.named_buffers(recurse=False)):
                setattr(module, name, x.to("meta").as_subclass(DeviceTensor))
        return model

    @contextlib.contextmanager
    def autocast(self, dtype: torch.dtype) -> Iterator[None]:
        """``torch.autocast("cuda", dtype)``, which a PyTorch without CUDA refuses."""
        before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
        torch.set_autocast_enabled("cuda", True)
        torch.set_autocast_dtype("cuda", dtype)
        try:
            yield
        finally:
            torch.set_autocast_enabled("cuda", before[0])
            torch.set_autocast_dtype("cuda", before[1])
            self._casts.clear()

    # -- what is counted -----------------------------------------------------------------------------------------------

    def launched(self, name: str, tensors: Sequence[Tensor], flops: float = 0.0, **triton: Any) -> None:
        distinct = {id(x): x for x in tensors}.values()
        moved = sum(x.numel() * x.element_size() for x in distinct)
        self.launches.append(Launch(name, flops, moved, **triton))

    def waited(self) -> None:
        """Record the innermost line of the package."""
        for frame in reversed(traceback.extract_stack()):
            path = Path(frame.filename)
            if frame.name in ONCE:
                return
            if path.is_relative_to(PACKAGE) and path.parent != Path(__file__).parent:
                self.waits.append(f"{path.relative_to(PACKAGE)}:{frame.lineno}")
                return
        self.waits.append("outside the package")

    def _kernel(self, kernel: Any, grid: tuple[int, ...], arguments: Sequence[Any], constants: dict[str, Any]) -> None:
        if self._record is not None:
            self._record(kernel, grid, arguments, constants)
        named = {**dict(zip(kernel.arg_names, arguments)), **constants}
        tensors = [x for x in arguments if isinstance(x, Tensor)]
        shapes = {name: tuple(x.shape) if isinstance(x, Tensor) else x for name, x in named.items()}
        self.launched(kernel.__name__, tensors, programs=math.prod(grid), arguments=shapes)

    def rounded(self, x: Any) -> Any:
        """An operand as autocast rounds it; a parameter is rounded once."""
        if not isinstance(x, DeviceTensor) or x.dtype != torch.float32:
            return x
        if not (x.is_leaf and x.requires_grad):
            return x.to(torch.get_autocast_dtype("cuda"))
        if id(x) not in self._casts:
            self._casts[id(x)] = x, x.to(torch.get_autocast_dtype("cuda"))
        return self._casts[id(x)][1]


class _Called(TorchFunctionMode):
    """Functions of PyTorch before they choose by device: autocast, attention, and tensors of numbers on the host."""

    def __init__(self, gpu: Counting) -> None:
        super().__init__()
        self.gpu = gpu

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in AUTOCAST and torch.is_autocast_enabled("cuda"):
            args, kwargs = _mapped(self.gpu.rounded, (args, kwargs))
        if func is F.scaled_dot_product_attention and isinstance(args[0], DeviceTensor):
            (*rows, time, _), keys = args[0].shape, args[1].shape[-2]
            pairs = math.prod(rows) * time * keys / (2 if kwargs.get("is_causal") else 1)
            return _Attention.apply(self.gpu, *args[:3], pairs)
        if func in (torch.tensor, torch.as_tensor) and kwargs.get("device") == "meta":
            self.gpu.waited()
            return _moved(func(*args, **{**kwargs, "device": "cpu"}))
        return func(*args, **kwargs)


def _moved(x: Tensor) -> Tensor:
    """A tensor of the host on the counted GPU."""
    return (x if _has_values(x) else x.to("meta")).as_subclass(DeviceTensor)


def _has_values(x: Tensor) -> bool:
    return not x.is_floating_point() and x.numel() <= VALUES


class _Dispatched(TorchDispatchMode):
    """Operators, also those of a backward pass."""

    def __init__(self, gpu: Counting) -> None:
        super().__init__()
        self.gpu = gpu

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.name().removeprefix("aten::").partition(".")[0]
        given = _tensors((args, kwargs))
        plain = {id(x): x.as_subclass(Tensor) for x in given}
        ours = [x for x in given if isinstance(x, DeviceTensor) or plain[id(x)].is_meta]
        if not ours and str(kwargs.get("device")) != "meta":
            return func(*args, **kwargs)
        if (answer := self._answer(name, args, kwargs)) is not None:
            return answer[0]
        if name in self.gpu.operators:  # whose launches are counted
            with self:
                return self.gpu.operators[name](*args, **kwargs)
        if any(x.is_meta for x in plain.values()):
            plain = {key: x if x.is_meta or not x.dim() else x.to("meta") for key, x in plain.items()}
        unwrapped = _mapped(lambda x: plain[id(x)], (args, kwargs))
        made = func(*unwrapped[0], **unwrapped[1])
        if (not given or name.startswith("new_")) and _has_values(made):  # made from nothing: with values
            on_host = _mapped(lambda x: torch.empty((), dtype=x.dtype), args)
            made = func(*on_host, **{**kwargs, "device": "cpu"})
            if "empty" in name:
                made.zero_()
        results = _tensors(made)
        if not func.is_view and name not in NO_LAUNCH:
            count = flop_registry.get(func.overloadpacket)
            # a dtype of the result is no operand
            operands = [x for x in unwrapped[0] if not isinstance(x, torch.dtype)]
            flops = 0.0 if count is None else count(*operands, **unwrapped[1], out_val=made)
            self.gpu.launched(name, [*ours, *results], flops)
        same = {id(plain[id(x)]): x for x in given}  # results that are arguments: in place, ``out``

        def wrapped(y: Tensor) -> Tensor:
            if id(y) in same:
                return same[id(y)]
            y = y.as_subclass(DeviceTensor)
            y.made_by = name
            return y

        return _mapped(wrapped, made)

    def _answer(self, name: str, args: Any, kwargs: Any) -> tuple[Any] | None:
        """What an operator that reads values returns, for which the host waits; ``None`` for other operators."""
        if name == "_local_scalar_dense":
            x, inner = args[0], args[0].as_subclass(Tensor)
            self.gpu.waited()
            if not inner.is_meta:
                return (inner.item(),)
            number: bool | int | float = 0.0 if x.dtype.is_floating_point else 0
            return (getattr(x, "made_by", "") != "any" if x.dtype == torch.bool else number,)
        if name == "_to_copy" and str(kwargs.get("device")) == "cpu":
            self.gpu.waited()
            return (_values(args[0]).to(kwargs.get("dtype") or args[0].dtype),)
        if name == "_to_copy" and str(kwargs.get("device")) == "meta" and not isinstance(args[0], DeviceTensor):
            if not kwargs.get("non_blocking"):
                self.gpu.waited()
            return (_moved(args[0].to(kwargs.get("dtype") or args[0].dtype)),)
        if name == "copy_" and isinstance(args[1], DeviceTensor) and not isinstance(args[0], DeviceTensor):
            self.gpu.waited()
            return (args[0].copy_(_values(args[1])),)
        masks = [i for i in args[1] if i is not None and i.dtype == torch.bool] if name == "index" else []
        if name in ("nonzero", "masked_select", "equal") or masks:
            self.gpu.waited()
            if any(x.as_subclass(Tensor).is_meta for x in (masks or args[:1])):
                raise NotImplementedError(f"{name}: its result is decided by values, which are not counted")
        return None


def _mapped(function: Callable[[Tensor], Any], tree: Any) -> Any:
    """The arguments or results of an operator, with each tensor replaced."""
    if isinstance(tree, Tensor):
        return function(tree)
    if isinstance(tree, (tuple, list)):
        made = [_mapped(function, x) for x in tree]
        return made if isinstance(tree, list) else tuple(made)
    return {name: _mapped(function, x) for name, x in tree.items()} if isinstance(tree, dict) else tree


def _tensors(tree: Any) -> list[Tensor]:
    found: list[Tensor] = []
    _mapped(found.append, tree)
    return found


def _values(x: Tensor) -> Tensor:
    """A copy on the host; zeros where there are no values."""
    inner = x.as_subclass(Tensor)
    return torch.zeros(inner.shape, dtype=inner.dtype) if inner.is_meta else inner.clone()


class _Attention(torch.autograd.Function):
    """Fused attention: a launch forward, and one backward."""

    @staticmethod
    def forward(ctx: Any, gpu: Counting, q: Tensor, k: Tensor, v: Tensor, pairs: float) -> Tensor:
        """``pairs``: of a query and a key, in all rows and heads together."""
        y = gpu.empty(*q.shape[:-1], v.shape[-1], dtype=q.dtype)
        ctx.gpu, ctx.flops = gpu, 2 * pairs * (q.shape[-1] + v.shape[-1])
        ctx.save_for_backward(q, k, v, y)
        gpu.launched("attention", [q, k, v, y], ctx.flops)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        grads = [ctx.gpu.empty(*x.shape, dtype=x.dtype) for x in saved[:3]]
        ctx.gpu.launched("attention_backward", [*saved, grad, *grads], 2.5 * ctx.flops)
        return None, *grads, None


class _Causal:
    """A mask of xFormers."""

    def __init__(self, _window_size: int | None = None) -> None:
        self.window = _window_size


class _XFormers:
    """xFormers, which a GPU has, and a machine without one cannot run: ``attention.xformers._Library``."""

    masks = SimpleNamespace(
        LowerTriangularFromBottomRightMask=_Causal, LowerTriangularFromBottomRightLocalAttentionMask=_Causal
    )
    built = True

    def __init__(self, gpu: Counting) -> None:
        self.gpu = gpu

    def whole(self, q: Tensor, k: Tensor, v: Tensor, attn_bias: _Causal | None) -> Tensor:
        (rows, time, heads, _), keys = q.shape, k.shape[1]
        seen = time * keys
        if attn_bias is not None:  # the first queries see one key more each, the others a window
            window = keys if attn_bias.window is None else min(keys, attn_bias.window)
            few = max(0, min(time, window - (keys - time)))
            seen = few * (keys - time) + few * (few + 1) // 2 + (time - few) * window
        return _Attention.apply(self.gpu, q, k, v, rows * heads * seen)

    partial = whole

    def merge(self, *parts: Tensor) -> Tensor:
        return torch.stack(parts).sum(0)
