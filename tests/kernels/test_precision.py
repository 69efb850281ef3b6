import torch

from titans_build.kernels.precision import full_precision


def test_autocast_is_off_inside() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16), full_precision("cpu"):
        assert not torch.is_autocast_enabled("cpu")
    with full_precision("meta"), full_precision("cpu"):
        assert torch.ones(2).matmul(torch.ones(2)).dtype == torch.float32
