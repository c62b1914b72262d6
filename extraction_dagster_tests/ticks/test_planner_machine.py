"""Ticks in every order of events: rows, runs, operators, crashes; and mutants that must not survive it."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from extraction_dagster.records import IdRange
from extraction_dagster.stages.catalog.pending import Scan, Unfinished
from extraction_dagster.ticks.cursor import CursorState
from extraction_dagster.ticks.mirrors import Reading, adopt, follow
from extraction_dagster.ticks.places import History, Outcomes, Patience, Rules
from extraction_dagster.ticks.planner import Observed, plan_tick

SOURCE = "0" * 16
RULES = Rules(batch_size=3, max_in_flight=2, max_wait_seconds=30.0)
LEAST, MOST = -(2**63), 2**63 - 1
ids = st.integers(-5, 60)


class MemoryMirror:
    """A mirror in memory; those on disk and in tables have their own tests."""

    name = "memory"

    def __init__(self):
        self.value, self.is_there = None, False

    def read(self):
        return Reading("ok", self.value) if self.is_there else Reading("missing")

    def write(self, last_processed_id, *, now):  # noqa: ARG002 - the interface
        self.value, self.is_there = last_processed_id, True


class World:
    """Rows, runs, partitions and the stored cursor, with nothing of the planner's own arithmetic."""

    def __init__(self, rules=RULES, budget=4):
        self.rules, self.budget = rules, budget
        self.now = datetime(2025, 6, 1, tzinfo=UTC)
        self.rows, self.retry_at = {}, {}
        self.partitions, self.active, self.histories = set(), {}, {}
        self.promised, self.of_backfill = set(), set()  # ranges that backfills wait to launch, and those they launched
        self.cursor, self.mirror, self.patience = None, MemoryMirror(), Patience()
        self.keys, self.launched, self.seq = set(), set(), 0
        self.window_after = None
        self.cursed, self.outcomes = set(), Outcomes()  # no run over a range that holds a cursed row succeeds

    plan = staticmethod(plan_tick)
    knows_the_watermark = True

    def unfinished(self):
        return {number for number, became in self.rows.items() if became in {"todo", "failed"}}

    def is_pending(self, number):
        return self.rows[number] == "todo" or (self.rows[number] == "failed" and self.retry_at[number] <= self.now)

    def scan(self, after, up_to, budget):
        low, high = LEAST if after is None else after + 1, MOST if up_to is None else up_to
        inside = sorted(number for number in self.rows if low <= number <= high)
        heads = [number for number in inside if self.rows[number] != "done"][:budget]
        reached = heads[-1] if len(heads) == budget else None
        left = [number for number in heads if number in self.unfinished()]
        end = left[0] - 1 if left else high if reached is None else reached
        finished = [number for number in inside if number <= end]
        rows = tuple(Unfinished(number, pending=self.is_pending(number)) for number in left)
        return Scan(rows, reached, finished[-1] if finished else None)

    def load(self):
        if self.cursor is not None:
            return self.cursor
        self.seq += 1_000_000  # the clock
        first = CursorState(SOURCE, seq=self.seq)
        watermark = adopt(self.mirror)
        return first.moved(now=self.now, last_processed_id=watermark, frontier_id=watermark)

    def see(self, cursor, *, sweeps):
        last = cursor.last_processed_id
        floor = LEAST if cursor.floor_id is None else cursor.floor_id
        after = cursor.floor_id if last is None else last
        swept = [
            number
            for number in sorted(self.rows)
            if sweeps
            and last is not None
            and self.is_pending(number)
            and (floor is None or number > floor)
            and number <= last
        ]
        newest = sorted(self.rows)[-self.rules.batch_size :]
        return Observed(
            active=[id_range for id_range in self.active if id_range not in self.of_backfill],
            backfilled=[*self.promised, *self.of_backfill],
            window=self.window(after, cursor.frontier_id),
            ahead=self.scan(cursor.frontier_id, None, self.budget),
            swept=swept,
            density=lambda: 1.0 if len(newest) < 2 else (newest[-1] - newest[0]) / (len(newest) - 1),
            partitions=lambda _ids: set(self.partitions),
            history=lambda id_range: self.histories.get(id_range, History()),
            room=self.room,
            outcomes=lambda: self.outcomes,
        )

    def window(self, after, frontier):
        """Its beginning, and a part of what follows: each time the next one."""
        first = Scan((), None, None) if frontier is None else self.scan(after, frontier, self.budget)
        if first.reached_id is None:
            self.window_after = None
            return first
        place = first.reached_id if self.window_after is None else max(self.window_after, first.reached_id)
        more = self.scan(place, frontier, self.budget)
        self.window_after = more.reached_id
        return replace(first, unfinished=first.unfinished + more.unfinished)

    def room(self, first, last, most):
        inside = sorted(number for number in self.rows if first <= number <= last)
        return inside[most - 1] if len(inside) >= most else last

    def tick(self, *, sweeps=True, crash=None):
        """A tick; a crash keeps only what was done before it: nothing, the partitions, the partitions and the runs."""
        before = self.load()
        seen = self.see(before, sweeps=sweeps)
        decided = self.plan(before, seen, self.rules, self.patience, now=self.now)
        self.check(before, decided)
        if crash != "at once":
            self.partitions |= {request.id_range for request in decided.requests if request.is_new}
            if crash != "before the runs":
                for request in decided.requests:
                    assert request.id_range not in self.active, "a range must not have two active runs"
                    if request.run_key not in self.launched:  # Dagster launches a run key once, for ever
                        self.launch(request.id_range, decided.cursor.floor_id)
                    self.launched.add(request.run_key)
        if crash is None:
            self.cursor = decided.cursor
            self.keys |= {request.run_key for request in decided.requests}
            follow(self.mirror, decided.cursor.last_processed_id, now=self.now)
        else:
            self.patience = Patience()  # the process died
        return decided

    def check(self, before, decided):
        after, old = decided.cursor, before.last_processed_id
        if old is not None:
            assert after.last_processed_id >= old, "the watermark must not go back"
        low = LEAST if old is None else old
        reached = LEAST if after.last_processed_id is None else after.last_processed_id
        skipped = [number for number in sorted(self.unfinished()) if low < number <= reached]
        assert skipped == [], "the watermark passed rows that are not finished"
        frontier = before.frontier_id
        for request in decided.requests:
            assert request.run_key not in self.keys, "a run key must be new"
            if request.is_new and frontier is not None and request.id_range.first_id > max(frontier, reached):
                between = range(max(frontier, reached) + 1, request.id_range.first_id)
                is_crowded = sum(number in between for number in self.rows) >= self.rules.most_rows
                assert not between or is_crowded or self.is_taken(between.stop - 1), "ranges must touch"
                passed = [number for number in self.rows if number in between and self.is_pending(number)]
                assert all(self.is_taken(number) for number in passed), "rows were left behind"
                frontier = request.id_range.last_id
            if request.is_new:
                held = sum(number in request.id_range for number in self.rows)
                assert held <= max(self.rules.most_rows, self.rules.batch_size), "a range must not hold too many rows"
        for given in self.promised | self.of_backfill:
            twice = [r for r in decided.requests if r.id_range.first_id in given and r.id_range.last_id in given]
            assert twice == [], "a range must not have two active runs"
        num_active = len(self.active.keys() - self.of_backfill)
        assert len(decided.requests) <= max(self.rules.max_in_flight - num_active, 0)

    def is_taken(self, number):
        return any(number in id_range for id_range in self.promised | self.of_backfill | self.active.keys())

    def launch_promised(self, id_range):
        self.promised.remove(id_range)
        if id_range not in self.active:
            self.launch(id_range)
            self.of_backfill.add(id_range)

    def launch(self, id_range, floor=None):
        self.partitions.add(id_range)
        low = LEAST if floor is None else floor
        self.active[id_range] = [number for number in self.rows if number in id_range and number > low]

    def is_cursed(self, id_range):
        return any(number in id_range for number in self.cursed)

    def end(self, id_range, outcomes, *, success):
        success = success and not self.is_cursed(id_range)
        outcomes = [None] * len(outcomes) if self.is_cursed(id_range) else outcomes
        when = {"succeeded_at" if success else "failed_at": self.now}
        self.outcomes = replace(self.outcomes, **when)
        for number, became in zip(sorted(self.active.pop(id_range)), outcomes, strict=False):
            if number in self.rows and self.is_pending(number) and became is not None:
                self.rows[number] = became
                self.retry_at[number] = self.now + timedelta(seconds=60)
        self.of_backfill.discard(id_range)
        before = self.histories.get(id_range, History())
        self.histories[id_range] = History(0 if success else before.failures_in_a_row + 1, self.now)

    def left(self, floor):
        return [number for number in sorted(self.unfinished()) if number > floor]

    def stuck(self):
        """Rows that share a range with a cursed one."""
        return {number for item in self.partitions if self.is_cursed(item) for number in self.rows if number in item}

    def drain(self):
        """Whatever happened before: with runs that succeed from now on, every row above the floor is finished.

        But for those in ranges that never succeed, for reasons of their own.
        """
        idle, floor = 0, LEAST if self.cursor is None or self.cursor.floor_id is None else self.cursor.floor_id
        for _ in range(200):
            for id_range in list(self.promised):
                self.launch_promised(id_range)
            for id_range in list(self.active):
                self.end(id_range, ["done"] * len(self.active[id_range]), success=True)
            self.now += timedelta(hours=2)
            decided = self.tick()
            idle = 0 if decided.requests or self.active else idle + 1
            if idle > 3:  # rows waited for their range to fill in between
                break
            if self.left(floor) and self.stuck().issuperset(self.left(floor)):
                break
        floor = LEAST if self.cursor.floor_id is None else self.cursor.floor_id
        assert [number for number in self.left(floor) if number not in self.stuck()] == [], "rows were forgotten"
        if self.left(floor):
            return
        finished = [number for number in self.rows if number > floor]
        if finished and self.knows_the_watermark:
            assert self.cursor.last_processed_id is not None, "the watermark stayed behind"
            assert self.cursor.last_processed_id >= max(finished), "the watermark stayed behind"


