"""A tick's decisions, rule by rule; `test_planner_machine.py` drives them through every order of events."""

from datetime import UTC, datetime, timedelta

import pytest

from extraction_dagster.records import IdRange
from extraction_dagster.stages.catalog.pending import Scan, Unfinished
from extraction_dagster.ticks.cursor import CursorState
from extraction_dagster.ticks.places import History, Patience, Rules
from extraction_dagster.ticks.planner import Observed, plan_tick

NOW = datetime(2025, 6, 1, 12, tzinfo=UTC)
NOTHING = Scan((), None, None)


def state(last=None, frontier=None, floor=None):
    return CursorState("0" * 16, last, frontier, floor, seq=100)


def found(*ids, waiting=(), reached=None, finished=None):
    rows = sorted([*((number, True) for number in ids), *((number, False) for number in waiting)])
    return Scan(tuple(Unfinished(number, pending=is_pending) for number, is_pending in rows), reached, finished)


def never(*_arguments):
    pytest.fail("was asked for without need: a tick must not read every partition")


def plan(cursor, *, batch_size=3, in_flight=4, wait=30.0, backs_off=True, patience=None, now=NOW, **seen):  # noqa: PLR0913 - a tick
    given = {
        "active": (),
        "window": NOTHING,
        "ahead": NOTHING,
        "swept": (),
        "density": lambda: 1.0,
        "partitions": never,
        "history": never,
    }
    observed = Observed(**given | seen)
    rules = Rules(batch_size, in_flight, wait, backs_off=backs_off)
    return plan_tick(cursor, observed, rules, Patience() if patience is None else patience, now=now)


def asked(tick):
    return [(str(request.id_range), request.run_key, request.is_new) for request in tick.requests]


def ranges(*keys):
    return lambda _ids: [IdRange.parse(key) for key in keys]


def ended(seconds_ago=1000, failures=0):
    return lambda _range: History(failures, NOW - timedelta(seconds=seconds_ago))


def test_a_table_with_nothing_to_do_changes_nothing():
    cursor = state(last=9, frontier=9)
    assert plan(cursor) == plan(cursor)
    assert plan(cursor).cursor is cursor


def test_a_backlog_is_cut_at_each_batchs_last_record_and_ranges_touch():
    tick = plan(state(), ahead=found(1, 2, 3, 101, 102, 103, 201, reached=201))
    assert asked(tick) == [("1-3", "1-3#101", True), ("4-103", "4-103#102", True), ("104-201", "104-201#103", True)]
    assert (tick.cursor.frontier_id, tick.cursor.last_processed_id, tick.cursor.seq) == (201, None, 103)


def test_a_range_handed_out_moves_the_frontier_and_not_the_watermark():
    tick = plan(state(last=3, frontier=3), ahead=found(4, 5, 6))
    assert (tick.cursor.frontier_id, tick.cursor.last_processed_id) == (6, 3)


def test_no_more_ranges_are_in_flight_than_allowed():
    ahead = found(4, 5, 6, 7, 8, 9, 10, 11, 12)
    tick = plan(state(last=3, frontier=3), in_flight=2, active=[IdRange(900, 901)], ahead=ahead)
    assert asked(tick) == [("4-6", "4-6#101", True)]
    assert asked(plan(state(last=3, frontier=3), in_flight=1, active=[IdRange(900, 901)], ahead=ahead)) == []


def test_less_than_a_batch_waits_and_is_then_cut_ahead_at_the_density_of_ids():
    patience, cursor, ahead = Patience(), state(last=3, frontier=3), found(10, 20)
    assert asked(plan(cursor, ahead=ahead, patience=patience)) == []
    almost = NOW + timedelta(seconds=29)
    assert asked(plan(cursor, ahead=ahead, patience=patience, now=almost)) == []
    tick = plan(cursor, ahead=ahead, patience=patience, now=NOW + timedelta(seconds=30), density=lambda: 9.5)
    assert asked(tick) == [("4-32", "4-32#101", True)]  # 3 records of 9.5 ids each, from 4 on
    assert tick.cursor.frontier_id == 32


def test_a_tail_reaches_its_last_row_and_never_beyond_the_greatest_id():
    assert asked(plan(state(last=3, frontier=3), ahead=found(90), wait=0))[0][0] == "4-90"
    last = 2**63 - 1
    tick = plan(state(last=last - 5, frontier=last - 5), ahead=found(last - 1), wait=0, density=lambda: 1e19)
    assert asked(tick)[0][0] == f"{last - 4}-{last}"


