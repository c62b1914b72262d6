"""Downloads ahead of the decoding: bounded, in the order of readiness, released after use, stopped at once."""

import threading
from pathlib import Path

import pytest

from extraction_dagster.errors.fetch import DownloadCacheError, FileUnavailableError
from extraction_dagster.records import IdRange, VideoRow
from extraction_dagster.shards.frame_store import FrameStore
from extraction_dagster.stages.catalog.fetch.ahead import Fetched, fetch_ahead
from extraction_dagster.stages.catalog.fetch.fetching import Fetcher
from extraction_dagster.stages.decode.stage import decode_rows

REMOTE = "https://host/{}.mp4"


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
    return lambda **overrides: settings(**known, **overrides)


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
