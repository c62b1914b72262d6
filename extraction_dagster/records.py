"""The records that pass between rooms.

Each record checks its own invariants once, when it is built, so that the rooms need no checks of their own.
A refusal prints every shape, so that the culprit can be read off the message.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Literal, NoReturn

from extraction_dagster.addresses import capped
from extraction_dagster.errors import PartitionKeyError, RecordShapeError
from extraction_dagster.late import np

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

Stage = Literal["catalog", "fetch", "decode", "embed", "index"]
_KEY = re.compile(r"(-?(?:0|[1-9][0-9]{0,18}))-(-?(?:0|[1-9][0-9]{0,18}))")  # BIGINT has up to 19 digits
_LONGEST_MESSAGE, _LONGEST_DETAILS = 4_000, 16_000
MIN_INT, MAX_INT = -(2**63), 2**63 - 1  # of ids, and of the numbers that databases and stores hold


@dataclass(frozen=True, order=True, slots=True)
class IdRange:
    """A contiguous, inclusive range of ids; the partition key is `"first-last"`.

    Examples:
        `IdRange(12346, 13345).partition_key == "12346-13345"`; negative ids parse too: `"-5--1"`.
    """

    first_id: int
    last_id: int

    def __post_init__(self) -> None:
        """Refuse a range that is empty or does not fit BIGINT."""
        if not MIN_INT <= self.first_id <= self.last_id <= MAX_INT:
            why = "the first id must not be greater than the last, and both must fit BIGINT"
            raise PartitionKeyError(self.partition_key, why)

    @property
    def partition_key(self) -> str:
        """The range as Dagster's partition key."""
        return f"{self.first_id}-{self.last_id}"

    @classmethod
    def parse(cls, key: str) -> IdRange:
        """Read a partition key.

        Raises:
            PartitionKeyError: The key is not two decimal integers in ascending order joined by `-`.
        """
        match = _KEY.fullmatch(key)
        if match is None or "-0" in match.groups():
            raise PartitionKeyError(key, "it is not two integers joined by '-'")
        return cls(int(match[1]), int(match[2]))

    def __contains__(self, record_id: int) -> bool:
        """Whether the id lies in the range."""
        return self.first_id <= record_id <= self.last_id

    def __str__(self) -> str:
        """The partition key."""
        return self.partition_key


@dataclass(frozen=True, slots=True)
class VideoRow:
    """A row of the source table: which video, and where its file lies.

    Attributes:
        record_id: The row's id.
        uri: Where the file lies: a path or a URL, as configured.
        platform: Payload: where the video comes from.
        code: Payload: the video's code on its platform.
        content_version: Changes whenever the file behind the row changes; empty when the table does not say.
        payload: Further payload columns, by name.
        address: 16 hex digits of the file's resolved address; empty when it is not known.
        claim: The number under which the row was planned; 0 when the ledger did not know it.
    """

    record_id: int
    uri: str
    platform: str | None = None
    code: str | None = None
    content_version: str = ""
    payload: Mapping[str, Any] = field(default_factory=dict)
    address: str = ""
    claim: int = 0


def _refuse(record: str, why: str, **values: object) -> NoReturn:
    raise RecordShapeError(record, why, ", ".join(f"{name} {_shown(value)}" for name, value in values.items()))


def _shown(value: object) -> str:
    """An array by dtype and shape, JPEGs by their number, anything else as it is."""
    if isinstance(value, np.ndarray):
        return f"{value.dtype} {value.shape}"
    if isinstance(value, list | tuple) and value and isinstance(value[0], bytes):
        return f"{len(value)} JPEGs"
    return repr(value)


class _Arrays:
    """A record of arrays, printed without their content: `FrameBatch(data: uint8 (2, 240, 320, 3), …)`."""

    __slots__ = ()

    def __repr__(self) -> str:
        """Dtypes and shapes in place of arrays, the number of JPEGs in place of their bytes."""
        shown = ", ".join(f"{item.name}: {_shown(getattr(self, item.name))}" for item in fields(self) if item.repr)  # type: ignore[arg-type]  # each is a dataclass
        return f"{type(self).__name__}({shown})"


@dataclass(frozen=True, slots=True, repr=False)
class FrameBatch(_Arrays):
    """Frames of one video, in display order.

    Attributes:
        data: uint8, shape (N, H, W, 3), RGB.
        pts_seconds: float64, shape (N,), ascending: when each frame is shown.
        target_seconds: float64, shape (N,): the time that was asked for.
        frame_number: int64, shape (N,), strictly ascending: the frame's index in the video's display order.
    """

    data: np.ndarray
    pts_seconds: np.ndarray
    target_seconds: np.ndarray
    frame_number: np.ndarray

    def __post_init__(self) -> None:
        """Refuse mismatched shapes, dtypes and orders."""
        arrays = {name: getattr(self, name) for name in ("data", "pts_seconds", "target_seconds", "frame_number")}
        if self.data.dtype != np.uint8 or self.data.ndim != 4 or self.data.shape[-1] != 3:  # noqa: PLR2004 - NHWC
            _refuse("FrameBatch", "data must be uint8 (N, H, W, 3)", **arrays)
        _check_times("FrameBatch", len(self.data), arrays)

    def __len__(self) -> int:
        """The number of frames, N."""
        return len(self.data)

    def __getitem__(self, chosen: slice | np.ndarray) -> FrameBatch:
        """Some of the frames: a slice, a mask of shape (N,), or ascending indexes."""
        return replace(self, **{item.name: getattr(self, item.name)[chosen] for item in fields(self)})


