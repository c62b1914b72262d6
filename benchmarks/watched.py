"""Run a command under strace and tell what its decoding workers ask the kernel for once they are confined.

    python benchmarks/watched.py COMMAND…      exit code 1 when a worker reaches anything outside

A confined worker opens nothing any more but, where Landlock says so, a file of Python's or of a library. Whatever else
it gets (a file, a socket, a process, a program, a signal to another) is printed; what it asked for and was refused is
counted.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

BOOT = "extraction_dagster.stages.decode.workers.worker import serve"
CONFINED = "seccomp(SECCOMP_SET_MODE_FILTER"
CALLS = "%file,%network,%process,%signal,%ipc,seccomp,io_uring_setup"
# Of these classes, what stays within the process, and talk on the line to the parent.
WITHIN = re.compile(
    r"rt_sig\w+|sigaltstack|exit|exit_group|sendto|recvfrom|sendmsg|recvmsg|clone3?|wait\w+|arch_prctl|seccomp|fstat"
)
_LINE = re.compile(r"^(\w+)\((.*)\) += (-?\w+|\?)(?:<(.*?)>)?")
_INSTALLED = {sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")}
LIBRARIES = tuple(
    f"{Path(path).resolve()}/"
    for path in (*_INSTALLED, sys.prefix, sys.base_prefix, Path(__file__).parents[1], "/usr", "/lib", "/lib64")
)


def main() -> None:
    """Run, read the log, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("command", nargs=argparse.REMAINDER)
    options = parser.parse_args()
    done, found = watch(options.command)
    left = [line for _, reached, _ in found for line in reached]
    confined, refused = sum(one[0] for one in found), sum(one[2] for one in found)
    print(
        f"workers {len(found)}, confined {confined}, asked in vain {refused}, reached outside {len(left)}",
        file=sys.stderr,
    )
    for line in left[:50]:
        print(line, file=sys.stderr)
    sys.exit(done or (1 if left or confined < len(found) else 0))


def watch(command: list[str]) -> tuple[int, list[tuple[bool, list[str], int]]]:
    """Run a command; its exit code, and of each worker what `read_log` says."""
    strace = shutil.which("strace")
    if strace is None:
        sys.exit("strace is not installed")
    with tempfile.TemporaryDirectory() as logs:
        options = ("-ff", "-y", "-qq", "-s", "4096", "-e", f"trace={CALLS}", "-o", f"{logs}/process")
        done = subprocess.run([strace, *options, *command], check=False)
        read = [read_log(log.read_text(errors="replace").splitlines()) for log in Path(logs).iterdir()]
    return done.returncode, [process for process in read if process is not None]


def read_log(lines: list[str]) -> tuple[bool, list[str], int] | None:
    """Whether a worker was confined, what it reached from then on, and how often it was refused; None for others."""
    if not any(line.startswith("execve(") and BOOT in line for line in lines):
        return None
    start = next((number for number, line in enumerate(lines) if line.startswith(CONFINED)), None)
    if start is None:
        return False, [], 0
    reached, refused = [], 0
    for line in lines[start:]:
        found = _LINE.match(line)
        if found is None or WITHIN.fullmatch(found[1]):
            continue
        if found[3].startswith("-"):
            refused += 1
        elif not (found[1] == "openat" and f"{found[4] or ''}/".startswith(LIBRARIES)) and found[1] != "newfstatat":
            reached.append(line)
    return True, reached, refused


if __name__ == "__main__":
    main()
