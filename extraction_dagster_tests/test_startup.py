"""What commands, definitions and decoding workers load, seen from fresh interpreters: nothing that they don't use."""

import contextlib
import json
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from typer.main import get_command

from extraction_dagster.cli.main import COMMANDS, app, load_command

NEVER = {"torch", "av", "cv2", "decord", "transformers", "qdrant_client", "qdrant_edge", "pyarrow", "grpc"}
LIBRARIES = NEVER | {"numpy", "fsspec", "psutil", "filelock", "tenacity", "sqlglot", "alembic"}
# Of each command and of the definitions: what may not be loaded once it is through.
ABSENT = {
    "--help": LIBRARIES | {"dagster", "sqlalchemy", "pydantic", "extraction_dagster.settings"},
    "--version": LIBRARIES | {"dagster", "sqlalchemy", "pydantic", "extraction_dagster.settings"},
    "run": LIBRARIES | {"dagster"},
    "status": LIBRARIES | {"dagster"},
    "errors": LIBRARIES | {"dagster"},
    "checkpoint show": LIBRARIES | {"dagster"},
    "launch --help": LIBRARIES | {"dagster"},
    "init": NEVER | {"numpy", "extraction_dagster.definitions"},
}
OF_DEFINITIONS = (LIBRARIES | {"sqlalchemy", "extraction_dagster.ranges", "extraction_dagster.ticks"}) - {"filelock"}
OF_WORKERS = (LIBRARIES | {"dagster", "sqlalchemy", "pydantic", "urllib.request", "http.client", "ssl", "asyncio"}) - {
    *("numpy", "av", "cv2", "decord"),  # which decode
}
PROGRAM = """
import json, sys
names = sys.argv.pop(1).split()
sys.argv[0] = "extraction"
from extraction_dagster.cli import main
try:
    main()
finally:
    print(json.dumps([name for name in names if name in sys.modules]), file=sys.stderr)
"""


def fresh(*arguments):
    """Run Python and return what it loaded of what it was told to look for."""
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stderr.splitlines()[-1])


def command(line, names):
    return fresh("-c", PROGRAM, " ".join(sorted(names)), *line.split())


def finished_table():
    """A table of rows that are done, on which `init` and `run` have been called."""

    Path(".extraction").mkdir()
    marks = "is_extracted BOOLEAN, is_embedded BOOLEAN"
    with contextlib.closing(sqlite3.connect(".extraction/source.db")) as connection, connection:
        connection.execute(f"CREATE TABLE insta_content (id INTEGER PRIMARY KEY, platform, code, path TEXT, {marks})")
        rows = [(number, "tube", f"c{number}", f"{number}.mp4", True, True) for number in range(1, 6)]
        connection.executemany("INSERT INTO insta_content VALUES (?, ?, ?, ?, ?, ?)", rows)


def test_commands_load_nothing_that_they_have_no_use_for():
    finished_table()
    assert command("init", ABSENT["init"]) == []
    assert command("run", {"dagster", "numpy"}) == ["dagster"]  # it has a cursor to store, and a first report to make
    found = {line: command(line, absent) for line, absent in ABSENT.items()}
    assert found == {line: [] for line in ABSENT}


def test_the_definitions_load_what_pages_show_and_no_more():
    names = sorted(OF_DEFINITIONS)
    code = f"import json, sys; import extraction_dagster.definitions; found = {names!r}; "
    told = "print(json.dumps([name for name in found if name in sys.modules]), file=sys.stderr)"
    assert fresh("-c", code + told) == []


def test_a_decoding_worker_loads_what_decodes_and_no_more():
    names = sorted(OF_WORKERS)
    code = f"""
import importlib, json, sys
from extraction_dagster.stages.decode.workers.pool import LIBRARIES
for name in [*sys.modules]:  # the pool itself is the parent's
    if name.startswith("extraction_dagster."):
        del sys.modules[name]
before = set(sys.modules)
from extraction_dagster.stages.decode.workers import worker
importlib.import_module("extraction_dagster.stages.decode.task")
for library in LIBRARIES:
    worker._load(library)
print(json.dumps([name for name in {names!r} if name in sys.modules and name not in before]), file=sys.stderr)
"""
    assert fresh("-c", code) == []


@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_of_all_says_of_a_command_what_its_own_help_says(name):
    own = load_command(name)
    assert own.name == name
    assert COMMANDS[name][1] == " ".join(own.help.split("\n\n")[0].split())
    assert get_command(app).commands[name].help == COMMANDS[name][1]
