"""For every test: one thread, since the models are tiny and the suite runs in as many processes as there are cores.

Without a GPU, the Triton kernels run in Triton's interpreter, where a test asks for them by name.
"""

from __future__ import annotations

import gc
import importlib.util
import os
import runpy
import signal
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # a shell's background jobs ignore Ctrl-C and pass that on, also to the commands that tests interrupt
    signal.signal(signal.SIGINT, signal.default_int_handler)

WRONG_RECIPES: list[Any] = runpy.run_path(str(Path(__file__).parent / "recipes" / "wrong_recipes.py"))["WRONG"]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test with the argument ``wrong_recipe`` runs for each invalid recipe: ``(name, text, fragment)``."""
    if "wrong_recipe" in metafunc.fixturenames:
        metafunc.parametrize("wrong_recipe", WRONG_RECIPES, ids=[name for name, _, _ in WRONG_RECIPES])


def pytest_collection_finish() -> None:
    """Later collections of garbage leave out the modules and tests that exist now, which are most of all objects."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()


@pytest.fixture(scope="session")
def wrong_recipes() -> list[Any]:
    return WRONG_RECIPES


@pytest.fixture(scope="session")
def fla_reference() -> Callable[[str], ModuleType]:
    """flash-linear-attention's own slow reference of a rule. Importing the library itself would look for a GPU."""

    def load(rule: str) -> ModuleType:
        found = importlib.util.find_spec("fla")
        assert found is not None and found.submodule_search_locations, "the tests need flash-linear-attention"
        path = Path(found.submodule_search_locations[0]) / "ops" / rule / "naive.py"
        spec = importlib.util.spec_from_file_location(f"naive_{rule}", path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load
