"""What a worker and its parent say to each other: a small fixed format, from which nothing but data can come.

    8 bytes         8 bytes       header            body
    header's size   body's size   a JSON object     bytes

The header's `kind` says what it is: `job` to the worker, with the video's open descriptor beside it; `ready`, `taken`,
`frames` or `failed` to the parent. Only `frames` has a body: for N frames pts_seconds, target_seconds (float64, shape
(N,) each), frame_number, the JPEGs' sizes (int64, shape (N,) each), then the JPEGs.

The parent believes nothing: sizes are bounded by what the job asked for before a byte is kept, and what a report says
is held against the job.
"""

from __future__ import annotations

import json
import math
import re
import struct
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import simplejpeg

from extraction_dagster.errors import RecordShapeError
from extraction_dagster.media import SUBSAMPLING
from extraction_dagster.records import EncodedFrames
from extraction_dagster.stages.decode.decoders.decoder import DecodeLimits
from extraction_dagster.stages.decode.quality import Quality
from extraction_dagster.stages.decode.sampling import Sampling
from extraction_dagster.stages.decode.task import DecodeJob

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Mapping

Header = dict[str, Any]
SIZES = struct.Struct("!QQ")
MAX_HEADER_BYTES = 2**18
_CHUNK_BYTES = 2**20
_FRAME_BYTES = 4 * 8  # of the body's four arrays
_MAX_TEXT, _MAX_TRACEBACK, _MAX_NAME = 8000, 20_000, 100
_MAX_NOTES, _MAX_NOTE = 20, 500
_MAX_SIDE_PX = 65_500  # of a JPEG
_JPEG_END = b"\xff\xd9"
_SPARE_SECONDS = 1.0  # a video may last a frame longer than its frames' times say
_ERROR_NAME = re.compile(rf"[A-Za-z_][A-Za-z0-9_.]{{0,{_MAX_NAME - 1}}}")
_RECORDS = {"sampling": Sampling, "limits": DecodeLimits, "quality": Quality}


class ReportError(Exception):
    """A worker says what no worker of ours would; caught by the pool, never seen outside."""


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
    """What became of one task: frames or a fault, and the CPU time that it took."""

    frames: EncodedFrames | None
    fault: Fault | None
    cpu_seconds: float


def send(wire: socket.socket, header: Header, *body: bytes) -> None:
    """Send a message, all of it.

    Raises:
        OSError: The other side is gone, or takes nothing for longer than the socket's timeout.
    """
    said = json.dumps(header).encode()
    wire.sendall(SIZES.pack(len(said), sum(map(len, body))) + said)
    for part in body:
        wire.sendall(part)


class Inbox:
    """What has arrived of a worker's next message.

    The parent never waits for the rest of a message: it takes what is there, so that a worker that stops in the middle
    of one costs no more than its video's time.
    """

    def __init__(self) -> None:
        self._arrived = bytearray()
        self._header: Header | None = None

    def take(self, wire: socket.socket, most_bytes: Callable[[Header], int]) -> tuple[Header, memoryview] | None:
        """The next message, or None where a part of it is missing.

        Args:
            wire: The socket, which does not wait.
            most_bytes: How long the body of a message with this header may be.

        Returns:
            The header, and the body.

        Raises:
            EOFError: The other side is gone.
            ReportError: It is no message, or too long.
            MemoryError: It does not fit this process.
        """
        while missing := self._missing(most_bytes):
            try:
                part = wire.recv(min(missing, _CHUNK_BYTES))
            except BlockingIOError:
                return None
            if not part:
                raise EOFError
            self._arrived += part
        message, header = self._arrived, self._header or {}
        self._arrived, self._header = bytearray(), None
        return header, memoryview(message)[SIZES.size + SIZES.unpack_from(message)[0] :]

    def _missing(self, most_bytes: Callable[[Header], int]) -> int:
        arrived = len(self._arrived)
        if arrived < SIZES.size:
            return SIZES.size - arrived
        size, body = SIZES.unpack_from(self._arrived)
        if size > MAX_HEADER_BYTES:
            raise ReportError(f"a header of {size} bytes, expected at most {MAX_HEADER_BYTES}")
        start = SIZES.size + size
        if arrived < start:
            return int(start - arrived)
        if self._header is None:
            self._header = parse_header(self._arrived[SIZES.size : start])
            if body > (most := most_bytes(self._header)):
                raise ReportError(f"a message of {body} bytes, expected at most {most}")
        return int(start + body - arrived)


