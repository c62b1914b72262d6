"""Ranges that fail, and others beside them: nobody waits for ever, and nothing piles up while a store is down."""

from datetime import UTC, datetime, timedelta

import pytest

from extraction_dagster.records import IdRange
from extraction_dagster.stages.catalog.pending import Scan, Unfinished
from extraction_dagster.ticks.cursor import CursorState
from extraction_dagster.ticks.memory import Memory
from extraction_dagster.ticks.places import History, Outcomes, Patience, Rules
from extraction_dagster.ticks.planner import Observed, plan_tick

NOW = datetime(2025, 6, 1, 12, tzinfo=UTC)
NOTHING = Scan((), None, None)


def found(*ids):
    return Scan(tuple(Unfinished(number, pending=True) for number in ids), None, None)


def ago(seconds):
    return NOW - timedelta(seconds=seconds)


def asked(patience=None, *, places=1, ahead=(), now=NOW, **seen):
    """The ranges that a tick requests; ranges of three ids are registered below the frontier, which is 30."""
    window = found(*seen.pop("pending"))
    observed = Observed(
        window=window,
        ahead=found(*ahead),
        **{"active": (), "swept": (), "density": lambda: 1.0, "outcomes": Outcomes, **seen},
        partitions=lambda _ids: [IdRange(first, first + 2) for first in range(1, 30, 3)],
    )
    rules = Rules(batch_size=3, max_in_flight=places, max_wait_seconds=0)
    cursor = CursorState("0" * 16, frontier_id=30)
    tick = plan_tick(cursor, observed, rules, Patience() if patience is None else patience, now=now)
    return [str(request.id_range) for request in tick.requests]


def failed(*ranges, seconds_ago=1.0, failures=1):
    """A history: these ranges failed, and no other has ever run."""
    return lambda item: History(failures, ago(seconds_ago)) if str(item) in ranges else History()


def test_a_range_that_backs_off_keeps_its_place_until_another_one_has_succeeded():
    def others(**outcomes):
        return asked(
            pending=[1],
            ahead=[31, 32, 33],
            history=failed("1-3", seconds_ago=10),
            outcomes=lambda: Outcomes(**outcomes),
        )

    assert others() == []
    assert others(failed_at=ago(10)) == []
    assert others(succeeded_at=ago(11), failed_at=ago(10)) == []
    assert others(succeeded_at=ago(10), failed_at=ago(10)) == []
    assert others(succeeded_at=ago(9), failed_at=ago(10)) == ["31-33"]
    assert others(succeeded_at=ago(9), failed_at=ago(5)) == ["31-33"]


def test_no_outcome_is_asked_for_while_no_range_has_failed():
    def never():
        pytest.fail("was asked for without need")

    assert asked(pending=[1], history=failed(), outcomes=never) == ["1-3"]


def test_a_range_that_keeps_its_place_takes_it_once_its_back_off_is_over():
    history = failed("1-3", seconds_ago=30)
    assert asked(pending=[1], ahead=[31, 32, 33], history=history) == ["1-3"]
    assert asked(places=2, pending=[1], ahead=[31, 32, 33], history=history) == ["31-33", "1-3"]


@pytest.mark.parametrize(
    ("succeeded", "places", "expected"),
    [
        (5, 1, ["1-3"]),  # the last one succeeded: one that failed goes first
        (50, 1, ["31-33"]),  # the last one failed: another one does
        (5, 3, ["1-3", "4-6", "31-33"]),
        (50, 2, ["1-3", "31-33"]),
        (5, 9, ["1-3", "4-6", "7-9", "10-12", "31-33"]),
    ],
)
def test_ranges_that_failed_and_others_share_what_is_free(succeeded, places, expected):
    ranges = {"1-3": 200, "4-6": 190, "7-9": 180, "10-12": 170}

    def history(item):
        return History(1, ago(ranges[str(item)]))

    outcomes = Outcomes(succeeded_at=ago(succeeded), failed_at=ago(20))
    given = asked(places=places, pending=[1, 4, 7, 10], ahead=[31, 32, 33], history=history, outcomes=lambda: outcomes)
    assert sorted(given, key=lambda key: int(key.split("-")[0])) == expected


def test_of_ranges_that_failed_those_go_first_that_have_waited_longest():
    ranges = {"1-3": 100, "4-6": 300, "7-9": 200}
    outcomes = Outcomes(succeeded_at=ago(50), failed_at=ago(20))
    given = asked(
        places=1,
        pending=[1, 4, 7],
        history=lambda item: History(1, ago(ranges[str(item)])),
        outcomes=lambda: outcomes,
    )
    assert given == ["4-6"]


def test_what_became_of_failing_ranges_is_read_once_until_they_run_again():
    read, patience = [], Patience()

    def history(item):
        read.append(str(item))
        return History(1, ago(1))

    seen = {"history": history, "outcomes": lambda: Outcomes(succeeded_at=NOW), "places": 9, "pending": [1, 4]}
    assert asked(patience, **seen) == []
    assert asked(Memory.from_json(Memory(patience).to_json()).patience, **seen) == []
    assert read == ["1-3", "4-6"]
    assert asked(patience, **seen | {"active": [IdRange(4, 6)]}) == []  # somebody launched it
    assert asked(patience, **seen | {"now": NOW + timedelta(seconds=30)}) == ["1-3", "4-6"]
    assert read == ["1-3", "4-6", "4-6"]
    asked(patience, **seen)  # their runs have ended before this tick
    assert read[3:] == ["1-3", "4-6"]
    assert asked(patience, **seen | {"pending": []}) == []
    assert patience.failing == {}


