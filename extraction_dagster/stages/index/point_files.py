"""Reading files of points, in the format that the end of their name says: Parquet, or lines of JSON, packed or not.

    points.parquet                                 points.jsonl, points.jsonl.gz
    metadata  {"extraction": {"dim": 512, …}}      line 1  {"extraction": {"dim": 512, …}}
    row 1     id, record_id, …, payload, vector    line 2  {"id": …, "payload": {"record_id": 7, …}, "vector": […]}

A file that is read may be anybody's: what it unpacks to is bounded before it is unpacked, line by line or row group by
row group. What its points say is looked at by `importing`.
"""

from __future__ import annotations

import abc
import contextlib
import gzip
import json
import stat
import zlib
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from extraction_dagster.errors import one_line
from extraction_dagster.errors.index import PointFileError
from extraction_dagster.settings import RESERVED_PAYLOAD_KEYS
from extraction_dagster.shards.checked_parquet import CheckedParquet, Layout

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from extraction_dagster.stages.index.protocol import CollectionSpec

ENDINGS = (".parquet", ".jsonl", ".jsonl.gz")
POINTS_PER_GROUP = 2048
_DISTANCE = "Cosine"
_MOST_DIM = 65_536  # a server takes no more
_LONGEST_HEAD = 65_536
_LONGEST_FOOTER = 64 * 2**20
_MOST_AT_ONCE = 2**25
_ENDS_WITH = 8  # bytes: a Parquet file's length of its footer, and PAR1
_TEXTS = ("id", "platform", "video_code", "path", "created_at", "generation", "payload")
# What a packed or damaged file ends in, besides ValueError.
_BROKEN = (ValueError, OSError, EOFError, zlib.error, pa.ArrowException, KeyError, TypeError, RecursionError)


def ending_of(path: Path) -> str | None:
    """Which format a file's name asks for; None for none of ours."""
    name = path.name.lower()
    return next((ending for ending in reversed(ENDINGS) if name.endswith(ending)), None)


@dataclass(frozen=True, slots=True)
class Head:
    """What a file says of its points.

    Attributes:
        collection: The name of the collection that they were taken from.
        dim: Length of each vector.
        fingerprint: The embedding's fingerprint.
        source: The identity of the source table; empty in files of earlier releases, and where nobody had said so.
        distance: What the vectors are compared by.
        points: How many there are; None where the file's own format says so.
    """

    collection: str
    dim: int
    fingerprint: str
    source: str = ""
    distance: str = _DISTANCE
    points: int | None = None

    @classmethod
    def of(cls, spec: CollectionSpec, *, points: int) -> Self:
        """The head of an export."""
        return cls(spec.name, spec.dim, spec.fingerprint, str(spec.source), points=points)

    @classmethod
    def parse(cls, text: bytes | str) -> Self:
        """Read it.

        Raises:
            ValueError: It is none.
        """
        found = json.loads(text)
        known = cls.__dataclass_fields__
        if not isinstance(found, dict) or not {"collection", "dim", "fingerprint"} <= found.keys() <= set(known):
            raise ValueError("it is no export of points")
        found["dim"] = int(found["dim"]) if isinstance(found["dim"], str) else found["dim"]
        texts = all(type(found.get(name, "")) is str for name in ("collection", "fingerprint", "source", "distance"))
        count = found.get("points")
        if not texts or type(found["dim"]) is not int or not (count is None or (type(count) is int and count >= 0)):
            raise ValueError("what it says of itself can't be understood")
        if not 1 <= found["dim"] <= _MOST_DIM or found.get("distance", _DISTANCE) != _DISTANCE:
            raise ValueError(
                f"its vectors have {found['dim']} dimensions compared by {one_line(found.get('distance', _DISTANCE))}, "
                f"expected 1 to {_MOST_DIM} by {_DISTANCE}"
            )
        return cls(**found)


@dataclass(frozen=True, slots=True)
class RawPoints:
    """Points as a file has them, nothing of which was looked at but its size.

    Attributes:
        first: The row, or the line, of the first one.
        ids, payloads: N of each.
        vectors: float32, shape (N, dim).
    """

    first: int
    ids: list[Any]
    vectors: np.ndarray
    payloads: list[Any]


