"""One try of an https (or, where allowed, http) download: to judged addresses only, within its time and size."""

from __future__ import annotations

import http.client
import io
import re
import socket
import ssl
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from typing import TYPE_CHECKING, Any
from urllib.parse import urljoin

from extraction_dagster import __version__
from extraction_dagster.errors.catalog import (
    AddressForbiddenError,
    FileEncodedError,
    FileRefusedError,
    FileTooLargeError,
    FileUnavailableError,
)
from extraction_dagster.stages.catalog.fetch.cache import CacheEntry, Deadline, FileVersion, PassingFaultError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from extraction_dagster.stages.catalog.fetch.guard import NetworkGuard, Target

_CHUNK_BYTES = 2**16
_MAX_REDIRECTS = 5
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_PASSING = frozenset({408, 421, 425, 429})
_RANGE = re.compile(r"bytes (\d{1,19})-(\d{1,19})/(\d{1,19}|\*)")
_MAX_RETRY_AFTER_SECONDS = 60.0
_SLICE_SECONDS = 0.5  # after which a silent connection looks whether the download was stopped


class HttpsDownload:
    """Downloads from servers that the guard lets through.

    Args:
        guard: Judges every address.
        max_file_bytes: The largest file that is taken.
        stall_seconds: For how long a connection may be silent.
        tls: Makes what certificates are checked with.
    """

    def __init__(
        self,
        guard: NetworkGuard,
        *,
        max_file_bytes: int,
        stall_seconds: float,
        tls: Callable[[], ssl.SSLContext] = ssl.create_default_context,
    ) -> None:
        self._guard, self._max_bytes, self._stall_seconds = guard, max_file_bytes, stall_seconds
        self._make_tls = tls
        self._tls: ssl.SSLContext | None = None

    def try_once(self, uri: str, entry: CacheEntry, deadline: Deadline) -> None:
        """Bring the entry to the present version of the file.

        Raises:
            PassingFaultError: It failed in a way that may pass; the entry keeps what it can go on from.
            ExtractionError: It failed for good.
        """
        with self._answer(uri, _conditions(entry), deadline) as response:
            if response.status == HTTPStatus.NOT_MODIFIED and entry.is_complete:
                return
            self._check_status(uri, response, entry)
            encoding = response.headers.get("Content-Encoding", "identity").strip().lower()
            if encoding not in {"", "identity"}:
                raise FileEncodedError(uri, encoding)
            if response.status == HTTPStatus.PARTIAL_CONTENT:
                expected = _continues(response, entry)
                if expected is None:
                    entry.discard()
                    raise PassingFaultError("the server went on with another file or at another place")
            else:
                version = _version(response)
                entry.begin(version)
                expected = version.num_bytes
            self._receive(uri, response, entry, deadline, expected)

    def _receive(
        self,
        uri: str,
        response: http.client.HTTPResponse,
        entry: CacheEntry,
        deadline: Deadline,
        expected: int | None,
    ) -> None:
        if expected is not None and expected > self._max_bytes:
            entry.discard()
            raise FileTooLargeError(uri, got_bytes=expected, max_bytes=self._max_bytes)
        limit = self._max_bytes if expected is None else expected
        with entry.receiving(limit, deadline, is_known=expected is not None) as received:
            while left := limit - received.num_bytes:
                chunk = response.read1(min(_CHUNK_BYTES, left))
                if not chunk:
                    break
                received.append(chunk)
            goes_on = expected is None and not left and bool(response.read1(1))
        if goes_on:
            entry.discard()
            raise FileTooLargeError(uri, got_bytes=limit + 1, max_bytes=limit)
        if expected is not None and received.num_bytes < expected:
            raise PassingFaultError(f"the connection ended after {received.num_bytes} of {expected} bytes")
        if received.num_bytes == 0:
            entry.discard()
            raise FileUnavailableError(uri, "it is empty")
        entry.complete()

    def _check_status(self, uri: str, response: http.client.HTTPResponse, entry: CacheEntry) -> None:
        status = response.status
        asked_to_go_on = entry.num_bytes > 0 and not entry.is_complete
        if status == HTTPStatus.OK or (status == HTTPStatus.PARTIAL_CONTENT and asked_to_go_on):
            return
        answer = f"{status} {http.client.responses.get(status, '')}".strip()
        if status == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE and asked_to_go_on:
            entry.discard()
            raise PassingFaultError(f"the server answered {answer} and is asked for the whole file")
        if status in _PASSING or status >= HTTPStatus.INTERNAL_SERVER_ERROR:
            raise PassingFaultError(f"the server answered {answer}", wait_seconds=_retry_after(response))
        raise FileRefusedError(uri, answer)

    @contextmanager
    def _answer(self, uri: str, headers: dict[str, str], deadline: Deadline) -> Iterator[http.client.HTTPResponse]:
        """The answer at the end of the redirects, each of which is judged as the first address was."""
        target = self._guard.vet(uri)
        for _ in range(_MAX_REDIRECTS + 1):
            with self._exchange(target, headers, deadline) as response:
                if response.status not in _REDIRECTS:
                    yield response
                    return
                location = response.headers.get("Location", "")
            # A header is Latin-1 for http.client; an address in it that is not ASCII was meant as UTF-8.
            location = location.encode("latin-1", "replace").decode("utf-8", "replace")
            try:
                led_to = urljoin(target.url, location)
            except ValueError:
                led_to = ""
            target = self._guard.vet(led_to, redirected_from=target, asked=uri)
        raise AddressForbiddenError(uri, f"it redirects more than {_MAX_REDIRECTS} times", "Correct the row.")

    @contextmanager
    def _exchange(
        self, target: Target, headers: dict[str, str], deadline: Deadline
    ) -> Iterator[http.client.HTTPResponse]:
        wire = None
        try:
            wire = self._connect(target, deadline)
            connection = http.client.HTTPConnection(target.host, target.port)
            connection.default_port = 443 if target.scheme == "https" else 80  # decides whether Host names the port
            connection.sock = _TimedSocket(wire, deadline, self._stall_seconds)
            connection.request("GET", target.path, headers={**_HEADERS, **headers})
            yield connection.getresponse()
        except ssl.SSLCertVerificationError as error:
            why = f"its server's certificate is not accepted ({error.verify_message})"
            raise FileUnavailableError(target.url, why) from None
        except TimeoutError:
            raise PassingFaultError(f"the server was silent for {self._stall_seconds:g} s") from None
        except (OSError, http.client.HTTPException) as error:
            # The exception's own words may repeat what the server sent: only its type is shown.
            said = (error.strerror if isinstance(error, OSError) else None) or type(error).__name__
            raise PassingFaultError(f"the connection failed ({said})") from None
        finally:
            if wire is not None:
                wire.close()

    def _connect(self, target: Target, deadline: Deadline) -> socket.socket:
        """A connection to one of the judged addresses, and to nothing else."""
        fault: OSError = ConnectionError("no address")
        for address in target.addresses:
            plain = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_STREAM)
            try:
                plain.settimeout(deadline.remaining(self._stall_seconds))
                plain.connect((address, target.port))
                return self._secured(plain, target) if target.scheme == "https" else plain
            except BaseException as error:
                plain.close()
                if not isinstance(error, OSError) or isinstance(error, ssl.SSLError):
                    raise
                fault = error
        raise fault

    def _secured(self, plain: socket.socket, target: Target) -> ssl.SSLSocket:
        if self._tls is None:
            self._tls = self._make_tls()
        # A connection that ends without saying so was cut: never taken for the end of a file.
        name = target.host.strip("[]")
        return self._tls.wrap_socket(plain, server_hostname=name, suppress_ragged_eofs=False)


