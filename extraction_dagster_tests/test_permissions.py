"""Who else may read or change the data folder and `.env`, and what is said of it."""

import os
import stat

import pytest

from extraction_dagster import permissions, settings
from extraction_dagster.permissions import dotenv_warning, home_warning, make_private_folder, parents_fault
from extraction_dagster.settings import load_settings, permission_warnings


def mode_of(path):
    return stat.S_IMODE(path.stat().st_mode)


def test_what_is_made_is_for_this_user_alone_and_what_is_there_stays(tmp_path):
    there = tmp_path / "there"
    there.mkdir(mode=0o755)
    there.chmod(0o755)
    before = os.umask(0)
    try:
        make_private_folder(there / "home" / "cache" / "videos")
        make_private_folder(there / "home")
    finally:
        os.umask(before)
    made = [there / "home", there / "home" / "cache", there / "home" / "cache" / "videos"]
    assert [mode_of(path) for path in (there, *made)] == [0o755, 0o700, 0o700, 0o700]
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError):
        make_private_folder(tmp_path / "file" / "below")


def test_a_data_folder_that_others_may_look_into_is_warned_of(tmp_path, monkeypatch):
    home = tmp_path / "home"
    assert home_warning(home) is None
    home.mkdir()
    for mode, said in ((0o700, None), (0o750, "Others may read"), (0o707, "Others may change"), (0o777, "change")):
        home.chmod(mode)
        found = home_warning(home)
        assert found is None if said is None else said in found
    home.chmod(0o700)
    monkeypatch.setattr(permissions.os, "geteuid", lambda: 4242)
    if home.stat().st_uid:
        assert "belongs to the user with number" in home_warning(home)


def test_a_file_of_settings_that_others_may_change_or_read_is_warned_of(tmp_path):
    path = tmp_path / ".env"
    assert dotenv_warning(path, holds_secrets=True) is None
    path.write_text("")
    for mode, secret, said in (
        (0o600, True, None),
        (0o644, False, None),
        (0o644, True, "which holds a password or key"),
        (0o640, True, "Others may read the file"),
        (0o664, False, "Others may change the file"),
        (0o602, True, "Others may change the file"),
    ):
        path.chmod(mode)
        found = dotenv_warning(path, holds_secrets=secret)
        assert found is None if said is None else said in found


@pytest.mark.skipif(os.geteuid() != 0, reason="gives a file to somebody else, which root alone may")
def test_files_of_others_are_warned_of(tmp_path):
    for path in (tmp_path / "home", tmp_path / ".env"):
        path.mkdir() if path.name == "home" else path.write_text("")
        os.chown(path, 4242, -1)
    assert "belongs to the user with number 4242" in home_warning(tmp_path / "home")
    assert "belongs to the user with number 4242" in dotenv_warning(tmp_path / ".env", holds_secrets=False)


def test_each_warning_is_logged_once_in_a_process(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(settings, "_warned", set())
    (tmp_path / ".env").write_text("EXTRACTION_QDRANT_API_KEY=canary\nEXTRACTION_HOME=home\n")
    (tmp_path / ".env").chmod(0o644)
    (tmp_path / "home").mkdir()
    (tmp_path / "home").chmod(0o755)
    monkeypatch.delenv("EXTRACTION_HOME", raising=False)
    for _ in range(3):
        loaded = load_settings()
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 2
    assert "run chmod 700 on it." in said[0]
    assert "which holds a password or key" in said[1]
    assert "canary" not in caplog.text
    assert len(permission_warnings(loaded)) == 2


def test_a_parent_that_others_may_write_to_is_a_fault(tmp_path):
    folder = tmp_path / "shared" / "home" / "compiled"
    folder.mkdir(parents=True)
    assert parents_fault(folder) is None
    (tmp_path / "shared").chmod(0o777)
    assert "others may write to" in parents_fault(folder)
    (tmp_path / "shared").chmod(0o1777)  # as /tmp: nobody else may rename what lies in it
    assert parents_fault(folder) is None
