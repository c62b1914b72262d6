"""Failures as a table: capped, and without anything secret."""

from extraction_dagster.defs.metadata import MOST_FAILURES_SHOWN, failures_table, in_table
from extraction_dagster.records import Failure


def failure(record_id, message):
    return Failure(record_id, "", "fetch", "FileUnavailableError", message, details="https://me:canary@host/")


def test_no_failure_gives_no_table():
    assert failures_table([]) == {}


def test_no_password_and_no_signature_gets_into_dagsters_storage():
    message = "Record 7: File 'https://me:canary@host/a.mp4?sig=canary' and s3://canary@bucket/b.mp4 can't be had."
    table = failures_table([failure(7, message)])["failures_table"]
    (record,) = (row.data for row in table.records)
    assert (record["record"], record["stage"], record["type"]) == (7, "fetch", "FileUnavailableError")
    assert "canary" not in str(table)
    assert record["message"] == "File '…tps://host/a.mp4?…' and s3://bucket/b.mp4 can't be had."


def test_the_columns_say_what_they_hold():
    table = failures_table([failure(7, "no")])["failures_table"]
    assert [(column.name, column.type) for column in table.schema.columns] == [
        ("record", "int"),
        ("stage", "string"),
        ("type", "string"),
        ("message", "string"),
    ]


def test_of_many_failures_the_first_are_shown():
    table = failures_table([failure(number, "x" * 1000) for number in range(1000)])["failures_table"]
    assert MOST_FAILURES_SHOWN == 100
    assert [row.data["record"] for row in table.records] == list(range(100))


def test_long_words_and_long_messages_are_cut_so_that_the_table_fits_the_page():
    assert (
        in_table("Video '/videos/2026/11/23/platform/truncated.mp4' is broken")
        == "Video '…form/truncated.mp4' is broken"
    )
    assert in_table("a " * 500) == "a " * 200 + "…"
