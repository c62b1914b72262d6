"""Post a small JSON document: to the address that was set and to no other, within seconds, tried a few times."""

from __future__ import annotations

import contextlib
import http.client
import json
import random
import socket
import ssl
import threading
import time
from http import HTTPStatus
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from extraction_dagster import __version__
from extraction_dagster.errors.watch import NoticeError

if TYPE_CHECKING:
    from collections.abc import Callable

_HTTPS_PORT, _HTTP_PORT = 443, 80
_PASSING = frozenset({HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_EARLY, HTTPStatus.TOO_MANY_REQUESTS})
_SILENT_SECONDS = 5.0
_TRIES = 3
_WAIT_SECONDS = 0.5  # before the second try, at most; doubles


class _PassingFaultError(Exception):
    """A try failed in a way that may pass."""


def post_json(
    url: str,
    document: Any,  # noqa: ANN401 - any JSON document
    *,
    seconds: float,
    tls: Callable[[], ssl.SSLContext] = ssl.create_default_context,
) -> None:
    """Post, and post again while the failure may pass; no redirect is followed, no proxy is used.

    Args:
        url: Where to; it may hold a secret, and is in no message.
        document: What.
        seconds: Limit for all tries together.
        tls: Makes what certificates are checked with.

    Raises:
        NoticeError: It did not arrive.
    """
    body, end = json.dumps(document).encode(), time.monotonic() + seconds
    why = "there was no time left"
    for tried in range(_TRIES):
        if tried:
            time.sleep(max(min(random.uniform(0, _WAIT_SECONDS * 2**tried), end - time.monotonic()), 0))  # noqa: S311
        if time.monotonic() >= end:
            break
        try:
            _post_once(url, body, end, tls)
        except _PassingFaultError as fault:
            why = str(fault)
        else:
            return
    raise NoticeError(f"{why} ({tried + 1} tries)")


def _post_once(url: str, body: bytes, end: float, tls: Callable[[], ssl.SSLContext]) -> None:
    parts = urlsplit(url)
    timeout = min(_SILENT_SECONDS, max(end - time.monotonic(), 0.001))
    connection: http.client.HTTPConnection
    if parts.scheme == "https":
        connection = http.client.HTTPSConnection(
            parts.hostname or "", parts.port or _HTTPS_PORT, timeout=timeout, context=tls()
        )
    else:
        connection = http.client.HTTPConnection(parts.hostname or "", parts.port or _HTTP_PORT, timeout=timeout)
    # A server that sends a byte now and then is never silent: what goes on too long is cut.
    cut = threading.Timer(max(end - time.monotonic(), 0.001), _cut, [connection])
    cut.daemon = True
    cut.start()
    try:
        target = f"{parts.path or '/'}{f'?{parts.query}' if parts.query else ''}"
        connection.request("POST", target, body=body, headers=_HEADERS)
        status = connection.getresponse().status
    except ssl.SSLCertVerificationError as error:
        raise NoticeError(f"the server's certificate is not accepted ({error.verify_message})") from None
    except TimeoutError:
        raise _PassingFaultError("the server did not answer in time") from None
    except (OSError, http.client.HTTPException, ValueError) as error:
        # The exception's own words may repeat the address or what the server sent: its kind has to do.
        said = (error.strerror if isinstance(error, OSError) else None) or type(error).__name__
        raise _PassingFaultError(f"the connection failed ({said})") from None
    finally:
        cut.cancel()
        connection.close()
    if status in _PASSING or status >= HTTPStatus.INTERNAL_SERVER_ERROR:
        raise _PassingFaultError(f"the server answered {status}")
    if not HTTPStatus.OK <= status < HTTPStatus.MULTIPLE_CHOICES:
        raise NoticeError(f"the server answered {status}")


_HEADERS = {
    "Content-Type": "application/json; charset=utf-8",
    "User-Agent": f"extraction-dagster/{__version__}",
    "Connection": "close",
}


def _cut(connection: http.client.HTTPConnection) -> None:
    wire = connection.sock
    if wire is not None:
        with contextlib.suppress(OSError):
            wire.shutdown(socket.SHUT_RDWR)
