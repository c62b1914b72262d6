"""Notices to people: what is said when a run has failed, never a password or a signature, and how it reaches them.

A notice goes to the log, a webhook, a chat that takes what Slack takes, or a function of one's own. What is posted
goes to the address that was set and to no other, within seconds, tried a few times.
"""

from __future__ import annotations

import contextlib
import html
import http.client
import json
import logging
import pkgutil
import random
import socket
import ssl
import sys
import threading
import time
from dataclasses import asdict, dataclass
from http import HTTPStatus
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import sqlalchemy as sa
from pydantic import SecretStr

from extraction_dagster import __version__
from extraction_dagster.addresses import capped, scrubbed
from extraction_dagster.errors.runs import NoticeError, NotifierError

if TYPE_CHECKING:
    from collections.abc import Callable

    from extraction_dagster.settings import Settings

    Notifier = Callable[["RunFailure"], None]

sys.modules[f"{__name__}.notice"] = sys.modules[__name__]  # where functions of one's own import RunFailure from
_log = logging.getLogger(__name__)
_POST_SECONDS = 15.0
_DELIVERY_SECONDS = 20.0  # a tick must end within a minute
_SILENT_SECONDS = 5.0
_TRIES = 3
_WAIT_SECONDS = 0.5  # before the second try, at most; doubles
_MAY_PASS = frozenset({HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_EARLY, HTTPStatus.TOO_MANY_REQUESTS})
_HEADERS = {
    "Content-Type": "application/json; charset=utf-8",
    "User-Agent": f"extraction-dagster/{__version__}",
    "Connection": "close",
}
_LONGEST_ERROR = 600
_LONGEST_LOOKED_AT = 16_000
_SHORTEST_SECRET = 4
_HIDDEN = "(hidden)"


@dataclass(frozen=True, slots=True)
class RunFailure:
    """A run that failed.

    Attributes:
        run_id: In Dagster's run history.
        job: The job's name.
        key: The range's partition key; None for a run without one.
        step: The step that failed first; empty when the run failed outside of its steps.
        error: That step's own sentence.
        failed_records: Records that failed in this run; None when that could not be looked up.
        failures_in_a_row: Failed runs of the range since its last success, this one included.
        is_test: Whether nothing has failed, and somebody tests whether notices arrive.
    """

    run_id: str
    job: str
    key: str | None
    step: str
    error: str
    failed_records: int | None = None
    failures_in_a_row: int = 1
    is_test: bool = False

    @property
    def fix(self) -> str:
        """What a person can do."""
        if self.key is None:
            return "Look at the run in the UI, then launch the job again."
        return (
            f"Nothing is lost: the sensor asks for the range again, and it goes on where it was. Once the cause is "
            f"mended, 'extraction launch {self.key}' does so at once; 'extraction errors' lists records that failed."
        )

    @property
    def text(self) -> str:
        """The notice for people."""
        test = "This is a test, nothing has failed. " if self.is_test else ""
        what = f"Range {self.key}" if self.key else f"Job {self.job}"
        where = f" at {self.step}" if self.step else ""
        again = f", for the {_ordinal(self.failures_in_a_row)} time in a row" if self.failures_in_a_row > 1 else ""
        return (
            f"{test}{what} failed{where} (run {self.run_id}){again}: {_sentence(self.error)}{self._records} {self.fix}"
        )

    @property
    def _records(self) -> str:
        if self.failed_records is None:
            return " How many of its records failed is not known."
        return f" {self.failed_records} of its records failed." if self.failed_records else ""

    def document(self) -> dict[str, Any]:
        """The notice for programs; the keys are stable."""
        return {"event": "run_failed", **asdict(self), "fix": self.fix, "text": self.text}


def redact(text: str, settings: Settings) -> str:
    """A text in one paragraph, not too long, without any secret of the settings, credentials or signatures."""
    secrets = _secrets(settings)
    # Cut first; what hangs over shows whether a secret begins before the cut, and goes then, whole or half of one.
    overhang = max(map(len, secrets), default=0)
    text, is_cut = text[: _LONGEST_LOOKED_AT + overhang], len(text) > _LONGEST_LOOKED_AT + overhang
    for secret in secrets:
        text = _without(text, secret)
    if is_cut:
        text = capped(text, max(len(text) - overhang - 1, 0))
    text = " ".join(scrubbed(text).split())
    return text if len(text) <= _LONGEST_ERROR else f"{text[: _LONGEST_ERROR - 1]}…"


def _without(text: str, secret: str) -> str:
    """A text without a secret, and without the beginning of it where the text was cut."""
    text = text.replace(secret, _HIDDEN)
    if not text.endswith("…"):
        return text
    body = text.rstrip("….")
    half = next((size for size in range(len(secret) - 1, _SHORTEST_SECRET - 1, -1) if body.endswith(secret[:size])), 0)
    return f"{body[: len(body) - half]}{_HIDDEN}" if half else text