def test_very_many_ranges_that_failed_are_read_over_several_ticks_and_hide_no_other():
    patience, outcomes, read = Patience(), Outcomes(succeeded_at=NOW), []
    parts = [IdRange(number, number) for number in range(1, 131)]

    def history(item):
        read.append(item)
        return History() if item.first_id == 130 else History(20, ago(100))

    def tick():
        seen = Observed(
            active=(),
            window=found(*range(1, 131)),
            ahead=NOTHING,
            swept=(),
            density=lambda: 1.0,
            partitions=lambda _ids: parts,
            history=history,
            outcomes=lambda: outcomes,
        )
        rules = Rules(batch_size=3, max_in_flight=2, max_wait_seconds=0)
        planned = plan_tick(CursorState("0" * 16, frontier_id=200), seen, rules, patience, now=NOW)
        return [str(request.id_range) for request in planned.requests]

    assert [tick() for _ in range(3)] == [[], [], ["130-130"]]
    assert len(read) == 130


class Table:
    """Rows in ranges of three; every range that holds one of `cursed` fails, as long as it is in there."""

    def __init__(self, num_rows, cursed, places, run_seconds=10):
        self.rows, self.cursed, self.run_seconds = (
            dict.fromkeys(range(1, num_rows + 1), False),
            set(cursed),
            run_seconds,
        )
        self.rules = Rules(batch_size=3, max_in_flight=places, max_wait_seconds=0)
        self.cursor, self.memory, self.start = CursorState("0" * 16), Memory(), NOW
        self.now, self.active, self.histories, self.first_runs = NOW, {}, {}, {}
        self.succeeded_at = self.failed_at = None
        self.num_runs = {}

    def tick(self):
        for id_range in [item for item, ends_at in self.active.items() if ends_at <= self.now]:
            del self.active[id_range]
            if any(number in id_range for number in self.cursed):
                failures = self.histories.get(id_range, History()).failures_in_a_row
                self.histories[id_range], self.failed_at = History(failures + 1, self.now), self.now
            else:
                self.histories[id_range], self.succeeded_at = History(0, self.now), self.now
                self.rows |= {number: True for number in self.rows if number in id_range}
        frontier = self.cursor.frontier_id or 0
        left = [number for number, done in self.rows.items() if not done]
        seen = Observed(
            active=list(self.active),
            window=found(*(number for number in left if number <= frontier)),
            ahead=found(*(number for number in left if number > frontier)),
            swept=(),
            density=lambda: 1.0,
            partitions=lambda _ids: set(self.first_runs),
            history=lambda item: self.histories.get(item, History()),
            outcomes=lambda: Outcomes(self.succeeded_at, self.failed_at),
        )
        planned = plan_tick(self.cursor, seen, self.rules, self.memory.patience, now=self.now)
        self.cursor, self.memory = planned.cursor, Memory.from_json(self.memory.to_json())
        for request in planned.requests:
            self.active[request.id_range] = self.now + timedelta(seconds=self.run_seconds)
            self.first_runs.setdefault(request.id_range, int((self.now - self.start).total_seconds()))
            self.num_runs[request.id_range] = self.num_runs.get(request.id_range, 0) + 1
        assert len(self.active) <= self.rules.max_in_flight

    def go_on(self, seconds):
        for _ in range(seconds // 10):
            self.tick()
            self.now += timedelta(seconds=10)

    @property
    def left(self):
        return [number for number, done in self.rows.items() if not done]


def test_while_everything_fails_another_range_is_tried_each_time_after_twice_as_long():
    table = Table(300, cursed=range(1, 301), places=1)
    table.go_on(8000)
    assert sorted(table.first_runs.values()) == [0, 40, 70, 130, 250, 490, 970, 1930, 3850, 7450]


def test_with_four_places_no_more_ranges_fail_while_a_store_is_down_for_a_day():
    table = Table(300, cursed=range(1, 301), places=4)
    table.go_on(86_400)
    assert len(table.first_runs) < 4 + 40
    table.cursed.clear()
    table.go_on(2 * 3600)
    assert len(table.left) == 0


@pytest.mark.parametrize(("places", "cursed"), [(1, [2]), (1, [2, 5]), (4, [1, 4, 7, 10]), (4, range(1, 60, 5))])
@pytest.mark.parametrize("run_seconds", [10, 300])
def test_ranges_that_fail_for_reasons_of_their_own_stop_no_other(places, cursed, run_seconds):
    table = Table(90, cursed, places, run_seconds)
    table.go_on(40 * (run_seconds + 60) * 2)
    stuck = [number for number in table.rows if any((number - 1) // 3 == (bad - 1) // 3 for bad in cursed)]
    assert table.left == stuck
    table.cursed.clear()
    table.go_on(3 * 3600)
    assert table.left == []


def test_a_backlog_without_an_end_keeps_no_range_that_failed_from_its_next_try():
    table = Table(6000, cursed=[1, 4, 7, 10], places=2)
    table.go_on(600)
    table.cursed.clear()
    table.go_on(1200)
    assert table.left[0] > 12
    assert len(table.left) > 3000
