"""Points back from a file: all of it is looked at before anything is written, and written again only where it differs.

file        of this embedding, of this source table, with ids as ours: or it is refused, by its row
record 7    the collection has none of it, or points of the same generation: those that are missing are written
record 8    the collection has it from another version, or other settings: what is there stays, and is counted
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from extraction_dagster.addresses import shown_address
from extraction_dagster.errors import one_line
from extraction_dagster.errors.index import PointFileError, PointsMissingError
from extraction_dagster.records import MAX_INT, MIN_INT
from extraction_dagster.settings import RESERVED_PAYLOAD_KEYS
from extraction_dagster.stages.catalog.database import is_text
from extraction_dagster.stages.catalog.lengths import size_bytes
from extraction_dagster.stages.catalog.source_rows import is_deep
from extraction_dagster.stages.index.points import NORM_TOLERANCE, PointBatch, PointFilter, point_id
from extraction_dagster.stages.index.protocol import MAX_POINTS_PER_CALL

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from extraction_dagster.settings import Settings
    from extraction_dagster.stages.index.point_files import Head, PointFile, RawPoints
    from extraction_dagster.stages.index.protocol import CollectionSpec, PointStore

# A byte that is no text is spelled out in a payload, as six.
_SPELLED_OUT = 2
_CREATED_AT = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(?:\.\d{1,9})?Z", re.ASCII)
_GENERATION = re.compile(r"[A-Za-z0-9_-]{1,64}", re.ASCII)
_ROUNDING = 2e-3  # of a number of a unit vector that was kept as float16, twice
_MOST_BYTES = 2**22
_MOST_KNOWN = 200_000  # records whose generation is remembered while a file is read
_RECORDS_KEPT = 5


@dataclass(frozen=True, slots=True)
class Caps:
    """The most bytes of what a point says, as the settings bound what a row may say."""

    label: int
    address: int
    payload: int

    @classmethod
    def of(cls, settings: Settings) -> Caps:
        """Those of the settings, and room for bytes that are spelled out."""
        caps = (settings.max_label_bytes, settings.max_address_bytes, settings.max_payload_bytes)
        return cls(*(_SPELLED_OUT * cap for cap in caps))

    @property
    def most_bytes(self) -> int:
        """Of all texts of a point together."""
        return 2 * self.label + self.address + self.payload


@dataclass(slots=True)
class Imported:
    """What became of the points of a file.

    Attributes:
        written, unchanged, refused: How many points were written, were there already, were left out because the
            collection has their record from something else.
        refused_records: A few of the records that were left out.
    """

    written: int = 0
    unchanged: int = 0
    refused: int = 0
    refused_records: list[int] = field(default_factory=list)

    @property
    def points(self) -> int:
        """The points of the file."""
        return self.written + self.unchanged + self.refused


def require_fit(path: str, head: Head, spec: CollectionSpec) -> None:
    """See that a file's vectors may lie in a collection.

    Raises:
        PointFileError: They are of another embedding.
    """
    if (head.dim, head.fingerprint) != (spec.dim, spec.fingerprint):
        got, expected = (f"dim {item.dim}, fingerprint {one_line(item.fingerprint)}" for item in (head, spec))
        why = f"its vectors are of {got}, and those of collection {spec.name!r} would be of {expected}"
        fix = "Set EXTRACTION_MODEL and what goes with it as they were when it was exported."
        raise PointFileError(path, "", why, fix)


def check_points(file: PointFile, caps: Caps, *, on_checked: Callable[[int], None] | None = None) -> int:
    """Look at every point of a file; returns how many there are.

    Raises:
        PointFileError: One of them can't be of ours.
    """
    checked = 0
    for batch in _batches(file, caps):
        checked += len(batch)
        if on_checked is not None:
            on_checked(checked)
    return checked


def import_points(
    store: PointStore, file: PointFile, caps: Caps, *, on_done: Callable[[int], None] | None = None
) -> Imported:
    """Write the points of a file into the open collection, some at a time; safe to repeat after it was stopped.

    A point that is there as the file has it is left alone. So is every point of a record that the collection has
    from something else: another version of its file, other settings.

    Args:
        store: With its collection open for writing.
        file: Checked; it is looked at again while it is read.
        caps: How long texts may be.
        on_done: Told the number of points that are finished.

    Raises:
        PointFileError: The file has changed since it was checked.
        PointsMissingError: The store does not hold what it acknowledged.
        PointStoreError: The store failed.
    """
    done = Imported()
    try:
        _import_all(store, file, caps, done, on_done)
    except PointFileError as error:
        raise error.after(done.written) from error
    finally:
        store.flush()
    return done


def _import_all(
    store: PointStore, file: PointFile, caps: Caps, done: Imported, on_done: Callable[[int], None] | None
) -> None:
    ours = _Generations(store)
    for batch in _batches(file, caps):
        for part in batch.chunks(max_points=MAX_POINTS_PER_CALL, max_bytes=_MOST_BYTES):
            _import(store, part, ours, done)
            if on_done is not None:
                on_done(done.points)


def _import(store: PointStore, batch: PointBatch, ours: _Generations, done: Imported) -> None:
    """Write what is not there yet of a few points."""
    there = {
        point_id: (found.payloads[at], found.vectors[at])
        for found in store.read(PointFilter(point_ids=batch.ids))
        for at, point_id in enumerate(found.ids)
    }
    ours.learn(batch)
    fresh = []
    for at, key in enumerate(batch.ids):
        record_id, generation = int(batch.payloads[at]["record_id"]), str(batch.payloads[at]["generation"])
        if not ours.has(record_id, generation) or (key in there and there[key][0].get("generation") != generation):
            done.refused += 1
            if record_id not in done.refused_records and len(done.refused_records) <= _RECORDS_KEPT:
                done.refused_records.append(record_id)
        elif key in there and _is_same(batch.payloads[at], batch.vectors[at], *there[key]):
            done.unchanged += 1
        else:
            fresh.append(at)
    if not fresh:
        return
    chosen = PointBatch([batch.ids[at] for at in fresh], batch.vectors[fresh], [batch.payloads[at] for at in fresh])
    store.upsert(chosen)
    number = store.count(PointFilter(point_ids=chosen.ids))
    if number != len(fresh):
        raise PointsMissingError("after writing them", expected=len(fresh), got=number, records="the file's")
    done.written += len(fresh)


class _Generations:
    """From what the collection has its records, asked once for each of them, as long as there are not too many."""

    def __init__(self, store: PointStore) -> None:
        self._store, self._known = store, dict[int, frozenset[str]]()

    def learn(self, batch: PointBatch) -> None:
        """Ask for the records of a batch; one that the collection lacks will be of the file's generation."""
        wanted = {int(payload["record_id"]): str(payload["generation"]) for payload in batch.payloads}
        if len(self._known) > _MOST_KNOWN:
            self._known.clear()
        unknown = sorted(wanted.keys() - self._known.keys())
        if unknown:
            found: dict[int, set[str]] = {record_id: set() for record_id in unknown}
            for record_id, generation in self._store.count_by_generation(PointFilter(record_ids=unknown)):
                found[record_id].add(generation)
            self._known |= {record_id: frozenset(names or {wanted[record_id]}) for record_id, names in found.items()}

    def has(self, record_id: int, generation: str) -> bool:
        """Whether a record is of this generation, and of no other."""
        return self._known[record_id] == {generation}


