"""Take the pictures of docs/dagster.md from the demo's data, in a real browser: `make screenshots`.

Makes the demo in a temporary folder, starts `dagster dev` there, opens each page in headless Chromium, waits until it
shows what it is about, and writes docs/screenshots/NAME.png; with names, only those. Needs a Chromium; reads none of
your own data.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from playwright.sync_api import sync_playwright

if TYPE_CHECKING:
    from collections.abc import Iterator

_BIN = Path(sys.executable).parent
_TARGET = Path(__file__).with_name("screenshots")
_BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
_QUICK = {"EXTRACTION_PROGRESS_INTERVAL_SECONDS": "30", "EXTRACTION_MAX_WAIT_SECONDS": "1"}
_LOCATION = "locations/extraction_dagster"
_SETTLE_MS = 2500  # for drawings that move into place, and pages that are drawn twice
# Where the last table row that fits ends, if there is one that does not fit: the picture ends there.
_LAST_WHOLE_ROW = """() => {
  const ends = [...document.querySelectorAll('tr')].map(row => row.getBoundingClientRect().bottom);
  return ends.some(end => end > innerHeight) ? Math.ceil(Math.max(...ends.filter(end => end <= innerHeight))) : 0;
}"""


@dataclass(frozen=True, slots=True)
class Picture:
    """A page: where it is, what it has to show before the picture is taken, what is clicked first; text or XPath."""

    name: str
    path: str
    shows: tuple[str, ...]
    clicks: tuple[str, ...] = ()
    size: tuple[int, int] = field(default=(1400, 900))


PICTURES = (
    Picture("lineage", "asset-groups", ("source_table", "qdrant_points"), size=(2000, 760)),
    Picture("overview", "assets/video_frames", ("Latest check results", "cpu_seconds_decode"), size=(1400, 1195)),
    Picture(
        "range",
        "assets/video_frames?view=partitions&partition=13-112",
        ("113-208", "VideoOpenError"),
        size=(1400, 1282),
    ),
    Picture("thumbnails", "assets/video_frames?view=partitions&partition=113-208", ("208 at",), ("[Show Markdown]",)),
    Picture("checks", "assets/qdrant_points?view=checks&checkDetail=points_verified", ("Passed",)),
    Picture("sensor", f"{_LOCATION}/sensors/extraction_sensor", ("last_processed_id", "0 runs requested")),
    Picture("runs", "runs", ("Success",), size=(1600, 900)),
    Picture(
        "launchpad",
        f"{_LOCATION}/jobs/extraction_job",
        ("No errors",),
        ("//button[contains(., 'Materialize')]/following::button[1]", "Open launchpad"),
        size=(1600, 1100),
    ),
    Picture(
        "progress",
        "assets/extraction_progress",
        ("//canvas",),
        ("//button[normalize-space() = 'Plots']",),  # the description says the word as well
        size=(1900, 1590),
    ),
)


def main() -> None:
    """Make the demo, take every picture, or those that are named."""
    wanted = sys.argv[1:] or [picture.name for picture in PICTURES]
    with tempfile.TemporaryDirectory(prefix="screenshots") as name:
        folder = Path(name)
        _run("extraction", "demo", cwd=folder)
        _run("extraction", "init", cwd=folder)
        with _dagster_dev(folder) as url, _browser() as browser:
            _TARGET.mkdir(exist_ok=True)
            for picture in PICTURES:
                if picture.name in wanted:
                    _take(browser, url, picture)


def _run(command: str, *arguments: str, cwd: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "DAGSTER_HOME"}
    subprocess.run([_BIN / command, *arguments], cwd=cwd, env=environment, check=True)


@contextmanager
def _dagster_dev(folder: Path) -> Iterator[str]:
    """The webserver and the daemon, until they are not needed any more."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [_BIN / "dagster", "dev", "-w", "workspace.yaml", "--host", "127.0.0.1", "--port", str(port)],
        cwd=folder,
        env={**os.environ, **_QUICK, "DAGSTER_HOME": str(folder)},
        start_new_session=True,
    )
    url = f"http://127.0.0.1:{port}"
    try:
        _wait_for_progress(url, 208)
        _grow(folder, url)
        yield url
    finally:
        os.killpg(process.pid, signal.SIGINT)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)


def _wait_for_progress(url: str, last_processed_id: int) -> None:
    """Until the webserver answers and progress says that all is done up to this id."""
    query = """{ assetOrError(assetKey: {path: ["extraction_progress"]}) { ... on Asset {
                 assetMaterializations(limit: 1) {
                 metadataEntries { label ... on IntMetadataEntry { intValue } } } } } }"""
    for _ in range(180):
        with suppress(OSError):
            reports = _ask(url, query)["assetOrError"].get("assetMaterializations", [])
            numbers = {entry["label"]: entry.get("intValue") for one in reports for entry in one["metadataEntries"]}
            if numbers.get("last_processed_id") == last_processed_id and numbers["lag_rows"] == 0:
                return
        time.sleep(1)
    sys.exit(f"The watermark did not reach {last_processed_id} within three minutes.")


def _grow(folder: Path, url: str) -> None:
    """Let rows come in while the daemon runs, so that charts and runs have something to show."""
    rows = "SELECT id + ?, platform, code || '_again', path FROM insta_content WHERE id BETWEEN 201 AND 208"
    for shift in (8, 16, 24):
        with closing(sqlite3.connect(folder / ".extraction" / "source.db")) as connection, connection:
            connection.execute(f"INSERT INTO insta_content (id, platform, code, path) {rows}", [shift])
        _wait_for_progress(url, 208 + shift)


def _ask(url: str, query: str) -> Any:  # noqa: ANN401 - GraphQL's answer
    body = json.dumps({"query": query}).encode()
    request = urllib.request.Request(f"{url}/graphql", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=20) as answer:
        return json.load(answer)["data"]


@contextmanager
def _browser() -> Iterator[Any]:
    executable = next(filter(None, map(shutil.which, _BROWSERS)), None)
    if executable is None:
        sys.exit(f"No Chromium was found; install one of {', '.join(_BROWSERS)}.")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


def _take(browser: Any, url: str, picture: Picture) -> None:  # noqa: ANN401 - Playwright's browser
    width, height = picture.size
    page = browser.new_page(viewport={"width": width, "height": height})
    page.goto(f"{url}/{picture.path}")
    for words in picture.clicks:
        page.wait_for_timeout(_SETTLE_MS)
        _find(page, words, exact=True).click()
    for words in picture.shows:
        _find(page, words).wait_for(timeout=60_000)
    page.wait_for_timeout(_SETTLE_MS)
    if bottom := page.evaluate(_LAST_WHOLE_ROW):
        page.set_viewport_size({"width": width, "height": bottom})
        page.wait_for_timeout(500)
    page.screenshot(path=_TARGET / f"{picture.name}.png")
    page.close()
    print(f"Wrote docs/screenshots/{picture.name}.png")


def _find(page: Any, words: str, *, exact: bool = False) -> Any:  # noqa: ANN401 - Playwright's page and locator
    found = page.locator(f"xpath={words}") if words.startswith("//") else page.get_by_text(words, exact=exact)
    return found.first


if __name__ == "__main__":
    main()
