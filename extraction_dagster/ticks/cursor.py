"""The cursor's state: a watermark derived from the rows, kept in Dagster's cursor store as strict JSON.

{"v":1,"source":"0f3c…","last_processed_id":12345,"frontier_id":16345,"floor_id":null,"seq":17,"reset_epoch":0,
 "updated_at":"2025-01-31T12:00:00Z"}

      floor_id      last_processed_id           frontier_id
─────────┼─────────────────┼─────────────────────────┼──────────────► id
 left    │ every eligible  │ handed out in ranges,   │ not handed out yet
 alone   │ row is done or  │ some rows unfinished    │
         │ parked          │                         │

An operator moves it by requests, set and reset, kept in the state database until a tick consumes them. A request is
applied to the cursor that the tick returns, and consumed only once a later tick finds it stored: a crash in between
applies it again, which changes nothing. The newest consumed one says where the floor was when the cursor is lost.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from typing import Any, Literal, TypeGuard

import sqlalchemy as sa

from extraction_dagster.errors.runs import CursorError
from extraction_dagster.stages.catalog.database import reading, writing
from extraction_dagster.stages.catalog.state_tables import REQUESTS_TABLE

MAX_BYTES = 64 * 1024  # of a cursor, a mirror or an earlier script's checkpoint: whatever is larger is none
_VERSION = 1
_EPOCH = datetime.fromtimestamp(0, UTC)


@dataclass(frozen=True, slots=True)
class CursorState:
    """Where processing is.

    Attributes:
        source: 16 hex digits that tell the source table from others.
        last_processed_id: The contiguous low watermark: every eligible id at or below it was done or parked when the
            watermark moved there. None before the first.
        frontier_id: The end of the last range handed out; None before the first.
        floor_id: The operator's floor: rows at or below are left alone; None for none.
        seq: Counts run requests; never repeats, so that no run key does.
        reset_epoch: Counts the operator's set and reset; within an epoch the watermark never goes back.
        updated_at: When the state last changed.
    """

    source: str
    last_processed_id: int | None = None
    frontier_id: int | None = None
    floor_id: int | None = None
    seq: int = 0
    reset_epoch: int = 0
    updated_at: datetime = _EPOCH

    @classmethod
    def first(cls, source: str, *, now: datetime) -> CursorState:
        """The state before anything was processed; `seq` starts at the clock, past every number of a lost cursor."""
        return cls(source=source, seq=int(now.timestamp() * 1000), updated_at=now)

    def to_json(self) -> str:
        """The state as the cursor store keeps it."""
        values = asdict(self) | {"v": _VERSION, "updated_at": f"{self.updated_at.astimezone(UTC):%Y-%m-%dT%H:%M:%SZ}"}
        return json.dumps({name: values[name] for name in _KEYS})  # with spaces: the sensor's page can wrap it

    @classmethod
    def from_json(cls, text: str, *, source: str) -> CursorState:
        """Read what the cursor store keeps; anything unexpected is refused, never guessed at.

        Raises:
            CursorError: The text is no state of this version, or it belongs to another source table.
        """
        if len(text.encode()) > MAX_BYTES:
            raise CursorError(f"it has {len(text.encode())} bytes, expected at most {MAX_BYTES}")
        values = _parse(text)
        ids = {name: _integer(values, name, optional=True) for name in ("last_processed_id", "frontier_id", "floor_id")}
        counters = {name: _counter(values, name) for name in ("seq", "reset_epoch")}
        if source != values["source"] and any(value is not None for value in ids.values()):  # else it never moved
            raise CursorError("it belongs to another source table, or to this one at another address")
        return cls(source=source, **ids, **counters, updated_at=_time(values["updated_at"]))  # type: ignore[arg-type]

    def moved(self, *, now: datetime, **changes: Any) -> CursorState:  # noqa: ANN401 - field values
        """The state with changes, stamped; the same object when nothing changes."""
        changed = replace(self, **changes)
        return self if changed == self else replace(changed, updated_at=now)


_KEYS = ("v", *CursorState.__dataclass_fields__)


def _parse(text: str) -> dict[str, Any]:
    try:
        values = parse_strictly(text)
    except ValueError as error:
        raise CursorError(f"it is no JSON object: {error}") from None
    if not isinstance(values, dict):
        raise CursorError(f"it is a JSON {type(values).__name__}, expected an object")
    if type(values.get("v")) is not int or values["v"] != _VERSION:
        raise CursorError(f"it has version {values.get('v')!r}, expected {_VERSION}")
    if set(values) != set(_KEYS):
        raise CursorError(f"it has the keys {sorted(values)}, expected {sorted(_KEYS)}")
    if not isinstance(values["source"], str) or not re.fullmatch("[0-9a-f]{16}", values["source"]):
        raise CursorError(f"its source is {values['source']!r}, expected 16 hex digits")
    return values


def _integer(values: dict[str, Any], name: str, *, optional: bool = False) -> int | None:
    value = values[name]
    if is_id(value) or (value is None and optional):
        return value
    raise CursorError(f"its {name} is {value!r}, expected an integer that fits BIGINT")


def _counter(values: dict[str, Any], name: str) -> int:
    value = _integer(values, name)
    if value is None or value < 0:
        raise CursorError(f"its {name} is {value!r}, expected 0 or more")
    return value


def _time(value: object) -> datetime:
    try:
        return datetime.strptime(str(value), "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC)
    except ValueError:
        raise CursorError(f"its updated_at is {value!r}, expected for example 2025-01-31T12:00:00Z") from None


def is_id(value: object) -> TypeGuard[int]:
    """Whether a value out of a document is an id: an integer that fits BIGINT, and no boolean."""
    return type(value) is int and -(2**63) <= value < 2**63


def parse_strictly(data: str | bytes) -> Any:  # noqa: ANN401 - any JSON document
    """Parse JSON as it is written by us: no key twice, no NaN; whatever else was written by somebody else.

    Raises:
        ValueError: It is no JSON, has a key twice, NaN or Infinity, or is nested too deep.
    """
    try:
        return json.loads(data, object_pairs_hook=_no_duplicates, parse_constant=_no_constant)
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError("a key stands twice")
    return values


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no number")


@dataclass(frozen=True, slots=True)
class OperatorRequest:
    """A request that is not consumed yet.

    Attributes:
        request_id: Its place in the order.
        kind: `set`: rows at or below `value` are left alone; `reset`: no such floor.
        value: The id to start after.
        applied_epoch: The epoch that it was applied with; None before.
    """

    request_id: int
    kind: Literal["set", "reset"]
    value: int | None
    applied_epoch: int | None


class Requests:
    """The requests table of a state database."""

    def __init__(self, engine: sa.Engine) -> None:
        self._engine = engine

    def add(self, kind: Literal["set", "reset"], value: int | None = None) -> None:
        """Ask for something."""
        row = {"kind": kind, "value": value, "requested_at": datetime.now(UTC)}
        with writing(self._engine, what="write the requests") as connection:
            connection.execute(sa.insert(REQUESTS_TABLE).values(**row))

    def waiting(self) -> list[OperatorRequest]:
        """The requests that are not consumed, oldest first."""
        table = REQUESTS_TABLE.c
        query = sa.select(table.id, table.kind, table.value, table.applied_epoch).where(table.consumed_at.is_(None))
        with reading(self._engine, what="read the requests") as connection:
            return [OperatorRequest(*row) for row in connection.execute(query.order_by(table.id))]

    def restore(self, cursor: CursorState, *, now: datetime) -> CursorState:
        """A first cursor with the floor and the epoch of the newest consumed request: what an operator said stays."""
        table = REQUESTS_TABLE.c
        query = sa.select(table.kind, table.value, table.applied_epoch).where(table.consumed_at.is_not(None))
        with reading(self._engine, what="read the requests") as connection:
            found = connection.execute(query.order_by(table.id.desc()).limit(1)).first()
        if found is None:
            return cursor
        floor_id = found.value if found.kind == "set" else None
        marks = dict.fromkeys(("last_processed_id", "frontier_id", "floor_id"), floor_id)
        return cursor.moved(now=now, **marks, reset_epoch=found.applied_epoch or 0)

    def apply(self, cursor: CursorState, *, now: datetime) -> CursorState:
        """The cursor with every waiting request applied; those that it already carries are consumed."""
        for request in self.waiting():
            if request.applied_epoch is not None and cursor.reset_epoch >= request.applied_epoch:
                self._change(request, consumed_at=now)
                continue
            value = request.value if request.kind == "set" else None
            marks = dict.fromkeys(("last_processed_id", "frontier_id", "floor_id"), value)
            cursor = cursor.moved(now=now, **marks, reset_epoch=cursor.reset_epoch + 1)
            self._change(request, applied_epoch=cursor.reset_epoch)
        return cursor

    def _change(self, request: OperatorRequest, **values: datetime | int) -> None:
        statement = sa.update(REQUESTS_TABLE).where(REQUESTS_TABLE.c.id == request.request_id).values(**values)
        with writing(self._engine, what="write the requests") as connection:
            connection.execute(statement)
