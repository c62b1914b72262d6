"""A tick, from the stored cursor to the next one: what the sensor does, and what `extraction run` does in its place."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Protocol

from extraction_dagster.errors.runs import CursorError
from extraction_dagster.stages.catalog.pending import Scan, scan
from extraction_dagster.ticks.cursor import CursorState, Requests
from extraction_dagster.ticks.mirrors import Mirror, Notice, adopt, follow, make_mirror
from extraction_dagster.ticks.planner import History, Observed, Request, Rules, plan_tick

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from datetime import datetime

    from extraction_dagster.records import IdRange
    from extraction_dagster.stages.catalog.catalog import Catalog
    from extraction_dagster.ticks.memory import Memory

_LEAST_BUDGET = 5_000
_SWEEP_BUDGET = 20_000
_SECONDS_AHEAD = 0.3


class Runs(Protocol):
    """What a tick needs to know of runs and partitions; Dagster's instance answers."""

    def active(self) -> Sequence[IdRange]:
        """Ranges that have an active run, launched by the sensor or by people; those of backfills apart."""

    def backfilled(self) -> Sequence[IdRange]:
        """Ranges that backfills take care of: an active run works on them, or will be asked for."""

    def partitions(self, record_ids: Sequence[int]) -> Iterable[IdRange]:
        """At least the ranges that hold any of these ids, which ascend."""

    def history(self, id_range: IdRange) -> History:
        """The ended runs of a range."""


@dataclass(frozen=True, slots=True)
class Ticked:
    """What a tick decided.

    Attributes:
        cursor: The next cursor.
        requests: Runs to ask for.
        notices: For the log.
        num_waiting: Failed rows between the watermark and the frontier that wait for their next try.
        num_active: Ranges that had an active run.
    """

    cursor: CursorState
    requests: tuple[Request, ...]
    notices: tuple[Notice, ...]
    num_waiting: int
    num_active: int


def tick(  # noqa: PLR0913 - what it sees, and how it is asked
    catalog: Catalog,
    runs: Runs,
    stored: str | None,
    memory: Memory,
    *,
    now: datetime,
    impatient: bool = False,
    sweep_all: bool = False,
) -> Ticked:
    """Decide a tick.

    The rows say what is pending (`stages/catalog/pending.py`), the cursor where to look, the planner what to request.

    Args:
        catalog: The source table and the ledger.
        runs: Runs and partitions.
        stored: What the cursor store holds; None when it is lost, or at the very first tick.
        memory: Of the ticks before.
        now: Timezone-aware.
        impatient: Wait neither for a range to fill nor after a failed run: somebody is looking.
        sweep_all: Look at every row below the watermark, not at a part of them.

    Raises:
        CursorError: What is stored can't be used, and no operator says where to start.
        LostCursorError: Nothing is stored, and the mirror is corrupt.
        MirrorError: Nothing is stored, and the mirror can't be reached.
    """
    settings = catalog.settings
    mirror = make_mirror(settings, catalog.state_engine)
    before = _load(catalog, stored, mirror, now=now)
    # Before the rows: a run that ends in between is then looked at by the next tick.
    active, backfilled = runs.active(), runs.backfilled()
    window = _window(catalog, before)
    seen = Observed(
        active=active,
        window=window,
        ahead=_ahead(catalog, before, settings.batch_size * settings.max_in_flight + 1),
        swept=_sweep(catalog, before, memory, sweep_all=sweep_all),
        density=lambda: catalog.source.recent_density(settings.batch_size),
        partitions=runs.partitions,
        history=runs.history,
        backfilled=backfilled,
        room=catalog.source.reach,
    )
    rules = Rules(
        batch_size=settings.batch_size,
        max_in_flight=settings.max_in_flight,
        max_wait_seconds=0.0 if impatient else settings.max_wait_seconds,
        backs_off=not impatient,
        retry_delay_seconds=settings.run_retry_delay_seconds,
    )
    planned = plan_tick(before, seen, rules, memory.patience, now=now)
    memory.ticks += 1
    notices = [] if mirror is None else follow(mirror, planned.cursor.last_processed_id, now=now)
    if planned.cursor.last_processed_id != before.last_processed_id:
        moved = f"Updated checkpoint: last processed ID = {planned.cursor.last_processed_id}"
        notices.insert(0, Notice("info", moved))
    waiting = len(window.unfinished) - len(window.pending_ids)
    return Ticked(planned.cursor, planned.requests, tuple(notices), waiting, len(active))


def _load(catalog: Catalog, stored: str | None, mirror: Mirror | None, *, now: datetime) -> CursorState:
    """The cursor that this tick starts from: stored, then changed by the operator, or adopted from the mirror."""
    source, requests = catalog.source.identity, Requests(catalog.state_engine)
    try:
        if stored:
            return requests.apply(CursorState.from_json(stored, source=source), now=now)
    except CursorError:
        if not requests.waiting():  # else it is replaced: somebody says where to start
            raise
    first = CursorState.first(source, now=now)
    if mirror is not None and not requests.waiting():  # an operator's word counts more than a mirror's
        watermark = adopt(mirror)
        first = first.moved(now=now, last_processed_id=watermark, frontier_id=watermark)
    return requests.apply(first, now=now)


def _window(catalog: Catalog, cursor: CursorState) -> Scan:
    """The unfinished rows between the watermark and the frontier."""
    after_id, up_to_id, floor_id = cursor.last_processed_id, cursor.frontier_id, cursor.floor_id
    if up_to_id is None:
        return Scan((), None, None)
    return scan(catalog, after_id=after_id, up_to_id=up_to_id, floor_id=floor_id, budget=_SWEEP_BUDGET)


def _ahead(catalog: Catalog, cursor: CursorState, budget: int) -> Scan:
    """The unfinished rows above the frontier; rows that are done already are passed over, for a moment at most."""
    after, finished, end = cursor.frontier_id, None, time.monotonic() + _SECONDS_AHEAD
    while True:
        most = max(budget, _LEAST_BUDGET)
        found = scan(catalog, after_id=after, up_to_id=None, floor_id=cursor.floor_id, budget=most)
        finished = found.finished_up_to if found.finished_up_to is not None else finished
        if found.unfinished or found.reached_id is None or time.monotonic() > end:
            return Scan(found.unfinished, found.reached_id, finished)
        after = found.reached_id


def _sweep(catalog: Catalog, cursor: CursorState, memory: Memory, *, sweep_all: bool) -> list[int]:
    """Pending rows at or below the watermark: a part of them each time, so that a tick's cost stays the same.

    With marks and without a version column, unmarked rows are all there is to find, and there are few: every Nth tick.
    Otherwise each row is compared with the ledger, a part of the table in each tick.
    """
    settings, source, up_to_id = catalog.settings, catalog.source, cursor.last_processed_id
    every_row = source.has_version or not source.has_marks
    is_turn = sweep_all or every_row or memory.sweep_found_rows or memory.ticks % settings.sweep_every_ticks == 0
    if up_to_id is None or not is_turn:
        return []
    pending: list[int] = []
    after = None if sweep_all else memory.sweep_after_id
    look = partial(scan, catalog, up_to_id=up_to_id, floor_id=cursor.floor_id, budget=_SWEEP_BUDGET)
    while True:
        found = look(after_id=after, every_row=every_row)
        pending += found.pending_ids
        after = memory.sweep_after_id = found.reached_id
        if not sweep_all or found.reached_id is None or len(pending) > _SWEEP_BUDGET:
            memory.sweep_found_rows = bool(pending)
            return pending
