"""In what the C kernels' matrix products take their operands: as they are, or rounded to bfloat16.

``torch.set_float32_matmul_precision("medium")`` allows bfloat16 inside of float32 products, and the kernels for many
tokens use that where the CPU multiplies bfloat16, at twice the speed. Only operands are rounded, to the nearest and as
they go into a product: sums, and whatever is no matrix product, stay float32. Backward does what its forward did.
Autocast says nothing about these kernels: what it must not narrow runs outside of it, and goes by the setting.
"""

from __future__ import annotations

import functools

import torch

from .library import NotBuilt, library


def operands(dtype: torch.dtype) -> torch.dtype:
    """The library of kernels to take for tensors of ``dtype``: bfloat16 where the setting asks for it and it pays."""
    return torch.bfloat16 if dtype == torch.float32 and refuse_narrow() is None else dtype


def refuse_narrow() -> str | None:
    """Why products of float32 numbers take no bfloat16 operands, or ``None``."""
    # of the settings that say so, the one that is always there to be read: the general one raises where others were set
    if torch.backends.mkldnn.matmul.fp32_precision != "bf16":  # type: ignore[attr-defined]
        return "is for bfloat16 operands: torch.set_float32_matmul_precision('medium') allows them"
    return _cannot()


@functools.cache
def _cannot() -> str | None:
    try:
        able = library(torch.float32).can_narrow()
    except NotBuilt as error:
        return str(error)
    return None if able else "needs a CPU that multiplies bfloat16 (AVX512_BF16)"
