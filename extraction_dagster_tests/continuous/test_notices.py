"""A run that fails under a real daemon is told, by a server that first misbehaves; the daemon goes on ticking."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from extraction_dagster.settings import load_settings
from extraction_dagster.stages.embed.models.registry import embedding_fingerprint
from extraction_dagster.stages.index.protocol import CollectionSpec
from extraction_dagster.stages.index.stage import open_point_store

pytestmark = pytest.mark.soak


@pytest.fixture
def posted(monkeypatch):
    """What is posted to a server that hangs up at the first try."""
    bodies = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            bodies.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            if len(bodies) == 1:
                self.connection.close()
                return
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_):
            """Say nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.handle_error = lambda *_: None
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        monkeypatch.setenv("EXTRACTION_NOTIFY", "webhook")
        monkeypatch.setenv("EXTRACTION_NOTIFY_URL", f"http://127.0.0.1:{server.server_port}/hook")
        yield bodies
        server.shutdown()


def test_a_store_that_is_down_is_told_and_the_daemon_goes_on(site, posted, monkeypatch):
    monkeypatch.setenv("EXTRACTION_BATCH_SIZE", "200")
    site.start_daemon()
    site.wait(lambda: site.num_ticks("run_failure_notices") > 0, seconds=120, what="the sensor has begun")
    settings = load_settings()
    with open_point_store(settings) as held:  # the embedded engine serves one process at a time
        held.ensure_collection(CollectionSpec(settings.collection_name, 8, embedding_fingerprint(settings)))
        site.add_rows(*range(1, 101))
        site.wait(lambda: len(posted) >= 2, seconds=240, what="somebody was told")
    first, second = posted[:2]
    assert first == second  # the server hung up, and was told again
    assert (first["event"], first["key"], first["step"]) == ("run_failed", "1-200", "qdrant_points")
    assert (first["failed_records"], first["failures_in_a_row"]) == (0, 1)
    site.wait(lambda: site.states() == {"done": 100}, seconds=240, what="every row is done")
    assert site.num_ticks("run_failure_notices", "FAILURE") == 0
