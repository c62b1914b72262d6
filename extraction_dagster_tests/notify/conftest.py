"""A web server that misbehaves as it is told, on this machine."""

import importlib.util
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def servers():
    """The class of servers that the tests of downloads use."""
    path = Path(__file__).parents[1] / "stages/catalog/misbehaving_server.py"
    spec = importlib.util.spec_from_file_location("misbehaving_server", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    class Hook(module.MisbehavingServer):
        """The same, for what is posted; `posted` holds the bodies."""

        def __init__(self, *, tls):
            super().__init__(tls=tls)
            self.posted = []

            class Handler(module.Handler):
                def do_POST(handler):  # noqa: N802, N805 - the base class looks for it; the server's self is in use
                    handler.server.posted.append(handler.rfile.read(int(handler.headers["Content-Length"])))
                    handler.do_GET()

            self.RequestHandlerClass = Handler

    return Hook


@pytest.fixture
def hook(servers):
    with servers(tls=False) as server:
        server.address = server.url("/hook", host="127.0.0.1")
        yield server


@pytest.fixture
def secure_hook(servers):
    with servers(tls=True) as server:
        server.address = server.url("/hook", host="localhost")
        yield server
