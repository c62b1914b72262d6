"""The contact sheet in Dagster's own UI: every picture is drawn, none is fetched."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import pytest

from extraction_dagster.defs.instance.launching import template

pytestmark = [pytest.mark.slow, pytest.mark.browser]
BIN = Path(sys.executable).parent
PICTURES = (
    "Array.from(document.querySelectorAll('.dagster-markdown img'), i => [i.alt, i.naturalWidth, i.naturalHeight])"
)


@contextmanager
def webserver(folder):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [BIN / "dagster-webserver", "-w", "workspace.yaml", "-h", "127.0.0.1", "-p", str(port)]
    with (folder / "webserver.log").open("w") as log:
        process = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log, start_new_session=True)
    try:
        wait_for(f"http://127.0.0.1:{port}/server_info")
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(process.pid, signal.SIGINT)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def wait_for(url):
    end = time.monotonic() + 120
    while time.monotonic() < end:
        try:
            urllib.request.urlopen(url, timeout=5).close()  # noqa: S310 - a server of this test's own
        except OSError:
            time.sleep(0.5)
        else:
            return
    pytest.fail(f"{url} did not answer")


def test_every_thumbnail_is_drawn_and_the_failures_are_a_table(world, browser, monkeypatch):
    for name in ("workspace.yaml", "dagster.yaml"):
        (world.home / name).write_text(template(name))
    monkeypatch.setenv("DAGSTER_HOME", str(world.home))
    subprocess.run([BIN / "extraction", "launch", "1-4"], cwd=world.home, check=True, capture_output=True, timeout=300)
    with webserver(world.home) as url:
        page = browser.new_page(viewport={"width": 1500, "height": 950})
        fetched = []
        page.on("request", lambda request: fetched.append(request.url))
        page.goto(f"{url}/assets/video_frames?view=partitions&partition=1-4")
        table = page.locator("table", has_text="VideoOpenError").last
        table.wait_for()
        header, row = (line.split("\t") for line in table.inner_text().splitlines()[:2])
        page.get_by_text("[Show Markdown]").first.click()
        page.locator(".dagster-markdown img").first.wait_for()
        pictures = page.evaluate(PICTURES)
        page.close()
    assert header == ["record", "stage", "type", "message"]
    assert row[:3] == ["4", "decode", "VideoOpenError"]
    assert pictures == [["1 at 1.0 s", 64, 48], ["2 at 1.0 s", 64, 48], ["3 at 1.0 s", 64, 48]]
    assert not [address for address in fetched if not address.startswith((url, "data:"))]
