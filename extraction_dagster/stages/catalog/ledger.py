"""The ledger: what became of every record, in tables of our own.

One row per record that was ever touched; a record without a row is still to do. The errors table only grows.
Times are timezone-aware UTC on every database.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Literal

import sqlalchemy as sa

from extraction_dagster.stages.catalog.database import chunks, reading, writing
from extraction_dagster.stages.catalog.state_tables import ERRORS_TABLE, FAILED_OR_PARKED, LEDGER_TABLE, insert_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from extraction_dagster.records import Failure, IdRange

State = Literal["todo", "extracted", "embedded", "done", "failed", "parked"]
_LONGEST_DELAY_SECONDS = 86_400.0


@dataclass(frozen=True, slots=True)
class Fingerprints:
    """What frames and vectors are made with: everything that changes frames, and all that changes vectors."""

    frames: str
    embedding: str


@dataclass(frozen=True, slots=True)
class LedgerEntry:
    """A record's row in the ledger.

    Attributes:
        record_id: The row's id.
        state: What became of it.
        source_version: The version column when the row was last handled, our own marks included: a trigger that
            stamps every update changes it, and must not make the row look new.
        content_version: Names what was decoded; it stays when only our own marks changed the row.
        revision: How often the row was to be decoded once more: a cleared mark, or a forced run.
        frames_fingerprint: What its frames were made with.
        embedding_fingerprint: What its vectors were made with.
        num_frames: Stored frames.
        num_points: Verified points.
        attempts: Tries that failed, of this version.
        not_before: When a failed record may be tried again.
        last_error: The last error's type and message.
        claim: Rises with each claim by a run and each command of an operator; only who knows it may write the entry.
        address: 16 hex digits of the address of the file that its frames are of; None when it is not known.
        generation: What its points are made from; None when an earlier release wrote them.
    """

    record_id: int
    state: State
    source_version: str = ""
    content_version: str = ""
    revision: int = 0
    frames_fingerprint: str | None = None
    embedding_fingerprint: str | None = None
    num_frames: int | None = None
    num_points: int | None = None
    attempts: int = 0
    not_before: datetime | None = None
    last_error: str | None = None
    claim: int = 0
    address: str | None = None
    generation: str | None = None


@dataclass(frozen=True, slots=True)
class ErrorRow:
    """A row of the errors table, with the record's present state."""

    record_id: int
    stage: str
    error_type: str
    error_message: str
    error_details: str
    occurred_at: datetime
    run_id: str
    state: str


