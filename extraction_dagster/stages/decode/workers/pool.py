"""Worker processes that a video may crash, hang or fill without harm to its siblings.

One single-threaded process a core, one video at a time in each; the parent has no thread of its own. A worker starts as
a fresh interpreter that knows nothing of the parent's main module, so that a script, a notebook, pytest and a Dagster
run can all be the parent. Killing a worker is always safe: it shares no lock with anyone.
"""

from __future__ import annotations

import logging
import time
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from multiprocessing.connection import wait
from typing import TYPE_CHECKING

from extraction_dagster.errors import SettingsError
from extraction_dagster.errors.decode import (
    DecodeConfinementError,
    DecodeMemoryError,
    DecoderMissingError,
    DecodeTimeoutError,
    DecodeWorkerDiedError,
    DecodeWorkerStartError,
    FramesRejectedError,
    FramesTooManyError,
    NoVideoStreamError,
    VideoEncryptedError,
    VideoFormatError,
    VideoTooLargeError,
    VideoTooLongError,
)
from extraction_dagster.records import Failure, Outcome
from extraction_dagster.stages.decode.quality import Quality
from extraction_dagster.stages.decode.workers.cage import Confinement, LackingError, hide
from extraction_dagster.stages.decode.workers.process import START_SECONDS, WorkerProcess
from extraction_dagster.stages.decode.workers.wire import Fault, Report, ReportError

if TYPE_CHECKING:
    from collections.abc import Generator, Iterable, Iterator

    from extraction_dagster.errors import ExtractionError
    from extraction_dagster.settings import Settings
    from extraction_dagster.stages.decode.task import DecodeJob

LIBRARIES = ("av", "numpy.ma", "cv2", "decord")  # what decode jobs import while they run, whatever they ask for
_log = logging.getLogger(__name__)  # managed by Dagster: these lines are in the run's events too
_TURN_SECONDS = 0.05  # between two looks for a job that is not ready yet
_PULSE_SECONDS = 1.0  # after which a caller that nothing new can be told has its turn
# What the task itself finds, looking at what it was told: no library failed.
_ORDERLY = frozenset(
    error.__name__
    for error in (
        *(DecoderMissingError, FramesRejectedError, FramesTooManyError, NoVideoStreamError, SettingsError),
        *(VideoEncryptedError, VideoFormatError, VideoTooLargeError, VideoTooLongError),
    )
)
_told: set[str] = set()
_MOST_EARLY_ENDS = 8  # of workers, one after the other, before they began with a video: so would all others


class _End(Enum):
    """After the last job."""

    END = 0


@dataclass(frozen=True, slots=True)
class PoolOptions:
    """How many workers, and what each may cost and load.

    Attributes:
        workers: Most processes at a time.
        timeout_seconds: Wall-clock limit for one video.
        memory_bytes: Address space of a worker beyond its own start.
        max_tasks: Videos after which a worker is replaced, so that a leak in a codec stays small.
        task: What runs on each job, as `module:function`.
        libraries: What the task imports while it runs: in its cage a worker loads nothing any more.
        require_confinement: Decode nothing unless a worker's whole cage stands.
    """

    workers: int
    timeout_seconds: float
    memory_bytes: int
    max_tasks: int = 200
    task: str = "extraction_dagster.stages.decode.task:decode_job"
    libraries: tuple[str, ...] = LIBRARIES
    require_confinement: bool = False

    @classmethod
    def from_settings(cls, settings: Settings) -> PoolOptions:
        """Read the options from the settings."""
        unused = {"decord"} if settings.decoder != "decord" else set()
        if settings.decoder != "pyav" and not Quality.from_settings(settings).identity:
            unused |= {"cv2"}  # which `pyav` needs for animated WebP
        return cls(
            settings.decode_workers,
            settings.decode_timeout_seconds,
            settings.decode_memory_bytes,
            libraries=tuple(library for library in LIBRARIES if library not in unused),
            require_confinement=settings.require_confinement,
        )


@dataclass(frozen=True, slots=True)
class Decoded:
    """What became of one video, and the worker's CPU time that it took."""

    outcome: Outcome
    cpu_seconds: float = 0.0


