"""The ledger: what became of every record, in tables of our own.

One row per record that was ever touched; a record without a row is still to do. The errors table only grows.
Times are timezone-aware UTC on every database.

Each entry has a claim, a number that rises whenever somebody takes the record over: a run that begins, an operator who
wants it once more. Who planned with claim 7 writes the entry only while it is still 7:

    run A begins      claim 7
    run A is frozen   checkpoint set --reprocess: claim 8; run B begins: claim 9, and marks the record as done
    run A goes on     its claim 7 is not 9: it writes nothing

Locks are taken in one order everywhere: the number after which claims begin, entries in ascending order of ids, then
rows of the source table in ascending order of ids. Long because what locks and what writes entries stand together.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Literal

import sqlalchemy as sa

from extraction_dagster.stages.catalog.database import chunks, reading, storable, writing
from extraction_dagster.stages.catalog.state_tables import (
    ERRORS_TABLE,
    FAILED_OR_PARKED,
    LEDGER_TABLE,
    insert_of,
    lock_claim_base,
    raise_claim_base,
)

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, Sequence

    from extraction_dagster.records import Failure, IdRange, VideoRow

State = Literal["todo", "extracted", "embedded", "done", "failed", "parked"]
_LONGEST_DELAY_SECONDS = 86_400.0
_ENTRY = [column for column in LEDGER_TABLE.c if column.name != "updated_at"]  # in the order of LedgerEntry


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
        claimed_by: The run that claimed it last; its later steps leave the records of other runs alone. None for an
            operator's command, or a caller without a run.
        address: 16 hex digits of the address of the file that its frames are of, or that failed; empty when the row
            had none, None when an earlier release wrote the entry.
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
    claimed_by: str | None = None
    address: str | None = None
    generation: str | None = None


@dataclass(frozen=True, slots=True)
class ErrorRow:
    """A row of the errors table, with the record's present state, its tries, and when it is tried again."""

    record_id: int
    stage: str
    error_type: str
    error_message: str
    error_details: str
    occurred_at: datetime
    run_id: str
    state: str
    attempts: int | None = None
    not_before: datetime | None = None