def test_the_wait_starts_anew_when_nothing_waits_any_more():
    patience, cursor = Patience(), state(last=3, frontier=3)
    plan(cursor, ahead=found(10), patience=patience)
    plan(cursor, patience=patience, now=NOW + timedelta(seconds=20))
    assert asked(plan(cursor, ahead=found(11), patience=patience, now=NOW + timedelta(seconds=40))) == []


def test_the_watermark_moves_to_the_last_id_below_which_all_is_finished():
    tick = plan(state(last=3, frontier=12), window=found(7, finished=6), active=[IdRange(7, 9)])
    assert (tick.cursor.last_processed_id, tick.cursor.frontier_id, asked(tick)) == (6, 12, [])


def test_the_watermark_never_goes_back():
    cursor = state(last=6, frontier=12)
    assert plan(cursor, window=found(8, finished=5), active=[IdRange(7, 9)]).cursor is cursor


def test_rows_that_were_done_before_need_no_range():
    tick = plan(state(last=3, frontier=3), ahead=found(50, finished=49), wait=0)
    assert (tick.cursor.last_processed_id, asked(tick)) == (49, [("50-52", "50-52#101", True)])


@pytest.mark.parametrize("window", [found(waiting=[5]), found(reached=6), found(5)])
def test_the_watermark_stays_below_the_frontier_while_something_there_is_unfinished(window):
    tick = plan(state(last=3, frontier=9), window=window, ahead=found(finished=49), active=[IdRange(4, 9)])
    assert (tick.cursor.last_processed_id, tick.cursor.frontier_id) == (3, 9)


def test_a_late_row_sends_its_range_to_a_new_run_with_a_key_of_its_own():
    tick = plan(state(last=9, frontier=9), swept=[2], partitions=ranges("1-3", "4-6", "7-9"), history=ended())
    assert asked(tick) == [("1-3", "1-3#101", False)]
    assert tick.cursor.last_processed_id == 9


def test_a_row_that_an_active_run_covers_is_not_asked_for_again_whoever_launched_it():
    assert asked(plan(state(last=9, frontier=9), swept=[2, 8], active=[IdRange(1, 8)])) == []


def test_rows_ahead_that_an_active_run_covers_wait_for_it():
    tick = plan(state(last=3, frontier=3), ahead=found(4, 20, 21), active=[IdRange(15, 30)], wait=1e9)
    assert asked(tick) == [("4-4", "4-4#101", True)]


def test_of_overlapping_ranges_the_narrowest_is_taken():
    known = ranges("1-100", "40-60", "45-80")
    tick = plan(state(last=100, frontier=200), swept=[50, 90], partitions=known, history=ended())
    assert asked(tick) == [("40-60", "40-60#101", False), ("1-100", "1-100#102", False)]


def test_pending_rows_that_no_range_holds_get_ranges_of_their_own_a_batch_to_each():
    tick = plan(state(last=99, frontier=99), swept=[1, 5, 9, 12, 50], partitions=ranges("10-20"), history=ended())
    assert asked(tick) == [("1-9", "1-9#101", True), ("10-20", "10-20#102", False), ("50-50", "50-50#103", True)]


def test_a_range_that_a_burst_has_crowded_is_cut_into_batches():
    burst = [*range(4, 8), 500, 501, 777]
    tick = plan(state(last=3, frontier=2000), window=found(*burst), partitions=ranges("1-1000"), history=ended())
    assert asked(tick) == [("4-6", "4-6#101", True), ("7-501", "7-501#102", True), ("777-777", "777-777#103", True)]
    known = ranges("1-1000", "4-6", "7-501")
    tick = plan(state(last=3, frontier=2000), window=found(*burst), partitions=known, history=ended())
    assert [(key, is_new) for key, _, is_new in asked(tick)] == [("4-6", False), ("7-501", False), ("1-1000", False)]
    full = found(4, 5, 6, 7, 8, 9)
    tick = plan(state(last=3, frontier=2000), window=full, partitions=ranges("1-1000"), history=ended())
    assert asked(tick) == [("1-1000", "1-1000#101", False)]


