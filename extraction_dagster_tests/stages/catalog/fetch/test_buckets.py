"""Downloads from buckets: a real S3 API in this process, and a stand-in for Google's."""

import importlib.util
import json
import re
from urllib.parse import quote

import fsspec
import pytest

from extraction_dagster.errors.catalog import (
    AddressForbiddenError,
    DownloadTimeoutError,
    FetchCredentialsError,
    FetchExtraMissingError,
    FileRefusedError,
    FileTooLargeError,
    FileUnavailableError,
)
from extraction_dagster.stages.catalog.fetch.buckets import BucketDownload, open_store
from extraction_dagster.stages.catalog.fetch.fetching import Fetcher

BLOCK = 4 * 2**20
BODY = bytes(range(256)) * (9 * 2**20 // 256)  # three blocks


@pytest.fixture
def s3(s3_environment):  # noqa: ARG001 - for what it sets
    """The S3 API, with the bucket `videos`, empty, and the environment that leads to it."""
    store = open_store("s3", stall_seconds=20)
    if store.exists("videos"):
        store.rm("videos", recursive=True)
    store.mkdir("videos")
    return store


class Faulty:
    """A store that does something else at the nth read of a block."""

    def __init__(self, store, at, fault):
        self._store, self._at, self._fault = store, at, fault
        self.asked = []

    def info(self, path, **options):
        return self._store.info(path, **options)

    def cat_file(self, path, *, start, end, timeout):
        self.asked.append((start, end))
        if len(self.asked) == self._at:
            self._fault()
        return self._store.cat_file(path, start=start, end=end, timeout=timeout)


@pytest.fixture
def make_fetcher(settings):
    made = []

    def make(*, store=None, attempts=3, **overrides):
        chosen = settings(**{"allowed_buckets": ("s3://videos",), **overrides})
        fetcher = Fetcher(chosen, attempts=attempts, wait_seconds=0.001)
        if store is not None:
            fetcher._buckets._open["s3"] = fetcher._buckets._open["gs"] = store
        made.append(fetcher)
        return fetcher

    yield make
    for fetcher in made:
        fetcher.close()


def test_an_object_arrives_whole(s3, make_fetcher, row):
    s3.pipe_file("videos/a/b c+ü.mp4", BODY)
    path = make_fetcher().fetch(row("s3://videos/a/b c+ü.mp4"))
    assert path.read_bytes() == BODY
    assert path.suffix == ".mp4"


def test_a_bucket_that_is_not_listed_is_not_asked(s3, make_fetcher, row):
    s3.mkdir("secret")
    s3.pipe_file("secret/a.mp4", b"x")
    fetcher = make_fetcher()
    for uri in ("s3://secret/a.mp4", "gs://videos/a.mp4", "s3://videos@secret/a.mp4", "S3://VIDEOS/a.mp4"):
        with pytest.raises(AddressForbiddenError, match="its bucket is not an allowed one") as raised:
            fetcher.fetch(row(uri))
        assert raised.value.permanent
    with pytest.raises(AddressForbiddenError, match="its bucket is not an allowed one"):
        make_fetcher(allowed_buckets=()).fetch(row("s3://videos/a.mp4"))


@pytest.mark.parametrize(
    ("key", "why"),
    [
        ("../secret/a.mp4", r"its key holds '\.' or '\.\.'"),
        ("folder/../../secret/a.mp4", r"its key holds '\.' or '\.\.'"),
        ("./a.mp4", r"its key holds '\.' or '\.\.'"),
        ("", "its key is empty"),
        ("a\n.mp4", "its key is empty or holds a control character"),
        ("\ud800.mp4", "its key is empty or holds a control character"),
    ],
)
def test_a_key_that_could_lead_out_of_its_bucket_is_refused_for_good(key, why, s3, make_fetcher, row):
    store = Faulty(s3, 0, None)
    with pytest.raises(AddressForbiddenError, match=why) as raised:
        make_fetcher(store=store).fetch(row(f"s3://videos/{key}"))
    assert raised.value.permanent
    assert store.asked == []


def test_a_bucket_can_be_allowed_for_one_of_its_folders(s3, make_fetcher, row):
    allowed = ("s3://videos/2026/", "s3://videos/old")
    for key in ("2026/a.mp4", "old/b/c.mp4"):
        s3.pipe_file(f"videos/{key}", b"video")
        assert make_fetcher(allowed_buckets=allowed).fetch(row(f"s3://videos/{key}")).read_bytes() == b"video"
    for key in ("a.mp4", "2026", "20261/a.mp4", "older/a.mp4", "2026secret.mp4", "x/2026/a.mp4"):
        with pytest.raises(AddressForbiddenError, match="it lies in no folder of the bucket that is allowed"):
            make_fetcher(allowed_buckets=allowed).fetch(row(f"s3://videos/{key}"))
    with pytest.raises(AddressForbiddenError, match=r"'\.' or '\.\.'"):
        make_fetcher(allowed_buckets=allowed).fetch(row("s3://videos/2026/../secret.mp4"))


def test_a_download_that_fails_in_the_middle_goes_on_there(s3, make_fetcher, row):
    def fail():
        raise OSError(5, "the store coughed")

    s3.pipe_file("videos/a.mp4", BODY)
    store = Faulty(s3, 2, fail)
    assert make_fetcher(store=store).fetch(row("s3://videos/a.mp4")).read_bytes() == BODY
    assert store.asked == [(0, BLOCK), (BLOCK, 2 * BLOCK), (BLOCK, 2 * BLOCK), (2 * BLOCK, len(BODY))]


def test_an_object_that_changes_while_it_is_read_is_read_anew(s3, make_fetcher, row):
    new = BODY[::-1]
    s3.pipe_file("videos/a.mp4", BODY)
    store = Faulty(s3, 2, lambda: s3.pipe_file("videos/a.mp4", new))
    assert make_fetcher(store=store).fetch(row("s3://videos/a.mp4")).read_bytes() == new
    assert len(store.asked) == 6


def test_an_object_that_shrinks_while_it_is_read_is_read_anew(s3, make_fetcher, row):
    s3.pipe_file("videos/a.mp4", BODY)
    store = Faulty(s3, 3, lambda: s3.pipe_file("videos/a.mp4", BODY[: 2 * BLOCK + 5]))
    assert make_fetcher(store=store).fetch(row("s3://videos/a.mp4")).read_bytes() == BODY[: 2 * BLOCK + 5]


def test_an_object_that_is_there_already_is_only_looked_at(s3, make_fetcher, row):
    store = Faulty(s3, 0, None)
    fetcher = make_fetcher(store=store)
    for body, is_new, reads in ((b"first", True, 1), (b"first", False, 1), (b"second", True, 2)):
        if is_new:  # written again, it would have another time of change, a second later
            s3.pipe_file("videos/a.mp4", body)
        assert fetcher.fetch(row("s3://videos/a.mp4")).read_bytes() == body
        fetcher.release(1, keep=True)
        assert len(store.asked) == reads


def test_a_missing_object_may_still_arrive_as_a_missing_file_may(s3, make_fetcher, row):
    s3.pipe_file("videos/folder/a.mp4", b"x")
    fetcher = make_fetcher()
    with pytest.raises(FileUnavailableError, match="is not available: 404 Not Found") as missing:
        fetcher.fetch(row("s3://videos/none.mp4"))
    assert not missing.value.permanent
    with pytest.raises(FileRefusedError, match="the answer was that this is a folder") as raised:
        fetcher.fetch(row("s3://videos/folder"))
    assert raised.value.permanent
    with pytest.raises(AddressForbiddenError, match="its key is empty"):
        fetcher.fetch(row("s3://videos/"))


@pytest.fixture
def versions(s3):
    """The bucket with two versions of `a?b.mp4`; their ids, the older one first."""
    s3.call_s3("put_bucket_versioning", Bucket="videos", VersioningConfiguration={"Status": "Enabled"})
    return [
        s3.call_s3("put_object", Bucket="videos", Key="a?b.mp4", Body=body)["VersionId"] for body in (b"old", b"new")
    ]


def test_a_version_that_is_named_is_read_and_no_other(versions, make_fetcher, row):
    fetcher, older = make_fetcher(), versions[0]
    assert fetcher.fetch(row(f"s3://videos/a?b.mp4?versionId={older}")).read_bytes() == b"old"
    fetcher.release(1, keep=True)
    assert fetcher.fetch(row("s3://videos/a?b.mp4")).read_bytes() == b"new"


@pytest.mark.usefixtures("versions")
def test_a_version_that_is_not_there_is_refused_for_good(make_fetcher, row):
    fetcher = make_fetcher()
    for uri, why in (
        ("s3://videos/a?b.mp4?versionId=there-is-none", "the answer was that there is no such version"),
        ("s3://videos/none.mp4?versionId=there-is-none", "the answer was that there is no such version"),
        ("s3://videos/a?b.mp4?versionId=", "its versionId is empty"),
    ):
        with pytest.raises((FileRefusedError, AddressForbiddenError), match=why) as raised:
            fetcher.fetch(row(uri))
        assert raised.value.permanent
        assert uri in str(raised.value)


@pytest.mark.parametrize("uri", ["gs://videos/a.mp4#1700000000000000", "gs://videos/a.mp4?generation=17"])
def test_a_generation_of_an_object_is_refused_and_never_taken_for_the_newest(uri, make_fetcher, row):
    with pytest.raises(AddressForbiddenError, match="it names a generation of an object"):
        make_fetcher(allowed_buckets=("gs://videos",)).fetch(row(uri))


@pytest.mark.parametrize("key", ["part #1.mp4", "50% off.mp4", "a%20b.mp4", "what?.mp4", "a b+c&d=e.mp4", "#/x.mp4"])
def test_a_key_is_read_and_named_as_it_is(key, s3, make_fetcher, row):
    s3.pipe_file(f"videos/{key}", b"it")
    assert make_fetcher().fetch(row(f"s3://videos/{key}")).read_bytes() == b"it"
    with pytest.raises(FileTooLargeError, match=re.escape(f"'s3://videos/{key}'")):
        make_fetcher(max_file_bytes=1).fetch(row(f"s3://videos/{key}", record_id=2))


def test_sizes_are_limited_before_anything_is_read(s3, make_fetcher, row):
    s3.pipe_file("videos/a.mp4", b"x" * 101)
    s3.pipe_file("videos/empty.mp4", b"")
    with pytest.raises(FileTooLargeError, match="has 101 bytes or more, expected at most 100"):
        make_fetcher(max_file_bytes=100).fetch(row("s3://videos/a.mp4"))
    with pytest.raises(FileUnavailableError, match="it is empty"):
        make_fetcher().fetch(row("s3://videos/empty.mp4"))


@pytest.mark.usefixtures("s3")
def test_a_store_that_is_down_fails_the_record_for_now(make_fetcher, row, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:1")
    with pytest.raises(FileUnavailableError, match=r"the store failed .*, in 1 tries") as raised:
        make_fetcher(attempts=1).fetch(row("s3://videos/a.mp4"))
    assert not raised.value.permanent


def test_a_store_that_is_slow_ends_with_the_time(make_fetcher, row):
    class Slow:
        def info(self, _path, **_options):
            raise fsspec.FSTimeoutError

        cat_file = info

    with pytest.raises(DownloadTimeoutError, match=r"did not arrive within 0\.5 s"):
        make_fetcher(store=Slow(), fetch_timeout_seconds=0.5, attempts=20).fetch(row("s3://videos/a"))


@pytest.mark.usefixtures("s3")
def test_missing_credentials_are_no_records_fault(make_fetcher, row, monkeypatch):
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    with pytest.raises(FetchCredentialsError, match=r"s3://videos/a\.mp4' are not accepted: NoCredentialsError"):
        make_fetcher().fetch(row("s3://videos/a.mp4"))


@pytest.mark.parametrize(
    ("code", "kind", "says"),
    [
        ("AccessDenied", FileRefusedError, "403 Forbidden"),
        ("ExpiredToken", FetchCredentialsError, "are not accepted: ExpiredToken"),
        ("SignatureDoesNotMatch", FetchCredentialsError, "are not accepted: SignatureDoesNotMatch"),
        ("NoSuchBucket", FileRefusedError, "404 Not Found"),
        ("SlowDown", FileUnavailableError, r"the store failed \(SlowDown\), in 3 tries"),
        ("InternalError", FileUnavailableError, r"the store failed \(InternalError\), in 3 tries"),
    ],
)
def test_refusals_are_told_apart_by_their_code(code, kind, says, make_fetcher, row):
    from botocore.exceptions import ClientError  # noqa: PLC0415 - lazy: it is slow to import
    from s3fs.errors import translate_boto_error  # noqa: PLC0415 - lazy: it is slow to import

    def refusal(code):
        return translate_boto_error(ClientError({"Error": {"Code": code, "Message": "canary-4711"}}, "GetObject"))

    class Refusing:
        def info(self, _path, **_options):
            raise refusal("403")  # all that a HEAD says

        def cat_file(self, _path, **_options):
            raise refusal(code)

    with pytest.raises(kind, match=says) as raised:
        make_fetcher(store=Refusing()).fetch(row("s3://videos/a.mp4"))
    assert "canary" not in str(raised.value)


def test_a_bug_is_not_taken_for_a_fault_of_the_store(make_fetcher, row):
    class Broken:
        def info(self, _path, **_options):
            raise TypeError("a bug")

    with pytest.raises(TypeError, match="a bug"):
        make_fetcher(store=Broken()).fetch(row("s3://videos/a.mp4"))


@pytest.mark.parametrize(("scheme", "package"), [("s3", "s3fs"), ("gs", "gcsfs")])
def test_a_missing_package_is_named_with_its_extra_before_any_row(scheme, package, monkeypatch, settings):
    there = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else there(name))
    with pytest.raises(FetchExtraMissingError, match=rf"{package} is not .*'extraction-dagster\[{scheme}\]'"):
        Fetcher(settings(allowed_buckets=(f"{scheme}://videos",)))
    Fetcher(settings())


def test_google_objects_arrive_whole_and_in_one_version(plain_server, make_fetcher, row):
    # The package's own name adds a look at a second API, over gRPC.
    from gcsfs.core import GCSFileSystem  # noqa: PLC0415 - lazy: it is slow to import

    versions = iter([("1", BODY), ("2", BODY[::-1])])
    now = list(next(versions))

    def look(handler, _nth):
        item = {"bucket": "videos", "name": "a/b c.mp4", "size": str(len(BODY)), "generation": now[0]}
        handler.answer(200, json.dumps(item).encode(), Content_Type="application/json")

    def read(handler, nth):
        if nth == 2:
            now[:] = next(versions)
        first, last = map(int, re.fullmatch(r"bytes=(\d+)-(\d+)", handler.headers["Range"]).groups())
        part = now[1][first : last + 1]
        handler.answer(206, part, Content_Range=f"bytes {first}-{first + len(part) - 1}/{len(BODY)}")

    name = quote("a/b c.mp4", safe="")
    plain_server.scripts |= {
        f"/storage/v1/b/videos/o/{name}": look,
        "/storage/v1/b/videos/o": lambda handler, _nth: handler.answer(200, b"{}", Content_Type="application/json"),
        f"/download/storage/v1/b/videos/o/{name}": read,
    }
    address = f"http://127.0.0.1:{plain_server.server_port}"
    store = GCSFileSystem(token="anon", endpoint_url=address, skip_instance_cache=True)  # noqa: S106 - nobody's
    fetcher = make_fetcher(store=store, allowed_buckets=("gs://videos",))
    assert fetcher.fetch(row("gs://videos/a/b c.mp4")).read_bytes() == BODY[::-1]


@pytest.mark.usefixtures("s3")
def test_the_stores_are_opened_by_their_own_environment():
    download = BucketDownload(("s3://videos",), max_file_bytes=1, stall_seconds=1)
    assert type(download._vetted("s3://videos/a")[0]).__name__ == "S3FileSystem"
