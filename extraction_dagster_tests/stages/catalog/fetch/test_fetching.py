import os
import socket

import hypothesis
import pytest
from hypothesis import strategies as st

from extraction_dagster.errors.base import ExtractionError
from extraction_dagster.errors.fetch import FileForbiddenError, FileUnavailableError, SchemeError
from extraction_dagster.records import VideoRow
from extraction_dagster.settings import Settings
from extraction_dagster.stages.catalog.fetch.fetching import Fetcher, fetch_local


@pytest.fixture
def roots(tmp_path):
    folders = (tmp_path / "one", tmp_path / "two")
    for folder in folders:
        folder.mkdir()
        (folder / "video.mp4").write_bytes(b"video")
    (folders[0] / "with space.mp4").write_bytes(b"video")
    (tmp_path / "secret.mp4").write_bytes(b"secret")
    return folders


def fetch(uri, roots):
    return fetch_local(VideoRow(42, str(uri)), roots)


def test_a_relative_path_is_taken_from_the_first_root(roots):
    assert fetch("video.mp4", roots) == (roots[0] / "video.mp4").resolve()


def test_absolute_paths_and_file_uris_in_any_root_are_read(roots):
    assert fetch(roots[1] / "video.mp4", roots) == (roots[1] / "video.mp4").resolve()
    assert fetch(f"file://{roots[1]}/video.mp4", roots) == (roots[1] / "video.mp4").resolve()
    assert fetch(f"FILE://localhost{roots[0]}/with%20space.mp4", roots) == (roots[0] / "with space.mp4").resolve()


def test_a_percent_sign_in_a_plain_path_stays(roots):
    (roots[0] / "100%25.mp4").write_bytes(b"video")
    assert fetch("100%25.mp4", roots).name == "100%25.mp4"


def test_a_link_within_the_roots_is_followed(roots):
    (roots[0] / "link.mp4").symlink_to(roots[1] / "video.mp4")
    assert fetch("link.mp4", roots) == (roots[1] / "video.mp4").resolve()


def test_a_root_that_is_a_link_is_a_root(roots, tmp_path):
    (tmp_path / "alias").symlink_to(roots[0])
    assert fetch("video.mp4", (tmp_path / "alias",)) == (roots[0] / "video.mp4").resolve()


@pytest.mark.parametrize("scheme", ["ftp", "data", "az", "memory", "concat"])
def test_other_schemes_are_refused_for_good_by_name(scheme, roots):
    with pytest.raises(
        SchemeError, match=rf"has scheme '{scheme}', expected a path, file://, https://, s3://"
    ) as raised:
        fetch(f"{scheme}://host/video.mp4", roots)
    assert raised.value.permanent


@pytest.mark.parametrize(
    ("uri", "why"),
    [
        ("../secret.mp4", r"it holds '\.\.'"),
        ("one/../../secret.mp4", r"it holds '\.\.'"),
        ("file:///%2e%2e/secret.mp4", r"it holds '\.\.'"),
        ("/etc/passwd", "it leads out of the folders that may be read"),
        ("video.mp4\0.jpg", "it holds a NUL byte"),
        ("file:///video%00.mp4", "it holds a NUL byte"),
        ("file://elsewhere/share/video.mp4", r"it names another machine \('elsewhere'\)"),
        ("file://else\x1bwhere/video.mp4", r"it names another machine \('else\\x1bwhere'\)"),
        ("file://[elsewhere/video.mp4", "Invalid IPv6 URL"),
        ("half a surrogate \ud800.mp4", ".*surrogates not allowed"),
        ("file:///proc/self/environ", "it leads out of the folders that may be read"),
        ("/proc/self/fd/0", "it leads out of the folders that may be read"),
        ("FILE:///%2e%2e%2f%2e%2e/secret.mp4", r"it holds '\.\.'"),
        ("~/video.mp4/../../secret.mp4", r"it holds '\.\.'"),
    ],
)
def test_addresses_that_lead_elsewhere_are_refused_for_good(uri, why, roots):
    with pytest.raises(
        FileForbiddenError, match=rf"is refused: {why}\. Expected a regular file under one of "
    ) as raised:
        fetch(uri, roots)
    assert raised.value.permanent


def test_a_link_out_of_the_roots_is_refused_by_where_it_ends(roots, tmp_path):
    (roots[0] / "link.mp4").symlink_to(tmp_path / "secret.mp4")
    (roots[0] / "folder").symlink_to(tmp_path)
    for uri in ("link.mp4", "folder/secret.mp4"):
        with pytest.raises(FileForbiddenError, match="it leads out of the folders"):
            fetch(uri, roots)


