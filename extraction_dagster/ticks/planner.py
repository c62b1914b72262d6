"""One tick of the sensor, as a function: from what the rows say to ranges to request and the next cursor.

It reads nothing and writes nothing, so that it can be tested against every order of events. What it must hold:

- the watermark moves over rows that are done or parked, never over an unfinished one, and never back;
- each range handed out starts right after the frontier, so that no id falls between two ranges; but rows that were done
  before there were ranges, more than a run can look through, are in none;
- a pending row is in a range that has an active run, or gets one, or waits for its turn: none is forgotten;
- no range keeps others from their turn for ever, whatever becomes of its runs (`places.py`).
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from itertools import groupby, takewhile
from typing import TYPE_CHECKING

from extraction_dagster.records import IdRange
from extraction_dagster.stages.catalog.ranges import merge, narrowest_parts
from extraction_dagster.ticks.places import History, Outcomes, Patience, Places, Rules

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from datetime import datetime

    from extraction_dagster.stages.catalog.pending import Scan
    from extraction_dagster.ticks.cursor import CursorState

_MAX_ID = 2**63 - 1
_MOST_BATCHES = 2  # of pending rows in a range that is requested once more as it is


@dataclass(frozen=True, slots=True)
class Observed:
    """What a tick sees; active ranges are looked up before rows are, so that a run that ends in between is no loss.

    Attributes:
        active: Ranges that have an active run, launched by the sensor or by people; those of backfills apart.
        window: Unfinished rows between the watermark and the frontier.
        ahead: Unfinished rows above the frontier.
        swept: Pending rows at or below the watermark: late commits, cleared marks, changed versions.
        density: Ids to a record, over the newest records; asked for when the tail is cut.
        partitions: The ranges that hold any of these ids, which ascend; asked for when a row below the frontier is
            pending and no active run covers it.
        history: The ended runs of a range; asked for when it is to be requested once more.
        outcomes: How the newest runs of all ranges ended; asked for when the last run of a range failed.
        backfilled: Ranges that backfills take care of, by a run or soon; they take no place among those in flight.
        room: How far a range between two ids reaches before it holds a number of rows, done ones too; asked for when
            a new range would be wide enough for as many as the rules allow.
    """

    active: Sequence[IdRange]
    window: Scan
    ahead: Scan
    swept: Sequence[int]
    density: Callable[[], float]
    partitions: Callable[[Sequence[int]], Iterable[IdRange]]
    history: Callable[[IdRange], History]
    backfilled: Sequence[IdRange] = ()
    room: Callable[[int, int, int], int] = lambda _first, last, _most: last
    outcomes: Callable[[], Outcomes] = Outcomes


@dataclass(frozen=True, slots=True)
class Request:
    """A run to ask for.

    Attributes:
        id_range: The range.
        run_key: Never used before.
        is_new: Whether the range is to be registered.
    """

    id_range: IdRange
    run_key: str
    is_new: bool


@dataclass(frozen=True, slots=True)
class Tick:
    """What a tick decides: the next cursor, and the runs to ask for."""

    cursor: CursorState
    requests: tuple[Request, ...]


def plan_tick(cursor: CursorState, seen: Observed, rules: Rules, patience: Patience, *, now: datetime) -> Tick:
    """Decide a tick."""
    planner = _Planner(cursor, seen, rules, patience, now)
    planner.move_watermark()
    planner.request_below_frontier()
    planner.cut_new_ranges()
    planner.request_failing()
    return Tick(planner.cursor, tuple(planner.requests))


class _Planner:
    def __init__(self, cursor: CursorState, seen: Observed, rules: Rules, patience: Patience, now: datetime) -> None:
        self.cursor, self.requests = cursor, list[Request]()
        self._seen, self._rules, self._patience, self._now = seen, rules, patience, now
        self._places = Places(
            len(seen.active), history=seen.history, outcomes=seen.outcomes, rules=rules, patience=patience, now=now
        )
        self._partitions = set[IdRange]()
        self._backfilled = merge(seen.backfilled)
        self._taken = merge([*seen.active, *self._backfilled])

    def move_watermark(self) -> None:
        """Up to the greatest id below which every row is done or parked; above the frontier only once it is met."""
        window, ahead = self._seen.window, self._seen.ahead
        if window.finished_up_to is not None:
            self._move(last_processed_id=window.finished_up_to)
        if window.is_clear and ahead.finished_up_to is not None:
            # Rows that were done before anybody cut a range for them need none: both marks pass them.
            self._move(last_processed_id=ahead.finished_up_to, frontier_id=ahead.finished_up_to)

    def request_below_frontier(self) -> None:
        """Ranges that still have a pending row and no active run: late rows, failed runs, retries, the growing tail."""
        pending = {*self._seen.swept, *self._seen.window.pending_ids}
        uncovered = sorted(record_id for record_id in pending if not within_any(self._taken, record_id))
        can_request = bool(uncovered) and self._places.free > 0
        self._partitions = set(self._seen.partitions(uncovered)) if can_request else set()
        wanted = _assign(uncovered, self._partitions, self._rules.batch_size) if can_request else []
        self._places.forget([item for item in self._patience.failing if within_any(self._taken, item.first_id)])
        tail_waits = False
        visited = set[IdRange]()
        for id_range, ids in self._cut_where_needed(wanted):
            history = self._places.history(id_range) if self._places.is_one_left() else None
            if history is None:
                break
            visited.add(id_range)
            if self._places.may_go(id_range, history):
                if self._is_filling(id_range, ids, history):
                    tail_waits = True
                else:
                    self._request(id_range, is_new=id_range not in self._partitions)
        else:
            if can_request or not uncovered:  # every range was looked at: of the others no row is pending
                self._places.forget(self._patience.failing.keys() - visited)
        if not tail_waits:
            self._patience.end("tail")

    def request_failing(self) -> None:
        """Ranges whose last run failed and whose back-off is over, after the others."""
        for id_range in self._places.late():
            self._request(id_range, is_new=id_range not in self._partitions)

    def cut_new_ranges(self) -> None:
        """Full batches of a backlog, each cut at its last record; then the tail, cut ahead."""
        rules, ahead = self._rules, self._seen.ahead
        left = self._pass_taken(ahead.pending_ids)
        pending = list(takewhile(lambda record_id: not within_any(self._taken, record_id), left))
        more_follows = ahead.reached_id is not None or len(pending) < len(left)
        if not pending:
            self._patience.end("ahead")
        while pending and self._places.is_one_left():
            first = self._first_after(pending[0])
            number = self._num_with_room(first, pending)
            if not number:  # so many rows in between are done that no range is to hold them
                first = pending[0]
                number = self._num_with_room(first, pending)
            batch, pending = pending[:number], pending[number:]
            whole = len(batch) == rules.batch_size or bool(pending) or more_follows
            if not whole and not self._patience.is_over("ahead", now=self._now, seconds=rules.max_wait_seconds):
                return
            last = batch[-1] if whole else self._ahead(first, batch[-1])
            self._request(IdRange(first, last), is_new=True)
            self._move(frontier_id=last)
            self._patience.end("ahead")

    def _cut_where_needed(
        self, wanted: Iterable[tuple[IdRange | None, Sequence[int]]]
    ) -> Iterator[tuple[IdRange, Sequence[int]]]:
        """Ranges with their pending rows; rows that have none yet get ranges of their own, one by one as asked for."""
        for known, members in wanted:
            if known is not None:
                yield known, members
                continue
            left = members
            while left:
                number = self._num_with_room(left[0], left)
                part, left = left[:number], left[number:]
                yield IdRange(part[0], part[-1]), part

    def _num_with_room(self, first: int, pending: Sequence[int]) -> int:
        """How many of these rows, a batch at most, a range that begins at an id has room for."""
        number = min(len(pending), self._rules.batch_size)
        return bisect_right(pending, self._room(first, pending[number - 1]), hi=number)

    def _room(self, first: int, last: int) -> int:
        """How far a range between two ids may reach; fewer ids than a range may hold rows need no question."""
        most = self._rules.most_rows
        return last if last - first < most else self._seen.room(first, last, most)

    def _pass_taken(self, pending: Sequence[int]) -> Sequence[int]:
        """Move the frontier over rows on which a run works or that a backfill has been handed: others need not wait.

        Returns those above the frontier as it is then.
        """
        while pending and (within := within_any(self._taken, pending[0])):
            self._move(frontier_id=within.last_id)
            pending = pending[bisect_right(pending, within.last_id) :]
        return pending

    def _first_after(self, record_id: int) -> int:
        """Where a new range for a row begins: right after the frontier, or after one below the row that is taken."""
        if self.cursor.frontier_id is None:
            return record_id
        position = bisect_right(self._taken, record_id, key=lambda id_range: id_range.first_id) - 1
        taken = self._taken[position].last_id if position >= 0 else self.cursor.frontier_id
        return max(self.cursor.frontier_id, taken) + 1

    def _ahead(self, first: int, last: int) -> int:
        """How far a batch will reach at the recent density of ids, so that a trickle of rows fills one range."""
        reach = first + math.ceil(self._rules.batch_size * max(self._seen.density(), 1.0)) - 1
        reach = min(max(reach, last), _MAX_ID)
        return max(self._room(first, reach), last)

    def _is_filling(self, id_range: IdRange, ids: Sequence[int], history: History) -> bool:
        """Whether rows trickle into the last range, which is not to be run for each of them."""
        if id_range.last_id != self.cursor.frontier_id or len(ids) >= self._rules.batch_size:
            return False
        if self.cursor.last_processed_id is not None and ids[0] <= self.cursor.last_processed_id:
            return False  # a record brought back, a late commit: not one of those that trickle in
        if history.ended_at is None or history.failures_in_a_row:
            return False
        return not self._patience.is_over("tail", now=self._now, seconds=self._rules.max_wait_seconds)

    def _request(self, id_range: IdRange, *, is_new: bool) -> None:
        self._places.take(id_range)
        self._move(seq=self.cursor.seq + 1)
        self.requests.append(Request(id_range, f"{id_range.partition_key}#{self.cursor.seq}", is_new))

    def _move(self, **changes: int) -> None:
        """Change the cursor; its two marks only ever move up."""
        for name in ("last_processed_id", "frontier_id"):
            old = getattr(self.cursor, name)
            if name in changes and old is not None and changes[name] <= old:
                del changes[name]
        self.cursor = self.cursor.moved(now=self._now, **changes)


def within_any(merged: Sequence[IdRange], record_id: int) -> IdRange | None:
    """Which of some ranges holds an id; they ascend and do not overlap."""
    position = bisect_right(merged, record_id, key=lambda id_range: id_range.first_id) - 1
    return merged[position] if position >= 0 and record_id in merged[position] else None


def _assign(
    ids: Sequence[int], partitions: Iterable[IdRange], batch_size: int
) -> list[tuple[IdRange | None, list[int]]]:
    """Each id, in ascending order, with the narrowest range that holds it.

    Ids that none holds are to get ranges of their own, and stand with None. So do ids that crowd a range: cut ahead
    where ids were sparse, it may have been filled by a burst. Ranges may overlap: people launch what they like.
    """
    narrowest = {
        record_id: known
        for part, known in narrowest_parts(IdRange(ids[0], ids[-1]), partitions)
        for record_id in ids[bisect_left(ids, part.first_id) : bisect_right(ids, part.last_id)]
    }
    assigned: list[tuple[IdRange | None, list[int]]] = []
    places: dict[IdRange, list[int]] = {}
    for known, group in groupby(ids, narrowest.get):
        members = list(group)
        if known is None or len(members) > _MOST_BATCHES * batch_size:
            assigned.append((None, members))
        elif known in places:
            places[known].extend(members)
        else:
            places[known] = members
            assigned.append((known, members))
    return assigned
