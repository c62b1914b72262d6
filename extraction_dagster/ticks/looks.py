"""Where a tick looks for pending rows, and how far: each look is bounded, and goes on in the next tick where it ended.

          floor_id      last_processed_id           frontier_id
    ─────────┼─────────────────┼─────────────────────────┼──────────────► id
               sweep:            window:                   ahead:
               a part each time  its beginning, for the    until rows are found,
                                 watermark; and a part     for a moment at most

Between two ticks the places are in `Memory`. A command that says at its end that nothing is due looks at the whole: it
goes on, over several ticks, until each of the three looks came to its end (`Round`).
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from extraction_dagster.stages.catalog.pending import Scan, scan
from extraction_dagster.ticks.newest import NewestLook
from extraction_dagster.ticks.planner import within_any

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from extraction_dagster.records import IdRange
    from extraction_dagster.stages.catalog.catalog import Catalog
    from extraction_dagster.ticks.cursor import CursorState
    from extraction_dagster.ticks.memory import Memory

_BUDGET = 20_000  # rows of the window, and below the watermark
_STEP = 5_000  # rows of one query, so that a slow database ends no tick
_SECONDS_AHEAD = 0.3
_SECONDS_A_PART = 5.0
_ADDRESSES = 1_000  # compared in one tick
_SECONDS_OF_ADDRESSES = 0.25  # of a command
_SECONDS_OF_ROUND = 0.25  # of a command
_KEEP_EVERY_SECONDS = 1.0


@dataclass(slots=True)
class Round:
    """A look through every row below the watermark, over several ticks, from wherever the last look ended.

    Attributes:
        began_at: The place that it began at; None for the first row.
        is_second_half: Whether it came to the end, and goes on from the first row to where it began.
        is_over: Whether every row was looked at.
        has_compared_addresses: Whether the addresses of some rows that are done were compared.
        has_compared_rows: Whether a part of the rows was compared with the ledger, where not all of them need to be.
        compares_since: What the order of versions was about when it began to compare all of them.
    """

    began_at: int | None = None
    is_second_half: bool = False
    is_over: bool = False
    has_compared_addresses: bool = False
    has_compared_rows: bool = False
    compares_since: str | None = None


class Looks:
    """The looks of one tick.

    Args:
        catalog: The source table and the ledger.
        cursor: Where processing is.
        memory: Where earlier looks ended; where these end is noted in it.
        taken: Ranges on which runs work, merged: what is pending there is no find.
        whole: Look at the whole, not at a part: the round that this tick is of.
        keep: Keeps the memory; called as looks go on, for a process may be ended while it looks.
    """

    def __init__(  # noqa: PLR0913 - what a tick was given
        self,
        catalog: Catalog,
        cursor: CursorState,
        memory: Memory,
        *,
        taken: Sequence[IdRange],
        whole: Round | None,
        keep: Callable[[], None],
    ) -> None:
        self._catalog, self._cursor, self._memory = catalog, cursor, memory
        self._taken, self._whole, self._keep = taken, whole, keep
        self._scan = partial(scan, catalog, floor_id=cursor.floor_id)
        self._newest = NewestLook(catalog, cursor, memory)
        self._kept_at = time.monotonic()

    def changed(self) -> list[int]:
        """Rows at or below the watermark whose versions are new; comes first, for it lets the others find the rest."""
        return self._newest.changed(whole=self._whole is not None)

    def window(self) -> Scan:
        """The unfinished rows up to the frontier: right above the watermark, and a part from where a look ended."""
        cursor, memory = self._cursor, self._memory
        if cursor.frontier_id is None:
            return Scan((), None, None)
        look = partial(self._scan, up_to_id=cursor.frontier_id)
        goes_on = memory.window_after_id is not None
        first = look(after_id=cursor.last_processed_id, budget=min(_STEP, _BUDGET) if goes_on else _BUDGET)
        if first.reached_id is None:
            memory.window_after_id = None
            return first
        after, unfinished = first.reached_id, [*first.unfinished]
        if self._whole is None and memory.window_after_id is not None:
            after = max(after, memory.window_after_id)
        while self._whole is None or not self.finds(first):
            found = look(after_id=after, budget=_BUDGET)
            unfinished += found.unfinished
            memory.window_after_id = found.reached_id
            self._keep_now_and_then()
            if self._whole is None or found.reached_id is None or self.finds(found):
                break
            after = found.reached_id
        return Scan(tuple(unfinished), first.reached_id, first.finished_up_to)

    def ahead(self, budget: int, *, nothing_before: bool) -> Scan:
        """The unfinished rows above the frontier; rows that are done or wait are passed over.

        Args:
            budget: Rows of one query, at least.
            nothing_before: Below the frontier every row is done, so that it follows the done rows that are passed.
        """
        memory = self._memory
        look = partial(self._scan, up_to_id=None, budget=max(budget, _STEP))
        found = look(after_id=self._cursor.frontier_id)
        finished, waits, after = found.finished_up_to, bool(found.unfinished), self._cursor.frontier_id
        goes_on = self._whole is None and (waits or not nothing_before)  # else the frontier itself is the place
        seconds = math.inf if self._whole else _SECONDS_AHEAD / 6 if goes_on else _SECONDS_AHEAD
        end = time.monotonic() + seconds
        while not self.finds(found) and found.reached_id is not None:
            after = found.reached_id
            if goes_on and memory.ahead_after_id is not None:
                after = max(after, memory.ahead_after_id)
            found = look(after_id=after)
            if not waits and not goes_on and found.finished_up_to is not None:
                finished = found.finished_up_to
            waits = waits or bool(found.unfinished)
            memory.ahead_after_id = found.reached_id
            if time.monotonic() > end:
                break
        memory.ahead_after_id = after if self.finds(found) else found.reached_id
        return Scan(found.unfinished, found.reached_id, finished)

    def sweep(self) -> list[int]:
        """Pending rows at or below the watermark: a part of them each time, so that a tick's cost stays the same.

        With marks, and without a version column or with one whose order says what changed lately, unmarked rows are all
        there is to find, and there are few: every Nth tick. Otherwise each row is compared with the ledger, a part of
        the table in each tick; behind the order of versions too, as a net.
        """
        source, memory, up_to_id = self._catalog.source, self._memory, self._cursor.last_processed_id
        if up_to_id is None:
            if self._whole is not None:
                self._whole.is_over = True
            return []
        compares = source.has_version or not source.has_marks
        has_net = source.has_marks and self._newest.is_possible
        if self._whole is not None:
            return self._sweep_whole(self._whole, up_to_id, every_row=compares and not self._newest.is_enough)
        found = self._newest.round() if has_net else []
        if has_net:
            compares = False
        if not (compares or memory.sweep_found_rows or self.is_nth):
            return found
        pending, num_seen, end = list[int](), 0, time.monotonic() + _SECONDS_A_PART
        while True:
            part = self._scan(
                after_id=memory.sweep_after_id, up_to_id=up_to_id, budget=min(_STEP, _BUDGET), every_row=compares
            )
            pending += part.pending_ids
            num_seen += min(_STEP, _BUDGET)
            memory.sweep_after_id = part.reached_id
            self._keep_now_and_then()
            if part.reached_id is None or num_seen >= _BUDGET or time.monotonic() > end:
                memory.sweep_found_rows = bool(pending)
                return [*found, *pending]

    def _sweep_whole(self, whole: Round, up_to_id: int, *, every_row: bool) -> list[int]:
        """Go on with a round of unmarked rows, and a part of the net; or, without what makes it a net, of each row."""
        order, source = self._memory.order, self._catalog.source
        if source.has_version and source.has_marks and not every_row and not whole.has_compared_rows:
            whole.has_compared_rows = True
            if found := self._newest.round(seconds=_SECONDS_OF_ROUND):
                return found
        if every_row and whole.compares_since != order.key:  # it has looked at unmarked rows alone so far, if at any
            whole.began_at, whole.is_second_half, whole.is_over = self._memory.sweep_after_id, False, False
            whole.compares_since = order.key
        look = partial(self._scan, budget=min(_STEP, _BUDGET), every_row=every_row)
        found = self._sweep_on(look, whole, up_to_id)
        if every_row and whole.is_over:
            self._newest.note_whole()
        return found

    def _sweep_on(self, look: Callable[..., Scan], whole: Round, last_id: int) -> list[int]:
        """Go on with a round until rows are found; its place stays there until they are taken care of."""
        memory = self._memory
        while not whole.is_over:
            up_to_id = last_id
            if whole.is_second_half and whole.began_at is not None:
                up_to_id = min(last_id, whole.began_at)
            found = look(after_id=memory.sweep_after_id, up_to_id=up_to_id)
            if self.finds(found):
                return found.pending_ids
            memory.sweep_after_id = found.reached_id
            if found.reached_id is None:
                whole.is_over = whole.is_second_half or whole.began_at is None
                whole.is_second_half = True
            self._keep_now_and_then()
        return []

    def moved(self) -> list[int]:
        """Rows that are done and whose file's address was corrected since: a few of them each time. They become due."""
        catalog, memory, last_id = self._catalog, self._memory, self._cursor.last_processed_id
        every, whole = catalog.settings.sweep_every_ticks, self._whole
        is_turn = memory.ticks % every == every // 2 if whole is None else not whole.has_compared_addresses
        if catalog.settings.address_changes == "report" or last_id is None or not is_turn:
            return []
        found, end = list[int](), time.monotonic() + (0.0 if whole is None else _SECONDS_OF_ADDRESSES)
        while True:
            places = [place for place in (memory.address_after_id, self._cursor.floor_id) if place is not None]
            part = catalog.moved(after_id=max(places, default=None), budget=_ADDRESSES, up_to_id=last_id)
            found += part.record_ids
            memory.address_after_id = part.reached_id
            if part.reached_id is None or time.monotonic() >= end:
                break
        if whole is not None:
            whole.has_compared_addresses = True
        if found:
            catalog.make_pending(found)  # so that none is forgotten that finds no place in this tick
            memory.sweep_found_rows = True
        return found

    @property
    def is_nth(self) -> bool:
        """Whether this tick does what is done each so many ticks."""
        return self._memory.ticks % self._catalog.settings.sweep_every_ticks == 0

    def finds(self, found: Scan) -> bool:
        """Whether a look found a row that is pending and on which no run works."""
        return any(not within_any(self._taken, record_id) for record_id in found.pending_ids)

    def _keep_now_and_then(self) -> None:
        if time.monotonic() - self._kept_at > _KEEP_EVERY_SECONDS:
            self._keep()
            self._kept_at = time.monotonic()
