"""Keeps encoders from taking the machine for themselves."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

_THREADS = Path("/proc/self/task")


def take_ordinary_priority() -> None:
    """Put every thread of this process under ordinary scheduling; on systems other than Linux, do nothing.

    As root, in a container too, SVT-AV1 starts its threads with the highest real-time priority. Whatever else runs on
    a machine with few cores, the thread that they wait for included, then gets a twentieth of the time.
    """
    if not _THREADS.is_dir():
        return
    for thread in _THREADS.iterdir():
        with contextlib.suppress(OSError):  # it has ended, or a sandbox forbids the call
            os.sched_setscheduler(int(thread.name), os.SCHED_OTHER, os.sched_param(0))
