"""What a worker process may not do, whatever a hostile file makes of its codec: talk to a network, start a program.

The kernel sees to it (seccomp), on Linux on x86-64 and arm64; elsewhere a worker has the limits alone. It needs no
right and can't be taken back. Files are not fenced off: a worker reads its video through one descriptor, and its
libraries whenever they load a part of themselves.
"""

from __future__ import annotations

import ctypes
import errno
import platform
import struct
import sys

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


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p))


def confine() -> bool:
    """Take the rights away from this process and whatever it starts; True where the kernel did."""
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
