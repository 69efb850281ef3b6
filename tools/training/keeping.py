"""Which checkpoints of a run there are: the latest whole one, the best, and those that are removed in time."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ...recipes import StorageError
from ...recipes.replacing import replacing
from . import checkpoint
from .folder import writing

_NAME = re.compile(r"step-(\d{8,})")


class Checkpoints:
    """The checkpoints in a folder, ``step-00000100`` each; ``index.json`` names the latest and the best of them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, step: int) -> Path:
        """The folder of a step's checkpoint, whether it is there or not."""
        return self.folder / f"step-{step:08d}"

    def steps(self) -> list[int]:
        """Those that are there, whole or damaged, in order."""
        if not self.folder.is_dir():
            return []
        return sorted(int(found[1]) for path in self.folder.iterdir() if (found := _NAME.fullmatch(path.name)))

    def latest(self, warn: Callable[[str], None]) -> tuple[int, dict[str, Any]] | None:
        """The last step with a whole checkpoint, and its facts. ``warn`` is told of damaged ones on the way.

        Raises ``StorageError`` when there are checkpoints and none is whole.
        """
        faults = []
        steps = self.steps()
        for step in reversed(steps):
            try:
                facts = checkpoint.verify(self.path(step))
            except StorageError as error:
                faults.append(str(error))
                continue
            for fault in faults:
                warn(f"{fault}; going on from step {step:,}, before it")
            return step, facts
        if faults:
            raise StorageError("no checkpoint is whole: " + "; ".join(faults))
        return None

    def facts(self, step: int) -> dict[str, Any]:
        """Those of a step's checkpoint, which has been verified."""
        return checkpoint.verify(self.path(step))

    def settle(self, latest: int, best: int | None, keep: int) -> None:
        """Say which are the latest and the best, and remove all but ``keep`` and the best."""
        best = best if best is not None and self.path(best).is_dir() else None
        index = {"latest": self.path(latest).name, "best": None if best is None else self.path(best).name}
        place = self.folder / "index.json"
        with writing(place), replacing(place) as path:
            path.write_text(json.dumps(index) + "\n", encoding="utf-8")
        older = [step for step in self.steps() if step <= latest]
        # those after it are of a course that the run has left
        gone = {*older[:-keep], *(step for step in self.steps() if step > latest)} - {best}
        for step in gone:
            shutil.rmtree(self.path(step), ignore_errors=True)

    def clear(self) -> None:
        """Remove what was being written when the run was killed."""
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            for path in self.folder.iterdir():
                if path.name.startswith(".") and path.name.endswith(".tmp"):
                    shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