def decode_as_ready(
    jobs: Iterable[DecodeJob | Decoded | None], options: PoolOptions
) -> Generator[Decoded | None, None, None]:
    """Decode videos in worker processes, with a turn for the caller at least every second.

    Jobs are drawn as workers become free, so that no more than `options.workers` are under way. Closing the iterator,
    or any exception in it, stops the workers at once.

    Args:
        jobs: None among them means that the next one is not ready yet, and gives the workers a turn; what is decided
            already, a row whose file could not be fetched say, is handed on.
        options: How many workers, and what each may cost.

    Yields:
        Decoded: what became of a video, as soon as it is known; None while nothing is.

    Raises:
        DecodeWorkerStartError: A worker can't start; no video is to blame.
        DecodeConfinementError: The options insist on a cage that this machine does not have.
    """
    with suppress(LackingError):  # what a worker is kept from is out of its reach in this process too
        hide()
    pool = _Pool(options)
    try:
        yield from pool.run(iter(jobs))
    finally:
        pool.stop()


def look_at_confinement(options: PoolOptions) -> Confinement:
    """Start a worker as for a video, and say what holds it.

    Raises:
        DecodeWorkerStartError: It can't start.
        DecodeConfinementError: The options insist on more than this machine has.
    """
    pool = _Pool(options)
    try:
        return pool.look()
    finally:
        pool.stop()


