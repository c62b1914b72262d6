"""What the suite costs, by file and by test.

    SUITE_LOG=log.tsv PYTHONPATH=benchmarks make test PYTEST_ARGS="-n logical --dist loadfile \
        --no-loadscope-reorder --max-worker-restart=0 -p suite"
    python benchmarks/suite.py log.tsv      two tables in Markdown

One line a test is written: its name, wall seconds, CPU seconds of the worker and of its children that have ended. What
a daemon's own children need is counted once the daemon has ended, with the test at whose end that is; what a test is
the first to ask for (a server, the demo's run) is counted as its own.
"""

from __future__ import annotations

import collections
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

_MOST_TESTS = 40
_LEAST_SECONDS = 3.0  # of a file that gets a line of its own

try:
    import pytest
except ImportError:  # the tables need none
    hook = lambda function: function  # noqa: E731
else:
    hook = pytest.hookimpl(wrapper=True)


@hook
def pytest_runtest_protocol(item: Any) -> Iterator[None]:  # noqa: ANN401 - pytest's own
    """Write a line for a test."""
    before, began = os.times(), time.monotonic()
    result = yield
    after = os.times()
    own = after.user + after.system - before.user - before.system
    children = after.children_user + after.children_system - before.children_user - before.children_system
    with Path(os.environ["SUITE_LOG"]).open("a", encoding="utf-8") as log:
        log.write(f"{item.nodeid}\t{time.monotonic() - began:.3f}\t{own:.3f}\t{children:.3f}\n")
    return result


def read(path: Path) -> dict[str, tuple[float, float]]:
    """Wall and CPU seconds by test."""
    rows = (line.rstrip("\n").rsplit("\t", 3) for line in path.read_text(encoding="utf-8").splitlines())
    return {name: (float(wall), float(own) + float(children)) for name, wall, own, children in rows}


def by_file(tests: dict[str, tuple[float, float]]) -> dict[str, tuple[int, float]]:
    """Tests and CPU seconds by file, the most expensive first."""
    found: dict[str, tuple[int, float]] = collections.defaultdict(lambda: (0, 0.0))
    for name, (_, cpu) in tests.items():
        file = name.partition("::")[0].removeprefix("extraction_dagster_tests/")
        found[file] = found[file][0] + 1, found[file][1] + cpu
    return dict(sorted(found.items(), key=lambda item: -item[1][1]))


def main() -> None:
    """Print the tables."""
    tests = read(Path(sys.argv[1]))
    files = by_file(tests)
    print("| file | tests | CPU seconds |\n| --- | --- | --- |")
    for file, (number, cpu) in files.items():
        if cpu >= _LEAST_SECONDS:
            print(f"| {file} | {number} | {cpu:.0f} |")
    small = [(number, cpu) for number, cpu in files.values() if cpu < _LEAST_SECONDS]
    print(f"| {len(small)} further files | {sum(number for number, _ in small)} | {sum(cpu for _, cpu in small):.0f} |")
    print(f"| all | {len(tests)} | {sum(cpu for _, cpu in files.values()):.0f} |\n")
    print("| test | CPU seconds | wall seconds |\n| --- | --- | --- |")
    for name, (wall, cpu) in sorted(tests.items(), key=lambda item: -item[1][1])[:_MOST_TESTS]:
        file, _, test = name.partition("::")
        print(f"| {Path(file).name}: {test} | {cpu:.0f} | {wall:.0f} |")


if __name__ == "__main__":
    main()
