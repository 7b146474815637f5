"""The atomic write: complete or absent, with the permissions of the umask."""

import os
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import save_file

from simipu_hf.errors import SimIPUError
from simipu_hf.files import atomic_folder, atomic_path, atomic_write, write_lock


def test_a_file_is_replaced_as_a_whole(tmp_path):
    target = tmp_path / "new" / "notes.txt"
    for text in ("first", "second ü"):
        with atomic_write(target) as stream:
            stream.write(text)
            assert not target.exists() or target.read_text(encoding="utf-8") == "first"
    assert target.read_text(encoding="utf-8") == "second ü"
    assert os.listdir(target.parent) == ["notes.txt"]


def test_an_error_leaves_the_earlier_file(tmp_path):
    target = tmp_path / "notes.txt"
    target.write_text("first", encoding="utf-8")
    with pytest.raises(TypeError), atomic_write(target) as stream:
        stream.write(b"no text")
    with pytest.raises(SimIPUError, match=r"notes.txt cannot be written: .*No space"), atomic_write(target) as stream:
        raise OSError(28, "No space left on device")
    assert target.read_text(encoding="utf-8") == "first"
    assert os.listdir(tmp_path) == ["notes.txt"]


@pytest.mark.skipif(os.name != "posix", reason="needs a umask")
@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077])
def test_permissions_follow_the_umask(tmp_path, umask):
    weights = {"x": torch.zeros(3)}
    before = os.umask(umask)
    try:
        with atomic_write(tmp_path / "a.txt") as stream:
            stream.write("x")
        with atomic_path(tmp_path / "b.safetensors") as beside:
            save_file(weights, beside)
        with atomic_folder(tmp_path / "c") as beside:
            (beside / "d").mkdir()
            save_file(weights, beside / "d" / "e.safetensors")
    finally:
        os.umask(before)
    for name, expected in (("a.txt", 0o666), ("b.safetensors", 0o666), ("c", 0o777), ("c/d/e.safetensors", 0o666)):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == expected & ~umask, name


def test_a_folder_appears_at_the_end(tmp_path):
    with atomic_folder(tmp_path / "a" / "out") as beside:
        (beside / "file").write_text("x", encoding="utf-8")
        assert not (tmp_path / "a" / "out").exists()
    assert [p.name for p in (tmp_path / "a" / "out").iterdir()] == ["file"]
    with pytest.raises(TypeError), atomic_folder(tmp_path / "b" / "out") as beside:
        (beside / "file").write_bytes("no bytes")
    with pytest.raises(SimIPUError, match=r"out cannot be written: .*No space"), atomic_folder(tmp_path / "b" / "out"):
        raise OSError(28, "No space left on device")
    assert os.listdir(tmp_path) == ["a"]


def test_only_an_earlier_output_is_overwritten(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work", encoding="utf-8")
    refusals = [({}, "exists already"), ({"overwrite": True}, "something else than")]
    for options, message in refusals:
        with (
            pytest.raises(SimIPUError, match=message),
            atomic_folder(tmp_path / "out", is_earlier_output=lambda f: (f / "mark").exists(), **options),
        ):
            pass
    (tmp_path / "out" / "mark").touch()
    with atomic_folder(tmp_path / "out", overwrite=True, is_earlier_output=lambda f: (f / "mark").exists()) as beside:
        (beside / "mark").touch()
    assert os.listdir(tmp_path / "out") == ["mark"]
    assert os.listdir(tmp_path) == ["out"]


def test_only_one_process_writes_a_folder(tmp_path):
    with ThreadPoolExecutor(1) as other, atomic_folder(tmp_path / "target") as beside:

        def write() -> None:
            with atomic_folder(tmp_path / "target"):
                pass

        with pytest.raises(SimIPUError, match="target is being written by another process"):
            other.submit(write).result()
        (beside / "file").touch()
    assert [path.name for path in tmp_path.rglob("*")] == ["target", "file"]


def test_a_lock_of_another_user_is_one_and_a_file_system_without_locks_has_none(tmp_path, monkeypatch):
    monkeypatch.setattr("filelock.FileLock.acquire", Mock(side_effect=PermissionError(13, "denied")))
    (tmp_path / ".target.lock").touch()
    with (
        pytest.raises(SimIPUError, match=r"target cannot be written, or is being written by another user: .*denied"),
        write_lock(tmp_path / "target"),
    ):
        pass
    assert (tmp_path / ".target.lock").exists()
    monkeypatch.setattr("filelock.FileLock.acquire", Mock(side_effect=OSError(38, "no locks")))
    with write_lock(tmp_path / "target"), write_lock(tmp_path / "target"):
        (tmp_path / "target").touch()


def test_a_folder_behind_a_link_is_written_where_it_lies(tmp_path, monkeypatch):
    (tmp_path / "far").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "far", target_is_directory=True)
    for content in "ab":
        with atomic_folder(tmp_path / "link", overwrite=True) as beside:
            (beside / content).touch()
    assert (tmp_path / "link").is_symlink()
    assert [path.name for path in (tmp_path / "far").iterdir()] == ["b"]
    monkeypatch.setattr("os.path.ismount", lambda path: True)
    with pytest.raises(SimIPUError, match="far is a mounted disk"), atomic_folder(tmp_path / "link"):
        pass


@pytest.mark.parametrize("error", [KeyboardInterrupt, PermissionError])
def test_a_folder_is_never_lost_between_two_renames(tmp_path, monkeypatch, error):
    def rename(path, target):
        if path.name in failing:
            raise error
        return path.replace(target)

    failing = {".out.partial"}

    (tmp_path / "out" / "old").mkdir(parents=True)
    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises((SimIPUError, KeyboardInterrupt)), atomic_folder(tmp_path / "out", overwrite=True):
        pass
    assert os.listdir(tmp_path) == ["out"]
    assert os.listdir(tmp_path / "out") == ["old"]
    failing.add(".out.replaced")  # nor can it be moved back
    with pytest.raises((SimIPUError, KeyboardInterrupt)), atomic_folder(tmp_path / "out", overwrite=True):
        pass
    with pytest.raises((SimIPUError, KeyboardInterrupt)), atomic_folder(tmp_path / "out"):
        pass
    assert os.listdir(tmp_path / ".out.replaced") == ["old"]
    failing.clear()
    with pytest.raises(SimIPUError, match="exists already"), atomic_folder(tmp_path / "out"):
        pass
    assert os.listdir(tmp_path / "out") == ["old"]