def parse_header(content: bytes | bytearray) -> Header:
    """Read a message's header.

    Raises:
        ReportError: It is no JSON object with a `kind`.
    """
    try:
        header = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ReportError(f"a header that is no JSON ({type(error).__name__})") from error
    if not isinstance(header, dict) or not isinstance(header.get("kind"), str):
        raise ReportError("a header without a kind")
    return header


def job_header(job: DecodeJob, unopened: str | None) -> Header:
    """A job as the worker is told it; `unopened` says why its file does not come along."""
    return {"kind": "job", "unopened": unopened, "job": asdict(job)}


def read_job(header: Header) -> DecodeJob:
    """The job in a header that the parent wrote."""
    fields = header["job"]
    return DecodeJob(**{**fields, **{name: kind(**fields[name]) for name, kind in _RECORDS.items()}})


def report_message(report: Report) -> tuple[Header, list[bytes]]:
    """A report as the parent is told it: the header, and the body in parts."""
    fault, frames = report.fault, report.frames
    if fault is not None:
        said = {**asdict(fault), "message": fault.message[:_MAX_TEXT], "error_type": fault.error_type[:_MAX_NAME]}
        said["traceback"] = fault.traceback[-_MAX_TRACEBACK:]
        return {"kind": "failed", "cpu_seconds": report.cpu_seconds, **said}, []
    if not isinstance(frames, EncodedFrames):
        raise TypeError(f"the task gave {type(frames).__name__}, expected EncodedFrames")
    header = {
        "kind": "frames",
        "cpu_seconds": report.cpu_seconds,
        "record_id": frames.record_id,
        "content_version": frames.content_version,
        "num_frames": len(frames),
        "width_px": frames.width_px,
        "height_px": frames.height_px,
        "duration_seconds": frames.duration_seconds,
        "partial": frames.partial and frames.partial[:_MAX_TEXT],
        "notes": [note[:_MAX_NOTE] for note in frames.notes[:_MAX_NOTES]],
    }
    times = (np.ascontiguousarray(array, "<f8").tobytes() for array in (frames.pts_seconds, frames.target_seconds))
    sizes = np.array([len(jpeg) for jpeg in frames.jpegs], "<i8").tobytes()
    return header, [*times, np.ascontiguousarray(frames.frame_number, "<i8").tobytes(), sizes, *frames.jpegs]


def most_bytes_for(job: DecodeJob | None) -> Callable[[Header], int]:
    """How long the body of a message may be, of a worker that has this job: what its frames need at the very most.

    Raises:
        ReportError: From what is returned: the frames are not those that were asked for.
    """

    def most_bytes(header: Header) -> int:
        if header["kind"] != "frames":
            return 0
        if job is None:
            _refuse("frames of no video")
        count, width, height = _shape(header, job)
        return count * (_FRAME_BYTES + _most_jpeg_bytes(width, height))

    return most_bytes


def read_report(header: Header, body: memoryview, job: DecodeJob) -> Report:
    """A worker's report on a job, held against the job.

    Raises:
        ReportError: It is not about the job, or not what was asked for.
    """
    cpu_seconds = _number(header, "cpu_seconds", most=1e9)
    if header["kind"] == "failed":
        return Report(None, _fault(header), cpu_seconds)
    if header["kind"] != "frames":
        _refuse("neither the next step nor a report")
    if header.get("record_id") != job.record_id or header.get("content_version") != job.content_version:
        _refuse("frames of another video")
    count, width, height = _shape(header, job)
    if len(body) < count * _FRAME_BYTES:
        _refuse(f"{len(body)} bytes for {count} frames")
    pts, target = (np.frombuffer(body, "<f8", count, place * 8 * count).astype(np.float64) for place in (0, 1))
    number, sizes = (np.frombuffer(body, "<i8", count, place * 8 * count).astype(np.int64) for place in (2, 3))
    _check_times(job, pts, target, number)
    claimed, partial = header.get("duration_seconds"), header.get("partial")
    try:
        frames = EncodedFrames(
            record_id=job.record_id,
            content_version=job.content_version,
            jpegs=_jpegs(body[count * _FRAME_BYTES :], sizes.tolist(), width, height),
            pts_seconds=pts,
            target_seconds=target,
            frame_number=number,
            width_px=width,
            height_px=height,
            duration_seconds=None if claimed is None else _number(header, "duration_seconds"),
            partial=None if partial is None else _text(header, "partial", _MAX_TEXT),
            notes=_notes(header),
        )
    except RecordShapeError as error:
        raise ReportError(str(error)) from error
    return Report(frames, None, cpu_seconds)