class Ledger:
    """Reads and writes the ledger and the errors table, which `state_tables.prepare` makes."""

    def __init__(self, engine: sa.Engine) -> None:
        self.engine = engine
        self._insert = insert_of(engine)

    def entries(self, id_range: IdRange) -> dict[int, LedgerEntry]:
        """The entries of a range, by record."""
        query = sa.select(*_ENTRY).where(_within(id_range))
        with reading(self.engine, what="read the ledger") as connection:
            return {
                row[0]: LedgerEntry(*row) for row in connection.execute(query)
            }  # a range is read several times a run

    def first_ids(self, most: int) -> list[int]:
        """The least ids that the ledger knows."""
        query = sa.select(LEDGER_TABLE.c.record_id).order_by(LEDGER_TABLE.c.record_id).limit(most)
        with reading(self.engine, what="read the ledger") as connection:
            return [int(key) for key in connection.execute(query).scalars()]

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

    def addresses(self, record_ids: Sequence[int]) -> dict[int, str | None]:
        """Of those of these records that are done, the addresses of the files that their frames are of, where known."""
        table = LEDGER_TABLE.c
        query = sa.select(table.record_id, table.address).where(table.state == "done")
        with reading(self.engine, what="read the ledger") as connection:
            return {
                record_id: address
                for chunk in chunks(record_ids)
                for record_id, address in connection.execute(query.where(table.record_id.in_(chunk)))
            }

    def lock(self, connection: sa.Connection, record_ids: Collection[int]) -> dict[int, LedgerEntry]:
        """The entries of these records as they are now, locked until the transaction ends, in ascending order."""
        table = LEDGER_TABLE.c
        query = sa.select(*_ENTRY).order_by(table.record_id).with_for_update()  # SQLite's writers wait anyway
        return {
            row["record_id"]: LedgerEntry(**row)
            for chunk in chunks(sorted(record_ids))
            for row in connection.execute(query.where(table.record_id.in_(chunk))).mappings()
        }

    def hold(self, connection: sa.Connection, claims: Mapping[int, int]) -> set[int]:
        """Lock the entries that still have the claim with which their records were planned; returns those records.

        A record that was planned without an entry gets one, so that there is something to lock.
        """
        table = LEDGER_TABLE.c
        query = sa.select(table.record_id, table.claim).order_by(table.record_id).with_for_update()
        there = {
            record_id: claim
            for chunk in chunks(sorted(claims))
            for record_id, claim in connection.execute(query.where(table.record_id.in_(chunk)))
        }
        held = {key for key, claim in there.items() if claim == claims[key]}
        fresh = [LedgerEntry(key, "todo") for key, claim in claims.items() if claim == 0 and key not in there]
        return held | self.add(connection, fresh)

    def add(self, connection: sa.Connection, entries: Sequence[LedgerEntry]) -> set[int]:
        """Write entries of records that have none and were never tried; returns those for which nobody was faster."""
        if not entries:
            return set()
        statement = self._insert(LEDGER_TABLE).on_conflict_do_nothing(index_elements=["record_id"])
        in_order = sorted(entries, key=lambda entry: entry.record_id)
        rows = _rows_of(
            in_order, ("record_id", "state", "source_version", "content_version", "revision", "claim", "claimed_by")
        )
        return set(connection.execute(statement.returning(LEDGER_TABLE.c.record_id), rows).scalars())

    def replace(self, connection: sa.Connection, entries: Sequence[LedgerEntry]) -> None:
        """Write whole entries that are locked here."""
        keep = {"record_id", "updated_at"}
        if entries:
            statement = self._insert(LEDGER_TABLE)
            columns = {item.name: statement.excluded[item.name] for item in LEDGER_TABLE.c if item.name not in keep}
            update = statement.on_conflict_do_update(index_elements=["record_id"], set_=columns)
            connection.execute(update, _rows_of(entries, [column.name for column in _ENTRY]))

    def window_end(self, after_id: int | None, size: int) -> int | None:
        """The id of the last of the next `size` entries after an id; None when fewer are left."""
        query = sa.select(LEDGER_TABLE.c.record_id).order_by(LEDGER_TABLE.c.record_id).offset(size - 1).limit(1)
        if after_id is not None:
            query = query.where(LEDGER_TABLE.c.record_id > after_id)
        end: int | None = self._value(query)
        return end

    def restamp(self, connection: sa.Connection, versions: Mapping[int, tuple[str, str]]) -> None:
        """Follow a trigger that stamps the version column: our own update must not make a row look new.

        Args:
            connection: In whose transaction the entries are locked.
            versions: Of each record, before and after our update.
        """
        changed = [
            {"key": key, "before": before, "after": after}
            for key, (before, after) in sorted(versions.items())
            if before != after
        ]
        if changed:
            table = LEDGER_TABLE.c
            is_ours = sa.and_(table.record_id == sa.bindparam("key"), table.source_version == sa.bindparam("before"))
            update = sa.update(LEDGER_TABLE).where(is_ours).values(source_version=sa.bindparam("after"))
            connection.execute(update, changed)

    def remove(self, connection: sa.Connection, record_ids: Sequence[int]) -> None:
        """Forget records; what is in the errors table stays.

        Should one of these ids come back, its claims go on above the forgotten ones.
        """
        base = lock_claim_base(connection, to_raise=True)
        entries = self.lock(connection, record_ids)
        for chunk in chunks(list(entries)):
            connection.execute(sa.delete(LEDGER_TABLE).where(LEDGER_TABLE.c.record_id.in_(chunk)))
        if (highest := max((entry.claim for entry in entries.values()), default=0)) > base:
            raise_claim_base(connection, highest)

    def counts(self, id_range: IdRange | None = None) -> dict[str, int]:
        """The number of records by state, of all or of a range."""
        return self._by_state(_within(id_range))

    def counts_of_run(self, run_id: str, id_range: IdRange) -> dict[str, int]:
        """The number of records of a range that a run was the last to claim, by state."""
        return self._by_state(sa.and_(_within(id_range), LEDGER_TABLE.c.claimed_by == run_id))

    def waiting(self, most: int) -> list[LedgerEntry]:
        """Failed records that wait for their next try, the soonest first."""
        table = LEDGER_TABLE.c
        query = sa.select(*_ENTRY).where(FAILED_OR_PARKED, table.not_before.is_not(None)).order_by(table.not_before)
        with reading(self.engine, what="read the ledger") as connection:
            return [LedgerEntry(*row) for row in connection.execute(query.limit(most))]

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

    def count_next(self, states: Collection[str], after_id: int | None, most: int) -> int:
        """The number of records in some states among the next `most` above an id, so that counting never takes long."""
        table = LEDGER_TABLE.c
        rows = sa.select(table.state).order_by(table.record_id).limit(most)
        looked_at = (rows if after_id is None else rows.where(table.record_id > after_id)).subquery()
        return int(self._value(sa.select(sa.func.count()).where(looked_at.c.state.in_(states))))

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

    def upsert(
        self, connection: sa.Connection, rows: Sequence[Mapping[str, Any]], *, if_unknown: Collection[str] = ()
    ) -> None:
        """Write entries; every row has the same keys, `record_id` among them. Other columns keep their values.

        Args:
            connection: In whose transaction they are written.
            rows: The entries.
            if_unknown: Columns that are written only where they have no value yet.
        """
        if not rows:
            return
        now = datetime.now(UTC)
        statement = self._insert(LEDGER_TABLE)
        columns = {name: statement.excluded[name] for name in (*rows[0], "updated_at") if name != "record_id"}
        columns |= {name: sa.func.coalesce(LEDGER_TABLE.c[name], columns[name]) for name in if_unknown}
        connection.execute(
            statement.on_conflict_do_update(index_elements=["record_id"], set_=columns),
            [{**row, "updated_at": now} for row in rows],
        )

    def record_failures(  # noqa: PLR0913 - what failed, how it was planned, and when it is tried again
        self,
        failures: Iterable[Failure],
        rows: Mapping[int, VideoRow],
        source_versions: Mapping[int, str],
        *,
        run_id: str,
        max_attempts: int,
        retry_delay_seconds: float,
    ) -> dict[int, State]:
        """Write failures, at most one a record, and decide for each record: `failed`, to be tried later, or `parked`.

        Args:
            failures: For the errors table.
            rows: Each record as it was planned. Where its claim has changed since, nothing is written.
            source_versions: Each record's version column, as it was read.
            run_id: The run they happened in.
            max_attempts: Tries before a record is parked.
            retry_delay_seconds: Wait before the second try.

        Returns:
            The new states of the records whose claim has not changed.
        """
        by_record = {failure.record_id: failure for failure in failures}
        claims, now = {key: rows[key].claim for key in by_record}, datetime.now(UTC)
        with writing(self.engine, what="write the ledger") as connection:
            held = self.hold(connection, claims)
            before = self.lock(connection, held)
            entries: list[dict[str, Any]] = []
            for key in sorted(held):
                failure, address = by_record[key], rows[key].address
                tries = _tries(before[key], failure, address) + 1
                parked = failure.permanent or tries >= max_attempts
                delay = _back_off(retry_delay_seconds, tries)
                entries.append(
                    {
                        "record_id": key,
                        "state": "parked" if parked else "failed",
                        "source_version": source_versions[key],
                        "content_version": failure.content_version,
                        "address": address,
                        "attempts": tries,
                        "not_before": None if parked else now + timedelta(seconds=delay),
                        "last_error": storable(f"{failure.error_type}: {failure.message}"),
                    }
                )
            self.upsert(connection, entries)
            if held:
                values = [_error_values(by_record[key], now, run_id) for key in by_record if key in held]
                connection.execute(sa.insert(ERRORS_TABLE), values)
        return {entry["record_id"]: entry["state"] for entry in entries}

    def errors(self, *, limit: int, error_type: str | None = None, current_only: bool = True) -> list[ErrorRow]:
        """The newest errors; by default only the last one of each record that is still failed or parked."""
        table, state = ERRORS_TABLE.c, LEDGER_TABLE.c.state
        query = (
            sa.select(
                *(column for column in table if column.name != "id"),
                sa.func.coalesce(state, "gone").label("state"),
                LEDGER_TABLE.c.attempts,
                LEDGER_TABLE.c.not_before,
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

    def errors_of(self, record_id: int, *, limit: int) -> list[ErrorRow]:
        """Every error of a record, newest first."""
        table, names = ERRORS_TABLE.c, [column for column in ERRORS_TABLE.c if column.name != "id"]
        query = sa.select(*names, sa.literal("").label("state")).where(table.record_id == record_id)
        with reading(self.engine, what="read the errors") as connection:
            rows = connection.execute(query.order_by(table.id.desc()).limit(limit)).mappings()
            return [ErrorRow(**row) for row in rows]

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
            wanted = found if record_ids is None else found.intersection(record_ids)
            locked = self.lock(connection, wanted)
            chosen = sorted(key for key, entry in locked.items() if entry.state in {"failed", "parked"})
            change = {"state": "todo", "attempts": 0, "not_before": None, "updated_at": datetime.now(UTC)}
            for chunk in chunks(chosen):
                update = sa.update(LEDGER_TABLE).where(table.record_id.in_(chunk))
                connection.execute(update.values(claim=table.claim + 1, claimed_by=None, **change))
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
            "claim": table.claim + 1,
            "claimed_by": None,
            "updated_at": datetime.now(UTC),
        }
        inner = sa.alias(LEDGER_TABLE)  # locked in ascending order first
        above = sa.select(inner.c.record_id).where(inner.c.record_id > after_id).order_by(inner.c.record_id)
        with writing(self.engine, what="write the ledger") as connection:
            update = sa.update(LEDGER_TABLE).where(table.record_id.in_(above.with_for_update()))
            connection.execute(update.values(**change))

    def adopt_addresses(self, addresses: Mapping[int, str]) -> None:
        """Give entries that have no address one; those that got one meanwhile keep it."""
        table = LEDGER_TABLE.c
        for chunk in chunks(sorted(addresses)):
            found = sa.case({key: addresses[key] for key in chunk}, value=table.record_id)
            with writing(self.engine, what="write the ledger") as connection:
                self.lock(connection, chunk)
                update = sa.update(LEDGER_TABLE).where(table.record_id.in_(chunk), table.address.is_(None))
                connection.execute(update.values(address=found))

    def _value(self, query: sa.Select[Any]) -> Any:  # noqa: ANN401 - whatever the query asks for
        """The single value of a query; None where it gives no row."""
        with reading(self.engine, what="read the ledger") as connection:
            return connection.execute(query).scalar_one_or_none()


def _within(id_range: IdRange | None) -> sa.ColumnElement[bool]:
    """That a record is in a range; of all for None."""
    return sa.true() if id_range is None else LEDGER_TABLE.c.record_id.between(id_range.first_id, id_range.last_id)


def _back_off(delay_seconds: float, tries: int) -> float:
    """The wait before the next try: 1, 2, 4, … times the delay, and up to a quarter more so that crowds spread out."""
    delay = min(delay_seconds * float(2 ** min(tries - 1, 32)), _LONGEST_DELAY_SECONDS)
    return delay * random.uniform(1.0, 1.25)  # noqa: S311 - no secret


def _tries(entry: LedgerEntry, failure: Failure, address: str) -> int:
    """How often a record was tried in its present version, from its present address."""
    is_same = entry.content_version == failure.content_version and entry.address in {None, address}
    return entry.attempts if is_same else 0


def _rows_of(entries: Iterable[LedgerEntry], names: Sequence[str]) -> list[dict[str, Any]]:
    now = datetime.now(UTC)
    return [{**{name: getattr(entry, name) for name in names}, "updated_at": now} for entry in entries]


def _error_values(failure: Failure, now: datetime, run_id: str) -> dict[str, Any]:
    return {
        "record_id": failure.record_id,
        "stage": failure.stage,
        "error_type": failure.error_type,
        "error_message": storable(failure.message),
        "error_details": storable(failure.details),
        "occurred_at": now,
        "run_id": run_id,
    }