class PointFile(abc.ABC):
    """A file of points, open; its rows may be read again and again.

    Args:
        path: The file.
        most_bytes: Most bytes of what a point has besides its vector, as JSON.

    Raises:
        PointFileError: It can't be read, or is no export of points.
    """

    head: Head
    unit = "row"

    def __init__(self, path: Path, *, most_bytes: int) -> None:
        self.path, self._most_bytes = path, most_bytes
        self._file = _open(path)
        try:
            self.head = self._read_head()
        except _BROKEN as error:
            self.close()
            raise PointFileError(str(path), "", _why(error)) from error

    @property
    @abc.abstractmethod
    def points(self) -> int | None:
        """How many points it says it has."""

    @abc.abstractmethod
    def _read_head(self) -> Head: ...

    @abc.abstractmethod
    def _groups(self) -> Iterator[RawPoints]: ...

    @abc.abstractmethod
    def _where(self, first: int) -> str:
        """What could not be read, when the points before `first` could."""

    def read(self) -> Iterator[RawPoints]:
        """Its points, some at a time, from the first one on.

        Raises:
            PointFileError: It can't be read any further.
        """
        first, groups = 1, self._groups()
        while True:
            try:
                found = next(groups, None)
            except _BROKEN as error:
                raise PointFileError(str(self.path), self._where(first), _why(error)) from error
            if found is None:
                return
            yield found
            first = found.first + len(found.ids)

    def close(self) -> None:
        """Close it."""
        self._file.close()

    def __enter__(self) -> Self:
        """The file."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close it."""
        self.close()


def _open(path: Path) -> IO[bytes]:
    fix = "Give the name of a file that 'extraction points export' wrote."
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # a pipe would be waited for
            raise PointFileError(str(path), "", "it is no regular file", fix)
        return path.open("rb")
    except (OSError, ValueError) as error:
        raise PointFileError(str(path), "", _why(error), fix) from error


def open_point_file(path: Path, *, most_bytes: int) -> PointFile:
    """Open a file by its ending; see `PointFile`."""
    return (
        _ParquetFile(path, most_bytes=most_bytes)
        if ending_of(path) == ".parquet"
        else _LinesFile(path, most_bytes=most_bytes)
    )


class _ParquetFile(PointFile):
    def _read_head(self) -> Head:
        self._file.seek(0, 2)
        self._file.seek(max(self._file.tell() - _ENDS_WITH, 0))
        tail = self._file.read()
        if tail[4:] != b"PAR1" or int.from_bytes(tail[:4], "little") > _LONGEST_FOOTER:
            raise ValueError("it is no Parquet file, or cut short")
        self._file.seek(0)
        about = pq.read_metadata(self._file).metadata or {}
        head = Head.parse(about.get(b"extraction", b"null")[:_LONGEST_HEAD])
        types = dict.fromkeys(_TEXTS, pa.dictionary(pa.int32(), pa.string()))
        schema = pa.schema([(item.name, types.get(item.name, item.type)) for item in parquet_schema(head)])
        layout = Layout(
            schema,
            "ZSTD",
            dictionaries=schema.names,
            max_group_rows=POINTS_PER_GROUP,
            nullable=schema.names,
            list_sizes={"vector": head.dim},
            as_dictionaries=_TEXTS,
            max_group_bytes=POINTS_PER_GROUP * (8 * head.dim + 2 * self._most_bytes),
        )
        self._parquet = CheckedParquet(self._file, layout)
        return head

    @property
    def points(self) -> int:
        return sum(self._parquet.group_rows)

    def _where(self, first: int) -> str:
        last = first - 1
        for rows in self._parquet.group_rows:
            last += rows if last < first else 0
        return f"rows {first} to {last}" if last >= first else ""

    def _groups(self) -> Iterator[RawPoints]:
        first = 1
        for number, rows in enumerate(self._parquet.group_rows):
            if rows:
                yield self._raw(first, self._parquet.read(number))
            first += rows

    def _raw(self, first: int, table: pa.Table) -> RawPoints:
        for name in _TEXTS:  # a text stands in the file once, and in memory as often as rows name it
            for chunk in table[name].chunks:
                longest = pc.max(pc.binary_length(chunk.dictionary)).as_py()
                if (longest or 0) > self._most_bytes:
                    raise ValueError(f"a {name} has {longest} bytes, expected at most {self._most_bytes}")
        columns = {name: table[name].to_pylist() for name in table.schema.names if name != "vector"}
        vector = table["vector"].combine_chunks()
        flat = vector.flatten() if isinstance(vector, pa.FixedSizeListArray) else pa.array([], pa.float32())
        if vector.null_count or flat.null_count or len(flat) != len(table) * self.head.dim:
            raise ValueError("a vector is missing, or a number of one")
        payloads = [self._payload(first + at, text) for at, text in enumerate(columns["payload"])]
        for at, payload in enumerate(payloads):
            payload |= {key: columns[key][at] for key in RESERVED_PAYLOAD_KEYS}
        vectors = flat.to_numpy(zero_copy_only=False).reshape(len(table), self.head.dim)
        return RawPoints(first, columns["id"], vectors, payloads)

    def _payload(self, row: int, text: str | None) -> dict[str, Any]:
        """The further columns of a row."""
        try:
            found = {} if text is None else parse_json(text)
        except ValueError as error:
            raise PointFileError(str(self.path), f"row {row}", f"its payload is no JSON: {_why(error)}") from error
        if not isinstance(found, dict) or not found.keys().isdisjoint(RESERVED_PAYLOAD_KEYS):
            why = "its payload is no object, or holds a key of every point"
            raise PointFileError(str(self.path), f"row {row}", why)
        return found