def _shape(header: Header, job: DecodeJob) -> tuple[int, int, int]:
    """The number of frames, their width and their height, each within what was asked for."""
    count = _count(header, "num_frames", job.sampling.most_frames)
    width, height = (_count(header, name, _MAX_SIDE_PX) for name in ("width_px", "height_px"))
    if min(width, height) > job.short_side_px or count * width * height * 3 > job.limits.max_batch_bytes:
        _refuse(f"{count} frames of {width}x{height}")
    return count, width, height


def _most_jpeg_bytes(width: int, height: int) -> int:
    """What libjpeg-turbo can need at the very most, colours at full resolution: its own bound, tjBufSize."""
    return -(-width // 16) * -(-height // 16) * 256 * 6 + 2048


def _check_times(job: DecodeJob, pts: np.ndarray, target: np.ndarray, number: np.ndarray) -> None:
    longest = job.limits.max_duration_seconds + _SPARE_SECONDS
    # Times count from the file's start, and pictures may start long after sound.
    late = float(pts[0]) if np.all(np.isfinite(pts)) else math.inf
    if not (0 <= late < math.inf and np.all(pts - late <= longest) and np.all(number >= 0)):
        _refuse("frames outside of the video")
    if not (np.all(target >= 0) and np.all(target <= late + 2 * longest)):  # a middle may lie past the last frame
        _refuse("times that nobody asked for")


def _jpegs(body: memoryview, sizes: list[int], width: int, height: int) -> list[bytes]:
    if any(size <= 0 for size in sizes) or sum(sizes) != len(body):
        _refuse("JPEGs of other sizes than they have")
    jpegs, start = [], 0
    for size in sizes:
        jpeg = bytes(body[start : start + size])
        start += size
        try:
            found = simplejpeg.decode_jpeg_header(jpeg)
        except ValueError as error:
            raise ReportError("a picture that is no JPEG") from error
        if found != (height, width, "YCbCr", SUBSAMPLING) or not jpeg.endswith(_JPEG_END):
            _refuse(f"a JPEG that is not the {width}x{height} that the report says")
        jpegs.append(jpeg)
    return jpegs


def _fault(header: Header) -> Fault:
    permanent, out_of_memory = header.get("permanent"), header.get("out_of_memory")
    if not isinstance(permanent, bool) or not isinstance(out_of_memory, bool):
        _refuse("a fault without its kind")
    name = _text(header, "error_type", _MAX_NAME)
    if not _ERROR_NAME.fullmatch(name):
        _refuse("an error without a name")
    message, traceback = _text(header, "message", _MAX_TEXT), _text(header, "traceback", _MAX_TRACEBACK)
    return Fault(name, message, permanent=permanent, traceback=traceback, out_of_memory=out_of_memory)


def _count(header: Mapping[str, object], name: str, most: int) -> int:
    value = header.get(name)
    if type(value) is not int or not 1 <= value <= most:
        _refuse(f"{name} {value!r:.50}, expected 1 to {most}")
    return value


def _number(header: Mapping[str, object], name: str, most: float = math.inf) -> float:
    value = header.get(name)
    if type(value) not in {int, float} or not (math.isfinite(value) and 0 <= value <= most):  # type: ignore[arg-type, operator]  # looked at first
        _refuse(f"{name} {value!r:.50}, expected a number")
    return float(value)  # type: ignore[arg-type]


def _text(header: Mapping[str, object], name: str, most: int) -> str:
    value = header.get(name)
    if not isinstance(value, str) or len(value) > most:
        _refuse(f"{name} that is no text of at most {most} characters")
    return value


def _notes(header: Mapping[str, object]) -> tuple[str, ...]:
    notes = header.get("notes")
    if not isinstance(notes, list) or len(notes) > _MAX_NOTES:
        _refuse(f"notes that are no list of at most {_MAX_NOTES}")
    if not all(isinstance(note, str) and len(note) <= _MAX_NOTE for note in notes):
        _refuse(f"a note that is no text of at most {_MAX_NOTE} characters")
    return tuple(notes)


def _refuse(got: str) -> NoReturn:
    raise ReportError(got)
