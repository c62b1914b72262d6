"""One try of a download from an object store through fsspec: S3 and whatever speaks its protocol, Google Cloud Storage.

Which server is asked and with whose rights is the operator's own configuration (AWS_… variables, ~/.aws,
GOOGLE_APPLICATION_CREDENTIALS), as the stores' own tools read it; a row can only name a bucket that is on the list.
"""

from __future__ import annotations

import importlib.util
import re
from typing import TYPE_CHECKING, Any

import fsspec

from extraction_dagster.errors.catalog import (
    AddressForbiddenError,
    FetchCredentialsError,
    FetchExtraMissingError,
    FileRefusedError,
    FileTooLargeError,
    FileUnavailableError,
)
from extraction_dagster.stages.catalog.fetch.cache import CacheEntry, Deadline, FileVersion, PassingFaultError
from extraction_dagster.stages.catalog.fetch.guard import is_text

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


_VERSION = "?versionId="
_NO_VERSION = ("NoSuchVersion", "InvalidArgument", "400")  # what S3 answers for a version that it has not
_GENERATION = re.compile(r"#\d+$|\?generation=")
_BLOCK_BYTES = 4 * 2**20
_PACKAGES = {"s3": "s3fs", "gs": "gcsfs"}
_CREDENTIALS = (
    "CredentialRetrievalError",
    "DefaultCredentialsError",
    "NoCredentialsError",
    "PartialCredentialsError",
    "RefreshError",
    "TokenRetrievalError",
)
# What S3 answers when the credentials are at fault, rather than their rights.
_CREDENTIAL_CODES = frozenset(
    {
        "AuthFailure",
        "ExpiredToken",
        "InvalidAccessKeyId",
        "InvalidToken",
        "RequestTimeTooSkewed",
        "SignatureDoesNotMatch",
        "TokenRefreshRequired",
    }
)
STORE_PACKAGES = ("aiobotocore", "aiohttp", "botocore", "fsspec", "gcsfs", "google", "requests", "s3fs")
_UNAUTHORIZED = 401


def open_store(scheme: str, *, stall_seconds: float, of_versions: bool = False) -> Any:  # noqa: ANN401 - fsspec is not typed
    """The fsspec file system of a scheme, configured by its own environment variables.

    Without `of_versions`, s3fs drops `?versionId=…` of a path and reads the newest version.
    """
    limits = {"connect_timeout": stall_seconds, "read_timeout": stall_seconds, "retries": {"max_attempts": 1}}
    options: dict[str, Any] = {"config_kwargs": limits, "version_aware": of_versions} if scheme == "s3" else {}
    return fsspec.filesystem(scheme, use_listings_cache=False, skip_instance_cache=True, **options)