@dataclass(frozen=True, slots=True, repr=False)
class EncodedFrames(_Arrays):
    """One video's frames as they are kept: one JPEG each, in display order.

    Attributes:
        record_id: The row's id.
        content_version: The version of the row that was decoded.
        jpegs: N JPEG files, RGB, all of one size.
        pts_seconds: float64, shape (N,), ascending.
        target_seconds: float64, shape (N,).
        frame_number: int64, shape (N,), strictly ascending.
        width_px: Width of every stored frame.
        height_px: Height of every stored frame.
        duration_seconds: What the container claims; None when it claims nothing.
        partial: Why the video is incomplete (a flagged partial), or None.
        address: 16 hex digits of the file's resolved address; empty when it is not known.
        claim: The number under which the row was planned.
        notes: How the file was understood, in words, for a person who looks; not stored.
    """

    record_id: int
    content_version: str
    jpegs: Sequence[bytes]
    pts_seconds: np.ndarray
    target_seconds: np.ndarray
    frame_number: np.ndarray
    width_px: int
    height_px: int
    duration_seconds: float | None = None
    partial: str | None = None
    address: str = ""
    claim: int = 0
    notes: tuple[str, ...] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        """Refuse a video without frames, and mismatched lengths."""
        arrays = {name: getattr(self, name) for name in ("pts_seconds", "target_seconds", "frame_number")}
        if not self.jpegs:
            _refuse("EncodedFrames", "a video must have at least one frame", **arrays)
        _check_times("EncodedFrames", len(self.jpegs), arrays)

    def __len__(self) -> int:
        """The number of frames, N."""
        return len(self.jpegs)


def _check_times(record: str, length: int, arrays: Mapping[str, np.ndarray]) -> None:
    times = ("pts_seconds", "target_seconds")
    if any(arrays[name].shape != (length,) for name in (*times, "frame_number")):
        _refuse(record, f"every array must have {length} entries", **arrays)
    if any(arrays[name].dtype != np.float64 for name in times) or arrays["frame_number"].dtype != np.int64:
        _refuse(record, "times must be float64 and frame_number int64", **arrays)
    pts_seconds = arrays["pts_seconds"]
    if not (np.all(np.isfinite(pts_seconds)) and np.all(np.diff(pts_seconds) >= 0)):
        _refuse(record, "pts_seconds must be finite and ascending", **arrays)
    if not np.all(np.diff(arrays["frame_number"]) > 0):
        _refuse(record, "frame_number must be strictly ascending", **arrays)


@dataclass(frozen=True, slots=True, repr=False)
class EmbeddingBatch(_Arrays):
    """Vectors of frames, L2-normalised; the frames of a record lie side by side.

    Attributes:
        vectors: float16, shape (N, dim).
        record_id: int64, shape (N,).
        frame_number: int64, shape (N,).
        pts_seconds: float64, shape (N,).
    """

    vectors: np.ndarray
    record_id: np.ndarray
    frame_number: np.ndarray
    pts_seconds: np.ndarray

    def __post_init__(self) -> None:
        """Refuse mismatched shapes and dtypes, and vectors that are not finite."""
        arrays = {name: getattr(self, name) for name in ("vectors", "record_id", "frame_number", "pts_seconds")}
        if self.vectors.dtype != np.float16 or self.vectors.ndim != 2:  # noqa: PLR2004 - (N, dim)
            _refuse("EmbeddingBatch", "vectors must be float16 (N, dim)", **arrays)
        if any(array.shape[:1] != (len(self.vectors),) for array in arrays.values()):
            _refuse("EmbeddingBatch", f"every array must have {len(self.vectors)} entries", **arrays)
        if self.record_id.dtype != np.int64 or self.frame_number.dtype != np.int64:
            _refuse("EmbeddingBatch", "record_id and frame_number must be int64", **arrays)
        if not np.all(np.isfinite(self.vectors)):
            _refuse("EmbeddingBatch", "vectors must be finite", **arrays)

    def __len__(self) -> int:
        """The number of vectors, N."""
        return len(self.vectors)

    def __getitem__(self, chosen: slice | np.ndarray) -> EmbeddingBatch:
        """Some of the vectors: a slice, a mask of shape (N,), or indexes."""
        return replace(self, **{item.name: getattr(self, item.name)[chosen] for item in fields(self)})

    @property
    def dim(self) -> int:
        """The length of each vector."""
        return int(self.vectors.shape[1])

    def of_records(self, record_ids: Collection[int]) -> EmbeddingBatch:
        """The vectors of some records, in the same order."""
        return self[np.isin(self.record_id, np.array(list(record_ids), np.int64))]


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a record gave nothing.

    Attributes:
        record_id: The row's id.
        content_version: The version of the row that failed.
        stage: The step that failed.
        error_type: The error's class name.
        message: One clear line: the culprit, what was got, what was expected.
        permanent: Trying again can't help (no video stream, too many pixels, forbidden URL): park at once.
        details: More for a person who digs: the codec library's own words, say.
    """

    record_id: int
    content_version: str
    stage: Stage
    error_type: str
    message: str
    permanent: bool = False
    details: str = ""

    def __post_init__(self) -> None:
        """Cut texts to what is kept of any error, here and nowhere else."""
        object.__setattr__(self, "message", capped(self.message, _LONGEST_MESSAGE))
        object.__setattr__(self, "details", capped(self.details, _LONGEST_DETAILS))


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one record in the decode stage: frames, or a failure; never both, never neither."""

    record_id: int
    frames: EncodedFrames | None = None
    failure: Failure | None = None

    def __post_init__(self) -> None:
        """Refuse an outcome with both or neither."""
        if (self.frames is None) == (self.failure is None):
            _refuse("Outcome", "either frames or a failure", record_id=self.record_id)


def fingerprint(**parts: object) -> str:
    """A short, stable hash of settings, in any order: 16 hex digits of sha256 over canonical JSON."""
    canonical = json.dumps(parts, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]