def _secrets(settings: Settings) -> list[str]:
    """Every secret that is set, and the passwords within addresses; the longest first."""
    found: set[str] = set()
    for name in type(settings).model_fields:
        value = getattr(settings, name)
        if isinstance(value, SecretStr):
            found.add(value.get_secret_value())
            found.update(_password(value.get_secret_value()))
    return sorted((secret for secret in found if len(secret) >= _SHORTEST_SECRET), key=len, reverse=True)


def _password(address: str) -> list[str]:
    try:
        password = sa.make_url(address).password
    except (sa.exc.ArgumentError, ValueError):
        return []
    return [str(password)] if password else []


def _sentence(text: str) -> str:
    text = text.strip() or "no reason was given"
    return text if text.endswith((".", "!", "?", "…")) else f"{text}."


def _ordinal(number: int) -> str:
    ending = "th" if number % 100 in {11, 12, 13} else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{ending}"


class _TransientError(Exception):
    """A try failed in a way that may pass."""


def make_notifier(settings: Settings) -> Notifier | None:
    """The notifier that the settings ask for; None when notices are off.

    Raises:
        NotifierError: A function of one's own can't be imported, or is none.
    """
    kind = settings.notify
    url = settings.notify_url.get_secret_value() if settings.notify_url else ""
    if kind == "none":
        return None
    if kind == "log":
        return lambda failure: _log.error("%s", failure.text)
    if kind == "webhook":
        return lambda failure: post_json(url, failure.document(), seconds=_POST_SECONDS)
    if kind == "slack":
        # Slack takes these three characters for markup: & < >
        return lambda failure: post_json(url, {"text": html.escape(failure.text, quote=False)}, seconds=_POST_SECONDS)
    return _import_function(kind)


def deliver(notifier: Notifier, failure: RunFailure, *, seconds: float = _DELIVERY_SECONDS) -> None:
    """Tell, within a time: whatever a notifier does, its caller goes on.

    Raises:
        NoticeError: The notifier failed, or did not end in time.
    """
    faults: list[str] = []

    def work() -> None:
        try:
            notifier(failure)
        except NoticeError as error:
            faults.append(error.why)
        except BaseException as error:  # noqa: BLE001 - also of a function that calls sys.exit
            # The error's words may hold an address with its secret: only its type is shown.
            faults.append(f"{type(error).__name__} was raised")

    thread = threading.Thread(target=work, daemon=True, name="notifier")
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise NoticeError(f"it did not end within {seconds:g} s")
    if faults:
        raise NoticeError(faults[0])


def _import_function(path: str) -> Notifier:
    try:
        found = pkgutil.resolve_name(path)
    except Exception as error:
        raise NotifierError(path, f"it can't be imported ({type(error).__name__}: {error})") from error
    if not callable(found):
        raise NotifierError(path, f"it is a {type(found).__name__}, expected a function")
    notifier: Notifier = found
    return notifier


def post_json(
    url: str,
    document: Any,  # noqa: ANN401 - any JSON document
    *,
    seconds: float,
    tls: Callable[[], ssl.SSLContext] = ssl.create_default_context,
) -> None:
    """Post a JSON document, and again while the failure may pass; no redirect is followed, no proxy is used.

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
        except _TransientError as fault:
            why = str(fault)
        else:
            return
    raise NoticeError(f"{why} ({tried + 1} tries)")


def _post_once(url: str, body: bytes, end: float, tls: Callable[[], ssl.SSLContext]) -> None:
    parts, left = urlsplit(url), max(end - time.monotonic(), 0.001)
    host, timeout = parts.hostname or "", min(_SILENT_SECONDS, left)
    connection = (  # without a port, the end of an IPv6 address would be taken for one
        http.client.HTTPSConnection(host, parts.port or 443, timeout=timeout, context=tls())
        if parts.scheme == "https"
        else http.client.HTTPConnection(host, parts.port or 80, timeout=timeout)
    )
    # A server that sends a byte now and then never reaches the timeout: the connection is cut at the end of the time.
    cut = threading.Timer(left, _cut, [connection])
    cut.daemon = True
    cut.start()
    try:
        target = f"{parts.path or '/'}{f'?{parts.query}' if parts.query else ''}"
        connection.request("POST", target, body=body, headers=_HEADERS)
        status = connection.getresponse().status
    except ssl.SSLCertVerificationError as error:
        raise NoticeError(f"the server's certificate is not accepted ({error.verify_message})") from None
    except TimeoutError:
        raise _TransientError("the server did not answer in time") from None
    except (OSError, http.client.HTTPException, ValueError) as error:
        # The exception's own words may repeat the address or what the server sent: only its type is shown.
        said = (error.strerror if isinstance(error, OSError) else None) or type(error).__name__
        raise _TransientError(f"the connection failed ({said})") from None
    finally:
        cut.cancel()
        connection.close()
    if status in _MAY_PASS or status >= HTTPStatus.INTERNAL_SERVER_ERROR:
        raise _TransientError(f"the server answered {status}")
    if not HTTPStatus.OK <= status < HTTPStatus.MULTIPLE_CHOICES:
        raise NoticeError(f"the server answered {status}")


def _cut(connection: http.client.HTTPConnection) -> None:
    wire = connection.sock
    if wire is not None:
        with contextlib.suppress(OSError):
            wire.shutdown(socket.SHUT_RDWR)