class _LinesFile(PointFile):
    unit = "line"

    def _read_head(self) -> Head:
        line = next(self._lines(_LONGEST_HEAD), b"")
        found = parse_json(line) if line.startswith(b"{") else None
        if not isinstance(found, dict) or found.keys() != {"extraction"}:
            raise ValueError("its first line says nothing of an export of points")
        head = Head.parse(json.dumps(found["extraction"]))
        if head.points is None:
            raise ValueError("its first line does not say how many points it has")
        return head

    @property
    def points(self) -> int | None:
        return self.head.points

    def _where(self, first: int) -> str:
        return f"line {max(first, 2)} or after"

    def _groups(self) -> Iterator[RawPoints]:
        number, size, some = 1, 0, list[dict[str, Any]]()
        lines = self._lines(_LONGEST_HEAD + 32 * self.head.dim + 2 * self._most_bytes)
        next(lines, None)
        for line in lines:
            number, size = number + 1, size + len(line)
            try:
                some.append(self._point(line))
            except _BROKEN as error:
                raise PointFileError(str(self.path), f"line {number}", _why(error)) from error
            if len(some) == POINTS_PER_GROUP or size > _MOST_AT_ONCE:
                yield self._raw(number, some)
                size, some = 0, []
        if some:
            yield self._raw(number, some)
        if number - 1 != self.head.points:
            raise ValueError(f"it has {number - 1} points, and its first line says {self.head.points}")

    def _point(self, line: bytes) -> dict[str, Any]:
        found = parse_json(line)
        if not isinstance(found, dict) or found.keys() != {"id", "payload", "vector"}:
            raise ValueError("it is no object of id, payload and vector")
        vector = found["vector"]
        if not isinstance(vector, list) or len(vector) != self.head.dim:
            length = f"{len(vector)} numbers" if isinstance(vector, list) else "none"
            raise ValueError(f"its vector has {length}, expected {self.head.dim}")
        if any(type(number) not in {float, int} for number in vector):
            raise ValueError("its vector holds what is no number")
        with np.errstate(over="ignore"):
            try:
                found["vector"] = np.array(vector, np.float64).astype(np.float32)
            except OverflowError:
                raise ValueError("its vector holds a number that is too large") from None
        return found

    def _raw(self, last: int, found: list[dict[str, Any]]) -> RawPoints:
        ids, vectors, payloads = ([item[key] for item in found] for key in ("id", "vector", "payload"))
        return RawPoints(last - len(found) + 1, ids, np.stack(vectors), payloads)

    def _lines(self, most_bytes: int) -> Iterator[bytes]:
        """Its lines, from the first one on."""
        self._file.seek(0)
        packed = self.path.name.lower().endswith(".gz")
        with gzip.GzipFile(fileobj=self._file) if packed else contextlib.nullcontext(self._file) as lines:
            while line := lines.readline(most_bytes + 1):
                if len(line) > most_bytes:
                    raise ValueError(f"a line has more than {most_bytes} bytes")
                yield line


def parse_json(text: bytes | str) -> Any:  # noqa: ANN401 - any JSON document
    """A JSON document without NaN and infinity, which JSON lacks.

    Raises:
        ValueError: It is none, or nested too deeply.
    """
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except RecursionError:
        raise ValueError("its JSON is nested too deeply") from None


def parquet_schema(head: Head) -> pa.Schema:
    """The columns of a Parquet file of points."""
    types = {"record_id": pa.int64(), "frame_number": pa.int64(), "frame_second": pa.float64()}
    fields = [("id", pa.string()), *((key, types.get(key, pa.string())) for key in RESERVED_PAYLOAD_KEYS)]
    return pa.schema([*fields, ("payload", pa.string()), ("vector", pa.list_(pa.float32(), head.dim))])


def _refuse_constant(name: str) -> None:
    raise ValueError(f"its JSON holds {name}")


def _why(error: BaseException) -> str:
    said = (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
    return one_line(" ".join(said.split()))
