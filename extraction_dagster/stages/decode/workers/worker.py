"""The inside of a worker process: single-threaded, killable, confined, never alive without its parent.

Started by `process` with file descriptor 0 as a lifeline (a pipe that only the parent holds open) and 2 as its log.
What a task is known to need is loaded before the first job: where the kernel has no Landlock, a worker can open nothing
later, no module either.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib
import os
import pkgutil
import select
import signal
import socket
import sys
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING

from extraction_dagster.stages.decode.decoders.container import hand_over
from extraction_dagster.stages.decode.workers.cage import confine
from extraction_dagster.stages.decode.workers.wire import (
    SIZES,
    Fault,
    Header,
    Report,
    parse_header,
    read_job,
    report_message,
    send,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from extraction_dagster.records import EncodedFrames
    from extraction_dagster.stages.decode.task import DecodeJob

_INPUT = 0
_NEVER_NEEDED = ("__main__", ".datasets")  # of av: its command, and what fetches samples, with all that speaks HTTP


def serve(wire_fd: int, task: str, memory_bytes: int, libraries: str, *, insist: bool) -> None:
    """Run tasks until the parent hangs up.

    Args:
        wire_fd: File descriptor of the socket that leads to the parent.
        task: The function to run on each job, as `module:function`.
        memory_bytes: Address space that may be used beyond what this process has at its start.
        libraries: What the task imports while it runs, separated by commas.
        insist: Take no job unless the whole cage stands.
    """
    for sent_to_all in (signal.SIGINT, signal.SIGTERM):  # of a terminal, of a service that stops: they are the parent's
        signal.signal(sent_to_all, signal.SIG_IGN)
    lifeline = _die_with_parent()
    wire = socket.socket(fileno=wire_fd)
    module, _, function = task.partition(":")
    loaded = importlib.import_module(module)
    run: Callable[[DecodeJob], EncodedFrames] = getattr(loaded, function)
    for library in filter(None, libraries.split(",")):
        _load(library)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, _INPUT)
    folder = str(Path(loaded.__file__ or "/").parent)
    confinement = confine(memory_bytes=memory_bytes, lifeline=lifeline, folders=[folder])
    with contextlib.suppress(EOFError, OSError):
        send(wire, {"kind": "ready", "holds": confinement.holds, "lacking": confinement.lacking})
        if insist and confinement.lacking:
            return
        # The socket waits for the next job, for ever if need be: a worker ends with its parent.
        while True:
            header = _receive(wire)
            send(wire, {"kind": "taken"})
            message, body = report_message(_run(run, read_job(header)))
            hand_over(None)
            os.dup2(nothing, _INPUT)
            send(wire, message, *body)


def _load(library: str) -> None:
    """Import a library and, where it would import parts of itself only when they are needed, these as well."""
    with contextlib.suppress(ImportError):  # the decoder says so, of each video
        loaded = importlib.import_module(library)
        if library == "cv2":  # it looks for other thread pools when one is first asked for
            loaded.setNumThreads(1)
        if library == "av":  # it imports parts of itself once they are needed
            for part in pkgutil.walk_packages(loaded.__path__, "av."):
                if not part.name.endswith(_NEVER_NEEDED):
                    importlib.import_module(part.name)


def _die_with_parent() -> int:
    """Have the kernel kill this process and its group once the lifeline is cut, even inside a codec that never returns.

    Returns:
        The lifeline, away from descriptor 0.
    """
    lifeline = fcntl.fcntl(_INPUT, fcntl.F_DUPFD_CLOEXEC, 3)
    fcntl.fcntl(lifeline, fcntl.F_SETOWN, -os.getpgrp())
    if hasattr(fcntl, "F_SETSIG"):  # Linux: a signal that can't be ignored, in place of SIGIO
        fcntl.fcntl(lifeline, fcntl.F_SETSIG, signal.SIGKILL)
    fcntl.fcntl(lifeline, fcntl.F_SETFL, fcntl.fcntl(lifeline, fcntl.F_GETFL) | os.O_ASYNC)
    if select.select([lifeline], [], [], 0)[0]:
        sys.exit("the parent is gone")
    return lifeline


def _receive(wire: socket.socket) -> Header:
    """The next job; its video, or why there is none, is handed to the decoders.

    Raises:
        EOFError: The parent is gone.
    """
    head, descriptors, _, _ = socket.recv_fds(wire, SIZES.size, 1)
    content = bytearray(head)
    while (missing := _missing(content)) > 0:
        part = wire.recv(missing)
        if not part:
            raise EOFError
        content += part
    header = parse_header(content[SIZES.size :])
    hand_over(descriptors[0] if descriptors else header["unopened"])
    return header


def _missing(content: bytearray) -> int:
    if not content:
        raise EOFError
    whole = SIZES.size + (SIZES.unpack_from(content)[0] if len(content) >= SIZES.size else 0)
    return int(whole - len(content))


def _run(run: Callable[[DecodeJob], EncodedFrames], job: DecodeJob) -> Report:
    began, result, fault = time.process_time(), None, None
    try:
        result = run(job)
    except MemoryError as error:
        fault = Fault(type(error).__name__, str(error), out_of_memory=True)
    except Exception as error:  # noqa: BLE001 - whatever a hostile file provokes is that file's failure
        permanent = getattr(error, "permanent", None)
        trace = "" if permanent is not None else traceback.format_exc()
        fault = Fault(type(error).__name__, str(error), permanent=bool(permanent), traceback=trace)
    return Report(result, fault, time.process_time() - began)
