"""A scrape: the newest figures and the newest census, each taken by a thread of its own; and the endpoint for it.

A database that does not answer, or a census of a hundred million rows, delays no answer.
"""

from __future__ import annotations

import logging
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Generic, TypeVar

from extraction_dagster.errors.runs import MetricsAddressError
from extraction_dagster.watch.exposition import Exposition
from extraction_dagster.watch.meter import Census, Figures, InstanceFigures, Meter, census_seconds

if TYPE_CHECKING:
    from collections.abc import Callable

    from extraction_dagster.settings import Settings

_Value = TypeVar("_Value")
_log = logging.getLogger(__name__)
_CACHE_SECONDS = 5.0
_SCRAPE_SECONDS = 5.0  # Prometheus gives up after 10
_FIRST_CENSUS_SECONDS = 2.0
_PATIENT_SECONDS = 60.0
_SILENT_SECONDS = 10.0  # a connection that says nothing for so long is closed
_HELP = b"Metrics are at /metrics\n"


class Latest(Generic[_Value]):
    """The newest of something that takes time: taken by one thread when it is asked for and the one before is old.

    When a database does not answer, that thread alone hangs: callers wait for as long as they said, and get the value
    before.

    Args:
        take: Takes a value; an exception is logged, and the value before stays.
        fresh_seconds: For how long a value is new enough.
    """

    def __init__(self, take: Callable[[], _Value], *, fresh_seconds: Callable[[_Value], float]) -> None:
        self._take, self._fresh_seconds = take, fresh_seconds
        self._lock = threading.Lock()
        self._taking: threading.Thread | None = None
        self._value: _Value | None = None
        self._taken_at = float("-inf")

    def get(self, *, wait_seconds: float) -> tuple[_Value | None, bool]:
        """The newest value, None before there is one; and whether it is as fresh as it should be."""
        with self._lock:
            if self._is_fresh():
                return self._value, True
            if self._taking is None:
                self._taking = threading.Thread(target=self._work, daemon=True)
                self._taking.start()
            taking = self._taking
        taking.join(wait_seconds)
        with self._lock:
            return self._value, self._is_fresh()

    def _is_fresh(self) -> bool:
        value = self._value
        return value is not None and time.monotonic() - self._taken_at < self._fresh_seconds(value)

    def _work(self) -> None:
        try:
            value = self._take()
            with self._lock:
                self._value, self._taken_at = value, time.monotonic()
        except Exception as error:  # noqa: BLE001 - whatever it is, those who ask get what there was before
            _log.warning("No figures could be taken: %s", error)
        finally:
            with self._lock:
                self._taking = None


class Scrape:
    """Answers scrapes, however many come at once; opens nothing before the first.

    Args:
        settings: Where everything is.
        read_instance: Asks Dagster's instance.
    """

    def __init__(self, settings: Settings, read_instance: Callable[[], InstanceFigures]) -> None:
        # Two meters: what one thread closes after a fault must not be in another's hands.
        self._meter, self._counter = Meter(settings, read_instance), Meter(settings, read_instance)
        self._bounds: tuple[int | None, int | None] = (None, None)
        self._figures: Latest[Figures] = Latest(self._meter.measure, fresh_seconds=lambda _: _CACHE_SECONDS)
        self._census: Latest[Census] = Latest(self._count, fresh_seconds=census_seconds)

    def close(self) -> None:
        """Give the connections back."""
        self._meter.close()
        self._counter.close()

    def now(self) -> Exposition:
        """Everything, waited for: for a file or a terminal."""
        return self._expose(_PATIENT_SECONDS, _PATIENT_SECONDS)

    def soon(self) -> Exposition:
        """What there is within seconds: for an endpoint. The census before is shown while one is taken."""
        return self._expose(_SCRAPE_SECONDS, _FIRST_CENSUS_SECONDS)

    def _expose(self, seconds: float, census_seconds: float) -> Exposition:
        figures, is_fresh = self._figures.get(wait_seconds=seconds)
        if figures is None or not is_fresh:
            return Exposition(None)
        if not figures.parts["table"]:
            return Exposition(figures)
        if figures.progress is not None:
            self._bounds = (figures.progress.after_id, figures.progress.floor_id)
        known, _ = self._census.get(wait_seconds=0.0)
        census = known or self._census.get(wait_seconds=census_seconds)[0]
        return Exposition(figures, census)

    def _count(self) -> Census:
        try:
            return self._counter.count(*self._bounds)
        except BaseException:
            self._counter.close()
            raise


class MetricsServer(ThreadingHTTPServer):
    """Serves /metrics; listens at once, and `serve_forever` answers.

    The client's own server has no limit of time for a silent connection, and answers at every path.

    Args:
        host: A numeric address or a name; `::1` for IPv6.
        port: 0 for any that is free.
        expose: Gives what is to be shown.

    Raises:
        MetricsAddressError: The address can't be listened at.
    """

    daemon_threads = True

    def __init__(self, host: str, port: int, expose: Callable[[], Exposition]) -> None:
        if ":" in host:
            self.address_family = 10  # AF_INET6
        self.expose = expose
        try:
            super().__init__((host, port), _Handler)
        except OSError as error:
            raise MetricsAddressError(f"{host}:{port}", error.strerror or str(error)) from None

    def handle_error(self, request: object, client_address: object) -> None:
        """Print nothing when a client hangs up."""


class _Handler(BaseHTTPRequestHandler):
    server: MetricsServer
    server_version = "extraction"
    sys_version = ""
    timeout = _SILENT_SECONDS

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path == "/metrics":
            body, content_type = self.server.expose().negotiated(self.headers.get("Accept", ""))
            self._send(200, body, content_type)
        else:
            self._send(200 if path == "/" else 404, _HELP, "text/plain; charset=utf-8")

    do_HEAD = do_GET  # noqa: N815 - likewise

    def _send(self, status: int, body: bytes, content_type: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Print nothing for each scrape."""
