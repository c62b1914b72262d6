"""From rows to files that may be read; downloads run ahead: bounded, released after use, stopped at once."""

import os
import socket
import threading
from pathlib import Path

import hypothesis
import pytest
from hypothesis import strategies as st

from extraction_dagster.errors import ExtractionError
from extraction_dagster.errors.catalog import (
    DownloadCacheError,
    FileForbiddenError,
    FileUnavailableError,
    SchemeError,
)
from extraction_dagster.records import IdRange, VideoRow
from extraction_dagster.settings import Settings
from extraction_dagster.shards.frame_store import FrameStore
from extraction_dagster.stages.catalog.fetch.fetching import Fetched, Fetcher, fetch_ahead, fetch_local
from extraction_dagster.stages.decode.stage import decode_rows

REMOTE = "https://host/{}.mp4"


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
    fetcher = Fetcher(settings, resolve=lambda _host, _port: [], attempts=1, wait_seconds=0.001)
    fetcher._buckets._open["s3"] = Empty()
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


class ScriptedFetcher:
    """Waits for each row's permission."""

    def __init__(self, faults=()):
        self.permitted = {number: threading.Event() for number in range(1, 20)}
        self.faults = dict(faults)
        self.begun, self.closed = [], False

    is_remote = staticmethod(Fetcher.is_remote)

    def fetch(self, row):
        self.begun.append(row.record_id)
        if self.is_remote(row):
            assert self.permitted[row.record_id].wait(30)
        if row.record_id in self.faults:
            raise self.faults[row.record_id]
        return Path(f"/{row.record_id}")

    def close(self):
        self.closed = True
        for event in self.permitted.values():
            event.set()


def remote(*numbers):
    return [VideoRow(number, REMOTE.format(number)) for number in numbers]


def ready(items):
    return next(item for item in items if item is not None)


def test_what_is_ready_first_comes_first_and_none_says_that_nothing_is():
    fetcher = ScriptedFetcher()
    items = fetch_ahead(remote(1, 2, 3), fetcher, threads=2)
    assert next(items) is None
    fetcher.permitted[2].set()
    assert ready(items) == Fetched(remote(2)[0], Path("/2"))
    fetcher.permitted[3].set()
    assert ready(items).row.record_id == 3
    fetcher.permitted[1].set()
    assert [item.row.record_id for item in items if item is not None] == [1]
    assert not fetcher.closed  # whoever got the files still has them


def test_rows_are_drawn_only_as_far_as_downloads_are_under_way():
    drawn = []

    def rows():
        for row in remote(*range(1, 10)):
            drawn.append(row.record_id)
            yield row

    items = fetch_ahead(rows(), ScriptedFetcher(), threads=3)
    assert next(items) is None
    assert drawn == [1, 2, 3]
    items.close()


def test_local_rows_do_not_wait_for_downloads():
    fetcher = ScriptedFetcher()
    items = fetch_ahead([*remote(1), VideoRow(2, "a.mp4"), VideoRow(3, "b.mp4")], fetcher, threads=2)
    assert [next(items).row.record_id for _ in range(2)] == [2, 3]
    items.close()


def test_a_failed_download_is_its_rows_and_the_others_go_on():
    fault = FileUnavailableError("u", "it is empty")
    fetcher = ScriptedFetcher({1: fault, 2: OSError("disk")})
    fetcher.close()
    items = [item for item in fetch_ahead(remote(1, 2, 3), fetcher, threads=1) if item is not None]
    assert items[0] == Fetched(remote(1)[0], error=fault)
    assert [(item.row.record_id, item.path) for item in items[1:]] == [(2, None), (3, Path("/3"))]


@pytest.mark.parametrize("fault", [DownloadCacheError("/cache", "No space left"), MemoryError(), KeyboardInterrupt()])
def test_a_fault_that_is_no_rows_ends_it_all(fault):
    fetcher = ScriptedFetcher({1: fault})
    fetcher.permitted[1].set()
    with pytest.raises(type(fault), match=r"No space left|^$"):
        list(fetch_ahead(remote(1, 2), fetcher, threads=2))
    assert fetcher.closed


def test_what_nobody_thought_of_is_its_rows_failure_and_the_others_go_on():
    fetcher = ScriptedFetcher({1: ZeroDivisionError("a bug")})
    fetcher.close()
    items = [item for item in fetch_ahead(remote(1, 2), fetcher, threads=1) if item is not None]
    assert [(item.path, repr(item.error)) for item in items] == [
        (None, "ZeroDivisionError('a bug')"),
        (Path("/2"), "None"),
    ]


def test_a_stop_does_not_wait_for_a_silent_server(server, make_fetcher, row):
    asked, leave = threading.Event(), threading.Event()

    def silent(_handler, _nth):
        asked.set()
        leave.wait(30)

    server.scripts["/v.mp4"] = silent
    items = fetch_ahead([row(server.url("/v.mp4"))], make_fetcher(), threads=1)
    assert next(items) is None
    assert asked.wait(30)
    thread = next(thread for thread in threading.enumerate() if thread.name == "fetch-1")
    items.close()
    thread.join(10)
    assert not thread.is_alive()
    leave.set()


@pytest.fixture
def trusting(server, monkeypatch, tmp_path, settings, demo_folder):
    """The settings that a person would make for a server in their own network, with their own authority."""
    server.authority.cert_pem.write_to_path(tmp_path / "authority.pem")
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "authority.pem"))
    monkeypatch.setattr("extraction_dagster.stages.decode.stage._MAX_SHARD_SECONDS", 3600)
    known = {
        "allowed_hosts": (f"localhost:{server.server_port}",),
        "allowed_networks": ("127.0.0.0/8", "::1/128"),
        "allowed_roots": (str(demo_folder),),
        "decode_workers": 2,
    }
    return lambda **overrides: settings(**{**known, **overrides})


