"""`dagster dev` on the demo's data, as `make ui` starts it, and a browser that looks at it."""

import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from contextlib import closing, contextmanager
from http.client import HTTPConnection
from pathlib import Path

import pytest

BIN = Path(sys.executable).parent
RUNS_QUERY = """query ($tags: [ExecutionTag!]) { runsOrError(filter: {tags: $tags}) { ... on Runs { results {
    runId status assetMaterializations { assetKey { path } } } } } }"""
# As in the Makefile.
QUIET = {"PYTHONWARNINGS": "ignore:Function `dev_command` is superseded"}
LAUNCH = """mutation ($execution: ExecutionParams!) { launchRun(executionParams: $execution) {
    __typename ... on LaunchRunSuccess { run { runId } } ... on PythonError { message } } }"""
QUICK = {
    "EXTRACTION_SHARD_RECORDS": "4",
    "EXTRACTION_SENSOR_INTERVAL_SECONDS": "4",
    "EXTRACTION_MAX_WAIT_SECONDS": "1",
    "EXTRACTION_RUN_RETRY_DELAY_SECONDS": "2",
}


class DagsterDev:
    """A folder with the demo's data, and `dagster dev` at work there."""

    def __init__(self, folder, get_browser, commands):
        self.folder, self.url, self._get_browser, self._commands = folder, "", get_browser, commands

    def run(self, *command):
        """Run a command as a user would type it."""
        environment = {**os.environ, **QUICK, "DAGSTER_HOME": str(self.folder), "NO_COLOR": "1"}
        done = self._commands.run([BIN / command[0], *command[1:]], cwd=self.folder, env=environment)
        assert done.returncode == 0, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def rows(self, sql):
        with closing(sqlite3.connect(self.folder / ".extraction" / "source.db", timeout=60)) as connection, connection:
            return connection.execute(sql).fetchall()

    def ask(self, query, **variables):
        body = json.dumps({"query": query, "variables": variables}).encode()
        connection = HTTPConnection(self.url.removeprefix("http://"), timeout=30)
        with closing(connection):
            connection.request("POST", "/graphql", body, {"Content-Type": "application/json"})
            return json.load(connection.getresponse())["data"]

    def launch(self, partition, **options):
        """Launch the job of all assets by the server that runs, as the launchpad does."""
        selector = {"repositoryName": "__repository__", "repositoryLocationName": "extraction_dagster"}
        execution = {
            "selector": {**selector, "jobName": "extraction_job"},
            "runConfigData": {"resources": {"extraction": {"config": options}}},
            "executionMetadata": {"tags": [{"key": "dagster/partition", "value": partition}]},
        }
        launched = self.ask(LAUNCH, execution=execution)["launchRun"]
        assert launched["__typename"] == "LaunchRunSuccess", launched

    def runs(self, partition):
        """A partition's runs, the newest first: (state, the assets that it materialized)."""
        found = self.ask(RUNS_QUERY, tags=[{"key": "dagster/partition", "value": partition}])
        return [
            (run["status"], [event["assetKey"]["path"][-1] for event in run["assetMaterializations"]])
            for run in found["runsOrError"]["results"]
        ]

    @contextmanager
    def page(self, path, fetched=None):
        """An open page. It polls and draws: close it before waiting for runs, which it would starve.

        `fetched`, a list, gets the addresses that the page asks for.
        """
        page = self._get_browser().new_page(viewport={"width": 1500, "height": 950})
        if fetched is not None:
            page.on("request", lambda request: fetched.append(request.url))
        try:
            page.goto(f"{self.url}/{path}")
            yield page
        finally:
            page.close()

    def wait(self, ready, *, seconds, what):
        """Wait for the first true answer; errors on the way count as no."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            try:
                if answer := ready():
                    return answer
            except OSError:
                pass
            time.sleep(0.3)
        log = "\n".join((self.folder / "dev.log").read_text().splitlines()[-40:])
        pytest.fail(f"waited {seconds} s in vain until {what}\n{log}")


@pytest.fixture(scope="module")
def dagster_dev(request, tmp_path_factory, demo_run, commands):
    folder = tmp_path_factory.mktemp("dev") / "folder"
    demo_run(folder)
    dev = DagsterDev(folder, lambda: request.getfixturevalue("browser"), commands)
    dev.run("extraction", "init")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with (folder / "dev.log").open("w") as log:
        process = subprocess.Popen(
            [BIN / "dagster", "dev", "-w", "workspace.yaml", "--host", "127.0.0.1", "--port", str(port)],
            cwd=folder,
            env={**os.environ, **QUICK, **QUIET, "DAGSTER_HOME": str(folder)},
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    dev.url = f"http://127.0.0.1:{port}"
    try:
        dev.wait(lambda: dev.ask("{ version }"), seconds=90, what="the webserver answers")
        yield dev
    finally:
        os.killpg(process.pid, signal.SIGINT)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:  # it waits for calls that its code server still answers
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
