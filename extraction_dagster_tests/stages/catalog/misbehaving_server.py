"""A local web server, with TLS by a certificate authority of its own, that does what it is told to do wrong."""

from __future__ import annotations

import contextlib
import ssl
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING

import trustme

if TYPE_CHECKING:
    from collections.abc import Callable

NAME = "videos.example"


class Handler(BaseHTTPRequestHandler):
    """Hands each request to the script of its path."""

    protocol_version = "HTTP/1.1"
    server: MisbehavingServer

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        self.server.requests.append((self.path, {name.lower(): value for name, value in self.headers.items()}))
        nth = sum(asked.partition("?")[0] == path for asked, _ in self.server.requests)
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.server.scripts[path](self, nth)

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        """An ordinary answer; header names with `_` for `-`."""
        self.head(status, **{"Content_Length": str(len(body)), **headers})
        self.wfile.write(body)

    def head(self, status: int, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()


class MisbehavingServer(ThreadingHTTPServer):
    """Serves `scripts`: by path, what to do with a handler and the number of the request to that path."""

    daemon_threads = True

    def __init__(self, *, tls: bool) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.scripts: dict[str, Callable[[Handler, int], None]] = {}
        self.requests: list[tuple[str, dict[str, str]]] = []
        self.authority = trustme.CA()
        if tls:
            context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
            self.authority.issue_cert(NAME, "other.example", "localhost", "127.0.0.1").configure_cert(context)
            self.socket = context.wrap_socket(self.socket, server_side=True, do_handshake_on_connect=False)
        self.scheme = "https" if tls else "http"
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def handle_error(self, *_: object) -> None:
        """A client that hangs up is what the tests are about."""

    def url(self, path: str, *, host: str = NAME) -> str:
        return f"{self.scheme}://{host}:{self.server_port}{path}"

    def trust(self) -> ssl.SSLContext:
        """What trusts this server's authority and nobody else's."""
        return ssl.create_default_context(cadata=self.authority.cert_pem.bytes().decode())

    def paths(self) -> list[str]:
        return [path for path, _ in self.requests]

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()
