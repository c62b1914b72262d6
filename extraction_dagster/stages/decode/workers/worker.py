"""The inside of a worker process: single-threaded, killable, limited, confined, never alive without its parent.

Started by `pool` with file descriptor 0 as a lifeline (a pipe that only the parent holds open) and 2 as its log.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib
import os
import pickle
import resource
import select
import signal
import socket
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from extraction_dagster.stages.decode.workers import messages
from extraction_dagster.stages.decode.workers.confinement import confine

if TYPE_CHECKING:
    from collections.abc import Callable

READY, TAKEN = "ready", "taken"
_LIFELINE, _LOG = 0, 2
_MAX_LOG_BYTES = 2**26


@dataclass(frozen=True, slots=True)
class Fault:
    """Why a task gave nothing, in words that cross the process boundary whatever the error was.

    Attributes:
        error_type: The error's class name.
        message: The error's message.
        permanent: Trying again can't help.
        traceback: Where an error that nobody raised on purpose came from; else empty.
        out_of_memory: The memory limit was hit.
    """

    error_type: str
    message: str
    permanent: bool = False
    traceback: str = ""
    out_of_memory: bool = False


@dataclass(frozen=True, slots=True)
class Report:
    """What became of one task: a result or a fault, and what it cost."""

    result: Any
    fault: Fault | None
    cpu_seconds: float
    wall_seconds: float


def serve(wire_fd: int, task: str, memory_bytes: int) -> None:
    """Run tasks until the parent hangs up.

    Args:
        wire_fd: File descriptor of the socket that leads to the parent.
        task: The function to run on each job, as `module:function`.
        memory_bytes: Address space that may be used beyond what this process has at its start.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _die_with_parent()
    wire = socket.socket(fileno=wire_fd)
    run = _load(task)
    _limit(memory_bytes)
    confine()
    with contextlib.suppress(EOFError, OSError):
        messages.send(wire, READY)
        while True:
            content = messages.wait_for(wire)
            messages.send(wire, TAKEN)
            _forget_log()
            messages.send(wire, _run(run, pickle.loads(content)))  # noqa: S301 - from the parent, which started us


def _load(task: str) -> Callable[[Any], Any]:
    module, _, function = task.partition(":")
    loaded: Callable[[Any], Any] = getattr(importlib.import_module(module), function)
    return loaded


def _die_with_parent() -> None:
    """Have the kernel end this process once the lifeline is cut, even inside a codec that never returns."""
    fcntl.fcntl(_LIFELINE, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(_LIFELINE, fcntl.F_SETFL, fcntl.fcntl(_LIFELINE, fcntl.F_GETFL) | os.O_ASYNC)
    if select.select([_LIFELINE], [], [], 0)[0]:
        sys.exit("the parent is gone")


def _limit(memory_bytes: int) -> None:
    """Bound the address space, the log, and core dumps; a system without a limit goes without."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
        start_bytes = pages * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        start_bytes = 0
    for limit, value in (
        (resource.RLIMIT_AS, start_bytes + memory_bytes),
        (resource.RLIMIT_FSIZE, _MAX_LOG_BYTES),
        (resource.RLIMIT_CORE, 0),
    ):
        hard = resource.getrlimit(limit)[1]
        soft = value if hard == resource.RLIM_INFINITY else min(value, hard)
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(limit, (soft, hard))


def _run(run: Callable[[Any], Any], job: object) -> Report:
    wall, cpu = time.monotonic(), time.process_time()
    result, fault = None, None
    try:
        result = run(job)
    except MemoryError as error:
        fault = Fault(type(error).__name__, str(error), out_of_memory=True)
    except Exception as error:  # noqa: BLE001 - whatever a hostile file provokes is that file's failure
        permanent = getattr(error, "permanent", None)
        trace = "" if permanent is not None else traceback.format_exc()
        fault = Fault(type(error).__name__, str(error), permanent=bool(permanent), traceback=trace)
    return Report(result, fault, time.process_time() - cpu, time.monotonic() - wall)


def _forget_log() -> None:
    """Empty the log, so that it holds the words about one video only."""
    with contextlib.suppress(OSError):
        os.ftruncate(_LOG, 0)
        os.lseek(_LOG, 0, os.SEEK_SET)
