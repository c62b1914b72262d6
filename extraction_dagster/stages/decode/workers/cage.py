"""The cage that a worker shuts itself into before it sees a file: what the kernel refuses it from then on, for good.

By then all that it is known to need is loaded, and a video comes as an open descriptor:

    Landlock          no path is read but Python's own files and its libraries', none is made, changed or removed; on
                      newer kernels no TCP port either, and no signal to others
    system calls      seccomp: a list of what is allowed. No socket, process, program or change of a file is on it;
                      threads are; opening for reading is only where Landlock says what
    no capabilities   none is left, and none can be gained
    limits            memory, threads, descriptors, the log, core dumps: none can be raised again
    not dumpable      no other process of the user can look into this one

Each part holds without the others; what a kernel lacks is named, never passed over. Nothing here needs a privilege.

Source:
    man 7 landlock, man 2 seccomp, man 7 capabilities; the numbers are Linux's own and never change.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import platform
import resource
import stat
import struct
import sys
import sysconfig
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

# prctl's own numbers.
_SET_DUMPABLE, _GET_DUMPABLE, _DROP_BOUNDING, _SET_NAME, _NO_NEW_PRIVILEGES, _AMBIENT = 4, 3, 24, 15, 38, 47
_NAME_MEMORY = 0x53564D41
_CLEAR_ALL, _HIGHEST_CAPABILITY, _CAPABILITY_VERSION = 4, 63, 0x20080522
# Landlock: the numbers of its calls are the same on every machine; rights to files by the version that brought them.
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF, _ASK_VERSION, _BENEATH = 444, 445, 446, 1, 1
_READ = 0x4 | 0x8  # files and folders
_FILE_RIGHTS = ((1, 0x1FFF), (2, 0x2000), (3, 0x4000), (5, 0x8000))
_NETWORK_SINCE, _SCOPES_SINCE, _TCP, _SCOPES = 4, 6, 0x3, 0x3
# seccomp: instructions of the classic packet filter, and where the kernel puts what they look at.
_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_NUMBER_AT, _ARCHITECTURE_AT, _ARGUMENTS_AT = 0, 4, 16
_ALLOW, _REFUSE, _UNKNOWN = 0x7FFF0000, 0x00050000 | errno.EACCES, 0x00050000 | errno.ENOSYS
_OTHER_ABI = 0x40000000  # x86-64's second set of numbers starts here
_NEWER = 424  # from here on a library asks whether the kernel knows a call, and does without: clone3, say
_SET_FILTER, _ALL_THREADS, _KEEP_SPECULATION = 1, 1, 4
# open: for writing, O_CREAT, O_TRUNC, O_APPEND, O_PATH (which Landlock lets pass), O_TMPFILE.
_NO_PLAIN_READING = 0x3 | 0x40 | 0x200 | 0x400 | 0x200000 | 0x400000
_THREAD, _NEW_NAMESPACES = 0x10000, 0x7E020000
_HARMLESS = (1, 2, 3, 1030)  # fcntl: F_GETFD, F_SETFD, F_GETFL, F_DUPFD_CLOEXEC
_MACHINES = {"x86_64": (0xC000003E, 317), "aarch64": (0xC00000B7, 277)}  # the machine's code, seccomp's number
# By name: x86-64's number and arm64's, or - where that machine has no such call; the most frequent first.
_ALLOWED = """
    pread64 17 67, futex 202 98, read 0 63, write 1 64, lseek 8 62,
    mmap 9 222, munmap 11 215, mremap 25 216, mprotect 10 226, madvise 28 233,
    brk 12 214, fstat 5 80, newfstatat 262 79, readv 19 65, preadv 295 69,
    writev 20 66, dup 32 23, sendto 44 206, recvfrom 45 207, sendmsg 46 211,
    recvmsg 47 212, poll 7 -, ppoll 271 73, select 23 -, pselect6 270 72,
    rt_sigaction 13 134, rt_sigprocmask 14 135, rt_sigreturn 15 139, sigaltstack 131 132,
    nanosleep 35 101, clock_nanosleep 230 115, clock_gettime 228 113, clock_getres 229 114,
    gettimeofday 96 169, time 201 -, times 100 153, getrusage 98 165,
    set_robust_list 273 99, rseq 334 293, sched_yield 24 124, getcpu 309 168,
    sched_getaffinity 204 123, restart_syscall 219 128, exit 60 93, exit_group 231 94,
    getpid 39 172, gettid 186 178, getppid 110 173, getuid 102 174, geteuid 107 175,
    getgid 104 176, getegid 108 177, getrandom 318 278, sysinfo 99 179, uname 63 160