@pytest.mark.parametrize(
    ("failures", "waits_seconds"), [(1, 30), (2, 60), (3, 120), (7, 1920), (8, 3600), (40, 3600), (2000, 3600)]
)
def test_a_range_whose_runs_failed_backs_off(failures, waits_seconds):
    def retried(seconds_ago, **options):
        history = ended(seconds_ago, failures)
        return asked(
            plan(state(last=3, frontier=9), window=found(4), partitions=ranges("4-6"), history=history, **options)
        )

    assert retried(waits_seconds - 1) == []
    assert retried(waits_seconds) == [("4-6", "4-6#101", False)]
    assert retried(0, backs_off=False) == [("4-6", "4-6#101", False)]


def test_a_range_that_backs_off_keeps_its_place():
    tick = plan(
        state(last=3, frontier=6),
        in_flight=1,
        window=found(4),
        ahead=found(7, 8, 9),
        partitions=ranges("4-6"),
        history=ended(1, failures=1),
    )
    assert asked(tick) == []


def test_a_trickle_into_the_last_range_is_run_once_it_waited_or_is_full():
    patience = Patience()

    def trickle(*ids, seconds=0.0, history=None):
        return asked(
            plan(
                state(last=3, frontier=9),
                window=found(*ids),
                partitions=ranges("4-9"),
                history=history or ended(),
                patience=patience,
                now=NOW + timedelta(seconds=seconds),
            )
        )

    again = [("4-9", "4-9#101", False)]
    assert trickle(5) == []
    assert trickle(5, 6, seconds=29) == []
    assert trickle(5, 6, seconds=30) == again
    patience.end("tail")
    assert trickle(5, 6, 7) == again
    assert trickle(5, history=lambda _range: History()) == again  # it never ran
    assert trickle(5, history=ended(failures=1)) == again


def test_a_range_below_the_frontier_never_waits_to_be_filled():
    tick = plan(state(last=3, frontier=9), window=found(4), partitions=ranges("4-6", "7-9"), history=ended())
    assert asked(tick) == [("4-6", "4-6#101", False)]


def test_no_partition_is_read_while_every_place_is_taken():
    assert asked(plan(state(last=9, frontier=9), in_flight=1, active=[IdRange(7, 9)], swept=[2])) == []


def test_a_record_brought_back_in_the_last_range_is_not_kept_waiting_for_the_range_to_fill():
    tick = plan(state(last=9, frontier=9), swept=[5], partitions=ranges("1-9"), history=ended())
    assert asked(tick) == [("1-9", "1-9#101", False)]


def test_rows_that_a_backfill_takes_care_of_are_not_asked_for_and_those_behind_them_are():
    backfilled = [IdRange(4, 6), IdRange(7, 9), IdRange(30, 40)]
    tick = plan(state(last=3, frontier=3), ahead=found(4, 8, 10, 11, 12, 31, 50, 51, 52), backfilled=backfilled)
    assert asked(tick) == [("10-12", "10-12#101", True)]
    assert (tick.cursor.frontier_id, tick.cursor.last_processed_id) == (12, 3)
    later = plan(tick.cursor, ahead=found(31, 50, 51, 52), backfilled=backfilled)
    assert asked(later) == [("41-52", "41-52#102", True)]


def test_a_range_above_the_frontier_on_which_somebody_works_for_ever_stops_nothing_behind_it():
    active = [IdRange(4, 9)]
    tick = plan(state(last=3, frontier=3), ahead=found(5, 8, 10, 11, 12), active=active)
    assert (asked(tick), tick.cursor.frontier_id) == ([("10-12", "10-12#101", True)], 12)
    # Its rows may have been passed by an earlier look; no second run is to work on them all the same.
    assert asked(plan(state(last=3, frontier=3), ahead=found(10, 11, 12), active=active))[0][0] == "10-12"


def test_late_rows_that_a_backfill_takes_care_of_wait_for_it():
    seen = {"swept": [2, 8], "window": found(12, 15, finished=11), "history": ended(), "wait": 0}
    there = ranges("1-3", "4-11", "12-14", "15-20")
    tick = plan(state(last=11, frontier=20), backfilled=[IdRange(1, 3), IdRange(12, 14)], partitions=there, **seen)
    assert asked(tick) == [("4-11", "4-11#101", False), ("15-20", "15-20#102", False)]


def test_ranges_of_a_backfill_take_no_place_among_those_in_flight():
    ahead, backfilled = found(4, 5, 6), [IdRange(900 + n, 900 + n) for n in range(10)]
    tick = plan(state(last=3, frontier=3), in_flight=1, ahead=ahead, backfilled=backfilled)
    assert asked(tick) == [("4-6", "4-6#101", True)]