class _TimedSocket:
    """What http.client needs of a socket; each wait ends with the stall limit, the deadline or a stop."""

    def __init__(self, wire: socket.socket, deadline: Deadline, stall_seconds: float) -> None:
        self._wire, self._deadline, self._stall_seconds = wire, deadline, stall_seconds

    def sendall(self, data: bytes) -> None:
        """Send all of it."""
        self._wire.settimeout(self._deadline.remaining(self._stall_seconds))
        self._wire.sendall(data)

    def makefile(self, _mode: str) -> io.BufferedReader:
        """What an answer is read from."""
        return io.BufferedReader(_TimedReader(self._wire, self._deadline, self._stall_seconds))

    def close(self) -> None:
        """Do nothing: `_exchange` made the connection and closes it."""


class _TimedReader(io.RawIOBase):
    def __init__(self, wire: socket.socket, deadline: Deadline, stall_seconds: float) -> None:
        super().__init__()
        self._wire, self._deadline, self._stall_seconds = wire, deadline, stall_seconds

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:  # noqa: ANN401 - a writable buffer has no type in Python 3.11
        silent = 0.0
        while True:
            seconds = self._deadline.remaining(min(_SLICE_SECONDS, max(self._stall_seconds - silent, 0.001)))
            self._wire.settimeout(seconds)
            try:
                return self._wire.recv_into(buffer)
            except TimeoutError:
                silent += seconds
                if silent >= self._stall_seconds:
                    raise


