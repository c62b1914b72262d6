"""The inside of a worker process: single-threaded, killable, limited, confined, never alive without its parent.

Started by `process` with file descriptor 0 as a lifeline (a pipe that only the parent holds open) and 2 as its log. A
message, either way, is 8 bytes of length, then a pickle. A worker has to start fast: this file imports a few modules of
the standard library and nothing else.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import importlib
import os
import pickle
import platform
import resource
import select
import signal
import socket
import struct
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

READY, TAKEN = "ready", "taken"
_LIFELINE, _LOG = 0, 2
_MAX_LOG_BYTES = 2**26
_LENGTH = struct.Struct("!Q")
_CHUNK_BYTES = 2**20
# Of the kernel's filter of system calls.
_NO_NEW_PRIVILEGES, _SECCOMP, _FILTER = 38, 22, 2  # prctl's own numbers
_LOAD, _EQUAL, _AT_LEAST, _RETURN = 0x20, 0x15, 0x35, 0x06  # instructions of the classic packet filter
_NUMBER_AT, _ARCHITECTURE_AT = 0, 4  # offsets in what a filter is shown
_ALLOW, _REFUSE = 0x7FFF0000, 0x00050000 | errno.EACCES
_OTHER_ABI = 0x40000000  # x86-64's second set of numbers starts here
# By machine: its code, and the numbers of socket, execve, execveat, ptrace, process_vm_readv, process_vm_writev and
# io_uring_setup. The last is a way around all the others.
_FORBIDDEN = {
    "x86_64": (0xC000003E, (41, 59, 322, 101, 310, 311, 425)),
    "aarch64": (0xC00000B7, (198, 221, 281, 117, 270, 271, 425)),
}


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
    """What became of one task: a result or a fault, and the CPU time that it took."""

    result: Any
    fault: Fault | None
    cpu_seconds: float


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
    module, _, function = task.partition(":")
    run: Callable[[Any], Any] = getattr(importlib.import_module(module), function)
    _limit(memory_bytes)
    confine()
    with contextlib.suppress(EOFError, OSError):
        send(wire, READY)
        # The socket waits for the next job, for ever if need be: a worker ends with its parent.
        while (job := Inbox(most_bytes=2**64).take(wire)) is not None:
            send(wire, TAKEN)
            with contextlib.suppress(OSError):  # the log then holds the words about one video only
                os.ftruncate(_LOG, 0)
                os.lseek(_LOG, 0, os.SEEK_SET)
            send(wire, _run(run, pickle.loads(job)))  # noqa: S301 - from the parent, which started us


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


def send(wire: socket.socket, message: object) -> None:
    """Send a message, all of it.

    Raises:
        OSError: The other side is gone, or takes nothing for longer than the socket's timeout.
    """
    content = pickle.dumps(message, pickle.HIGHEST_PROTOCOL)
    wire.sendall(_LENGTH.pack(len(content)))
    wire.sendall(content)


class Inbox:
    """What has arrived of the other side's next message.

    The parent never waits for the rest of a message: it takes what is there, so that a worker that stops in the middle
    of one costs no more than its video's time.

    Args:
        most_bytes: A message that claims to be longer is refused.
    """

    def __init__(self, *, most_bytes: int) -> None:
        self._most_bytes, self._arrived = most_bytes, bytearray()

    def take(self, wire: socket.socket) -> bytes | None:
        """The next message, or None where a part of it is missing and the socket does not wait.

        Raises:
            EOFError: The other side is gone.
            ValueError: The message says that it is too long.
        """
        while missing := self._missing():
            try:
                part = wire.recv(min(missing, _CHUNK_BYTES))
            except BlockingIOError:
                return None
            if not part:
                raise EOFError
            self._arrived += part
        message = bytes(memoryview(self._arrived)[_LENGTH.size :])
        self._arrived = bytearray()
        return message

    def _missing(self) -> int:
        if len(self._arrived) < _LENGTH.size:
            return _LENGTH.size - len(self._arrived)
        (length,) = _LENGTH.unpack_from(self._arrived)
        if length > self._most_bytes:
            raise ValueError(f"a message of {length} bytes, expected at most {self._most_bytes}")
        return int(_LENGTH.size + length - len(self._arrived))


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p))


def confine() -> bool:
    """Forbid this process, and whatever it starts, to talk to a network or to start a program.

    The kernel enforces it (seccomp) without any privilege, and nothing can undo it. Files are not fenced off: a worker
    reads its video through one descriptor, and its libraries read parts of themselves when they need them.

    Returns:
        True where the kernel agreed: on Linux, x86-64 and arm64. Elsewhere a worker has its limits alone.
    """
    if sys.platform != "linux" or platform.machine() not in _FORBIDDEN or sys.maxsize < 2**32:
        return False
    code = _filter(*_FORBIDDEN[platform.machine()])
    program = _Program(len(code) // 8, code)
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    prctl.argtypes = (ctypes.c_int, ctypes.c_ulong, ctypes.c_void_p, ctypes.c_ulong, ctypes.c_ulong)
    steps = ((_NO_NEW_PRIVILEGES, 1, None, 0, 0), (_SECCOMP, _FILTER, ctypes.byref(program), 0, 0))
    return all(int(prctl(*step)) == 0 for step in steps)


def _filter(architecture: int, forbidden: tuple[int, ...]) -> bytes:
    """The filter: refuse another architecture, another ABI, and each forbidden number; allow the rest."""
    count = len(forbidden)
    steps = [
        (_LOAD, 0, 0, _ARCHITECTURE_AT),
        (_EQUAL, 0, count + 3, architecture),
        (_LOAD, 0, 0, _NUMBER_AT),
        (_AT_LEAST, count + 1, 0, _OTHER_ABI),
        *((_EQUAL, count - place, 0, number) for place, number in enumerate(forbidden)),
        (_RETURN, 0, 0, _ALLOW),
        (_RETURN, 0, 0, _REFUSE),
    ]
    return b"".join(struct.pack("=HBBI", *step) for step in steps)
