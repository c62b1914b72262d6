"""An HTTP endpoint for Prometheus: answers at once from the newest figures, whatever is down or held."""

from __future__ import annotations

from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING

from extraction_dagster.errors.watch import MetricsAddressError

if TYPE_CHECKING:
    from collections.abc import Callable

    from extraction_dagster.watch.exposition import Exposition

_SILENT_SECONDS = 10.0
_HELP = b"Metrics are at /metrics\n"


class MetricsServer(ThreadingHTTPServer):
    """Serves /metrics."""

    daemon_threads = True

    def __init__(self, host: str, port: int, expose: Callable[[], Exposition]) -> None:
        """Listen; `serve_forever` answers.

        Args:
            host: A numeric address or a name; `::1` for IPv6.
            port: 0 for any that is free.
            expose: Gives what is to be shown.

        Raises:
            MetricsAddressError: The address can't be listened at.
        """
        if ":" in host:
            self.address_family = 10  # AF_INET6
        self._expose = expose
        try:
            super().__init__((host, port), _Handler)
        except OSError as error:
            raise MetricsAddressError(f"{host}:{port}", error.strerror or str(error)) from None

    def answer(self, accept: str) -> tuple[bytes, str]:
        """The metrics, and their content type."""
        return self._expose().negotiated(accept)

    def handle_error(self, request: object, client_address: object) -> None:
        """Somebody hung up: nobody has to know."""


class _Handler(BaseHTTPRequestHandler):
    server: MetricsServer
    server_version = "extraction"
    sys_version = ""
    timeout = _SILENT_SECONDS

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path == "/metrics":
            body, content_type = self.server.answer(self.headers.get("Accept", ""))
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
        """A scrape every few seconds is no news."""
