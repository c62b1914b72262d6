"""Web servers that misbehave, and fetchers that trust them."""

import importlib.util
from pathlib import Path

import pytest

from extraction_dagster.records import VideoRow
from extraction_dagster.stages.catalog.fetch.fetching import Fetcher

NAMES = ("videos.example", "other.example")


def _load_misbehaving_server():
    path = Path(__file__).with_name("misbehaving_server.py")
    spec = importlib.util.spec_from_file_location("extraction_dagster_tests_misbehaving_server", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def server():
    """An https server whose `scripts` say what it does at each path."""
    with _load_misbehaving_server().MisbehavingServer(tls=True) as server:
        yield server


@pytest.fixture
def plain_server():
    """The same over http."""
    with _load_misbehaving_server().MisbehavingServer(tls=False) as server:
        yield server


@pytest.fixture
def make_fetcher(server, settings):
    """A fetcher for which the server's names lie on this machine: `make_fetcher(max_file_bytes=1000)`."""
    made = []

    def make(*, resolve=None, tls=None, attempts=4, stall_seconds=20.0, **overrides):
        known = {
            "allowed_hosts": tuple(f"{name}:{server.server_port}" for name in NAMES),
            "allowed_networks": ("127.0.0.1/32",),
            **overrides,
        }
        fetcher = Fetcher(
            settings(**known),
            resolve=resolve or (lambda host, _port: ["127.0.0.1"] if host in NAMES else []),
            tls=tls or server.trust,
            attempts=attempts,
            stall_seconds=stall_seconds,
            wait_seconds=0.001,
        )
        made.append(fetcher)
        return fetcher

    yield make
    for fetcher in made:
        fetcher.close()


@pytest.fixture
def row():
    """A row by its address."""
    return lambda uri, record_id=1, version="": VideoRow(record_id, uri, content_version=version)
