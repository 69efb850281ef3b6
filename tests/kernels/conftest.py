"""Tests of a ``native`` backend, and those marked ``c_kernels``, are skipped where the C kernels cannot be built."""

from __future__ import annotations

import pytest
import torch

from titans_build.kernels.cpu_runtime import library


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "c_kernels: needs the C kernels")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    needing = []
    for item in items:
        parameters = item.callspec.params.values() if hasattr(item, "callspec") else ()
        native = any(isinstance(value, str) and value == "native" for value in parameters)
        if native or item.get_closest_marker("c_kernels"):
            needing.append(item)
    reason = library.refuse(device="cpu", dtype=torch.float64) if needing else None
    if reason is not None:
        for item in needing:
            item.add_marker(pytest.mark.skip(reason=f"C kernels: {reason}"))


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.default_generator.manual_seed(0)  # torch.manual_seed asks every other device, too, before each of the tests
