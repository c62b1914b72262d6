"""Addresses as they are shown, and what tells one from another."""

import pytest

from extraction_dagster.addresses import address_hash, scrubbed, shown_address
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