class Ticks(RuleBasedStateMachine):
    """What can happen, in any order."""

    world_class = World

    @initialize(numbers=st.sets(ids, max_size=12), budget=st.integers(4, 30))
    def begin(self, numbers, budget):
        self.world = self.world_class(budget=budget)
        self.world.rows = dict.fromkeys(numbers, "todo")

    @rule(number=ids)
    def a_row_commits_early_or_late(self, number):
        self.world.rows.setdefault(number, "todo")

    @rule(number=ids)
    def a_row_is_deleted(self, number):
        self.world.rows.pop(number, None)

    @rule(number=ids, became=st.sampled_from(["todo", "done"]))
    def a_mark_is_cleared_or_set_by_somebody_else(self, number, became):
        if number in self.world.rows:
            self.world.rows[number] = became

    @rule(sweeps=st.booleans())
    def a_tick(self, sweeps):
        self.world.tick(sweeps=sweeps)

    @rule(crash=st.sampled_from(["at once", "before the runs", "after the runs"]))
    def a_tick_that_crashes(self, crash):
        self.world.tick(crash=crash)

    @rule(seconds=st.sampled_from([1, 31, 61, 4000]))
    def time_passes(self, seconds):
        self.world.now += timedelta(seconds=seconds)

    @precondition(lambda self: self.world.active)
    @rule(
        data=st.data(),
        outcomes=st.lists(st.sampled_from(["done", "done", "failed", "parked", None]), max_size=8),
        success=st.booleans(),
    )
    def a_run_ends_fails_or_is_killed(self, data, outcomes, success):
        id_range = data.draw(st.sampled_from(sorted(self.world.active)))
        self.world.end(id_range, outcomes, success=success)

    @rule(number=ids)
    def a_row_makes_each_run_of_its_range_fail(self, number):
        if len(self.world.cursed) < 3:
            self.world.cursed.add(number)

    @rule()
    def what_made_runs_fail_is_mended(self):
        self.world.cursed.clear()

    @rule(first=ids, width=st.integers(0, 20))
    def somebody_launches_a_range(self, first, width):
        if IdRange(first, first + width) not in self.world.active:
            self.world.launch(IdRange(first, first + width))

    @rule(value=st.none() | ids)
    def the_operator_sets_or_resets(self, value):
        cursor = self.world.load()
        self.world.cursor = cursor.moved(
            now=self.world.now,
            last_processed_id=value,
            frontier_id=value,
            floor_id=value,
            reset_epoch=cursor.reset_epoch + 1,
        )

    @rule()
    def the_cursor_store_is_lost(self):
        self.world.cursor = None

    @rule(value=ids)
    def somebody_writes_the_mirror(self, value):
        if self.world.cursor is not None:
            self.world.mirror.write(value, now=self.world.now)

    def teardown(self):
        if hasattr(self, "world"):
            if self.world.cursor is None:
                self.world.mirror = MemoryMirror()
            self.world.drain()


