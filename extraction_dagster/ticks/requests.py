"""What an operator asks of the cursor: set and reset. The next tick consumes it.

A request is applied to the cursor that the tick returns, and consumed only once a later tick finds it stored: a crash
in between applies it again, which changes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Literal

import sqlalchemy as sa

from extraction_dagster.stages.catalog.database import reading, writing
from extraction_dagster.stages.catalog.state_tables import REQUESTS_TABLE

if TYPE_CHECKING:
    from extraction_dagster.ticks.cursor import CursorState


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

    def apply(self, cursor: CursorState, *, now: datetime) -> CursorState:
        """The cursor with every waiting request applied; those that it already carries are consumed."""
        for request in self.waiting():
            if request.applied_epoch is not None and cursor.reset_epoch >= request.applied_epoch:
                self._change(request, consumed_at=now)
                continue
            value = request.value if request.kind == "set" else None
            cursor = cursor.moved(
                now=now,
                last_processed_id=value,
                frontier_id=value,
                floor_id=value,
                reset_epoch=cursor.reset_epoch + 1,
            )
            self._change(request, applied_epoch=cursor.reset_epoch)
        return cursor

    def _change(self, request: OperatorRequest, **values: datetime | int) -> None:
        statement = sa.update(REQUESTS_TABLE).where(REQUESTS_TABLE.c.id == request.request_id).values(**values)
        with writing(self._engine, what="write the requests") as connection:
            connection.execute(statement)