def _is_same(payload: Mapping[str, Any], vector: np.ndarray, held: Mapping[str, Any], found: np.ndarray) -> bool:
    return dict(payload) == dict(held) and bool(np.all(np.abs(vector - found) <= _ROUNDING))


def _batches(file: PointFile, caps: Caps) -> Iterator[PointBatch]:
    """The points of a file, each of them looked at."""
    before = ""
    for raw in file.read():
        for at, (key, payload) in enumerate(zip(raw.ids, raw.payloads, strict=True)):
            why = _wrong(key, payload, caps) or ("" if key > before else "it stands twice, or out of the ids' order")
            if why:
                raise PointFileError(str(file.path), f"{file.unit} {raw.first + at}", why)
            before = key
        yield PointBatch(tuple(raw.ids), _unit(file, raw), tuple(map(_shown, raw.payloads)))


def _unit(file: PointFile, raw: RawPoints) -> np.ndarray:
    """The vectors, of length one but for rounding."""
    with np.errstate(over="ignore", invalid="ignore"):
        norms = np.linalg.norm(raw.vectors.astype(np.float64), axis=1)
        wrong = np.flatnonzero(~(np.abs(norms - 1) <= NORM_TOLERANCE))
    if len(wrong):
        why = f"its vector has norm {norms[wrong[0]]:.4g}, expected 1"
        raise PointFileError(str(file.path), f"{file.unit} {raw.first + int(wrong[0])}", why)
    return np.asarray(raw.vectors / norms[:, np.newaxis], dtype=np.float32)


