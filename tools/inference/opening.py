"""The model that the command line names: a saved model's folder, or that of a training run."""

from __future__ import annotations

from pathlib import Path

from ... import recipes
from ...blocks.language_model import LanguageModel
from ...recipes import packaged_names
from ...recipes.index import INDEX
from ...recipes.reading import read_file
from ...registry import nearest
from ..options import placement
from ..terminal import UsageError
from ..training.folder import RUN, is_run
from .codec import Codec, open_codec

MODEL = "model"
"""The model's folder in that of a run."""
TOKENIZER = "tokenizer.json"
"""A tokenizer's file in the folder of a run comes before the one that the run says it has read with."""

MOST_SEEN = 1000
"""Folders that are looked through for the nearest name."""


def open_model(
    name: str, tokenizer: str | None, device_name: str, dtype_name: str | None
) -> tuple[LanguageModel, Codec]:
    """The model, and how it is written to. ``tokenizer``: ``bytes``, ``ids``, a file, or ``None`` for the run's own.

    Raises ``UsageError`` and ``StorageError``.
    """
    folder = find_model(name)
    device, _ = placement(device_name, dtype_name or "float32")
    model = recipes.load(folder, device=device, dtype=dtype_name).eval()
    if model.vocab is None:
        raise UsageError(f"{name}: a model of vectors (vocab: null), which neither reads nor writes text")
    if tokenizer is None:
        tokenizer = (_tokenizer_of(folder.parent) if folder.name == MODEL else None) or "bytes"
    return model, open_codec(tokenizer, model.vocab)


def find_model(name: str) -> Path:
    """The folder with the model's index. Raises ``UsageError`` with the nearest one where there is none."""
    folder = Path(name)
    try:
        if (folder / INDEX).exists():
            return folder
        if (folder / MODEL / INDEX).exists():
            return folder / MODEL
        if is_run(folder):
            raise UsageError(
                f"{name}: this run has not saved its model yet (no {MODEL}/{INDEX}), which it does at its end"
            )
        if folder.is_dir():
            inside = _models_in(folder)
            hint = f"; did you mean {str(folder / inside[0])!r}?" if inside else ""
            raise UsageError(f"{name}: no saved model is in this folder (no {INDEX}){hint}")
        if folder.exists():
            hint = f"; its folder is {str(folder.parent)!r}" if folder.name == INDEX else ""
            raise UsageError(f"{name}: a file; expected the folder of a saved model{hint}")
        if name in packaged_names():
            raise UsageError(
                f"{name}: a recipe, not a saved model: `titans-build {name} --out DIR` saves one with fresh weights, "
                "titans-train a trained one"
            )
        hint = nearest(folder.name, _models_in(folder.parent)) if folder.parent.is_dir() else ""
    except (OSError, ValueError) as error:
        raise UsageError(f"{name}: {getattr(error, 'strerror', None) or error}") from None
    raise UsageError(f"{name}: no such folder{hint}; expected a saved model, or the folder of a titans-train run")


def _tokenizer_of(run: Path) -> str | None:
    """The tokenizer that a run's data was read with; ``None`` where that was bytes."""
    if (run / TOKENIZER).is_file():
        return str(run / TOKENIZER)
    if not is_run(run):
        return None
    recorded = read_file(run / RUN)
    data = recorded.get("data") if isinstance(recorded, dict) else None
    named = data.get("tokenizer") if isinstance(data, dict) else None
    return named if isinstance(named, str) else None


def _models_in(folder: Path) -> list[str]:
    """Names of the folders in ``folder`` that hold a model, or a run with one."""
    found = []
    for seen, place in enumerate(folder.iterdir()):
        if seen >= MOST_SEEN:
            break
        if (place / INDEX).exists() or (place / MODEL / INDEX).exists():
            found.append(place.name)
    return sorted(found)
