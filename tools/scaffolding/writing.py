"""Writing a plugin's folder, all of it or none."""

from __future__ import annotations

import importlib.resources
import os
import shutil
import tempfile
from pathlib import Path
from string import Template

from ... import __version__
from ...recipes.replacing import making_folder, sync_folder
from ..terminal import UsageError
from . import template
from .naming import Names

FILES = {
    "pyproject.toml": "pyproject.toml.in",
    "README.md": "README.md.in",
    "recipe.yaml": "recipe.yaml.in",
    "src/$module/__init__.py": "block.py.in",
    "tests/test_$module.py": "test_block.py.in",
}
"""The plugin's files, and the templates they are made from."""


def write_plugin(names: Names, into: Path) -> tuple[Path, list[str]]:
    """Make the folder ``into/names.block`` and return it with the names of its files.

    ``into`` is made if need be. Raises ``UsageError`` when the folder is there, or cannot be made; then nothing is
    left of it.
    """
    folder = into / names.block
    values = {**names._asdict(), "version": __version__}
    written = []
    try:
        if folder.exists() or folder.is_symlink():
            raise UsageError(f"{folder}: is there already; nothing was written (--into FOLDER: make it elsewhere)")
        with making_folder(into):
            # beside its place, so that it gets there in one step, whole
            temporary = Path(tempfile.mkdtemp(prefix=f".{names.block[:100]}.", dir=into))
            try:
                for name, source in FILES.items():
                    file = temporary / Template(name).substitute(values)
                    file.parent.mkdir(parents=True, exist_ok=True)
                    text = importlib.resources.files(template).joinpath(source).read_text(encoding="utf-8")
                    file.write_text(Template(text).substitute(values), encoding="utf-8")
                    written.append(file.relative_to(temporary).as_posix())
                _open_as_any_folder(temporary)
                os.rename(temporary, folder)
            except BaseException:
                shutil.rmtree(temporary, ignore_errors=True)
                raise
            sync_folder(into)
    except (OSError, ValueError) as error:  # a ValueError is a letter that no file's name may hold
        raise UsageError(f"{folder}: cannot be made: {getattr(error, 'strerror', None) or error}") from None
    return folder, written


def _open_as_any_folder(folder: Path) -> None:
    """The permissions that a new folder gets; a temporary one is its owner's alone."""
    mask = os.umask(0)
    os.umask(mask)
    folder.chmod(0o777 & ~mask)