class TicksBesideBackfills(Ticks):
    """The same, and backfills that promise ranges, launch them one by one, or are cancelled."""

    @rule(first=ids, widths=st.lists(st.integers(0, 8), min_size=1, max_size=4))
    def somebody_backfills_ranges(self, first, widths):
        for width in widths:
            if IdRange(first, first + width) not in self.world.active:
                self.world.promised.add(IdRange(first, first + width))
                self.world.partitions.add(IdRange(first, first + width))
            first += width + 1

    @precondition(lambda self: self.world.promised)
    @rule(data=st.data())
    def a_backfill_launches_a_range(self, data):
        self.world.launch_promised(data.draw(st.sampled_from(sorted(self.world.promised))))

    @precondition(lambda self: self.world.promised)
    @rule()
    def a_backfill_is_cancelled(self):
        self.world.promised.clear()


class TicksOverManyDoneRows(Ticks):
    """Rows that were done before anybody cut ranges, more than a range may hold."""

    @initialize(numbers=st.sets(ids, max_size=40), budget=st.integers(4, 30), pending=st.sets(ids, max_size=6))
    def begin(self, numbers, budget, pending):
        self.world = self.world_class(rules=replace(RULES, most_rows=7), budget=budget)
        self.world.rows = dict.fromkeys(numbers, "done") | dict.fromkeys(pending, "todo")


