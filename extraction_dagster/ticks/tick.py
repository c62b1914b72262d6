"""A tick, from the stored cursor to the next one: what the sensor does, and what `extraction run` does in its place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from extraction_dagster.errors.runs import CursorError
from extraction_dagster.stages.catalog.ranges import merge
from extraction_dagster.ticks.cursor import CursorState, Requests
from extraction_dagster.ticks.looks import Looks, Round
from extraction_dagster.ticks.mirrors import Mirror, Notice, adopt, follow, make_mirror
from extraction_dagster.ticks.places import History, Outcomes, Rules
from extraction_dagster.ticks.planner import Observed, Request, plan_tick

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from datetime import datetime

    from extraction_dagster.records import IdRange
    from extraction_dagster.stages.catalog.catalog import Catalog
    from extraction_dagster.ticks.memory import Memory


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

    def outcomes(self) -> Outcomes:
        """How the newest runs of all ranges ended."""


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
    whole: Round | None = None,
    keep: Callable[[], None] = lambda: None,
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
        whole: Look at every row, not at a part of them: nothing is due once a tick of a round that is over requests no
            run.
        keep: Keeps the memory; called while a look takes long.

    Raises:
        CursorError: What is stored can't be used, and no operator says where to start.
        LostCursorError: Nothing is stored, and the mirror is corrupt.
    """
    settings = catalog.settings
    mirror = make_mirror(settings, catalog.state_engine)
    before = _load(catalog, stored, mirror, now=now)
    # Before the rows: a run that ends in between is then looked at by the next tick.
    active, backfilled = runs.active(), runs.backfilled()
    looks = Looks(catalog, before, memory, taken=merge([*active, *backfilled]), whole=whole, keep=keep)
    changed = looks.changed()
    window = looks.window()
    ahead = looks.ahead(settings.batch_size * settings.max_in_flight + 1, nothing_before=window.is_clear)
    found = whole is not None and (looks.finds(window) or looks.finds(ahead))  # these first: below, it goes on later
    seen = Observed(
        active=active,
        window=window,
        ahead=ahead,
        swept=[] if found else [*changed, *looks.moved(), *looks.sweep()],
        density=lambda: catalog.source.recent_density(settings.batch_size),
        partitions=runs.partitions,
        history=runs.history,
        backfilled=backfilled,
        room=catalog.source.reach,
        outcomes=runs.outcomes,
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
    first = requests.restore(CursorState.first(source, now=now), now=now)
    if mirror is not None and not requests.waiting():  # an operator's word counts more than a mirror's
        watermark = max((mark for mark in (adopt(mirror), first.floor_id) if mark is not None), default=None)
        first = first.moved(now=now, last_processed_id=watermark, frontier_id=watermark)
    return requests.apply(first, now=now)