class Ledger:
    """Reads and writes the ledger and the errors table, which `state_tables.prepare` makes."""

    def __init__(self, engine: sa.Engine) -> None:
        self.engine = engine
        self._insert = insert_of(engine)

    def entries(self, id_range: IdRange) -> dict[int, LedgerEntry]:
        """The entries of a range, by record."""
        query = sa.select(*(column for column in LEDGER_TABLE.c if column.name != "updated_at")).where(
            _within(id_range)
        )
        with reading(self.engine, what="read the ledger") as connection:
            return {row["record_id"]: LedgerEntry(**row) for row in connection.execute(query).mappings()}

    def claims(self, record_ids: Sequence[int]) -> dict[int, int]:
        """The present claims of those of these records that the ledger knows."""
        found: dict[int, int] = {}
        with reading(self.engine, what="read the ledger") as connection:
            for chunk in chunks(record_ids):
                query = sa.select(LEDGER_TABLE.c.record_id, LEDGER_TABLE.c.claim)
                found.update(
                    (row.record_id, row.claim)
                    for row in connection.execute(query.where(LEDGER_TABLE.c.record_id.in_(chunk)))
                )
        return found

    def window_end(self, after_id: int | None, size: int) -> int | None:
        """The id of the last of the next `size` entries after an id; None when fewer are left."""
        query = sa.select(LEDGER_TABLE.c.record_id).order_by(LEDGER_TABLE.c.record_id).offset(size - 1).limit(1)
        if after_id is not None:
            query = query.where(LEDGER_TABLE.c.record_id > after_id)
        end: int | None = self._value(query)
        return end

    def remove(self, connection: sa.Connection, record_ids: Sequence[int]) -> None:
        """Forget records; what is in the errors table stays."""
        for chunk in chunks(record_ids):
            connection.execute(sa.delete(LEDGER_TABLE).where(LEDGER_TABLE.c.record_id.in_(chunk)))

    def counts(self, id_range: IdRange | None = None) -> dict[str, int]:
        """The number of records by state, of all or of a range."""
        return self._by_state(_within(id_range))

    def count_failed_and_parked(self) -> dict[str, int]:
        """The number of failed and of parked records, through the index over them."""
        return {"failed": 0, "parked": 0} | self._by_state(FAILED_OR_PARKED)

    def _by_state(self, condition: sa.ColumnElement[bool] | sa.TextClause) -> dict[str, int]:
        query = sa.select(LEDGER_TABLE.c.state, sa.func.count()).where(condition).group_by(LEDGER_TABLE.c.state)
        with reading(self.engine, what="read the ledger") as connection:
            return {state: int(number) for state, number in connection.execute(query)}

    def count_held_back(self, id_range: IdRange | None, *, now: datetime) -> int:
        """The number of records, of all or of a range, that are parked or wait for their next try."""
        table = LEDGER_TABLE.c
        held_back = sa.or_(table.state == "parked", table.not_before > now)
        return int(self._value(sa.select(sa.func.count()).where(FAILED_OR_PARKED, held_back, _within(id_range))))

    def last_change(self, id_range: IdRange, most: int) -> datetime | None:
        """When an entry of a range was last written, by the clocks of those who write; looks at the last `most`."""
        table = LEDGER_TABLE.c
        entries = sa.select(table.updated_at).where(_within(id_range))
        newest = sa.select(sa.func.max(entries.order_by(table.record_id.desc()).limit(most).subquery().c.updated_at))
        found: datetime | None = self._value(newest)
        return found

    def totals(self) -> tuple[int, int]:
        """The stored frames and the verified points of the records that are done."""
        frames, points = (
            sa.func.coalesce(sa.func.sum(LEDGER_TABLE.c[name]), 0) for name in ("num_frames", "num_points")
        )
        with reading(self.engine, what="read the ledger") as connection:
            found = connection.execute(sa.select(frames, points).where(LEDGER_TABLE.c.state == "done")).one()
        return int(found[0]), int(found[1])

    def error_counts(self) -> dict[tuple[str, str], int]:
        """How many errors were ever written, by stage and type."""
        names = (ERRORS_TABLE.c.stage, ERRORS_TABLE.c.error_type)
        with reading(self.engine, what="read the errors") as connection:
            rows = connection.execute(sa.select(*names, sa.func.count()).group_by(*names))
            return {(str(stage), str(kind)): int(number) for stage, kind, number in rows}

    def num_failed(self, run_id: str, id_range: IdRange) -> int:
        """How many records of a range failed in a run."""
        table = ERRORS_TABLE.c
        within = table.record_id.between(id_range.first_id, id_range.last_id)  # there is an index of records
        query = sa.select(sa.func.count(sa.distinct(table.record_id))).where(within, table.run_id == run_id)
        return int(self._value(query))

    def write(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write entries in a transaction of their own; see `upsert`."""
        with writing(self.engine, what="write the ledger") as connection:
            self.upsert(connection, rows)

    def upsert(self, connection: sa.Connection, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write entries; every row has the same keys, `record_id` among them. Other columns keep their values."""
        if not rows:
            return
        now = datetime.now(UTC)
        statement = self._insert(LEDGER_TABLE)
        columns = {name: statement.excluded[name] for name in (*rows[0], "updated_at") if name != "record_id"}
        connection.execute(
            statement.on_conflict_do_update(index_elements=["record_id"], set_=columns),
            [{**row, "updated_at": now} for row in rows],
        )

    def record_failures(
        self,
        failures: Iterable[Failure],
        source_versions: Mapping[int, str],
        *,
        run_id: str,
        max_attempts: int,
        retry_delay_seconds: float,
    ) -> dict[int, State]:
        """Write failures, at most one a record, and decide for each record: `failed`, to be tried later, or `parked`.

        Args:
            failures: For the errors table.
            source_versions: Each record's version column, as it was read.
            run_id: The run they happened in.
            max_attempts: Tries before a record is parked.
            retry_delay_seconds: Wait before the second try.
        """
        failures = list(failures)
        now = datetime.now(UTC)
        with writing(self.engine, what="write the ledger") as connection:
            attempts = self._attempts(connection, failures)
            entries: list[dict[str, Any]] = []
            for failure in failures:
                tries = attempts[failure.record_id] + 1
                parked = failure.permanent or tries >= max_attempts
                delay = _back_off(retry_delay_seconds, tries)
                entries.append(
                    {
                        "record_id": failure.record_id,
                        "state": "parked" if parked else "failed",
                        "source_version": source_versions[failure.record_id],
                        "content_version": failure.content_version,
                        "attempts": tries,
                        "not_before": None if parked else now + timedelta(seconds=delay),
                        "last_error": _storable(f"{failure.error_type}: {failure.message}"),
                    }
                )
            self.upsert(connection, entries)
            if failures:
                connection.execute(sa.insert(ERRORS_TABLE), [_error_values(item, now, run_id) for item in failures])
        return {entry["record_id"]: entry["state"] for entry in entries}

    def errors(self, *, limit: int, error_type: str | None = None, current_only: bool = True) -> list[ErrorRow]:
        """The newest errors; by default only the last one of each record that is still failed or parked."""
        table, state = ERRORS_TABLE.c, LEDGER_TABLE.c.state
        query = (
            sa.select(
                *(column for column in table if column.name != "id"), sa.func.coalesce(state, "gone").label("state")
            )
            .join_from(ERRORS_TABLE, LEDGER_TABLE, table.record_id == LEDGER_TABLE.c.record_id, isouter=True)
            .order_by(table.id.desc())
            .limit(limit)
        )
        if error_type is not None:
            query = query.where(table.error_type == error_type)
        if current_only:
            newest = sa.select(sa.func.max(table.id)).group_by(table.record_id)
            query = query.where(state.in_(("failed", "parked")), table.id.in_(newest))
        with reading(self.engine, what="read the errors") as connection:
            return [ErrorRow(**row) for row in connection.execute(query).mappings()]

    def retry(self, *, record_ids: Sequence[int] | None, error_type: str | None) -> list[int]:
        """Give failed and parked records their tries back, so that they are pending at once; returns them, ascending.

        Args:
            record_ids: These; None for all.
            error_type: Only those whose last error was of this type.
        """
        table = LEDGER_TABLE.c
        query = sa.select(table.record_id).where(FAILED_OR_PARKED)
        if error_type is not None:
            query = query.where(table.last_error.startswith(f"{error_type}:", autoescape=True))
        with writing(self.engine, what="write the ledger") as connection:
            found = set(connection.execute(query).scalars())
            chosen = sorted(found if record_ids is None else found.intersection(record_ids))
            change = {"state": "todo", "attempts": 0, "not_before": None, "updated_at": datetime.now(UTC)}
            for chunk in chunks(chosen):
                connection.execute(sa.update(LEDGER_TABLE).where(table.record_id.in_(chunk)).values(**change))
        return chosen

    def forget_done(self, after_id: int) -> None:
        """Make every record above an id pending, whatever became of it."""
        table = LEDGER_TABLE.c
        revision = table.revision + 1
        change = {
            "state": "todo",
            "revision": revision,
            "content_version": table.source_version + "~" + sa.cast(revision, sa.Text),
            "attempts": 0,
            "not_before": None,
            "updated_at": datetime.now(UTC),
        }
        with writing(self.engine, what="write the ledger") as connection:
            connection.execute(sa.update(LEDGER_TABLE).where(table.record_id > after_id).values(**change))

    def _value(self, query: sa.Select[Any]) -> Any:  # noqa: ANN401 - whatever the query asks for
        """The single value of a query; None where it gives no row."""
        with reading(self.engine, what="read the ledger") as connection:
            return connection.execute(query).scalar_one_or_none()

    def _attempts(self, connection: sa.Connection, failures: Sequence[Failure]) -> dict[int, int]:
        """How often each record was tried in its present version."""
        version = {failure.record_id: failure.content_version for failure in failures}
        attempts = dict.fromkeys(version, 0)
        table = LEDGER_TABLE.c
        for chunk in chunks(list(version)):
            query = sa.select(table.record_id, table.content_version, table.attempts).where(table.record_id.in_(chunk))
            for record_id, tried_version, number in connection.execute(query):
                if tried_version == version[record_id]:
                    attempts[record_id] = number
        return attempts


def _within(id_range: IdRange | None) -> sa.ColumnElement[bool]:
    """That a record is in a range; of all for None."""
    return sa.true() if id_range is None else LEDGER_TABLE.c.record_id.between(id_range.first_id, id_range.last_id)


def _back_off(delay_seconds: float, tries: int) -> float:
    """The wait before the next try: 1, 2, 4, … times the delay, and up to a quarter more so that crowds spread out."""
    delay = min(delay_seconds * float(2 ** min(tries - 1, 32)), _LONGEST_DELAY_SECONDS)
    return delay * random.uniform(1.0, 1.25)  # noqa: S311 - no secret


def _storable(text: str) -> str:
    """What a codec library or a hostile file made us say, without what no database takes as text."""
    return text.replace("\0", "\\0").encode(errors="backslashreplace").decode()


def _error_values(failure: Failure, now: datetime, run_id: str) -> dict[str, Any]:
    return {
        "record_id": failure.record_id,
        "stage": failure.stage,
        "error_type": failure.error_type,
        "error_message": _storable(failure.message),
        "error_details": _storable(failure.details),
        "occurred_at": now,
        "run_id": run_id,
    }