def test_a_sibling_whose_name_begins_like_a_root_is_outside(roots, tmp_path):
    (tmp_path / "one-more").mkdir()
    (tmp_path / "one-more" / "video.mp4").write_bytes(b"video")
    with pytest.raises(FileForbiddenError, match="it leads out of the folders"):
        fetch(tmp_path / "one-more" / "video.mp4", roots)


def test_links_in_a_circle_are_refused(roots):
    (roots[0] / "a.mp4").symlink_to(roots[0] / "b.mp4")
    (roots[0] / "b.mp4").symlink_to(roots[0] / "a.mp4")
    with pytest.raises(FileForbiddenError, match=r"is refused: .*[Ss]ymlink loop"):
        fetch("a.mp4", roots)


def test_what_is_no_regular_file_is_refused_without_opening_it(roots):
    (roots[0] / "folder.mp4").mkdir()
    os.mkfifo(roots[0] / "pipe.mp4")
    with socket.socket(socket.AF_UNIX) as listener:
        folder = os.open(roots[0], os.O_RDONLY)
        listener.bind(f"/proc/self/fd/{folder}/socket.mp4")
        os.close(folder)
    for name, kind in (("folder.mp4", "a folder"), ("pipe.mp4", "a pipe"), ("socket.mp4", "a socket")):
        with pytest.raises(FileForbiddenError, match=f"is refused: it is {kind}") as raised:
            fetch(name, roots)
        assert raised.value.permanent


def test_a_device_is_refused(roots):
    with pytest.raises(FileForbiddenError, match="it is a device"):
        fetch("/dev/null", (*roots, roots[0].__class__("/dev")))


def test_a_file_that_may_still_arrive_is_tried_again(roots):
    (roots[0] / "empty.mp4").touch()
    for uri, why in (("missing.mp4", "No such file"), ("empty.mp4", "it is empty"), ("", "the address is empty")):
        with pytest.raises(FileUnavailableError, match=f"is not available: {why}") as raised:
            fetch(uri, roots)
        assert not raised.value.permanent


def test_a_file_without_permission_is_tried_again(roots, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *_: False)  # the superuser, who may run this, may read everything
    with pytest.raises(FileUnavailableError, match="permission denied"):
        fetch("video.mp4", roots)


def test_a_name_that_is_too_long_is_an_error_that_names_it(roots):
    with pytest.raises((FileForbiddenError, FileUnavailableError), match=r"[Ff]ile name too long"):
        fetch("x" * 5000, roots)


def test_a_message_stays_one_line_whatever_the_address_holds(roots):
    for uri in ("missing\nMarked 9 records as embedded.mp4", "/outside\r\n\x1b[31m.mp4"):
        with pytest.raises((FileForbiddenError, FileUnavailableError), match=r"is refused|is not available") as raised:
            fetch(uri, roots)
        assert str(raised.value).isprintable()


@pytest.fixture(scope="module")
def any_fetcher(tmp_path_factory):
    """A fetcher with everything on its lists, whose hosts have no address and whose bucket has no object."""

    class Empty:
        def info(self, path, **_options):
            raise FileNotFoundError(path)

        cat_file = info

    settings = Settings(
        home=tmp_path_factory.mktemp("home"),
        allowed_hosts=("host", "*.a.example"),
        allowed_buckets=("s3://videos",),
        allow_http=True,
    )
    fetcher = Fetcher.from_settings(settings, resolve=lambda _host, _port: [], attempts=1, wait_seconds=0.001)
    fetcher._buckets._make["s3"] = Empty
    yield fetcher
    fetcher.close()


ANY_TEXT = st.text(st.characters(exclude_categories=()), max_size=30)
STARTS = (
    "",
    "/",
    "file://",
    "file:///",
    "FILE://localhost/",
    "https://",
    "https://host/",
    "http://b.a.example:80/",
    "s3://videos/",
)


@hypothesis.settings(max_examples=300)
@hypothesis.given(st.sampled_from(STARTS), ANY_TEXT)
def test_whatever_a_row_holds_is_that_rows_error_in_one_line(any_fetcher, start, text):
    with pytest.raises(ExtractionError, match=r"^(Address|File) ['\"]") as raised:
        any_fetcher.fetch(VideoRow(1, start + text))
    assert str(raised.value).isprintable()
