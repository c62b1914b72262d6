"""Mirrors of the watermark, a JSON file and a table, in every state that they can be found in."""

import json
import os
import threading
from datetime import UTC, datetime

import pytest
import sqlalchemy as sa
from hypothesis import given
from hypothesis import strategies as st

from extraction_dagster.errors.runs import LegacyCheckpointError, LostCursorError, MirrorError
from extraction_dagster.stages.catalog.database import make_engine
from extraction_dagster.ticks.mirrors import (
    JsonMirror,
    Notice,
    Reading,
    TableMirror,
    _read_json,
    adopt,
    follow,
    make_mirror,
    read_legacy_checkpoint,
)

NOW = datetime(2025, 1, 31, 12, tzinfo=UTC)
DOCUMENT = '{"last_processed_id": 5, "updated_at": "2025-01-31T12:00:00Z"}'


class Json:
    """A JSON mirror, and what a person could do to its file."""

    def __init__(self, folder):
        self.path = folder / ".checkpoint"
        self.mirror = JsonMirror(self.path)

    def corrupt(self):
        self.path.write_text('{"last_processed_id": 5, "upd')

    def lose(self):
        self.path.unlink()

    def make_foreign(self):
        self.path.write_text('{"epoch": 3, "loss": 0.1}')

    def kept_copies(self):
        return [path.read_text() for path in self.path.parent.glob(".checkpoint.corrupt-*")]


class Table:
    """A table mirror, and what a person could do to the table."""

    def __init__(self, database):
        self.database, self.mirror = database, TableMirror(database.engine)

    def corrupt(self):
        self.database.execute("DROP TABLE IF EXISTS extraction_checkpoint")
        self.database.execute("CREATE TABLE extraction_checkpoint (id BIGINT PRIMARY KEY, updated_at TIMESTAMP)")
        self.database.execute("INSERT INTO extraction_checkpoint (id) VALUES (5), (6)")

    make_foreign = corrupt

    def lose(self):
        self.database.execute("DROP TABLE extraction_checkpoint")

    def kept_copies(self):
        names = sa.inspect(self.database.engine).get_table_names()
        return [name for name in names if name.startswith("extraction_checkpoint_corrupt_")]


@pytest.fixture(params=["json", "sqlite table", "postgresql table"])
def place(request, tmp_path, settings):
    if request.param == "json":
        yield Json(tmp_path)
        return
    url = f"sqlite:///{tmp_path}/s.db" if "sqlite" in request.param else request.getfixturevalue("postgres_url")
    database = request.getfixturevalue("make_database")(url, settings)
    yield Table(database)
    database.engine.dispose()


def test_nothing_is_mirrored_before_there_is_a_watermark(place):
    assert follow(place.mirror, None, now=NOW) == []
    assert place.mirror.read() == Reading("missing")


def test_a_missing_mirror_is_written(place):
    assert follow(place.mirror, 5, now=NOW) == []
    assert place.mirror.read() == Reading("ok", 5)


@pytest.mark.parametrize("last_processed_id", [-(2**63), -1, 0, 2**63 - 1])
def test_every_id_is_mirrored(place, last_processed_id):
    follow(place.mirror, last_processed_id, now=NOW)
    assert place.mirror.read() == Reading("ok", last_processed_id)


def test_a_mirror_that_was_removed_is_written_anew(place):
    follow(place.mirror, 5, now=NOW)
    place.lose()
    assert follow(place.mirror, 5, now=NOW) == []
    assert place.mirror.read() == Reading("ok", 5)


def test_a_mirror_behind_is_brought_forward_in_silence(place):
    place.mirror.write(4, now=NOW)
    assert follow(place.mirror, 9, now=NOW) == []
    assert place.mirror.read() == Reading("ok", 9)


@pytest.mark.parametrize("actual", [4, None])
def test_a_mirror_ahead_is_rewritten_with_a_warning_for_the_cursor_wins(place, actual):
    place.mirror.write(9, now=NOW)
    text = f"Checkpoint mirror {place.mirror.name} said 9, ahead of the cursor: rewritten."
    assert follow(place.mirror, actual, now=NOW) == [Notice("warning", text)]
    assert place.mirror.read().last_processed_id == actual
    assert follow(place.mirror, actual, now=NOW) == []


