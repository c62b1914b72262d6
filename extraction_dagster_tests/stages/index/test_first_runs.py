"""First runs at once on an empty store: no failure, one collection, one name for it, all points."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from extraction_dagster.stages.index.edge.store import EdgeStore

PROCESSES = 3
ROUNDS = int(os.environ.get("EXTRACTION_TEST_FIRST_RUNS", "5"))
FINGERPRINT = "0123456789abcdef"


@pytest.fixture
def processes():
    """`processes(line)`: what each of them answers to a line that all get at the same moment."""
    file = Path(__file__).with_name("first_runs.py")
    started = [
        subprocess.Popen([sys.executable, file, str(number)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for number in range(1, PROCESSES + 1)
    ]
    assert [process.stdout.readline() for process in started] == ["ready\n"] * PROCESSES

    def ask(line):
        for process in started:
            process.stdin.write(line + "\n")
            process.stdin.flush()
        return [process.stdout.readline().strip() for process in started]

    yield ask
    for process in started:
        process.communicate()


@pytest.mark.slow
def test_on_the_embedded_engine(processes, tmp_path):
    for number in range(ROUNDS):
        assert processes(f"frames{number} {tmp_path}") == ["ok"] * PROCESSES
        with EdgeStore(tmp_path / "qdrant") as store:
            assert store.collections(f"frames{number}") == {FINGERPRINT: True}
            store.open_collection(f"frames{number}")
            assert store.count_by_record() == {1: 2, 2: 2, 3: 2}


@pytest.mark.slow
def test_on_a_server(processes, stand_in, tmp_path):
    for number in range(ROUNDS):
        assert processes(f"frames{number} {tmp_path} {stand_in.url} {stand_in.port}") == ["ok"] * PROCESSES
        assert stand_in.engine.count(f"frames{number}").count == 2 * PROCESSES
    names = [f"frames{number}" for number in range(ROUNDS)]
    assert stand_in.engine._client.aliases == {name: f"{name}-{FINGERPRINT}" for name in names}
    assert set(stand_in.engine._client.collections) == {f"{name}-{FINGERPRINT}" for name in names}
