"""What a notice says, and what it never does."""

import pytest

from extraction_dagster.notify.notice import RunFailure, redact

FAILURE = RunFailure("r-1", "extraction_job", "1-1000", "video_frames", "The store is down", failed_records=3)


def test_a_notice_names_range_step_run_error_records_and_the_command():
    assert FAILURE.text == (
        "Range 1-1000 failed at video_frames (run r-1): The store is down. 3 of its records failed. Nothing is lost: "
        "the sensor asks for the range again, and it goes on where it was. Once the cause is mended, 'extraction "
        "launch 1-1000' does so at once; 'extraction errors' lists records that failed."
    )


@pytest.mark.parametrize(
    ("failure", "said"),
    [
        (RunFailure("r", "j", "1-9", "", "gone.", 0), "Range 1-9 failed (run r): gone. Nothing is lost"),
        (
            RunFailure("r", "j", "1-9", "", "", None),
            "no reason was given. How many of its records failed is not known.",
        ),
        (RunFailure("r", "j", "1-9", "s", "x", 0, 4), "(run r), for the 4th time in a row: x."),
        (RunFailure("r", "j", "1-9", "s", "x", 0, 12), "for the 12th time in a row"),
        (RunFailure("r", "j", "1-9", "s", "x", 0, 22), "for the 22nd time in a row"),
        (RunFailure("r", "reconcile_job", None, "s", "x", 0), "Job reconcile_job failed at s (run r): x. Look at the"),
        (RunFailure("r", "j", "1-9", "s", "x", 0, is_test=True), "This is a test, nothing has failed. Range 1-9"),
    ],
)
def test_a_notice_says_what_there_is_to_say_and_no_more(failure, said):
    assert said in failure.text


def test_a_program_gets_every_part():
    document = FAILURE.document()
    assert document.pop("text") == FAILURE.text
    assert document.pop("fix").startswith("Nothing is lost")
    assert document == {
        "event": "run_failed",
        "run_id": "r-1",
        "job": "extraction_job",
        "key": "1-1000",
        "step": "video_frames",
        "error": "The store is down",
        "failed_records": 3,
        "failures_in_a_row": 1,
        "is_test": False,
    }


@pytest.fixture
def secretive(settings):
    return settings(
        source_url="postgresql://operator:hunter2@db/videos",
        qdrant_api_key="key-of-the-kingdom",
        notify="webhook",
        notify_url="https://hooks.example.com/services/T0/B0/abcdef",
    )


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("no route to postgresql://operator:hunter2@db/videos", "no route to (hidden)"),
        ("password 'hunter2' is wrong", "password '(hidden)' is wrong"),
        ("401 for key-of-the-kingdom", "401 for (hidden)"),
        ("posting to https://hooks.example.com/services/T0/B0/abcdef", "posting to (hidden)"),
        ("GET https://me:pw@host/a.mp4?sig=abc&x=1 failed", "GET https://host/a.mp4?… failed"),
        ("s3://bucket/a.mp4?versionId=7", "s3://bucket/a.mp4?…"),
        ("two\n  lines\tand more", "two lines and more"),
        ("is it up? yes", "is it up? yes"),
    ],
)
def test_secrets_credentials_and_signatures_are_left_out(secretive, text, shown):
    assert redact(text, secretive) == shown


def test_a_very_long_error_is_cut(settings):
    shown = redact("x" * 5000, settings())
    assert (len(shown), shown[-2:]) == (600, "x…")
