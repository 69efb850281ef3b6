"""Kernels start where their tensors are."""

import contextlib
import re
from pathlib import Path

import numpy as np
import pytest
import torch

import titans_build.kernels
from titans_build.kernels.triton_runtime import launch, refuse

triton = pytest.importorskip("triton")


class On(torch.Tensor):
    """A tensor that says it is on a GPU."""

    device = torch.device("cuda", 1)


def on(index):
    x = torch.zeros(2).as_subclass(On)
    x.device = torch.device("cuda", index)
    return x


class Kernel:
    """Writes down on which device it was started."""

    arg_names = ("x", "size", "y")
    __name__ = "some_kernel"

    def __init__(self):
        self.started = []

    def __getitem__(self, grid):
        return lambda *arguments, **fixed: self.started.append((grid, arguments, fixed, torch.cuda.current_device()))


@pytest.fixture
def gpus(monkeypatch):
    """Two of them, the first current."""
    current = [0]

    @contextlib.contextmanager
    def device(there):
        before, current[0] = current[0], there.index
        yield
        current[0] = before

    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[0])
    monkeypatch.setattr(torch.cuda, "device", device)


@pytest.mark.parametrize("index", [0, 1])
def test_on_the_device_of_the_tensors(gpus, index):
    kernel, x, y = Kernel(), on(index), on(index)
    launch(kernel, (3,), x, 2, y, FLAG=True)
    ((grid, arguments, fixed, device),) = kernel.started
    assert (grid, fixed, device) == ((3,), {"FLAG": True}, index)
    assert arguments[0] is x and arguments[2] is y
    assert torch.cuda.current_device() == 0


@pytest.mark.parametrize("other", [torch.zeros(2), on(0)])
def test_tensors_on_different_devices(gpus, other):
    kernel = Kernel()
    message = f"some_kernel: y is on {other.device}: expected all tensors on one device, and x is on cuda:1"
    with pytest.raises(ValueError, match=re.escape(message)):
        launch(kernel, (1,), on(1), 2, other)
    assert not kernel.started


def test_missing_tensors(gpus):
    kernel, x = Kernel(), on(1)
    launch(kernel, (1,), None, 2, x)
    assert kernel.started[0][-1] == 1
    launch(kernel, (1,), None, 2, None)
    assert kernel.started[1][-1] == 0


def test_every_kernel_is_launched_through_launch():
    """No file of the package starts one of its own."""
    package = Path(titans_build.kernels.__file__).parent
    starts = re.compile(r"kernel\[.*\]\(")
    found = [path.name for path in package.rglob("*.py") if starts.search(path.read_text())]
    assert found == ["triton_runtime.py"]


@pytest.mark.parametrize("versions", [("3.6.0", "2.4.6"), ("3.6.1", "2.10.0rc1")])
def test_an_interpreter_that_does_not_run_with_this_numpy_is_refused(versions, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(triton, "__version__", versions[0])
    monkeypatch.setattr(np, "__version__", versions[1])
    # not by an operation, which asks once for each kind of arguments
    found = refuse(device="cpu", dtype=torch.float32, named=True)
    assert re.search(r"Triton 3.6.\d does not run with NumPy .*: install triton>=3.7", found or "")


@pytest.mark.parametrize("versions", [("3.6.0", "2.3.9"), ("3.7.0", "2.4.6"), ("3.10.0+git1", "2.5.0")])
def test_other_versions_run(versions, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(triton, "__version__", versions[0])
    monkeypatch.setattr(np, "__version__", versions[1])
    assert refuse(device="cpu", dtype=torch.float32, named=True) is None
