"""What is installed: one import package with every folder in it, its data files, and nothing beside it."""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
FOLDERS = ("blocks", "kernels", "recipes", "registry", "tools")
DATA = ("*.yaml", "*.c", "*.h", "*.html", "*.css", "*.js", "*.in", "py.typed")


def folders_with_code() -> list[Path]:
    """Every folder of the package, the repository's root first."""
    return [ROOT, *sorted({file.parent for folder in FOLDERS for file in (ROOT / folder).rglob("*.py")})]


@pytest.mark.parametrize("folder", folders_with_code()[1:], ids=lambda folder: folder.relative_to(ROOT).as_posix())
def test_every_folder_is_a_package(folder: Path) -> None:
    # an editable install finds no folder that lacks it
    assert (folder / "__init__.py").is_file()


def test_the_pinned_versions_meet_the_declared_ones() -> None:
    from packaging.markers import default_environment
    from packaging.requirements import Requirement

    pins = {}
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            pin = Requirement(line)
            if pin.marker is None or pin.marker.evaluate({**default_environment(), "python_version": "3.11"}):
                pins[pin.name.lower()] = str(pin.specifier).removeprefix("==")
    wanted = [*PROJECT["project"]["dependencies"], *PROJECT["project"]["optional-dependencies"]["dev"]]
    for line in wanted:
        requirement = Requirement(line)
        assert requirement.name.lower() in pins, f"{requirement.name} is not in constraints.txt"
        assert requirement.specifier.contains(pins[requirement.name.lower()]), line


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    # built from a copy: setuptools leaves build/ and *.egg-info beside what it builds
    import shutil

    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in (
        "pyproject.toml",
        "setup.py",
        "README.md",
        "LICENSE",
        "__init__.py",
        "__main__.py",
        "huggingface.py",
        "py.typed",
        *FOLDERS,
    ):
        path = ROOT / name
        if path.is_dir():
            shutil.copytree(path, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(path, source / name)
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", str(source)]
    command += ["--no-deps", "--no-build-isolation", "--quiet", "--wheel-dir", str(target)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (built,) = target.glob("*.whl")
    return zipfile.ZipFile(built)


def test_a_wheel_holds_every_module_and_recipe(wheel: zipfile.ZipFile) -> None:
    expected = {
        f"titans_build/{file.relative_to(ROOT).as_posix()}"
        for folder in folders_with_code()
        for pattern in ("*.py", *DATA)
        for file in folder.glob(pattern)
        if file != ROOT / "setup.py"
    }
    shipped = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert shipped == expected
    assert "titans_build/py.typed" in shipped


def test_nothing_but_the_import_package_reaches_site_packages(wheel: zipfile.ZipFile) -> None:
    tops = {name.partition("/")[0] for name in wheel.namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"titans_build"}


def test_a_wheel_installs_the_command_and_names_its_extras(wheel: zipfile.ZipFile) -> None:
    (entry_points,) = (name for name in wheel.namelist() if name.endswith("entry_points.txt"))
    assert "titans-build = titans_build.tools.cli:run" in wheel.read(entry_points).decode()
    (metadata,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    extras = re.findall(r"^Provides-Extra: (\S+)$", wheel.read(metadata).decode(), flags=re.M)
    assert set(extras) == {"dev", "gpu", "hf", "eval", "fla", "train", "data", "analyze", "examples"}


def test_the_facade_offers_the_promised_names() -> None:
    import titans_build as tb

    promised = [
        "load_recipe", "build", "save", "load", "save_state", "load_state", "register", "Block", "Spec",
        "create", "check_block", "NeuralMemory", "list_blocks", "describe", "build_block", "state", "RecipeError",
        "__version__", "Task", "register_task", "list_tasks", "open_source", "train", "observe", "memory_loss",
        "memory_check", "adapt", "perplexity", "write_cost", "compare", "search", "swap", "unswap", "memory",
        "BackendError", "LawError", "StorageError", "SwapError", "Unavailable", "load_swaps", "save_swaps",
        "PrefixCache", "register_features", "register_network", "register_objective", "register_optimizer",
        "register_retention", "parallelize",
    ]  # fmt: skip
    assert [name for name in promised if not hasattr(tb, name)] == []
    assert sorted(tb.__all__) == sorted(promised)
    assert tb.__version__ == PROJECT["project"]["version"]
