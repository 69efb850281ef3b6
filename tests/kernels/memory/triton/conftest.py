"""What every test of the Triton kernels runs under."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def poisoned():
    """What a kernel leaves unwritten is NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
