"""flash-linear-attention's own slow references, run as they stand: importing the library would look for a GPU."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType


def reference(rule: str) -> ModuleType:
    found = importlib.util.find_spec("fla")
    assert found is not None and found.submodule_search_locations, "the tests need flash-linear-attention"
    path = Path(found.submodule_search_locations[0]) / "ops" / rule / "naive.py"
    spec = importlib.util.spec_from_file_location(f"naive_{rule}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