"""
# Allowed with some arguments only, see `_checks`.
_CHECKED = """
    close 3 57, clone 56 220, kill 62 129, tgkill 234 131, fcntl 72 25,
    prctl 157 167, dup2 33 -, dup3 292 24
"""
# Where Landlock holds, and so says what can be read.
_READING = "openat 257 56, getdents64 217 61"
_LIBRARIES = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib", "/etc/ld.so.cache")
_MAX_LOG_BYTES, _MAX_DESCRIPTORS = 2**26, 64
_SPARE_THREADS = 1024  # of all that the user's other programs start later
_Step = tuple[int, int, int, int]


class LackingError(Exception):
    """A part of the cage that this machine does not have; caught here, and named in `Confinement.lacking`."""


@dataclass(frozen=True, slots=True)
class Confinement:
    """What holds a worker, and what does not.

    Attributes:
        holds: The parts in force, each with a word about it.
        lacking: The parts that this machine lacks, each with the reason.
    """

    holds: dict[str, str] = field(default_factory=dict)
    lacking: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        """One line: what holds, then what is lacking."""
        holds, lacking = (
            ", ".join(f"{part} ({word})" if word else part for part, word in parts.items())
            for parts in (self.holds, self.lacking)
        )
        return f"{holds or 'nothing'}; lacking: {lacking}" if lacking else holds


def confine(*, memory_bytes: int, lifeline: int, folders: Iterable[str] = ()) -> Confinement:
    """Shut this process in; it has to have one thread, and nothing undoes it.

    Args:
        memory_bytes: Address space that may be used beyond what this process has now.
        lifeline: The descriptor that can't be closed any more.
        folders: What may be read beside Python's own folders, where there is Landlock.

    Returns:
        Confinement: what holds from now on.
    """
    # Without a list of system calls, only this limit keeps an ordinary user's worker from starting processes.
    threads = _threads_of_all() + _SPARE_THREADS if _has_list() else 0
    parts: dict[str, Callable[[], str]] = {
        "limits": lambda: limit(memory_bytes=memory_bytes, threads=threads),  # first: it has to read /proc
        "not dumpable": hide,
        "Landlock": lambda: landlock({*_python_folders(), *_LIBRARIES, *folders}),
        "no capabilities": drop_capabilities,
        "system calls": lambda: allow_calls(lifeline=lifeline, reading="Landlock" in found.holds),
    }
    found = Confinement()
    for part, put_up in parts.items():
        try:
            found.holds[part] = put_up()
        except LackingError as lacking:
            found.lacking[part] = str(lacking)
    return found


def hide() -> str:
    """Keep other processes of the same user from reading this one's memory and environment; a child is as others are.

    Raises:
        LackingError: The system can't.
    """
    if sys.platform != "linux" or _prctl(_SET_DUMPABLE, 0) != 0 or _prctl(_GET_DUMPABLE) != 0:
        raise LackingError("this system can't")
    return ""


def landlock(folders: Iterable[str]) -> str:
    """Refuse every path but reading in some, TCP ports, and signals to others, as far as the kernel's Landlock can.

    Raises:
        LackingError: The kernel has no Landlock, or another thread is running, which it would not reach.
    """
    _need_linux()
    version = _syscall(_CREATE_RULESET, None, 0, _ASK_VERSION)
    if version < 1:
        raise LackingError(f"{_why()}; Linux has it from 5.13 on, where it is enabled")
    if _threads() > 1:
        raise LackingError("other threads are running")
    rights = sum(bits for since, bits in _FILE_RIGHTS if version >= since)
    network = _TCP if version >= _NETWORK_SINCE else 0
    scopes = _SCOPES if version >= _SCOPES_SINCE else 0
    # A kernel refuses fields that it does not know, unless they are left away: 8 bytes each.
    known = 1 + (version >= _NETWORK_SINCE) + (version >= _SCOPES_SINCE)
    attributes = struct.pack("=QQQ", rights, network, scopes)[: 8 * known]
    ruleset = _syscall(_CREATE_RULESET, attributes, len(attributes), 0)
    if ruleset < 0:
        raise LackingError(_why())
    try:
        for folder in folders:
            _allow_reading(ruleset, folder)
        if _prctl(_NO_NEW_PRIVILEGES, 1) != 0 or _syscall(_RESTRICT_SELF, ruleset, 0) != 0:
            raise LackingError(_why())
    finally:
        os.close(ruleset)
    return f"version {version}"


def _allow_reading(ruleset: int, path: str) -> None:
    """In a folder and below, or of one file; what is not there needs no rule."""
    with contextlib.suppress(OSError):
        place = os.open(path, os.O_PATH | os.O_CLOEXEC)
        try:
            rights = _READ if stat.S_ISDIR(os.fstat(place).st_mode) else _READ & 0x4
            if _syscall(_ADD_RULE, ruleset, _BENEATH, struct.pack("=Qi", rights, place), 0) != 0:
                raise LackingError(_why())
        finally:
            os.close(place)


def _python_folders() -> set[str]:
    """Where the interpreter's modules and the installed packages are, this one included."""
    names = ("stdlib", "platstdlib", "purelib", "platlib")
    found = {sysconfig.get_path(name) for name in names}
    found |= {sysconfig.get_path(name, vars={"base": sys.base_prefix, "platbase": sys.base_prefix}) for name in names}
    return {*found, f"{sys.base_prefix}/lib", str(Path(__file__).parents[3])}


