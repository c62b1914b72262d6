"""Addresses as they are shown, and what tells one from another."""

import pytest

from extraction_dagster.addresses import address_hash, brief_address, capped, scrubbed, shown_address
from extraction_dagster.defs.metadata import in_table
from extraction_dagster.errors.catalog import FileForbiddenError, FileUnavailableError, SchemeError


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("videos/a?b#c.mp4", "videos/a?b#c.mp4"),
        ("/videos/me@home.mp4", "/videos/me@home.mp4"),
        ("file:///videos/a?b.mp4", "file:///videos/a?b.mp4"),
        ("https://host/a.mp4", "https://host/a.mp4"),
        ("https://host:8443/@user/a.mp4", "https://host:8443/@user/a.mp4"),
        ("https://host/a.mp4?X-Amz-Signature=canary", "https://host/a.mp4?…"),
        ("https://host/a.mp4#canary", "https://host/a.mp4?…"),
        ("https://me:canary@host/a.mp4", "https://host/a.mp4"),
        ("https://canary@host/a.mp4?canary", "https://host/a.mp4?…"),
        ("https://me:can/ary@host/a.mp4", "https://host/a.mp4"),
        ("https://me:c@nary@host/a.mp4", "https://host/a.mp4"),
        ("HTTPS://me:canary@host\\a.mp4", "HTTPS://host\\a.mp4"),
        ("s3://bucket/a.mp4?versionId=3HL4", "s3://bucket/a.mp4?versionId=3HL4"),
        ("gs://bucket/part #1, 50% off?.mp4", "gs://bucket/part #1, 50% off?.mp4"),
        ("s3://me:canary@bucket/a.mp4", "s3://bucket/a.mp4"),
        ("s3://bucket/a.mp4?X-Amz-Signature=canary", "s3://bucket/a.mp4?…"),
        ("ftp://me:canary@host/a.mp4", "ftp://host/a.mp4"),
    ],
)
def test_no_password_and_no_signature_is_shown(address, shown):
    assert shown_address(address) == shown


def test_errors_about_files_do_not_show_them_either():
    address = "ftp://me:canary@host/a.mp4?canary"
    for error in (
        SchemeError(address, "ftp"),
        FileForbiddenError(address, "it leads elsewhere", roots="/videos"),
        FileUnavailableError(address, "it is empty"),
    ):
        assert "canary" not in str(error)
        assert "ftp://host/a.mp4?…" in str(error)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("no address: a/b.mp4, 3://x", "no address: a/b.mp4, 3://x"),
        ("Can't open 'https://me:canary@host/a.mp4'.", "Can't open 'https://host/a.mp4'."),
        ("(https://host/a?canary=1) and s3://b/c", "(https://host/a?… and s3://b/c"),
        ("postgresql://u:canary@db/videos is down", "postgresql://db/videos is down"),
    ],
)
def test_every_address_in_a_text_is_scrubbed(text, shown):
    assert scrubbed(text) == shown


SAME = [
    ("a.mp4", "./a.mp4", "/videos/a.mp4", "/videos//a.mp4", "file:///videos/a.mp4", "FILE://localhost/videos/a.mp4"),
    ("b c.mp4", "file:///videos/b%20c.mp4"),
    ("b%20c.mp4", "file:///videos/b%2520c.mp4"),
    ("https://host/a.mp4", "https://me:secret@host/a.mp4", "https://host/a.mp4?X-Amz-Date=1&X-Amz-Signature=2"),
    ("https://host/a.mp4?v=1", "https://host/a.mp4?v=1&Expires=9&Signature=x", "https://host/a.mp4?sig=a&v=1&se=b"),
    ("https://host/a.mp4?v=2", "https://host/a.mp4?Expires=9&v=2&Signature=y&Key-Pair-Id=k"),
    ("s3://bucket/a.mp4",),
    ("s3://bucket/a.mp4?versionId=1",),
    ("gs://bucket/a.mp4",),
    ("http://host/a.mp4",),
    ("https://host/A.mp4",),
]


def test_two_spellings_of_one_address_have_one_hash_and_two_addresses_have_two():
    hashes = [{address_hash(address, "/videos") for address in group} for group in SAME]
    assert [len(group) for group in hashes] == [1] * len(SAME)
    assert len(set.union(*hashes)) == len(SAME)
    assert all(len(found) == 16 for group in hashes for found in group)


def test_an_address_is_the_same_in_every_process():
    # printf /videos/a.mp4 | sha256sum
    assert address_hash("a.mp4", "/videos") == "9ec49090b225b812"
    assert address_hash("a.mp4", "/other") != "9ec49090b225b812"
    assert address_hash("", "/videos") == ""
    assert address_hash("no\udcff.mp4", "/videos") != address_hash("no\udcfe.mp4", "/videos")


SHAPES = ("a", "://", "a:", "a://", "3://", "a@:", "@", "'", " ", "/", ":1", "?X-Amz-", "a.", "é", "://a ", "a:b@")


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    "function",
    [scrubbed, shown_address, brief_address, lambda text: capped(text, len(text) - 1), in_table],
    ids=["scrubbed", "shown_address", "brief_address", "capped", "in_table"],
)
def test_the_cost_of_a_text_grows_no_faster_than_its_length(function, shape, least_seconds):
    def seconds(length):
        return least_seconds(function, "https://" + (shape * length)[:length])

    # Ten times the length costs ten times as much, where it can be measured at all; quadratic would be a hundred.
    assert seconds(1_000_000) < 35 * max(seconds(100_000), 0.002)


def test_a_hash_of_an_endless_address_takes_no_time_either(least_seconds):
    for shape in SHAPES:
        for address in (f"https://{shape * 100_000}", shape * 100_000):
            assert least_seconds(address_hash, address, "/videos") < 1


@pytest.mark.parametrize("length", range(1, 60))
def test_a_cut_leaves_no_half_of_a_password(length):
    text = "Look at 'https://me:canary-canary@host/a.mp4', not at me."
    shown = scrubbed(capped(text, length))
    assert "me:" not in shown
    assert "can" not in shown


def test_a_cut_is_seen_and_keeps_what_is_not_an_address():
    assert capped("short", 5) == "short"
    assert capped("longer", 5) == "longe…"
    assert capped("see https://me:secret@host and more", 14) == "see https://…"
    assert capped("see https://me:secret@host and more", 30) == "see https://me:secret@host and…"
    assert capped("see https://host 'ftp://me:se", 28) == "see https://host 'ftp://…"


def test_an_error_shows_both_ends_of_a_long_address():
    error = str(FileUnavailableError(f"https://me:canary@host/{'a' * 10_000}/last.mp4?canary", "it is empty"))
    assert len(error) < 600
    assert "https://host/aaaa" in error
    assert "aaaa/last.mp4?…'" in error
