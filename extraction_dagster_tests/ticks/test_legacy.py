"""The checkpoint that an earlier script left: a file or a table."""

import pytest

from extraction_dagster.errors.ticks import LegacyCheckpointError
from extraction_dagster.ticks.legacy import read_legacy_checkpoint


@pytest.mark.parametrize(
    ("content", "last_processed_id"),
    [
        ("12345", 12345),
        ("  12345\n", 12345),
        ("-3", -3),
        ('{"last_processed_id": 7, "updated_at": "2025-01-31"}', 7),
        ('{"last_id": 8}', 8),
        ('{"id": 9}', 9),
        ('{"id": 9, "last_processed_id": 7}', 7),
    ],
)
def test_a_file_holds_a_number_or_an_object_with_one(tmp_path, sqlite_database, content, last_processed_id):
    (tmp_path / ".checkpoint").write_text(content)
    assert read_legacy_checkpoint(tmp_path / ".checkpoint", sqlite_database.engine) == last_processed_id


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "neither JSON nor a number"),
        (b"video_12", "neither JSON nor a number"),
        (b"\xff", "neither JSON nor a number"),
        (b"[" * 60_000, "neither JSON nor a number"),
        (b"12.5", "no last_processed_id that is an integer"),
        (b"true", "no last_processed_id that is an integer"),
        (b"[7]", "no last_processed_id that is an integer"),
        (b"9223372036854775808", "no last_processed_id that is an integer"),
        (b'{"last_processed_id": "7"}', "no last_processed_id that is an integer"),
        (b'{"last_processed_id": null}', "no last_processed_id that is an integer"),
        (b'{"other": 7}', "no last_processed_id that is an integer"),
        (b'{"id": 7, "id": 9}', "neither JSON nor a number"),
        (b"9" * 5_000, "neither JSON nor a number"),
        (b"1e3", "no last_processed_id that is an integer"),
        (b"NaN", "neither JSON nor a number"),
        (b"7" + b" " * 65_536, "more than 65536 bytes"),
    ],
)
def test_any_other_file_is_refused_by_name(tmp_path, sqlite_database, content, why):
    (tmp_path / ".checkpoint").write_bytes(content)
    with pytest.raises(LegacyCheckpointError, match=rf"imported from {tmp_path}/.checkpoint: .*{why}.*Nothing was"):
        read_legacy_checkpoint(tmp_path / ".checkpoint", sqlite_database.engine)


def test_a_missing_file_a_folder_and_a_link_are_refused(tmp_path, sqlite_database):
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    for name, why in (("none", "no such file"), (".", "no regular file"), ("link", "symbolic links")):
        with pytest.raises(LegacyCheckpointError, match=why):
            read_legacy_checkpoint(tmp_path / name, sqlite_database.engine)


def test_the_greatest_id_of_the_table_counts(database):
    database.execute("CREATE TABLE extraction_checkpoint (id BIGINT PRIMARY KEY, updated_at TIMESTAMP)")
    database.execute("INSERT INTO extraction_checkpoint (id) VALUES (5), (12345), (-7)")
    assert read_legacy_checkpoint(None, database.engine) == 12345


def test_a_missing_and_an_empty_table_are_refused(database):
    with pytest.raises(LegacyCheckpointError, match=r"from table extraction_checkpoint at .*: there is no such table"):
        read_legacy_checkpoint(None, database.engine)
    database.execute("CREATE TABLE extraction_checkpoint (id BIGINT PRIMARY KEY, updated_at TIMESTAMP)")
    with pytest.raises(LegacyCheckpointError, match="it has no row"):
        read_legacy_checkpoint(None, database.engine)


def test_a_table_whose_ids_are_texts_is_refused(database):
    database.execute("CREATE TABLE extraction_checkpoint (id TEXT PRIMARY KEY, updated_at TIMESTAMP)")
    database.execute("INSERT INTO extraction_checkpoint (id) VALUES ('video_12'), ('7')")
    with pytest.raises(LegacyCheckpointError, match="it holds an id that is no integer"):
        read_legacy_checkpoint(None, database.engine)


def test_the_first_database_that_has_the_table_counts(database, make_database, settings, tmp_path):
    state = make_database(f"sqlite:///{tmp_path}/state.db", settings)
    state.execute("CREATE TABLE extraction_checkpoint (id BIGINT PRIMARY KEY, updated_at TIMESTAMP)")
    state.execute("INSERT INTO extraction_checkpoint (id) VALUES (3)")
    assert read_legacy_checkpoint(None, database.engine, state.engine) == 3
    database.execute("CREATE TABLE extraction_checkpoint (id BIGINT PRIMARY KEY, updated_at TIMESTAMP)")
    database.execute("INSERT INTO extraction_checkpoint (id) VALUES (5)")
    assert read_legacy_checkpoint(None, database.engine, state.engine) == 5