def test_videos_behind_addresses_become_frames_and_their_files_are_released(server, trusting, demo_folder, demo_videos):
    body = (demo_folder / demo_videos[0].path).read_bytes()
    tag = {"ETag": '"v1"'}
    for number in range(1, 7):
        server.scripts[f"/{number}.mp4"] = lambda handler, _nth: handler.answer(200, body, **tag)
    server.scripts["/5.mp4"] = lambda handler, _nth: handler.answer(404)
    server.scripts["/6.mp4"] = lambda handler, _nth: handler.answer(200, b"no video at all" * 100)
    urls = [server.url(f"/{number}.mp4?sig=canary-4711", host="localhost") for number in range(1, 7)]
    rows = [VideoRow(number, url) for number, url in enumerate(urls, 1)]
    # Room for two of them at a time: without a release after each decoding, the third would never come.
    body += bytes(max(0, 450_000 - len(body)))
    chosen = trusting(cache_bytes=2**20)
    partition = IdRange(1, 6)
    store = FrameStore(chosen.resolved_frames_uri, "f1")
    landed = list(decode_rows(rows, store=store, partition=partition, settings=chosen))
    assert sorted(record.record_id for shard in store.shards(partition) for record in shard.records) == [1, 2, 3, 4]
    failures = {item.record_id: item for shard in landed for item in shard.failures}
    assert {number: (item.stage, item.error_type, item.permanent) for number, item in failures.items()} == {
        5: ("fetch", "FileRefusedError", True),
        6: ("decode", failures[6].error_type, failures[6].permanent),
    }
    assert "canary" not in str(failures)
    cached = sum(path.stat().st_size for path in (chosen.home / "cache" / "videos").iterdir())
    assert cached <= chosen.cache_bytes
    assert not [path for path in (chosen.home / "cache" / "videos").glob("*.mp4") if path.stat().st_size == 1500]


def test_the_last_file_is_in_use_until_its_video_is_decoded(server, trusting, demo_folder, demo_videos, monkeypatch):
    body = (demo_folder / demo_videos[0].path).read_bytes()
    server.scripts["/1.mp4"] = lambda handler, _nth: handler.answer(200, body, ETag='"v1"')
    chosen = trusting()
    steps = []
    monkeypatch.setattr(Fetcher, "close", _noting(Fetcher.close, steps, "close"))
    monkeypatch.setattr(Fetcher, "release", _noting(Fetcher.release, steps, "release"))
    store = FrameStore(chosen.resolved_frames_uri, "f1")
    row = VideoRow(1, server.url("/1.mp4", host="localhost"))
    list(decode_rows([row], store=store, partition=IdRange(1, 1), settings=chosen))
    assert steps == ["release", "close"]


def _noting(function, steps, name):
    def noted(*arguments, **options):
        steps.append(name)
        return function(*arguments, **options)

    return noted


def test_a_fault_of_the_set_up_ends_the_range_and_blames_no_record(server, trusting, demo_videos):
    local = VideoRow(1, demo_videos[0].path)
    chosen = trusting()
    (chosen.home / "cache").write_text("in the way")
    store = FrameStore(chosen.resolved_frames_uri, "f1")
    rows = [local, VideoRow(2, server.url("/v.mp4", host="localhost"))]
    landed = []
    with pytest.raises(DownloadCacheError, match="No record is to blame"):
        landed.extend(decode_rows(rows, store=store, partition=IdRange(1, 2), settings=chosen))
    assert [failure for shard in landed for failure in shard.failures] == []


def test_dead_links_are_reported_while_another_download_hangs(server, trusting):
    leave = threading.Event()
    for number in range(1, 6):
        server.scripts[f"/{number}.mp4"] = lambda handler, _nth: handler.answer(404)

    def hang(handler, _nth):
        leave.wait(20)
        handler.answer(404)

    server.scripts["/6.mp4"] = hang
    rows = [VideoRow(number, server.url(f"/{number}.mp4", host="localhost")) for number in range(1, 7)]
    chosen = trusting(fetch_threads=2)
    store = FrameStore(chosen.resolved_frames_uri, "f1")
    stream = decode_rows(rows, store=store, partition=IdRange(1, 6), settings=chosen)
    landed = []
    while len(landed) < 5:
        landed += next(stream).failures
    assert sorted(failure.record_id for failure in landed) == [1, 2, 3, 4, 5]
    leave.set()
    assert [failure.record_id for item in stream for failure in item.failures] == [6]


def test_a_finished_video_lands_while_a_download_hangs(server, trusting, demo_videos, monkeypatch):
    leave = threading.Event()

    def hang(handler, _nth):
        leave.wait(20)
        handler.answer(404)

    server.scripts["/2.mp4"] = hang
    monkeypatch.setattr("extraction_dagster.stages.decode.stage._MAX_SHARD_SECONDS", 0.1)
    chosen = trusting()
    store = FrameStore(chosen.resolved_frames_uri, "f1")
    rows = [VideoRow(1, demo_videos[0].path), VideoRow(2, server.url("/2.mp4", host="localhost"))]
    stream = decode_rows(rows, store=store, partition=IdRange(1, 2), settings=chosen)
    first = next(stream)
    assert ([record.record_id for record in first.shard.records], first.failures) == ([1], ())
    leave.set()
    assert [failure.record_id for item in stream for failure in item.failures] == [2]
