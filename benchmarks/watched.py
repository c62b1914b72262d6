"""Run a command under strace and tell what its decoding workers asked the kernel for: files, sockets, programs.

    python benchmarks/watched.py [--folder FOLDER] COMMAND…      exit code 1 when a worker left its fence

FOLDER is where the videos lie, the system's folder for temporary files by default. A worker may open a video there in
one way only, by its own hand (relative to a folder that it holds, without following links), and otherwise what belongs
to Python and its libraries. Anything else is printed: a socket, a program, any other file, or a video that a library
opened by name.
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
CALLS = "open,openat,openat2,creat,socket,connect,execve,execveat,io_uring_setup"
_LINE = re.compile(r"^(\w+)\((.*)\) += (-?\d+|\?)(?:<(.*?)>)?")
_INSTALLED = {sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")}
LIBRARIES = tuple(
    f"{Path(path).resolve()}/"
    for path in (*_INSTALLED, sys.prefix, sys.base_prefix, Path(__file__).parents[1], "/usr", "/lib", "/lib64")
)
SYSTEM = re.compile(
    r"/etc/(ld\.so\.(cache|preload)|localtime|locale\.alias|ssl/openssl\.cnf)|/dev/(null|urandom)|/proc/(self|\d+)/(task/\d+/)?"
    r"(status|stat|statm|maps|mounts|cgroup|mountinfo|auxv)|/proc/(cpuinfo|meminfo|stat|filesystems)|/proc/sys/vm/.*|"
    r"/sys/(devices|fs)/.*"
)


def main() -> None:
    """Run, read the log, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("command", nargs=argparse.REMAINDER)
    options = parser.parse_args()
    done, left, opened, workers = watch(options.command, options.folder.resolve())
    print(f"workers {workers}, videos opened {opened}, out of the fence {len(left)}", file=sys.stderr)
    for line in left[:50]:
        print(line, file=sys.stderr)
    sys.exit(done or (1 if left else 0))


def watch(command: list[str], folder: Path) -> tuple[int, list[str], int, int]:
    """Run a command; its exit code, what left the fence, how many videos were opened, how many workers there were."""
    strace = shutil.which("strace")
    if strace is None:
        sys.exit("strace is not installed")
    with tempfile.TemporaryDirectory() as logs:
        options = ("-ff", "-y", "-qq", "-s", "4096", "-e", f"trace={CALLS}", "-o", f"{logs}/process")
        done = subprocess.run([strace, *options, *command], check=False)
        read = [read_log(log.read_text(errors="replace").splitlines(), folder) for log in Path(logs).iterdir()]
    left = [line for process in read if process is not None for line in process[0]]
    opened = [process[1] for process in read if process is not None]
    return done.returncode, left, sum(opened), len(opened)


def read_log(lines: list[str], folder: Path) -> tuple[list[str], int] | None:
    """What left the fence, and how many videos were opened; None when the process is no worker."""
    starts = [number for number, line in enumerate(lines) if line.startswith("execve(") and BOOT in line]
    if not starts:
        return None
    left, opened = [], 0
    for line in lines[starts[0] + 1 :]:
        found = _LINE.match(line)
        if found is None:
            continue
        call, arguments, _, path = found.groups()
        ours = call == "openat" and "O_NOFOLLOW" in arguments  # which no library asks for
        if ours and path and Path(path).is_relative_to(folder):
            opened += "O_NONBLOCK" in arguments
        elif not (call.startswith("open") and is_harmless(path or "", arguments, ours=ours)):
            left.append(line)
    return left, opened


def is_harmless(path: str, arguments: str, *, ours: bool) -> bool:
    """Whether an opening is of a library or of the system; nothing that was refused was read."""
    if not path or f"{path}/".startswith(LIBRARIES) or SYSTEM.fullmatch(path):
        return True
    if '"/proc/self/fd/' in arguments:  # decord's way to the very file that was opened before
        return True
    return ours and "O_DIRECTORY" in arguments


if __name__ == "__main__":
    main()