def drop_capabilities() -> str:
    """Give up every capability, and the right to gain one by starting a program.

    Raises:
        LackingError: The system has none to give up, or refuses.
    """
    _need_linux()
    libc = ctypes.CDLL(None, use_errno=True)
    header, nothing = struct.pack("=Ii", _CAPABILITY_VERSION, 0), bytes(24)
    for number in range(_HIGHEST_CAPABILITY + 1):
        _prctl(_DROP_BOUNDING, number)  # an ordinary user may not, and can gain none anyway
    _prctl(_AMBIENT, _CLEAR_ALL)
    found = ctypes.create_string_buffer(len(nothing))
    if _prctl(_NO_NEW_PRIVILEGES, 1) != 0 or libc.capset(header, nothing) != 0 or libc.capget(header, found) != 0:
        raise LackingError(_why())
    if any(found.raw):
        raise LackingError("some are left")
    return ""


def limit(*, memory_bytes: int, threads: int) -> str:
    """Bound memory, threads, descriptors, the log and core dumps, so that none can be raised again.

    Raises:
        LackingError: The system refuses one of them.
    """
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
        start_bytes = pages * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        start_bytes = 0
    limits = {
        "memory": (resource.RLIMIT_AS, start_bytes + memory_bytes),
        "log": (resource.RLIMIT_FSIZE, _MAX_LOG_BYTES),
        "core dumps": (resource.RLIMIT_CORE, 0),
        "descriptors": (resource.RLIMIT_NOFILE, _MAX_DESCRIPTORS),
        "threads": (resource.RLIMIT_NPROC, threads),
    }
    refused = []
    for name, (number, most) in limits.items():
        hard = resource.getrlimit(number)[1]
        value = most if hard == resource.RLIM_INFINITY else min(most, hard)
        try:
            resource.setrlimit(number, (value, value))
        except (ValueError, OSError):
            refused.append(name)
    if refused:
        raise LackingError(f"the system refuses {', '.join(refused)}")
    return ""


def allow_calls(*, lifeline: int, reading: bool) -> str:
    """Let the kernel refuse every system call that is not on the list.

    Args:
        lifeline: The descriptor that can't be closed any more.
        reading: Whether files can be opened for reading.

    Raises:
        LackingError: The kernel has no filter, or none is written for this machine.
    """
    _need_linux()
    if not _has_list():
        raise LackingError(f"no list is written for {platform.machine()}")
    architecture, seccomp = _MACHINES[platform.machine()]
    code, count = _filter(architecture, list(_MACHINES).index(platform.machine()), lifeline=lifeline, reading=reading)
    program = _Program(len(code) // 8, code)
    if _prctl(_NO_NEW_PRIVILEGES, 1) == 0:
        for flags in (_ALL_THREADS | _KEEP_SPECULATION, _ALL_THREADS):  # the second is of Linux 4.17
            if _syscall(seccomp, _SET_FILTER, flags, ctypes.addressof(program)) == 0:
                return f"{count} allowed"
    raise LackingError(_why())


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p))