class BucketDownload:
    """Downloads from the buckets on the list.

    Args:
        buckets: `s3://name` or `gs://name`; with a folder, `s3://name/folder`, all keys must lie in it.
        max_file_bytes: The largest file that is taken.
        stall_seconds: How long one answer may take.

    Raises:
        FetchExtraMissingError: A bucket's package is not installed.
    """

    def __init__(self, buckets: Sequence[str], *, max_file_bytes: int, stall_seconds: float) -> None:
        self._max_bytes, self._stall_seconds = max_file_bytes, stall_seconds
        self._folders = dict[str, list[str]]()
        for bucket in buckets:
            scheme, _, path = bucket.partition("://")
            name, _, folder = path.partition("/")
            self._folders.setdefault(f"{scheme}://{name}", []).append(folder.strip("/"))
        self._open = dict[str, Any]()
        for scheme in sorted({bucket.partition("://")[0] for bucket in buckets}):
            if importlib.util.find_spec(_PACKAGES[scheme]) is None:
                raise FetchExtraMissingError(scheme, _PACKAGES[scheme])

    def try_once(self, uri: str, entry: CacheEntry, deadline: Deadline) -> None:
        """Bring the entry to the present version of the object.

        Raises:
            PassingFaultError: It failed in a way that may pass; the entry keeps what it can go on from.
            ExtractionError: It failed for good.
        """
        store, path = self._vetted(uri)
        version = self._look(store, path, uri, deadline)
        if version == entry.version and entry.is_complete:
            return
        if version != entry.version or not version.joins:
            entry.begin(version)
        size = version.num_bytes or 0
        with entry.receiving(size, deadline) as received:
            while received.num_bytes < size:
                end = min(received.num_bytes + _BLOCK_BYTES, size)
                block = self._ask(store.cat_file, path, uri, deadline, start=received.num_bytes, end=end)
                if len(block) != end - received.num_bytes:
                    entry.discard()
                    raise PassingFaultError("the object changed while it was read")
                received.append(block)
        if self._look(store, path, uri, deadline) != version:  # every block was read in between: all are of one version
            entry.discard()
            raise PassingFaultError("the object changed while it was read")
        entry.complete()

    def _vetted(self, uri: str) -> tuple[Any, str]:
        scheme, _, path = uri.partition("://")
        scheme = scheme.lower()
        bucket, _, key = path.partition("/")
        fix = "Correct the row, or add the bucket to EXTRACTION_ALLOWED_BUCKETS."
        folders = self._folders.get(f"{scheme}://{bucket}")
        if folders is None:
            raise AddressForbiddenError(uri, "its bucket is not an allowed one", fix)
        if not any(not folder or key.startswith(f"{folder}/") for folder in folders):
            raise AddressForbiddenError(uri, "it lies in no folder of the bucket that is allowed", fix)
        if not key or any(character < " " for character in key) or not is_text(key):
            raise AddressForbiddenError(uri, "its key is empty or holds a control character", "Correct the row.")
        if not {".", ".."}.isdisjoint(key.split("/")):  # a server or a proxy may take it for a step into another bucket
            raise AddressForbiddenError(uri, "its key holds '.' or '..' between slashes", "Correct the row.")
        if scheme == "gs" and _GENERATION.search(key):
            raise AddressForbiddenError(uri, "it names a generation of an object", "Name the object alone.")
        of_versions = scheme == "s3" and _VERSION in key
        if of_versions and not key.partition(_VERSION)[2]:
            raise AddressForbiddenError(uri, "its versionId is empty", "Correct the row.")
        store = f"{scheme}{_VERSION}" if of_versions else scheme
        if store not in self._open:
            self._open[store] = open_store(scheme, stall_seconds=self._stall_seconds, of_versions=of_versions)
        return self._open[store], path

    def _look(self, store: Any, path: str, uri: str, deadline: Deadline) -> FileVersion:  # noqa: ANN401 - fsspec is not typed
        """The object's present version."""
        try:
            info = self._ask(store.info, path, uri, deadline)
        except (FileRefusedError, FileUnavailableError, PassingFaultError):
            # S3 refuses this question without a body that would say why: one byte is asked for, to hear the reason.
            self._ask(store.cat_file, path, uri, deadline, start=0, end=1)
            raise
        if info["type"] != "file":
            raise FileRefusedError(uri, "that this is a folder")
        size = int(info["size"] or 0)
        if size == 0:
            raise FileUnavailableError(uri, "it is empty")
        if size > self._max_bytes:
            raise FileTooLargeError(uri, got_bytes=size, max_bytes=self._max_bytes)
        name = str(info.get("generation") or info.get("ETag") or info.get("etag") or "")
        return FileVersion(size, name, str(info.get("LastModified") or info.get("updated") or ""), joins=bool(name))

    def _ask(self, function: Callable[..., Any], path: str, uri: str, deadline: Deadline, **options: int) -> Any:  # noqa: ANN401 - fsspec is not typed
        seconds = deadline.remaining(self._stall_seconds)
        try:
            return function(path, timeout=seconds, **options)
        except Exception as error:  # noqa: BLE001 - each store has its own family; what is none of them is raised
            raise _judged(error, uri) from None


def _judged(error: Exception, uri: str) -> Exception:
    """What a store's exception means. Its own words may repeat the request, so only its type and code are shown."""
    name, code = type(error).__name__, _code(error)
    if name in _CREDENTIALS or code in _CREDENTIAL_CODES or code == _UNAUTHORIZED:
        return FetchCredentialsError(uri, str(code or name))
    if _VERSION in uri and (isinstance(error, FileNotFoundError) or code in _NO_VERSION):
        return FileRefusedError(uri, f"that there is no such version ({code or 404})")
    if isinstance(error, FileNotFoundError) and code != "NoSuchBucket":  # as of a folder: it may still arrive
        return FileUnavailableError(uri, "404 Not Found")
    if isinstance(error, FileNotFoundError):
        return FileRefusedError(uri, "404 Not Found, of its bucket")
    if isinstance(error, PermissionError) or str(error).startswith("Forbidden"):
        return FileRefusedError(uri, "403 Forbidden")
    if isinstance(error, ValueError):
        return AddressForbiddenError(uri, "the store does not take its key", "Correct the row.")
    if isinstance(error, OSError) or type(error).__module__.partition(".")[0] in STORE_PACKAGES:
        return PassingFaultError(f"the store failed ({code or getattr(error, 'strerror', None) or name})")
    return error


def _code(error: Exception) -> str | int | None:
    """The store's own code for what is wrong."""
    response = getattr(error.__cause__ or error, "response", None)
    if isinstance(response, dict):
        return str(response.get("Error", {}).get("Code", "")) or None
    code = getattr(error, "code", None)
    return code if isinstance(code, int) else None
