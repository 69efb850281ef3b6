"""Saves that are killed, that fail, or that run during a load: there is a complete model at any time."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import pytest

from titans_build.blocks.language_model import LanguageModel
from titans_build.recipes import StorageError, build, load, save, storage


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_save_killed_at_any_time_leaves_a_complete_model(
    tmp_path: Path, tiny: str, other: str, same: Any, values: Any
):
    """For every k, a process that is killed at the k-th step of a save leaves the old model or the new one."""
    old, new = build(tiny, seed=0), build(other, seed=1)
    outcomes = []
    for step in range(100):
        folder = tmp_path / str(step)
        save(old, folder)
        child = os.fork()
        if child == 0:
            _die_at(step)
            save(new, folder, overwrite=True)
            os._exit(0)
        finished = os.waitpid(child, 0)[1] == 0
        loaded = load(folder)
        is_new = loaded.recipe == new.recipe
        assert same(values(loaded), values(new if is_new else old))
        outcomes.append(is_new)
        save(old, folder, overwrite=True)
        assert same(values(load(folder)), values(old))
        if finished:
            break
    assert finished and outcomes[-1]
    # old up to one moment, new from then on
    assert len(outcomes) > 6 and not outcomes[0] and outcomes == sorted(outcomes)


def _die_at(step: int) -> None:
    """Exit without clean-up at the ``step``-th call that accesses the disk."""
    remaining = step

    def mortal(function: Any) -> Any:
        def call(*arguments: Any, **named: Any) -> Any:
            nonlocal remaining
            if remaining == 0:
                os._exit(9)
            remaining -= 1
            return function(*arguments, **named)

        return call

    for name in ("fsync", "replace", "open", "unlink"):
        setattr(os, name, mortal(getattr(os, name)))
    Path.write_text = mortal(Path.write_text)  # type: ignore[method-assign]
    Path.unlink = mortal(Path.unlink)  # type: ignore[method-assign]
    storage.save_file = mortal(storage.save_file)  # type: ignore[attr-defined]


@pytest.mark.parametrize("failing", ["save_file", "os.fsync", "os.replace"])
def test_a_failed_save_leaves_the_old_model_only(
    tmp_path: Path, model: LanguageModel, monkeypatch: pytest.MonkeyPatch, failing: str, other: str
):
    save(model, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def fail(*arguments: Any, **named: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(f"titans_build.recipes.storage.{failing}", fail)
        with pytest.raises(StorageError, match="cannot be written: No space left on device"):
            save(build(other), tmp_path, overwrite=True)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_loading_during_saves(tmp_path: Path, tiny: str, same: Any, values: Any):
    """A load during saves returns one of the saved models."""
    models = [build(tiny, seed=seed) for seed in range(2)]
    save(models[0], tmp_path)
    stop = threading.Event()

    def write() -> None:
        while not stop.is_set():
            for model in models:
                save(model, tmp_path, overwrite=True)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for _ in range(20):
            loaded = values(load(tmp_path))
            assert any(same(loaded, values(model)) for model in models)
    finally:
        stop.set()
        writer.join()