QUIET = [HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large]


@pytest.mark.parametrize("machine", [Ticks, TicksBesideBackfills, TicksOverManyDoneRows])
def test_no_order_of_events_loses_a_row_or_moves_the_watermark_over_one(machine):
    most = max(40, settings.default.max_examples)  # 500 in the full profile
    run_state_machine_as_test(
        machine,
        settings=settings(max_examples=most, stateful_step_count=40, deadline=None, suppress_health_check=QUIET),
    )


def test_a_trickle_of_one_row_at_a_time_makes_about_rows_by_batch_size_partitions():
    world = World(Rules(batch_size=20, max_in_flight=4, max_wait_seconds=30.0), budget=5000)
    for number in range(1, 201):
        world.rows[number] = "todo"
        for _ in range(6):
            world.now += timedelta(seconds=10)
            world.tick(sweeps=False)
            for id_range in list(world.active):
                world.end(id_range, ["done"] * len(world.active[id_range]), success=True)
    assert world.unfinished() == set()
    assert sorted(map(str, world.partitions), key=lambda key: int(key.split("-")[0])) == [
        f"{first}-{first + 19}" for first in range(1, 201, 20)
    ]


def test_a_trickle_of_sparse_ids_makes_about_rows_by_batch_size_partitions():
    world = World(Rules(batch_size=20, max_in_flight=4, max_wait_seconds=30.0), budget=5000)
    for number in range(7, 7 + 200 * 50, 50):
        world.rows[number] = "todo"
        for _ in range(6):
            world.now += timedelta(seconds=10)
            world.tick(sweeps=False)
            for id_range in list(world.active):
                world.end(id_range, ["done"] * len(world.active[id_range]), success=True)
    assert world.unfinished() == set()
    assert 10 <= len(world.partitions) <= 12


# Mutants: each is a mistake that such systems make; the machine has to find it.


class AdvancesAtLaunch(World):
    """Takes what was handed out for done."""

    @staticmethod
    def plan(cursor, seen, rules, patience, *, now):
        decided = plan_tick(cursor, seen, rules, patience, now=now)
        moved = decided.cursor.moved(now=now, last_processed_id=decided.cursor.frontier_id)
        return replace(decided, cursor=moved)


class LooksAboveTheCursorAlone(World):
    """`WHERE id > cursor`: never looks back."""

    knows_the_watermark = False

    def see(self, cursor, *, sweeps):  # noqa: ARG002 - the interface
        return replace(super().see(cursor, sweeps=False), window=Scan((), None, None))

    def check(self, before, decided):
        """Let it go on: the rows that it forgets are what is looked for."""


class BelievesTheMirror(World):
    """Starts from the mirror, although the cursor store has its own word."""

    def load(self):
        cursor = super().load()
        mirrored = self.mirror.read().last_processed_id
        return cursor if mirrored is None else replace(cursor, last_processed_id=mirrored, frontier_id=mirrored)

    def check(self, before, decided):
        stored = self.cursor
        super().check(stored if stored is not None else before, decided)


