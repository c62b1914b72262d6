"""The folder of compiled networks: nothing is loaded that somebody else could have written."""

from __future__ import annotations

import hashlib
import os
import signal
import stat
import subprocess
import sys
import time

import pytest

from extraction_dagster.errors.embed import ArtifactFolderError
from extraction_dagster.stages.embed.compiled.compiling import ArtifactFolder

DAY = 86_400


@pytest.fixture
def folder(tmp_path):
    return ArtifactFolder(tmp_path / "home" / "cache" / "compiled")


@pytest.fixture
def keep(folder):
    """`keep("key", b"code")`: a network compiled and kept."""

    def keep(key, code):
        folder.find(key)  # makes the folder
        with folder.building(key) as work:
            (work / "network.onnx").write_bytes(code)
            return folder.keep(key, work / "network.onnx")

    return keep


def names(folder):
    return sorted(path.name for path in folder.folder.iterdir() if path.suffix != ".lock")


def test_what_was_kept_is_found_under_its_key_and_is_this_users_alone(folder, keep):
    path = keep("k1", b"code")

    assert path.name == f"k1-{hashlib.sha256(b'code').hexdigest()}.onnx"
    assert (folder.find("k1"), folder.find("k")) == (path, None)
    assert path.read_bytes() == b"code"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(folder.folder.stat().st_mode) == 0o700
    assert names(folder) == [path.name]


@pytest.mark.parametrize("damage", [b"", b"cod", b"codf", b"code "])
def test_a_damaged_network_is_thrown_away_with_a_warning(folder, keep, caplog, damage):
    path = keep("k1", b"code")
    path.write_bytes(damage)

    assert folder.find("k1") is None
    assert not path.exists()
    assert f"The compiled network {path} is damaged; it is removed and made again" in caplog.text


def test_what_belongs_to_another_user_is_refused(folder, keep, monkeypatch):
    keep("k1", b"code")
    owner = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: owner + 1)

    with pytest.raises(
        ArtifactFolderError, match=rf"compiled: it belongs to the user with number {owner}, expected .*runs uncompiled"
    ):
        folder.find("k1")


@pytest.mark.parametrize("mode", [0o770, 0o707])
def test_a_folder_that_others_may_write_to_is_refused(folder, keep, mode):
    keep("k1", b"code")
    folder.folder.chmod(mode)

    with pytest.raises(ArtifactFolderError, match=rf"compiled: others may write to it \(mode {mode:o}\)"):
        folder.find("k1")


def test_a_network_that_others_may_write_to_is_refused(folder, keep):
    path = keep("k1", b"code")
    path.chmod(0o620)

    with pytest.raises(ArtifactFolderError, match=r"\.onnx: others may write to it \(mode 620\)"):
        folder.find("k1")


def test_links_are_not_followed(folder, keep, tmp_path):
    path = keep("k1", b"code")
    path.rename(tmp_path / "elsewhere.onnx")
    path.symlink_to(tmp_path / "elsewhere.onnx")
    with pytest.raises(ArtifactFolderError, match=r"\.onnx: Too many levels of symbolic links"):
        folder.find("k1")

    folder.folder.rename(tmp_path / "elsewhere")
    folder.folder.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ArtifactFolderError, match=r"compiled: it is not a folder"):
        folder.find("k1")


def test_what_is_no_file_and_what_can_not_be_made_is_refused(folder, keep, tmp_path):
    path = keep("k1", b"code")
    path.unlink()
    os.mkfifo(path, 0o600)
    with pytest.raises(ArtifactFolderError, match=r"\.onnx: it is not a file"):
        folder.find("k1")

    (tmp_path / "file").touch()
    with pytest.raises(ArtifactFolderError, match=r"compiled: (Not a directory|File exists)"):
        ArtifactFolder(tmp_path / "file" / "compiled").find("k1")


def test_only_one_builds_a_key_at_a_time(folder):
    folder.find("k1")
    with folder.building("k1") as first, folder.building("k1") as second, folder.building("k2") as other:
        assert first.is_dir()
        assert second is None
        assert other.is_dir()
    assert names(folder) == []

    with folder.building("k1") as again:
        assert again is not None


KILLED = """
import faulthandler
faulthandler.dump_traceback_later(300, exit=True)  # the test must not wait for a line for ever
import sys, time
from pathlib import Path
from extraction_dagster.stages.embed.compiled.compiling import ArtifactFolder
folder = ArtifactFolder(Path(sys.argv[1]))
folder.find("k1")
with folder.building("k1") as work:
    (work / "network.onnx").write_bytes(b"half")
    print("building", flush=True)
    time.sleep(600)
"""


def test_a_builder_that_is_killed_leaves_no_lock_and_its_rest_is_swept(folder):
    with subprocess.Popen(
        [sys.executable, "-c", KILLED, str(folder.folder)], stdout=subprocess.PIPE, text=True
    ) as builder:
        assert builder.stdout.readline() == "building\n"
        with folder.building("k1") as work:
            assert work is None
        builder.send_signal(signal.SIGKILL)
    assert names(folder) == ["k1.tmp"]

    assert folder.find("k1") is None
    with folder.building("k1") as work:
        assert list(work.iterdir()) == []


def test_networks_unused_for_a_month_go_when_another_is_kept(folder, keep):
    old, used = keep("old", b"old"), keep("used", b"used")
    for path in (old, used):
        os.utime(path, (time.time() - 31 * DAY,) * 2)
    folder.find("used")

    kept = keep("new", b"new")

    assert names(folder) == sorted([used.name, kept.name])


def test_a_failure_is_remembered_for_a_day_for_its_compiler_and_key(folder, keep):
    folder.find("k1")
    folder.remember_failure("k1", "onnx 1.19", "no header")
    assert folder.failure("k1", "onnx 1.19") == "no header"
    assert folder.failure("k1", "onnx 1.20") is None
    assert folder.failure("k2", "onnx 1.19") is None

    marker = folder.folder / "k1.failed"
    os.utime(marker, (time.time() - DAY - 60,) * 2)
    assert folder.failure("k1", "onnx 1.19") is None

    for garbage in ("", "[]", "{}", '{"compiler": 1}', "\0"):
        marker.write_text(garbage)
        assert folder.failure("k1", "onnx 1.19") is None

    folder.remember_failure("k1", "onnx 1.19", "no header")
    keep("k1", b"code")
    assert folder.failure("k1", "onnx 1.19") is None


def test_a_folder_above_that_others_may_write_to_is_refused(folder, keep):
    keep("k1", b"code")
    home = folder.folder.parent.parent
    home.chmod(0o777)
    with pytest.raises(ArtifactFolderError, match=r"compiled: others may write to '.*home' above it \(mode 777\)"):
        folder.find("k1")


def test_what_is_loaded_is_what_was_judged_whatever_takes_its_name(folder, keep):
    path = keep("k1", b"code")
    with folder.opened(path) as alias:
        path.unlink()
        path.write_bytes(b"other code")
        assert alias.read_bytes() == b"code"
    with pytest.raises(ArtifactFolderError, match="it was changed a moment ago"), folder.opened(path):
        pass
    path.unlink()
    path.symlink_to("/etc/hostname")
    with pytest.raises(ArtifactFolderError, match="symbolic links"), folder.opened(path):
        pass
