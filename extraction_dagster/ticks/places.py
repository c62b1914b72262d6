"""Which ranges of a tick get a place among those in flight; one that fails keeps others from theirs for a time only.

While everything fails, a store is down, say: ranges that failed keep their places, so that nothing piles up. Still
another one is tried now and then, for perhaps it is these ranges alone that fail. Once anything succeeded after a
range's failure, that range keeps no place any more. Two places, 30 s of back-off, A and B fail each time:

    10:00:00   A and B fail, and nothing has succeeded since: both keep their places
    10:00:30   C is tried instead of A, whose back-off is over; had C failed, D would be tried a minute later,
               E after two minutes more, …
    10:01:00   C succeeds: D gets a place, and so does B, whose back-off is over
    10:01:30   B fails, E gets its place and succeeds: after each success one that failed goes first, after each
               failure another one
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING

from extraction_dagster.records import IdRange

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

_LONGEST_DELAY_SECONDS = 3600.0
_MOST_HISTORIES = 50  # read in a tick
_MOST_REMEMBERED = 1_000


@dataclass(frozen=True, slots=True)
class Rules:
    """The settings that a tick obeys.

    Attributes:
        batch_size: Records to a range.
        max_in_flight: Most ranges with an active run.
        max_wait_seconds: Longest wait of a row for its range to fill.
        backs_off: Whether a range whose runs failed waits before the next one.
        retry_delay_seconds: The wait after the first failed run; doubles at each further one.
        most_rows: Of a new range, done ones too: a run looks at each of them, and holds them in memory.
    """

    batch_size: int
    max_in_flight: int
    max_wait_seconds: float
    backs_off: bool = True
    retry_delay_seconds: float = 30.0
    most_rows: int = 100_000


@dataclass(frozen=True, slots=True)
class History:
    """The runs of a range that have ended.

    Attributes:
        failures_in_a_row: Failed runs since the last success.
        ended_at: When the last one ended; None when there was none.
    """

    failures_in_a_row: int = 0
    ended_at: datetime | None = None


@dataclass(frozen=True, slots=True)
class Outcomes:
    """How the newest runs of any ranges ended.

    Attributes:
        succeeded_at: When one last succeeded; None when none did.
        failed_at: When one last failed; None when none did.
    """

    succeeded_at: datetime | None = None
    failed_at: datetime | None = None

    @property
    def last_succeeded(self) -> bool:
        """Whether the last of them succeeded."""
        return self.succeeded_at is not None and (self.failed_at is None or self.succeeded_at >= self.failed_at)


@dataclass(slots=True)
class Patience:
    """Since when rows have been waiting for their range to fill, and what is known of ranges that fail.

    Attributes:
        since: By kind: `tail`, rows that trickle into the last range; `ahead`, rows above the frontier; `kept`, ranges
            that wait for a place which a failing one keeps; `tried`: when one of them was last requested all the same.
        failing: The runs of ranges that failed, as they were read last, so that they are not read in each tick.
    """

    since: dict[str, datetime] = field(default_factory=dict)
    failing: dict[IdRange, History] = field(default_factory=dict)

    def is_over(self, kind: str, *, now: datetime, seconds: float) -> bool:
        """Whether rows of a kind have waited long enough; the wait begins with the first question."""
        return (now - self.since.setdefault(kind, now)).total_seconds() >= seconds

    def end(self, kind: str) -> None:
        """Nothing of a kind is waiting any more."""
        self.since.pop(kind, None)


class Places:
    """The places of one tick.

    Args:
        num_active: Ranges that have an active run.
        history: The ended runs of a range.
        outcomes: How the newest runs of all ranges ended.
        rules: How many places there are, and how long ranges back off.
        patience: What earlier ticks saw; what this one sees is noted in it.
        now: Timezone-aware.
    """

    def __init__(  # noqa: PLR0913 - what the planner was given
        self,
        num_active: int,
        *,
        history: Callable[[IdRange], History],
        outcomes: Callable[[], Outcomes],
        rules: Rules,
        patience: Patience,
        now: datetime,
    ) -> None:
        self.free = rules.max_in_flight - num_active  # no run has them; some are kept by ranges that failed
        self._kept, self._histories_left = 0, _MOST_HISTORIES
        self._read_history, self._read_outcomes = history, outcomes
        self._outcomes: Outcomes | None = None
        self._failing_first = 0
        self._keepers, self._others = list[IdRange](), list[tuple[datetime, IdRange]]()
        self._rules, self._patience, self._now = rules, patience, now

    def is_one_left(self) -> bool:
        """Whether a range may be requested: a place is free, or only kept by one that failed and it is time to try."""
        if self.free > self._kept or not self._kept:
            return self.free > self._kept
        since, outcomes = self._patience.since, self._outcomes or Outcomes()
        if "kept" not in since or (outcomes.succeeded_at is not None and outcomes.succeeded_at > since["kept"]):
            since["kept"] = self._now
            self._patience.end("tried")
        tried = since.get("tried", since["kept"])
        delay = max((tried - since["kept"]).total_seconds(), self._rules.retry_delay_seconds)
        is_time = (self._now - tried).total_seconds() >= min(delay, _LONGEST_DELAY_SECONDS)
        return is_time and self.free > 0

    def take(self, id_range: IdRange) -> None:
        """A range is requested."""
        if self.free <= self._kept:
            self._patience.since["tried"] = self._now
        self.free -= 1
        self._patience.failing.pop(id_range, None)  # its run may end before the next tick

    def history(self, id_range: IdRange) -> History | None:
        """The ended runs of a range; None when a tick has read so many that the next one goes on."""
        known = self._patience.failing.get(id_range)
        if known is not None:
            return known
        self._histories_left -= 1
        return self._read_history(id_range) if self._histories_left >= 0 else None

    def forget(self, ranges: Iterable[IdRange]) -> None:
        """Ranges on which a run works, or of which no row is pending any more: what became of them is read again."""
        for id_range in ranges:
            self._patience.failing.pop(id_range, None)

    def may_go(self, id_range: IdRange, history: History) -> bool:
        """Whether a range may be requested now; one whose last run failed may have to wait, and may keep a place."""
        if not self._rules.backs_off or not history.failures_in_a_row or history.ended_at is None:
            return True
        if len(self._patience.failing) < _MOST_REMEMBERED:
            self._patience.failing[id_range] = history
        outcomes = self._ask()
        waits = self._waits(history)
        others_succeed = outcomes.succeeded_at is not None and outcomes.succeeded_at > history.ended_at
        if not others_succeed and self.free > self._kept:
            self._kept += 1
            if not waits:
                self._keepers.append(id_range)
        elif not waits and others_succeed and min(self._failing_first, self.free - self._kept) > 0:
            self._failing_first -= 1
            return True
        elif not waits:
            self._others.append((history.ended_at, id_range))
        return False

    def late(self) -> Iterator[IdRange]:
        """Ranges that failed and let others go first: those that keep a place, then as long as each has waited."""
        for id_range in self._keepers:
            self._kept -= 1
            if self.free > self._kept:
                yield id_range
        for _, id_range in sorted(self._others):
            if not self.is_one_left():
                return
            yield id_range

    def _ask(self) -> Outcomes:
        if self._outcomes is None:
            self._outcomes = self._read_outcomes()
            # Half of what is free: many ranges that fail don't keep others back, and no backlog keeps these back.
            self._failing_first = (self.free - self._kept + self._outcomes.last_succeeded) // 2
        return self._outcomes

    def _waits(self, history: History) -> bool:
        """Whether a range whose last runs failed has to wait: 1, 2, 4, … times the delay, an hour at most."""
        if history.ended_at is None:
            return False
        doublings = min(history.failures_in_a_row - 1, 10)
        delay = min(self._rules.retry_delay_seconds * float(2**doublings), _LONGEST_DELAY_SECONDS)
        return (self._now - history.ended_at).total_seconds() < delay