class ForgetsRowsThatWait(World):
    """Lets the watermark pass a failed row that still has tries."""

    @staticmethod
    def plan(cursor, seen, rules, patience, *, now):
        pending = tuple(row for row in seen.window.unfinished if row.pending)
        finished = pending[0].record_id - 1 if pending else cursor.frontier_id
        window = replace(seen.window, unfinished=pending, finished_up_to=finished)
        return plan_tick(cursor, replace(seen, window=window), rules, patience, now=now)


class AsksTwice(World):
    """Does not look for runs that are active already."""

    @staticmethod
    def plan(cursor, seen, rules, patience, *, now):
        return plan_tick(cursor, replace(seen, active=()), rules, patience, now=now)


class OverlooksBackfills(World):
    """Does not look at the ranges that backfills take care of."""

    @staticmethod
    def plan(cursor, seen, rules, patience, *, now):
        return plan_tick(cursor, replace(seen, backfilled=()), rules, patience, now=now)


class KeepsPlacesForEver(World):
    """Lets a range that failed keep its place whatever others do, and tries no other."""

    @staticmethod
    def plan(cursor, seen, rules, patience, *, now):
        patience.since |= {"kept": now, "tried": now}
        return plan_tick(cursor, replace(seen, outcomes=Outcomes), rules, patience, now=now)


def two_ranges_never_succeed(world):
    world.rows, world.cursed = dict.fromkeys(range(1, 16), "todo"), {1, 5}
    world.tick()
    world.drain()
    assert world.unfinished() == {1, 2, 3, 5, 6, 7}


def a_row_fails_and_waits(world):
    world.rows = dict.fromkeys((1, 2, 3), "todo")
    (request,) = world.tick().requests
    world.end(request.id_range, ["failed", "done", "done"], success=False)
    world.tick()


def a_backfill_promises_what_is_due(world):
    world.rows = dict.fromkeys((1, 2, 3), "todo")
    world.promised.add(IdRange(1, 3))
    world.partitions.add(IdRange(1, 3))
    world.tick()


def a_row_commits_late(world):
    world.rows = dict.fromkeys((2, 3, 4), "todo")
    (request,) = world.tick().requests
    world.end(request.id_range, ["done"] * 3, success=True)
    world.tick()
    world.rows[1] = "todo"
    world.drain()


# Chance takes hundreds of examples to find these: the events that show them are written out here.
@pytest.mark.parametrize(
    ("mutant", "events", "caught"),
    [
        (LooksAboveTheCursorAlone, a_row_commits_late, "rows were forgotten"),
        (ForgetsRowsThatWait, a_row_fails_and_waits, "the watermark passed"),
        (OverlooksBackfills, a_backfill_promises_what_is_due, "two active runs"),
        (KeepsPlacesForEver, two_ranges_never_succeed, "rows were forgotten"),
    ],
)
def test_a_planted_mistake_shows_in_the_events_that_tell_it(mutant, events, caught):
    events(World())
    with pytest.raises(AssertionError, match=caught):
        events(mutant())


@pytest.mark.parametrize(
    ("mutant", "caught"),
    [
        (AdvancesAtLaunch, "the watermark passed"),
        pytest.param(LooksAboveTheCursorAlone, "rows were forgotten", marks=pytest.mark.soak),
        (BelievesTheMirror, "the watermark"),
        pytest.param(ForgetsRowsThatWait, "the watermark passed", marks=pytest.mark.soak),
        (AsksTwice, "two active runs|assert"),
        pytest.param(OverlooksBackfills, "two active runs", marks=pytest.mark.soak),
    ],
)
def test_a_planted_mistake_is_found(mutant, caught):
    base = TicksBesideBackfills if mutant is OverlooksBackfills else Ticks
    machine = type(f"Ticks{mutant.__name__}", (base,), {"world_class": mutant})
    with pytest.raises(AssertionError, match=caught):
        run_state_machine_as_test(
            machine,
            settings=settings(
                max_examples=5000,  # it stops at the first find; chance decides how soon that is
                stateful_step_count=40,
                deadline=None,
                derandomize=True,
                database=None,
                phases=[Phase.generate],
                report_multiple_bugs=False,
                suppress_health_check=QUIET,
            ),
        )
