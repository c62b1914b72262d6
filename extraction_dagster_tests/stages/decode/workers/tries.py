"""What runs in a confined worker: harmless tries to leave it, each by a call of our own, and what became of each.

A job's path names a folder with `video`, `other` (a file) and nothing else. The answers come back as JSON in `partial`.
"""

import contextlib
import ctypes
import errno
import importlib
import json
import os
import resource
import signal
import socket
import stat
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import simplejpeg

from extraction_dagster.records import EncodedFrames

LIBC = ctypes.CDLL(None, use_errno=True)
PARENT = os.getppid()
JPEG = simplejpeg.encode_jpeg(np.zeros((1, 1, 3), np.uint8), quality=90, colorspace="RGB", colorsubsampling="444")
_PR_SET_DUMPABLE, _IO_URING_SETUP, _PTRACE_ATTACH = 4, 425, 16


def raw(result):
    if result < 0:
        raise OSError(ctypes.get_errno(), "refused")


def fork():
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)


def start_thread():
    thread = threading.Thread(target=int)
    thread.start()
    thread.join()


def tries(folder):
    return {
        "read the parent's environment": lambda: os.open(f"/proc/{PARENT}/environ", os.O_RDONLY),
        "read the parent's memory": lambda: raw(LIBC.process_vm_readv(PARENT, None, 0, None, 0, 0)),
        "attach to the parent": lambda: raw(LIBC.ptrace(_PTRACE_ATTACH, PARENT, None, None)),
        "write a file": lambda: os.open(folder / "written", os.O_WRONLY | os.O_CREAT),
        "write over the video": lambda: os.open(folder / "video", os.O_RDWR),
        "change the video's mode": lambda: (folder / "video").chmod(0o640),
        "remove the video": (folder / "video").unlink,
        "make a folder": (folder / "made").mkdir,
        "make a link": lambda: (folder / "link").symlink_to("/"),
        "open another file": lambda: os.open(folder / "other", os.O_RDONLY),
        "open the video by name": lambda: os.open(folder / "video", os.O_RDONLY),
        "hold a path": lambda: os.open(folder / "other", os.O_PATH),
        "list a folder": lambda: list(folder.iterdir()),
        "read a link": lambda: Path(f"/proc/{PARENT}/exe").readlink(),
        "fork": fork,
        "start a program": lambda: subprocess.run([sys.executable, "-c", ""], check=True),
        "become a program": lambda: os.execv(sys.executable, [sys.executable, "-c", ""]),  # noqa: S606 - that is the try
        "signal the parent": lambda: os.kill(PARENT, 0),
        "signal everybody": lambda: os.kill(-1, 0),
        "signal the group": lambda: os.killpg(0, 0),
        "open a socket": lambda: socket.socket(socket.AF_INET),
        "open a local socket": lambda: socket.socket(socket.AF_UNIX),
        "open a pair of sockets": socket.socketpair,
        "raise a limit": lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (65, 65)),
        "memory outside of the limit": lambda: os.memfd_create("memory"),
        "be looked into": lambda: raw(LIBC.prctl(_PR_SET_DUMPABLE, 1, 0, 0, 0)),
        "queues of calls": lambda: raw(LIBC.syscall(_IO_URING_SETUP, 1, None)),
        "run sooner": lambda: os.nice(-1),
        "leave its group": os.setsid,
        # And what it may.
        "start a thread": start_thread,
        "signal itself": lambda: os.kill(os.getpid(), 0),
        "read a module": lambda: importlib.import_module("colorsys"),
    }


def run(job):
    answers = {}
    for name, attempt in tries(Path(job.path)).items():
        try:
            attempt()
            answers[name] = "done"
        except OSError as error:
            answers[name] = errno.errorcode[error.errno]
        except ValueError:  # what Python makes of a limit that may not be raised
            answers[name] = "EPERM"
    return told(job, json.dumps(answers))


def told(job, said):
    """Words as frames: a picture of one pixel."""
    zero = np.zeros(1)
    return EncodedFrames(job.record_id, job.content_version, [JPEG], zero, zero, zero.astype(int), 1, 1, partial=said)


def deaf(_job):
    """Ignore every signal that can be ignored, cut all but the line to the parent, and go on for ever."""
    for number in set(signal.valid_signals()) - {signal.SIGKILL, signal.SIGSTOP}:
        signal.signal(number, signal.SIG_IGN)
    for descriptor in range(64):
        with contextlib.suppress(OSError):
            if not stat.S_ISSOCK(os.fstat(descriptor).st_mode):
                LIBC.close(descriptor)
    while True:
        sum(range(10**6))