@pytest.mark.parametrize("harm", ["corrupt", "make_foreign"])
def test_a_corrupt_or_foreign_mirror_is_kept_aside_and_rewritten_with_an_error(place, harm):
    getattr(place, harm)()
    (notice,) = follow(place.mirror, 7, now=NOW)
    assert (notice.level, "was corrupt" in notice.text, "Kept as" in notice.text) == ("error", True, True)
    assert len(place.kept_copies()) == 1
    assert place.mirror.read() == Reading("ok", 7)
    assert follow(place.mirror, 7, now=NOW) == []


def test_a_mirror_that_is_lost_with_the_cursor_store_has_nothing_to_adopt(place):
    assert adopt(place.mirror) is None


def test_a_lost_cursor_store_is_replaced_by_what_the_mirror_says(place):
    place.mirror.write(42, now=NOW)
    assert adopt(place.mirror) == 42
    place.mirror.write(None, now=NOW)
    assert adopt(place.mirror) is None


@pytest.mark.parametrize("harm", ["corrupt", "make_foreign"])
def test_a_corrupt_mirror_of_a_lost_cursor_store_is_refused_and_stays(place, harm):
    getattr(place, harm)()
    with pytest.raises(LostCursorError, match=r"is corrupt: .*Mend or remove it, or .* 'extraction checkpoint set ID'"):
        adopt(place.mirror)
    assert place.mirror.read().state == "corrupt"
    assert place.kept_copies() == []


# The JSON file alone


def test_the_file_is_written_as_documented(tmp_path):
    JsonMirror(tmp_path / "new" / "folder" / "checkpoint.json").write(5, now=NOW)
    assert (tmp_path / "new" / "folder" / "checkpoint.json").read_text() == DOCUMENT + "\n"


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "no JSON object"),
        (b"5", "expected exactly the keys"),
        (b"\xff\xfe", "no JSON object"),
        (b'{"last_processed_id": 5}', "expected exactly the keys"),
        (DOCUMENT.replace("5", "5.0").encode(), "no integer"),
        (DOCUMENT.replace("5,", "true,").encode(), "no integer"),
        (DOCUMENT.replace("5,", '"5",').encode(), "no integer"),
        (DOCUMENT.replace("5,", "NaN,").encode(), "NaN is no number"),
        (DOCUMENT.replace("5,", "9223372036854775808,").encode(), "no integer"),
        (DOCUMENT.replace("{", '{"last_processed_id": 4, ').encode(), "a key stands twice"),
        (DOCUMENT.replace("2025", "year").encode(), "no time"),
        (b"[" * 60_000, "no JSON object"),
        (DOCUMENT.encode() + b" " * 65_536, "more than 65536 bytes"),
    ],
)
def test_a_file_that_is_not_exactly_ours_is_corrupt(tmp_path, content, why):
    (tmp_path / "state").write_bytes(content)
    reading = JsonMirror(tmp_path / "state").read()
    assert (reading.state, reading.last_processed_id) == ("corrupt", None)
    assert why in reading.why


@given(st.none() | st.integers(-(2**63), 2**63 - 1))
def test_every_watermark_is_read_back(last_processed_id):
    document = {"last_processed_id": last_processed_id, "updated_at": "2025-01-31T12:00:00Z"}
    assert _read_json(json.dumps(document).encode()) == Reading("ok", last_processed_id)


@given(st.binary(max_size=200))
def test_no_bytes_are_taken_for_a_watermark_or_crash(data):
    assert _read_json(data).state == "corrupt"


def test_a_file_that_can_not_be_written_is_a_warning_and_keeps_its_value(tmp_path):
    mirror = JsonMirror(tmp_path / "file" / ".checkpoint")
    (tmp_path / "file").write_text("in the way")
    (notice,) = follow(mirror, 5, now=NOW)
    text = (
        f"Checkpoint mirror {tmp_path}/file/.checkpoint can't be read: Not a directory. The cursor store is not "
        "affected. Restore access to it, or set EXTRACTION_CHECKPOINT_MIRROR=none."
    )
    assert notice == Notice("warning", text)


