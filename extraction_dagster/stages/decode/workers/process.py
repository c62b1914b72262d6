"""One worker process, as its parent sees it: given nothing that a hostile file could want, and not trusted.

It gets no setting and no key of the environment, and of the file system one open file, its video.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import IO, TYPE_CHECKING

from extraction_dagster.errors.decode import VideoOpenError
from extraction_dagster.stages.decode.decoders.container import open_descriptor
from extraction_dagster.stages.decode.workers.cage import Confinement
from extraction_dagster.stages.decode.workers.wire import (
    SIZES,
    Header,
    Inbox,
    Report,
    ReportError,
    job_header,
    most_bytes_for,
    read_report,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from extraction_dagster.stages.decode.task import DecodeJob

_BOOT = (
    "import sys; fd, task, memory, libraries, insist = sys.argv[1:6]; sys.path[:] = sys.argv[6:]; "
    "from extraction_dagster.stages.decode.workers.worker import serve; "
    "serve(int(fd), task, int(memory), libraries, insist=insist == 'insist')"
)
# One thread; and memory that a picture gave back is kept for the next one, which saves the kernel 300 to 800 page
# faults a frame, and 4 % of the CPU, at 1280x720 (names of glibc; other systems ignore them).
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "MALLOC_MMAP_THRESHOLD_": str(2**25),
    "MALLOC_TRIM_THRESHOLD_": str(2**28),
}
# What an interpreter and its libraries need, and no other variable.
_PASSED_VARIABLES = re.compile(
    r"PATH|HOME|TMPDIR|TZ|LANG|LANGUAGE|GLIBC_TUNABLES|(LC|LD|DYLD|PYTHON|MALLOC|DECORD|OPENCV)_?\w*"
)
START_SECONDS = 120.0
_REAP_SECONDS, _LOOK_SECONDS = 2.0, 0.005
_DETAILS_BYTES = 2000


class WorkerProcess:
    """A worker process and the video that it has; it is started at once, and says when it is ready.

    Args:
        task: What it runs on each job, as `module:function`.
        memory_bytes: Address space that it may use beyond its own start.
        libraries: What the task imports while it runs.
        insist: Whether it takes no job unless its whole cage stands.

    Attributes:
        wire: The socket to it; neither `receive` nor `give` waits on it for ever.
        process: The process.
        confinement: What holds it, once it has started; None before.
        taken: Whether it has begun with its video.
        opened: Whether its video could be opened.
        tasks: Videos that it was given.
        job: The video that it has, or None.
        deadline: When it has to be done, by the monotonic clock.
    """

    def __init__(self, *, task: str, memory_bytes: int, libraries: Sequence[str] = (), insist: bool = False) -> None:
        self.wire, theirs = socket.socketpair()
        self.wire.settimeout(0.0)
        self.log: IO[bytes] = tempfile.TemporaryFile(prefix="extraction-worker-")  # noqa: SIM115 - closed by stop()
        paths = [entry or os.getcwd() for entry in sys.path]  # noqa: PTH109 - what '' means in sys.path
        with theirs:
            arguments = (str(theirs.fileno()), task, str(memory_bytes), ",".join(libraries), "insist" * insist, *paths)
            self.process = subprocess.Popen(  # noqa: S603 - our own interpreter
                (sys.executable, "-c", _BOOT, *arguments),
                stdin=subprocess.PIPE,
                stdout=self.log,
                stderr=self.log,
                pass_fds=(theirs.fileno(),),
                env={name: value for name, value in os.environ.items() if _PASSED_VARIABLES.fullmatch(name)}
                | ENVIRONMENT,
                process_group=0,
            )
        self._inbox, self._most_bytes = Inbox(), memory_bytes
        self.confinement: Confinement | None = None
        self.taken = False
        self.opened = False
        self.tasks = 0
        self.job: DecodeJob | None = None
        self.deadline = self._timeout_seconds = 0.0

    @property
    def ready(self) -> bool:
        """Whether it has started."""
        return self.confinement is not None

    def give(self, job: DecodeJob, timeout_seconds: float) -> None:
        """Open a job's video and hand both over, to be finished in time.

        Raises:
            OSError: It is gone, or does not listen.
        """
        self.wire.settimeout(START_SECONDS)
        with contextlib.suppress(OSError):  # the log then holds the words about one video only
            os.ftruncate(self.log.fileno(), 0)
            os.lseek(self.log.fileno(), 0, os.SEEK_SET)
        try:
            self.opened = send_job(self.wire, job)
        finally:
            self.wire.settimeout(0.0)
        self.job = job
        self.taken = False
        self.tasks += 1
        self._timeout_seconds = timeout_seconds
        self.deadline = time.monotonic() + (timeout_seconds if self.ready else START_SECONDS)

    def receive(self) -> Report | None:
        """Its report on the video that it has; None while there is none, or a part of it is still on its way.

        Raises:
            EOFError: It is gone.
            ReportError: It says what no worker of ours would; other errors mean the same.
            MemoryError: What it says does not fit this process.
        """
        while (message := self._inbox.take(self.wire, self._most_body_bytes)) is not None:
            header, body = message
            if self.job is not None and self.taken:
                return read_report(header, body, self.job)
            self._note_step(header)
        return None

    def _most_body_bytes(self, header: Header) -> int:
        return min(most_bytes_for(self.job if self.taken else None)(header), self._most_bytes)

    def _note_step(self, header: Header) -> None:
        """It started, or took its video: either once, and it has all of its time from then on."""
        if header["kind"] == "ready" and self.confinement is None:
            self.confinement = Confinement(header["holds"], header["lacking"])
        elif header["kind"] == "taken" and self.job is not None and self.ready:
            self.taken = True
        else:
            raise ReportError("neither the next step nor the frames of its video")
        self.deadline = time.monotonic() + self._timeout_seconds

    def reap(self) -> None:
        """Wait a moment for a process that hung up, kill what is left of its group, and take note of its end."""
        until = time.monotonic() + _REAP_SECONDS
        while not self._has_ended() and time.monotonic() < until:
            time.sleep(_LOOK_SECONDS)
        self._kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(_REAP_SECONDS)

    def _has_ended(self) -> bool:
        """Without taking note of it: until then nobody else can get the number of its group."""
        if self.process.returncode is not None:
            return True
        with contextlib.suppress(ChildProcessError):
            return os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
        return True

    def _kill(self) -> None:
        if self.process.returncode is None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.process.pid, signal.SIGKILL)

    def last_words(self) -> str:
        """The end of what the worker and its codec library wrote."""
        with contextlib.suppress(OSError, ValueError):
            size = os.fstat(self.log.fileno()).st_size
            said = os.pread(self.log.fileno(), _DETAILS_BYTES, max(0, size - _DETAILS_BYTES))
            return said.decode(errors="replace").strip()
        return ""

    def stop(self) -> str:
        """Kill the process and its group, wait for its end, and say how it ended."""
        self._kill()
        self.reap()
        self.wire.close()
        self.log.close()
        if self.process.stdin is not None:
            self.process.stdin.close()
        code = self.process.returncode
        if code is None or code >= 0:
            return f"exit code {code}"
        with contextlib.suppress(ValueError):
            return f"killed by {signal.Signals(-code).name}"
        return f"killed by signal {-code}"


def send_job(wire: socket.socket, job: DecodeJob) -> bool:
    """Send a job with its video's open descriptor, or with the reason why there is none.

    Returns:
        Whether there is one.

    Raises:
        OSError: The other side is gone, or takes nothing for longer than the socket's timeout.
    """
    descriptor, why = -1, None
    try:
        descriptor = open_descriptor(Path(job.path).absolute())
    except VideoOpenError as error:
        why = error.why
    said = json.dumps(job_header(job, why)).encode()
    try:
        sizes = SIZES.pack(len(said), 0)
        if socket.send_fds(wire, [sizes], [descriptor] if why is None else []) != len(sizes):
            raise BrokenPipeError
    finally:
        if why is None:
            os.close(descriptor)
    wire.sendall(said)
    return why is None
