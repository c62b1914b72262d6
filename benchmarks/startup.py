"""What commands cost before they do anything: CPU seconds of each, all its processes, beside `import dagster`.

    python benchmarks/startup.py                    # five interleaved rounds, medians, ratios to `import dagster`
    python benchmarks/startup.py --rounds 9 --only status,run
    python benchmarks/startup.py --python OTHER/.venv/bin/python --only help     # of another checkout

The table has 1,000 rows that are marked as done, so that `run` finds nothing due. Every measured command is a process
of its own; each is called once before it is measured, so that its bytecode is there, as it is for an installed package.
"""

import argparse
import contextlib
import os
import resource
import sqlite3
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

_BESIDE = "import dagster"
_LIMITS = {"help": 0.35}  # CPU seconds
_MOST = {"definitions": 1.3, "run": 1.25, "status": 1.25}  # times `import dagster`


def cases(python: str) -> dict[str, list[str]]:
    """The measured command lines."""
    extraction = [python, "-c", "from extraction_dagster.cli import main; main()"]
    return {
        "python": [python, "-c", "pass"],
        _BESIDE: [python, "-c", "import dagster"],
        "definitions": [python, "-c", "import extraction_dagster.definitions"],
        "help": [*extraction, "--help"],
        "run": [*extraction, "run"],
        "status": [*extraction, "status"],
        "errors": [*extraction, "errors"],
        "checkpoint": [*extraction, "checkpoint", "show"],
        "init": [*extraction, "init"],
        "launch --help": [*extraction, "launch", "--help"],
    }


def make_table(path: Path) -> str:
    """A table of videos that are done; returns its address."""
    columns = "id INTEGER PRIMARY KEY, platform TEXT, code TEXT, path TEXT, is_extracted BOOLEAN, is_embedded BOOLEAN"
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        connection.execute(f"CREATE TABLE insta_content ({columns})")
        rows = ((number, "tube", f"c{number}", f"{number}.mp4", True, True) for number in range(1, 1001))
        connection.executemany("INSERT INTO insta_content VALUES (?, ?, ?, ?, ?, ?)", rows)
    return f"sqlite:///{path}"


def cpu_seconds(command: list[str], folder: Path, environment: dict[str, str]) -> float:
    """User and system seconds of a command and of every process that it waited for."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)}: exit code {done.returncode}\n{done.stderr}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default="", help="names of cases, separated by commas")
    parser.add_argument("--python", default=sys.executable, help="the interpreter whose extraction_dagster is measured")
    wanted = parser.parse_args()
    chosen = {name.strip() for name in wanted.only.split(",") if name.strip()} | {_BESIDE}
    measured = {name: line for name, line in cases(wanted.python).items() if not wanted.only or name in chosen}
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("EXTRACTION_", "DAGSTER"))}
    with tempfile.TemporaryDirectory(prefix="startup-") as place:
        folder = Path(place)
        environment |= {
            "EXTRACTION_SOURCE_URL": make_table(folder / "videos.db"),
            "PYTHONPYCACHEPREFIX": str(folder / "cache"),
        }
        environment.pop("PYTHONDONTWRITEBYTECODE", None)
        for name in dict.fromkeys(["init", "run", *measured]):  # `run` makes its first report
            cpu_seconds(cases(wanted.python)[name], folder, environment)
        seconds: dict[str, list[float]] = {name: [] for name in measured}
        for _ in range(wanted.rounds):
            for name, line in measured.items():
                seconds[name].append(cpu_seconds(line, folder, environment))
    beside = statistics.median(seconds[_BESIDE])
    for name, found in seconds.items():
        median = statistics.median(found)
        limit = _LIMITS.get(name, _MOST[name] * beside if name in _MOST else None)
        told = "" if limit is None else f"  at most {limit:.2f}: {'yes' if median <= limit else 'NO'}"
        print(f"{name:16} {median:6.2f} CPU s  {median / beside:5.2f} x  ({min(found):.2f} to {max(found):.2f}){told}")


if __name__ == "__main__":
    main()
