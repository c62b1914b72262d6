"""How long the errors table keeps what is over: EXTRACTION_KEEP_ERRORS_DAYS.

The last error of a record that is still failed or parked stays, however old: `extraction errors` shows it. What goes is
counted by stage and type in `extraction_meta`, so that the metric of all errors never falls.
"""

from __future__ import annotations

import json
from collections import Counter
from contextlib import suppress
from datetime import UTC, datetime, timedelta

import sqlalchemy as sa

from extraction_dagster.stages.catalog.database import chunks, reading, writing
from extraction_dagster.stages.catalog.state_tables import ERRORS_TABLE, LEDGER_TABLE, META_TABLE, write_meta

_KEY = "errors_removed"
_MOST_AT_ONCE = 5_000


def prune_errors(engine: sa.Engine, *, keep_days: int) -> int:
    """Remove errors that are older than that, at most 5,000 of them. Returns how many."""
    table, ledger = ERRORS_TABLE.c, LEDGER_TABLE.c
    other = sa.alias(ERRORS_TABLE)
    newest = sa.select(sa.func.max(other.c.id)).where(other.c.record_id == table.record_id).scalar_subquery()
    is_open = sa.exists().where(ledger.record_id == table.record_id, ledger.state.in_(("failed", "parked")))
    before = datetime.now(UTC) - timedelta(days=keep_days)
    old = sa.select(table.id, table.stage, table.error_type).where(
        table.occurred_at < before, sa.or_(sa.not_(is_open), table.id < newest)
    )
    with writing(engine, what="remove old errors") as connection:
        # The row is locked: of two processes one counts after the other.
        told = connection.execute(_removed().with_for_update()).scalar_one_or_none()
        rows = connection.execute(old.order_by(table.id).limit(_MOST_AT_ONCE)).all()
        if not rows:
            return 0
        for chunk in chunks([row.id for row in rows]):
            connection.execute(sa.delete(ERRORS_TABLE).where(table.id.in_(chunk)))
        removed = _parse(told)
        removed.update((row.stage, row.error_type) for row in rows)
        write_meta(connection, {_KEY: json.dumps([[*of, number] for of, number in sorted(removed.items())])})
    return len(rows)


def removed_errors(engine: sa.Engine) -> Counter[tuple[str, str]]:
    """How many errors were removed so far, by stage and type."""
    with reading(engine, what="read the errors") as connection:
        return _parse(connection.execute(_removed()).scalar_one_or_none())


def _removed() -> sa.Select[str]:
    return sa.select(META_TABLE.c.value).where(META_TABLE.c.key == _KEY)


def _parse(text: str | None) -> Counter[tuple[str, str]]:
    found = Counter[tuple[str, str]]()
    with suppress(ValueError, TypeError):
        for stage, kind, number in json.loads(text or "[]"):
            found[str(stage), str(kind)] += int(number)
    return found