_HEADERS = {
    "Accept": "*/*",
    "Accept-Encoding": "identity",
    "Connection": "close",
    "User-Agent": f"extraction-dagster/{__version__}",
}


def _conditions(entry: CacheEntry) -> dict[str, str]:
    """What to ask for: all, all if it changed, or the rest if it did not."""
    version = entry.version
    if version is None:
        return {}
    if entry.is_complete:
        wanted = {"If-None-Match": version.etag, "If-Modified-Since": version.modified}
        return {name: value for name, value in wanted.items() if value}
    if version.joins and entry.num_bytes:
        return {"Range": f"bytes={entry.num_bytes}-", "If-Range": version.etag or version.modified}
    return {}


def _version(response: http.client.HTTPResponse) -> FileVersion:
    """What a whole answer says of its version."""
    headers = response.headers
    etag, modified = headers.get("ETag", "").strip(), headers.get("Last-Modified", "").strip()
    # A time is a safe name of a content only if the answer is at least a second younger than the change.
    age = (_time(headers.get("Date", "")) or datetime.min.replace(tzinfo=UTC)) - (
        _time(modified) or datetime.max.replace(tzinfo=UTC)
    )
    joins = etag.startswith('"') if etag else age >= timedelta(seconds=1)
    return FileVersion(response.length, etag, modified, joins)


def _continues(response: http.client.HTTPResponse, entry: CacheEntry) -> int | None:
    """The size of the whole file, if an answer goes on exactly where the entry ends, in the same version."""
    found = _RANGE.fullmatch(response.headers.get("Content-Range", "").strip())
    version = entry.version
    if found is None or version is None or int(found[1]) != entry.num_bytes:
        return None
    total = int(found[2]) + 1
    if found[3] != "*" and int(found[3]) != total:
        return None
    if version.num_bytes not in {None, total} or response.headers.get("ETag", "").strip() != version.etag:
        return None
    if response.headers.get("Last-Modified", version.modified).strip() != version.modified:
        return None
    return total


def _time(text: str) -> datetime | None:
    try:
        return parsedate_to_datetime(text).astimezone(UTC)
    except (ValueError, TypeError, OverflowError):
        return None


def _retry_after(response: http.client.HTTPResponse) -> float:
    text = response.headers.get("Retry-After", "").strip()
    return min(float(text), _MAX_RETRY_AFTER_SECONDS) if text.isascii() and text.isdigit() else 0.0
