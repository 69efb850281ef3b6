"""Starting a kernel on the device that its tensors are on, which need not be the current one."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **fixed: Any) -> None:
    """``kernel[grid](*arguments, **fixed)``, where its tensors are.

    Triton starts a kernel on the current device, whatever it is given: there, an address of another device is that of
    other numbers, or of none.

    Raises:
        ValueError: the tensors are on more than one device.
    """
    device = None
    for name, x in zip(kernel.arg_names, arguments):
        if isinstance(x, Tensor):
            if device is None:
                first, device = name, x.device
            elif x.device != device:
                raise ValueError(
                    f"{kernel.__name__}: {name} is on {x.device}: expected all tensors on one device, "
                    f"and {first} is on {device}"
                )
    with _current(device):
        kernel[grid](*arguments, **fixed)


def _current(device: torch.device | None) -> AbstractContextManager[object]:
    if device is None or device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)
