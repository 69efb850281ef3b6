import pytest
import torch

from titans_build.kernels.dispatch import full_precision, half_dtype


def test_autocast_is_off_inside() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16), full_precision("cpu"):
        assert not torch.is_autocast_enabled("cpu")
    with full_precision("meta"), full_precision("cpu"):
        assert torch.ones(2).matmul(torch.ones(2)).dtype == torch.float32


@pytest.mark.parametrize("given, autocast, expected", [
    (torch.bfloat16, None, "bfloat16"), (torch.float16, None, "float16"), (torch.float32, None, None),
    (torch.float32, torch.bfloat16, "bfloat16"), (torch.float32, torch.float16, "float16"),
    (torch.float16, torch.bfloat16, "float16"), (torch.float64, torch.bfloat16, None),
])  # fmt: skip
def test_what_products_are_rounded_to(given, autocast, expected):
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        assert half_dtype(torch.zeros(1, dtype=given)) == expected