def test_a_full_disk_is_a_warning_and_the_old_value_stands(tmp_path, monkeypatch):
    mirror = JsonMirror(tmp_path / ".checkpoint")
    mirror.write(5, now=NOW)

    def full(_handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    (notice,) = follow(mirror, 6, now=NOW)
    assert (notice.level, "can't be written: No space left on device" in notice.text) == ("warning", True)
    assert mirror.read() == Reading("ok", 5)


def test_a_link_or_a_folder_in_the_files_place_is_a_warning_and_stays(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    for name, reason in (("folder", "no regular file"), ("link", "symbolic links")):
        (notice,) = follow(JsonMirror(tmp_path / name), 5, now=NOW)
        assert (notice.level, reason in notice.text) == ("warning", True)
        assert adopt(JsonMirror(tmp_path / name)) is None
    assert not (tmp_path / "elsewhere").exists()


# The table alone


def test_a_table_that_can_not_be_reached_is_a_warning_and_hides_the_password():
    engine = make_engine("postgresql://u:s3cret@127.0.0.1:1/none", setting="EXTRACTION_STATE_URL")
    (notice,) = follow(TableMirror(engine), 5, now=NOW)
    assert (notice.level, "can't be read" in notice.text, "s3cret" in notice.text) == ("warning", True, False)


def test_a_table_of_somebody_else_is_a_warning_and_stays(database):
    database.execute("CREATE TABLE extraction_checkpoint (name TEXT)")
    database.execute("INSERT INTO extraction_checkpoint VALUES ('theirs')")
    (notice,) = follow(TableMirror(database.engine), 5, now=NOW)
    assert (notice.level, "can't be used: it is not ours" in notice.text) == ("warning", True)
    assert database.rows("SELECT name FROM extraction_checkpoint") == [("theirs",)]


def test_a_text_in_the_id_column_is_corrupt(sqlite_database):
    sqlite_database.execute("CREATE TABLE extraction_checkpoint (id BIGINT PRIMARY KEY, updated_at TIMESTAMP)")
    sqlite_database.execute("INSERT INTO extraction_checkpoint (id) VALUES ('five')")
    assert TableMirror(sqlite_database.engine).read() == Reading("corrupt", why="its id is no integer")


def test_a_second_row_is_refused_by_the_database_itself(database):
    TableMirror(database.engine).write(5, now=NOW)
    with pytest.raises(sa.exc.IntegrityError, match=r"one_row"):
        database.execute("INSERT INTO extraction_checkpoint (id) VALUES (6)")


def test_many_writers_at_once_leave_exactly_one_row(database):
    errors, start = [], threading.Barrier(6)

    def write(first):
        mirror = TableMirror(database.engine)
        start.wait(timeout=60)
        for number in range(first, first + 15):
            try:
                mirror.write(number, now=NOW)
            except MirrorError as error:
                errors.append(error)

    threads = [threading.Thread(target=write, args=(1000 * number,), daemon=True) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=240)
    assert (errors, any(thread.is_alive() for thread in threads)) == ([], False)
    ((last,),) = database.rows("SELECT id FROM extraction_checkpoint")
    assert last % 1000 == 14


def test_the_settings_choose_the_mirror(settings, tmp_path, sqlite_database):
    engine = sqlite_database.engine
    assert make_mirror(settings(), engine) is None
    assert make_mirror(settings(checkpoint_mirror="json"), engine).name == f"{tmp_path}/.checkpoint"
    own = settings(checkpoint_mirror="json", checkpoint_path=tmp_path / "own.json")
    assert make_mirror(own, engine).name == f"{tmp_path}/own.json"
    table = make_mirror(settings(checkpoint_mirror="table"), engine)
    assert table.name == f"table extraction_checkpoint at sqlite:///{tmp_path}/source.db"


# The checkpoint that an earlier script left: a file or a table.


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
    assert (
        read_legacy_checkpoint(tmp_path / ".checkpoint", sqlite_database.engine).last_processed_id == last_processed_id
    )


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
    assert read_legacy_checkpoint(None, database.engine).last_processed_id == 12345


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
    assert read_legacy_checkpoint(None, database.engine, state.engine).last_processed_id == 3
    database.execute("CREATE TABLE extraction_checkpoint (id BIGINT PRIMARY KEY, updated_at TIMESTAMP)")
    database.execute("INSERT INTO extraction_checkpoint (id) VALUES (5)")
    assert read_legacy_checkpoint(None, database.engine, state.engine).last_processed_id == 5


ORIGINAL = "CREATE TABLE extraction_checkpoint (id INTEGER PRIMARY KEY, last_processed_id BIGINT, updated_at TIMESTAMP)"


def test_the_column_that_holds_the_watermark_is_read_and_named_with_its_row(database):
    database.execute(ORIGINAL)
    database.execute("INSERT INTO extraction_checkpoint VALUES (1, 46336, '2025-01-31 12:00:00')")
    found = read_legacy_checkpoint(None, database.engine)
    assert found.last_processed_id == 46336
    assert "table extraction_checkpoint at" in found.told
    assert "column last_processed_id, row id=1, last_processed_id=46336, updated_at=2025-01-31 12:00:00" in found.told


@pytest.mark.parametrize(
    ("columns", "rows", "why"),
    [
        (
            "id INTEGER PRIMARY KEY, last_processed_id BIGINT",
            "(1, 5), (2, 6)",
            "say different values of last_proc.*6, 5",
        ),
        (
            "id INTEGER PRIMARY KEY, worker TEXT, last_id BIGINT",
            "(1, 'a', 5), (2, 'b', 6)",
            "different values of last_id",
        ),
        ("id INTEGER PRIMARY KEY, worker TEXT", "(1, 'a'), (2, 'b')", "its column id may number its rows"),
        ("name TEXT, value BIGINT", "('a', 5)", "it has none of last_processed_id, last_id, id .it has: name, value"),
        ("id INTEGER PRIMARY KEY, last_processed_id BIGINT", "(1, NULL)", "it has no row"),
    ],
)
def test_a_table_that_could_be_read_in_two_ways_is_refused(columns, rows, why, database):
    database.execute(f"CREATE TABLE extraction_checkpoint ({columns})")
    database.execute(f"INSERT INTO extraction_checkpoint VALUES {rows}")
    with pytest.raises(LegacyCheckpointError, match=why):
        read_legacy_checkpoint(None, database.engine)


def test_rows_that_agree_are_one_watermark(database):
    database.execute(ORIGINAL)
    database.execute("INSERT INTO extraction_checkpoint (id, last_processed_id) VALUES (1, 7), (2, 7)")
    assert read_legacy_checkpoint(None, database.engine).last_processed_id == 7


def test_a_table_of_another_shape_is_not_ours_and_stays_as_it_is(database):
    database.execute(ORIGINAL)
    database.execute("INSERT INTO extraction_checkpoint (id, last_processed_id) VALUES (1, 7)")
    mirror = TableMirror(database.engine)
    for attempt in (mirror.read, lambda: mirror.write(9, now=NOW), lambda: mirror.write(None, now=NOW)):
        with pytest.raises(MirrorError, match="it is not ours: it has the columns id, last_processed_id, updated_at"):
            attempt()
    (notice,) = follow(mirror, 9, now=NOW)
    assert (notice.level, "it is not ours" in notice.text) == ("warning", True)
    assert adopt(mirror) is None
    assert database.rows("SELECT id, last_processed_id FROM extraction_checkpoint") == [(1, 7)]


def test_a_mirror_of_state_tables_in_a_schema_lies_there(postgres_url):
    engine = make_engine(postgres_url, setting="EXTRACTION_STATE_URL", state_schema="mine")
    with engine.begin() as connection:
        connection.execute(sa.text("CREATE SCHEMA mine"))
    mirror = TableMirror(engine)
    mirror.write(5, now=NOW)
    mirror.write(7, now=NOW)
    assert mirror.read() == Reading("ok", 7)
    assert sa.inspect(engine).get_table_names("mine") == ["extraction_checkpoint"]
    assert sa.inspect(engine).get_table_names("public") == []
    engine.dispose()
