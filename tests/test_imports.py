"""Imports run one way, ``tools -> recipes -> blocks -> registry, kernels``, and never in a circle."""

from __future__ import annotations

import ast
import graphlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BELOW = {
    "tools": {"titans_build", "recipes", "blocks", "registry", "kernels"},
    "titans_build": {"tools", "recipes", "blocks", "registry", "kernels"},
    "huggingface": {"tools"},
    "__main__": {"tools"},
    "recipes": {"blocks", "registry"},
    "blocks": {"registry", "kernels"},
    "registry": set(),
    "kernels": {"registry"},
}
"""What a folder may import besides itself; ``titans_build`` and ``huggingface`` are the public face."""
FOLDERS = [name for name in BELOW if (ROOT / name).is_dir()]


def modules() -> dict[str, Path]:
    """Every module by its name in the package, ``blocks.memory``, a folder's ``__init__`` by that of the folder."""
    found = {"titans_build": ROOT / "__init__.py"}
    found |= {name: ROOT / f"{name}.py" for name in ("__main__", "huggingface")}
    for file in (file for folder in FOLDERS for file in (ROOT / folder).rglob("*.py")):
        parts = file.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


def imported(name: str, file: Path, known: dict[str, Path]) -> set[str]:
    """The package's own modules that a module imports, wherever in it: in functions and for type checkers, too."""
    package = name.split(".") if file.name == "__init__.py" else name.split(".")[:-1]
    package = [] if name == "titans_build" else package
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            if node.level:
                path = package[: len(package) - node.level + 1] + (node.module.split(".") if node.module else [])
            elif (node.module or "").split(".")[0] == "titans_build":
                path = str(node.module).split(".")[1:]
            else:
                continue
            for alias in node.names:
                inner = ".".join([*path, alias.name])
                found.add(inner if inner in known else ".".join(path) or "titans_build")
        elif isinstance(node, ast.Import):
            names = [alias.name.partition(".") for alias in node.names]
            found |= {rest or first for first, _, rest in names if first == "titans_build"}
    return found


MODULES = modules()
IMPORTS = {name: imported(name, file, MODULES) for name, file in MODULES.items()}


def test_every_import_is_understood() -> None:
    assert len(MODULES) > 50
    assert {target for targets in IMPORTS.values() for target in targets} <= MODULES.keys()
    # one of each kind
    assert {"blocks.attention", "blocks.block"} <= IMPORTS["blocks"]
    assert {"registry", "blocks.block"} <= IMPORTS["blocks.combinators"]
    assert {"titans_build", "recipes", "tools.terminal"} <= IMPORTS["tools.command_line"]


@pytest.mark.parametrize("name", sorted(MODULES))
def test_a_module_imports_its_own_folder_and_those_below(name: str) -> None:
    mine = name.partition(".")[0]
    assert {target.partition(".")[0] for target in IMPORTS[name]} - {mine} <= BELOW[mine]


def test_no_module_imports_itself_in_the_end() -> None:
    try:
        graphlib.TopologicalSorter(IMPORTS).prepare()
    except graphlib.CycleError as error:
        pytest.fail("a circle of imports: " + " <- ".join(error.args[1]))