def _filter(architecture: int, machine: int, *, lifeline: int, reading: bool) -> tuple[bytes, int]:
    """The filter, as the kernel reads it, and how many calls it allows."""
    checks = _checks(os.getpid(), lifeline)
    allow: list[_Step] = [(_RETURN, 0, 0, _ALLOW)]
    calls = ",".join((_ALLOWED, _CHECKED, *([_READING] if reading else [])))
    rules = [
        (int(numbers[machine]), checks.get(name, allow))
        for name, *numbers in (entry.split() for entry in calls.split(","))
        if numbers[machine] != "-"
    ]
    steps: list[_Step] = [
        (_LOAD, 0, 0, _ARCHITECTURE_AT),
        (_EQUAL, 1, 0, architecture),
        (_RETURN, 0, 0, _REFUSE),
        (_LOAD, 0, 0, _NUMBER_AT),
    ]
    for number, block in rules:
        steps += [(_EQUAL, 0, len(block), number), *block]
    steps += [
        (_AT_LEAST, 0, 2, _NEWER),
        (_AT_LEAST, 1, 0, _OTHER_ABI),
        (_RETURN, 0, 0, _UNKNOWN),
        (_RETURN, 0, 0, _REFUSE),
    ]
    return b"".join(struct.pack("=HBBI", *step) for step in steps), len(rules)


def _checks(process: int, lifeline: int) -> dict[str, list[_Step]]:
    """What must hold of a call's arguments: of each, the lower half, which is all that the kernel takes of a number."""

    def one_of(argument: int, *values: int) -> list[_Step]:
        tests = [(_EQUAL, len(values) - place, 0, value) for place, value in enumerate(values)]
        return [_argument(argument), *tests, (_RETURN, 0, 0, _REFUSE), (_RETURN, 0, 0, _ALLOW)]

    return {
        # The watch over the parent's end hangs on that descriptor.
        "close": [_argument(0), (_EQUAL, 0, 1, lifeline), (_RETURN, 0, 0, _REFUSE), (_RETURN, 0, 0, _ALLOW)],
        # A thread of this process, and no new view of the system.
        "clone": [
            *(_argument(0), (_ANY_BIT, 0, 2, _THREAD), (_ANY_BIT, 1, 0, _NEW_NAMESPACES)),
            *((_RETURN, 0, 0, _ALLOW), (_RETURN, 0, 0, _REFUSE)),
        ],
        "openat": [
            *(_argument(2), (_ANY_BIT, 1, 0, _NO_PLAIN_READING)),
            *((_RETURN, 0, 0, _ALLOW), (_RETURN, 0, 0, _REFUSE)),
        ],
        "kill": one_of(0, process),
        "tgkill": one_of(0, process),
        "fcntl": one_of(1, *_HARMLESS),
        "prctl": one_of(0, _SET_NAME, _NAME_MEMORY),
        "dup2": one_of(1, 0),  # decord reads the video from there
        "dup3": one_of(1, 0),
    }


def _argument(number: int) -> _Step:
    return _LOAD, 0, 0, _ARGUMENTS_AT + 8 * number


def _has_list() -> bool:
    return sys.platform == "linux" and platform.machine() in _MACHINES and sys.maxsize > 2**32


def _why() -> str:
    return f"the kernel refuses it: {os.strerror(ctypes.get_errno())}"


def _need_linux() -> None:
    if sys.platform != "linux":
        raise LackingError("it is Linux's")


def _threads() -> int:
    """Of this process."""
    return len(list(Path("/proc/self/task").iterdir()))


def _threads_of_all() -> int:
    """Of all processes of the machine, which bounds those of this user."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        return int(Path("/proc/loadavg").read_text(encoding="ascii").split()[3].partition("/")[2])
    return 2**15


def _prctl(option: int, value: int = 0) -> int:
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    prctl.argtypes = (ctypes.c_int, *[ctypes.c_ulong] * 4)
    return int(prctl(option, value, 0, 0, 0))


def _syscall(number: int, *arguments: int | bytes | None) -> int:
    call = ctypes.CDLL(None, use_errno=True).syscall
    call.restype = ctypes.c_long
    return int(call(ctypes.c_long(number), *(ctypes.c_long(a) if isinstance(a, int) else a for a in arguments)))