class _Pool:
    """The workers and who has what."""

    def __init__(self, options: PoolOptions) -> None:
        self._options = options
        self._workers: list[WorkerProcess] = []
        self._returned: list[DecodeJob] = []
        self._early_ends = 0
        self._more = True

    def run(self, jobs: Iterator[DecodeJob | Decoded | None]) -> Iterator[Decoded | None]:
        while True:
            drawn = self._fill(jobs)
            wait_seconds = _TURN_SECONDS if drawn is None else _PULSE_SECONDS
            if isinstance(drawn, Decoded):
                yield from self._hand_over([drawn])
                wait_seconds = 0.0
            busy = [worker for worker in self._workers if worker.job is not None]
            if busy:
                yield from self._hand_over(self._collect(busy, at_most=wait_seconds))
            elif drawn is _End.END:
                return
            yield from self._hand_over([None])

    def _fill(self, jobs: Iterator[DecodeJob | Decoded | None]) -> Decoded | _End | None:
        """Give jobs to workers while one is idle; what is drawn and is no job is returned, END when nothing is."""
        while self._more or self._returned:
            if len(self._workers) >= self._options.workers and all(worker.job for worker in self._workers):
                break
            drawn = self._returned.pop() if self._returned else next(jobs, _End.END)
            if drawn is None or isinstance(drawn, Decoded):
                return drawn
            if drawn is _End.END:
                self._more = False
            else:
                self._give(drawn)
        return _End.END

    def _hand_over(self, items: Iterable[Decoded | None]) -> Iterator[Decoded | None]:
        """Yield to the caller; the time that it takes, in a slow store say, is not counted as a video's."""
        for item in items:
            handed_over = time.monotonic()
            yield item
            for worker in self._workers:
                worker.deadline += time.monotonic() - handed_over

    def stop(self) -> None:
        while self._workers:
            self._workers.pop().stop()

    def _give(self, job: DecodeJob) -> None:
        """Hand a job to an idle worker, or to a new one; an idle worker that has died is replaced."""
        while True:
            worker = next((worker for worker in self._workers if worker.job is None), None)
            if worker is None:
                worker = self._start()
            try:
                worker.give(job, self._options.timeout_seconds)
            except OSError:
                self._note_early_end(worker)
                self._drop(worker)
            else:
                return

    def _start(self) -> WorkerProcess:
        options = self._options
        worker = WorkerProcess(
            task=options.task,
            memory_bytes=options.memory_bytes,
            libraries=options.libraries,
            insist=options.require_confinement,
        )
        self._workers.append(worker)
        return worker

    def look(self) -> Confinement:
        worker = self._start()
        until = time.monotonic() + START_SECONDS
        while worker.confinement is None:
            wait([worker.wire], timeout=max(0.0, until - time.monotonic()))
            try:
                worker.receive()
            except (EOFError, OSError, ReportError):
                worker.reap()
                raise self._no_start(worker) from None
            if time.monotonic() > until:
                raise self._no_start(worker)
        self._tell(worker)
        return worker.confinement

    def _tell(self, worker: WorkerProcess) -> None:
        """Log what holds the workers, once in a process; and insist on all of it, where the options do.

        Raises:
            DecodeConfinementError: Something is lacking.
        """
        held = worker.confinement
        if held is None:
            return
        if held.lacking and self._options.require_confinement:
            raise DecodeConfinementError("; ".join(f"{part} ({why})" for part, why in held.lacking.items()))
        if str(held) not in _told:
            _told.add(str(held))
            _log.log(logging.WARNING if held.lacking else logging.INFO, "Decoding workers are confined: %s", held)

    def _collect(self, busy: list[WorkerProcess], *, at_most: float) -> Iterator[Decoded]:
        """Wait for the next report, death or deadline, or for `at_most` seconds."""
        left = min(worker.deadline for worker in busy) - time.monotonic()
        wait([worker.wire for worker in busy], timeout=max(0.0, min(left, at_most)))
        for worker in busy:
            yield from self._hear(worker)
            if worker.job is not None and time.monotonic() >= worker.deadline:
                yield self._time_out(worker)

    def _hear(self, worker: WorkerProcess) -> Iterator[Decoded]:
        was_ready = worker.ready
        try:
            report = worker.receive()
        except MemoryError:
            yield from self._bury(worker, "its report did not fit the memory of this process")
        except ReportError as error:
            yield from self._bury(worker, f"its report was refused: {error}")
        except Exception:  # noqa: BLE001 - it hung up, or sent what it should not: either is its end
            yield from self._bury(worker)
        else:
            if worker.ready and not was_ready:
                self._tell(worker)
            if report is not None:
                yield self._finish(worker, report)

    def _finish(self, worker: WorkerProcess, report: Report) -> Decoded:
        job, worker.job, self._early_ends = _job_of(worker), None, 0
        fault, said = report.fault, worker.last_words()
        if fault is None:
            outcome = Outcome(job.record_id, frames=report.frames)
        elif fault.out_of_memory:
            outcome = _failed(job, DecodeMemoryError(job.path, limit_bytes=self._options.memory_bytes), said)
        else:
            outcome = _failed(job, fault, said)
        if worker.tasks >= self._options.max_tasks or self._is_in_doubt(worker, report, said):
            self._drop(worker)
        return Decoded(outcome, report.cpu_seconds)

    def _is_in_doubt(self, worker: WorkerProcess, report: Report, said: str) -> bool:
        """Whether a library met something in the video that it could not read: who knows what it left behind."""
        if report.fault is not None:
            return worker.opened and report.fault.error_type not in _ORDERLY
        return report.frames is not None and report.frames.partial is not None and said != ""

    def _time_out(self, worker: WorkerProcess) -> Decoded:
        if not worker.ready:
            raise self._no_start(worker)
        job, said = _job_of(worker), worker.last_words()
        self._drop(worker)
        return Decoded(_failed(job, DecodeTimeoutError(job.path, seconds=self._options.timeout_seconds), said))

    def _bury(self, worker: WorkerProcess, why: str = "") -> Iterator[Decoded]:
        """Blame a worker's death on its video, unless it died before it took it; `why` if it is ended for that."""
        if not worker.taken:
            self._note_early_end(worker)
        job, said = _job_of(worker), worker.last_words()
        if not why:
            worker.reap()
        how = self._drop(worker)
        if worker.taken:
            self._early_ends = 0
            yield Decoded(_failed(job, DecodeWorkerDiedError(job.path, how=why or how), said))
        else:
            self._returned.append(job)

    def _note_early_end(self, worker: WorkerProcess) -> None:
        """A worker that was killed before it began with a video is replaced, as long as that is no rule.

        Raises:
            DecodeWorkerStartError: It ended by itself before it was ready; or so did too many, one after the other.
        """
        worker.reap()
        self._early_ends += 1
        was_killed = (worker.process.returncode or 0) < 0  # by a signal
        if self._early_ends > _MOST_EARLY_ENDS or not (worker.ready or was_killed):
            raise self._no_start(worker)

    def _no_start(self, worker: WorkerProcess) -> DecodeWorkerStartError:
        said = worker.last_words().splitlines()[-1:]
        return DecodeWorkerStartError(self._drop(worker), "".join(said))

    def _drop(self, worker: WorkerProcess) -> str:
        self._workers.remove(worker)
        worker.job = None
        return worker.stop()


def _job_of(worker: WorkerProcess) -> DecodeJob:
    if worker.job is None:
        raise RuntimeError("a worker reported on a video that it was not given")
    return worker.job


def _failed(job: DecodeJob, why: Fault | ExtractionError, said: str) -> Outcome:
    fault = why if isinstance(why, Fault) else Fault(type(why).__name__, str(why), permanent=why.permanent)
    details = "\n".join(part for part in (fault.traceback.strip(), said) if part)
    message = f"Record {job.record_id}: {fault.message or fault.error_type}"
    return Outcome(
        job.record_id,
        failure=Failure(
            job.record_id, job.content_version, "decode", fault.error_type, message, fault.permanent, details
        ),
    )
