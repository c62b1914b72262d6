"""One worker process, as its parent sees it: given nothing that a hostile file could want, and not trusted.

It gets no setting and no key of the environment. What it sends back may be built from a few classes only, since reading
a pickle can otherwise run any code in the process that reads it.
"""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from typing import IO, TYPE_CHECKING

from extraction_dagster.records import EncodedFrames
from extraction_dagster.stages.decode.workers.worker import READY, TAKEN, Fault, Inbox, Report, send

if TYPE_CHECKING:
    from extraction_dagster.stages.decode.task import DecodeJob

_BOOT = (
    "import sys; fd, task, memory = sys.argv[1:4]; sys.path[:] = sys.argv[4:]; "
    "from extraction_dagster.stages.decode.workers.worker import serve; serve(int(fd), task, int(memory))"
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
    r"PATH|HOME|TMPDIR|TZ|LANG|LANGUAGE|GLIBC_TUNABLES|(LC|LD|DYLD|PYTHON|MALLOC|DECORD|OPENCV|COV_CORE|COVERAGE)_?\w*"
)
# What a report may be built from: these, and of numpy, in whatever module its releases keep them, these names.
_ALLOWED_CLASSES = frozenset((allowed.__module__, allowed.__qualname__) for allowed in (Report, Fault, EncodedFrames))
_ALLOWED_NUMPY = frozenset({"ndarray", "dtype", "scalar", "_reconstruct", "_frombuffer"})
_START_SECONDS = 120.0
_REAP_SECONDS = 2.0
_DETAILS_BYTES = 2000


class WorkerProcess:
    """A worker process and the video that it has; it is started at once, and says when it is ready.

    Args:
        task: What it runs on each job, as `module:function`.
        memory_bytes: Address space that it may use beyond its own start.

    Attributes:
        wire: The socket to it; neither `receive` nor `give` waits on it for ever.
        process: The process.
        ready: Whether it has started.
        taken: Whether it has begun with its video.
        tasks: Videos that it was given.
        job: The video that it has, or None.
        deadline: When it has to be done, by the monotonic clock.
    """

    def __init__(self, *, task: str, memory_bytes: int) -> None:
        self.wire, theirs = socket.socketpair()
        self.wire.settimeout(0.0)
        self.log: IO[bytes] = tempfile.TemporaryFile(prefix="extraction-worker-")  # noqa: SIM115 - closed by stop()
        paths = [entry or os.getcwd() for entry in sys.path]  # noqa: PTH109 - what '' means in sys.path
        with theirs:
            arguments = (str(theirs.fileno()), task, str(memory_bytes), *paths)
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
        self._inbox = Inbox(most_bytes=memory_bytes)
        self.ready = False
        self.taken = False
        self.tasks = 0
        self.job: DecodeJob | None = None
        self.deadline = self._timeout_seconds = 0.0

    def give(self, job: DecodeJob, timeout_seconds: float) -> None:
        """Hand it a job, which it has to finish in time.

        Raises:
            OSError: It is gone, or does not listen.
        """
        self.wire.settimeout(_START_SECONDS)
        try:
            send(self.wire, job)
        finally:
            self.wire.settimeout(0.0)
        self.job = job
        self.taken = False
        self.tasks += 1
        self._timeout_seconds = timeout_seconds
        self.deadline = time.monotonic() + (timeout_seconds if self.ready else _START_SECONDS)

    def receive(self) -> Report | None:
        """Its report on the video that it has; None while there is none, or a part of it is still on its way.

        Raises:
            EOFError: It is gone.
            pickle.UnpicklingError: It says what no worker of ours would; other errors mean the same.
        """
        while (message := self._inbox.take(self.wire)) is not None:
            said = _Unpickler(io.BytesIO(message)).load()
            if isinstance(said, Report) and (said.fault is not None or self._is_of_its_video(said.result)):
                return said
            self._note_step(said)
        return None

    def _note_step(self, said: object) -> None:
        """It started, or took its video: either once, and it has all of its time from then on."""
        if said == READY and not self.ready:
            self.ready = True
        elif said == TAKEN and self.ready and not self.taken:
            self.taken = True
        else:
            raise pickle.UnpicklingError("neither the next step nor the frames of its video")
        self.deadline = time.monotonic() + self._timeout_seconds

    def _is_of_its_video(self, result: object) -> bool:
        return isinstance(result, EncodedFrames) and self.job is not None and result.record_id == self.job.record_id

    def reap(self) -> None:
        """Wait a moment for a process that hung up."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(_REAP_SECONDS)

    def last_words(self) -> str:
        """The end of what the worker and its codec library wrote."""
        with contextlib.suppress(OSError, ValueError):
            size = os.fstat(self.log.fileno()).st_size
            said = os.pread(self.log.fileno(), _DETAILS_BYTES, max(0, size - _DETAILS_BYTES))
            return said.decode(errors="replace").strip()
        return ""

    def stop(self) -> str:
        """Kill the process, wait for its end, and say how it ended."""
        self.process.kill()
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


class _Unpickler(pickle.Unpickler):
    """Builds what a report is made of, and refuses everything else."""

    def find_class(self, module: str, name: str) -> object:
        is_numpy = module.partition(".")[0] == "numpy" and name in _ALLOWED_NUMPY
        if not is_numpy and (module, name) not in _ALLOWED_CLASSES:
            raise pickle.UnpicklingError(f"{module}.{name} is no part of a report")
        return super().find_class(module, name)
