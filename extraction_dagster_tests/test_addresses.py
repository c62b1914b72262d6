"""Addresses as they are shown."""

import pytest

from extraction_dagster.addresses import scrubbed, shown_address
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
        ("s3://bucket/a.mp4?versionId=canary", "s3://bucket/a.mp4?…"),
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