def _shown(payload: Mapping[str, Any]) -> dict[str, Any]:
    return {**payload, "frame_second": float(payload["frame_second"]), "path": shown_address(payload["path"])}


def _wrong(key: object, payload: object, caps: Caps) -> str:
    """What a point can't be: empty where it is one of ours."""
    if not isinstance(payload, dict) or not set(RESERVED_PAYLOAD_KEYS) <= payload.keys():
        return f"its payload lacks one of {', '.join(RESERVED_PAYLOAD_KEYS)}"
    if any(isinstance(value, dict | list) and is_deep(value) for value in payload.values()):
        return "its payload is nested too deeply"
    record_id, number, second = (payload[name] for name in ("record_id", "frame_number", "frame_second"))
    if type(record_id) is not int or not MIN_INT <= record_id <= MAX_INT:
        return f"record_id is {_told(record_id)}, expected an integer of 64 bits"
    if type(number) is not int or not 0 <= number <= MAX_INT:
        return f"frame_number is {_told(number)}, expected a frame's index"
    if type(second) not in {int, float} or not abs(second) < float("inf"):
        return f"frame_second is {_told(second)}, expected seconds"
    if key != point_id(record_id, number):
        return f"its id is {_told(key)}, expected {point_id(record_id, number)} of record {record_id}, frame {number}"
    return _wrong_texts(payload, caps) or _wrong_value(payload)


def _wrong_texts(payload: Mapping[str, Any], caps: Caps) -> str:
    expected: dict[str, tuple[int, re.Pattern[str] | None]] = {
        "platform": (caps.label, None),
        "video_code": (caps.label, None),
        "path": (caps.address, None),
        "created_at": (caps.label, _CREATED_AT),
        "generation": (caps.label, _GENERATION),
    }
    for name, (most, pattern) in expected.items():
        value = payload[name]
        if value is None and name in {"platform", "video_code"}:
            continue
        if not isinstance(value, str) or (pattern is not None and not pattern.fullmatch(value)):
            form = "a moment such as 2026-01-31T12:00:00.000Z" if name == "created_at" else "a text"
            return f"{name} is {_told(value)}, expected {form}"
        if size_bytes(value) > most:
            return f"{name} has {size_bytes(value)} bytes, expected at most {most}"
    extra = {key: payload[key] for key in payload if key not in RESERVED_PAYLOAD_KEYS}
    if extra and size_bytes(extra) > caps.payload:
        return f"its payload has {size_bytes(extra)} bytes, expected at most {caps.payload}"
    return ""


def _wrong_value(payload: Mapping[str, Any]) -> str:
    """What JSON or a store can't hold."""
    left: list[object] = [payload]
    while left:
        item = left.pop()
        if isinstance(item, str) and not is_text(item):
            return "its payload holds a text that is no UTF-8"
        if type(item) is int and not MIN_INT <= item <= MAX_INT:
            return f"its payload holds {_told(item)}, expected integers of 64 bits"
        if type(item) is float and not abs(item) < float("inf"):
            return "its payload holds a number that is too large"
        if isinstance(item, dict):
            left += [*item.keys(), *item.values()]
        elif isinstance(item, list):
            left += item
    return ""


def _told(value: object) -> str:
    """A value of a file, briefly."""
    plain = isinstance(value, str | int | float | None)
    return one_line(repr(value[:60] if isinstance(value, str) else value), 60) if plain else f"a {type(value).__name__}"
