"""Atomic replacement of files, links and devices."""

from __future__ import annotations

import os
import stat

import pytest

import titans_build as tb
from titans_build.recipes import StorageError
from titans_build.recipes.atomic_write import atomic_write, making_folder, read_regular


def write(target, text):
    with atomic_write(target) as temporary:
        temporary.write_text(text)


def test_the_target_of_a_link_is_replaced(tmp_path):
    real, link = tmp_path / "real", tmp_path / "link"
    real.write_text("old")
    link.symlink_to(real)
    write(link, "new")
    assert link.is_symlink() and real.read_text() == "new"


def test_permissions_are_kept(tmp_path):
    private = tmp_path / "private"
    private.write_text("old")
    private.chmod(0o600)
    write(private, "new")
    assert private.read_text() == "new" and stat.S_IMODE(private.stat().st_mode) == 0o600


@pytest.mark.skipif(not os.path.exists("/dev/null"), reason="there is no such device")
def test_a_device_is_written_to(tmp_path):
    link = tmp_path / "link"
    link.symlink_to("/dev/null")
    write(link, "gone")
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode) and link.is_symlink()


def test_a_long_name(tmp_path):
    target = tmp_path / ("a" * 240)
    write(target, "new")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["new"]


def test_empty_folders_are_removed_after_an_error(tmp_path):
    with pytest.raises(OSError, match="long"), making_folder(tmp_path / "a" / "b" / ("c" * 300)):
        pass
    with pytest.raises(ZeroDivisionError), making_folder(tmp_path / "a" / "b"):
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no pipes here")
def test_a_writer_that_replaces_its_file_does_not_replace_a_device(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    with atomic_write(pipe) as temporary:
        new = temporary.with_name("new")
        new.write_bytes(b"content")
        os.replace(new, temporary)  # as safetensors does
    assert stat.S_ISFIFO(os.stat(pipe).st_mode) and os.read(reader, 100) == b"content"
    os.close(reader)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_what_killed_writers_left_is_removed(tmp_path):
    target = tmp_path / "a"
    child = os.fork()
    if child == 0:
        with atomic_write(target) as temporary:
            temporary.write_text("half")
            (temporary.parent / ".tmpAbC").write_text("as safetensors does")
            os._exit(9)
    os.waitpid(child, 0)
    # of earlier versions, which wrote files, and of others
    kept = [".a.fedcba9876543210.tmp", ".b.0123456789abcdef.tmp", ".a.tmp"]
    for name in [".a.0123456789abcdef.tmp", *kept]:
        (tmp_path / name).write_text("half")
        if name != kept[0]:
            os.utime(tmp_path / name, (0, 0))
    with atomic_write(target) as running:  # is not removed by another writer
        running.write_text("last")
        write(target, "first")
        assert target.read_text() == "first"
    assert target.read_text() == "last"
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*kept, "a"])


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no pipes here")
def test_a_pipe_that_nothing_reads_is_an_error(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="No such device or address"), atomic_write(tmp_path / "pipe") as temporary:
        temporary.write_text("new")
    with pytest.raises(OSError, match="not a regular file"):
        read_regular(tmp_path / "pipe")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no pipes here")
def test_a_pipe_in_place_of_the_index_is_an_error(tmp_path):
    os.mkfifo(tmp_path / "model.json")
    with pytest.raises(StorageError, match="not a regular file"):
        tb.load(tmp_path)


def test_a_path_with_a_nul_character_is_an_error():
    with pytest.raises(StorageError, match="null"):
        tb.load("a\0b")
