"""The brake: what is gone for a moment, or too much of it at once, stays; what is gone for good is removed."""

from contextlib import closing
from datetime import UTC, datetime, timedelta

import pytest

from extraction_dagster.records import IdRange
from extraction_dagster.stages.catalog.catalog import Catalog
from extraction_dagster.stages.index import purge, reconcile
from extraction_dagster.stages.index.edge.store import EdgeStore
from extraction_dagster.stages.index.purge import Brake
from extraction_dagster.stages.index.server.store import ServerStore

ALL = IdRange(-(2**63), 2**63 - 1)
TABLE = dict.fromkeys(range(1, 41), 1)


class Clock:
    """The moment that `purge` takes for now: `clock.pass_by(minutes=30)`."""

    def __init__(self, monkeypatch):
        self.moment = datetime(2026, 1, 2, 3, 0, tzinfo=UTC)
        clock = self

        class Datetime(datetime):
            @classmethod
            def now(cls, tz=None):
                return clock.moment.astimezone(tz)

        monkeypatch.setattr(purge, "datetime", Datetime)

    def pass_by(self, **span):
        self.moment += timedelta(**span)


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


@pytest.fixture
def make(world, settings):
    """`make(purge_share=0.5)`: a catalog over 40 records that are done, with the brake's defaults otherwise."""
    opened = []

    def start(ids=TABLE, **options):
        catalog = Catalog(settings(source_predicate="NOT is_removed", **options))
        opened.append(catalog)
        world.add(*ids)
        assert world.process(catalog, frames=dict.fromkeys(ids, 1)) == sorted(ids)
        return catalog

    yield start
    for catalog in opened:
        catalog.close()


def held(world, catalog):
    """The records that have points, and those that the ledger knows."""
    return list(world.points()), list(catalog.ledger.entries(ALL))


def listed(world, *, removed=False):
    """The records that are on the list as gone, or as removed."""
    condition = f"purged_at IS {'NOT ' if removed else ''}NULL"
    return world.rows(f"SELECT record_id FROM extraction_gone WHERE {condition} ORDER BY record_id")


def back_with_its_marks(world, *ids):
    world.add(*ids)
    world.execute(
        f"UPDATE insta_content SET is_extracted = 1, is_embedded = 1 WHERE id IN ({', '.join(map(str, ids))})"
    )


@pytest.fixture
def purged(world, make, clock):
    """`purged(2, 3)`: the catalog, after these rows were deleted and their points removed."""

    def start(*ids, **options):
        catalog = make(**options)
        world.execute(f"DELETE FROM insta_content WHERE id IN ({', '.join(map(str, ids))})")
        world.reconcile(catalog)
        clock.pass_by(hours=1)
        assert world.reconcile(catalog, repair=True).removed_records == len(ids)
        assert listed(world, removed=True) == [(key,) for key in ids]
        return catalog

    return start


def test_what_is_gone_is_removed_when_a_later_reconciliation_finds_it_gone_as_well(world, make, clock):
    catalog = make()
    world.execute("DELETE FROM insta_content WHERE id IN (2, 3)")
    for minutes in (0, 30, 29):
        clock.pass_by(minutes=minutes)
        found = world.reconcile(catalog, repair=True)
        assert (found.brake.waiting, found.removed_points, found.remaining) == (2, 0, 0)
    assert held(world, catalog) == (sorted(TABLE), sorted(TABLE))
    assert found.summary == (
        "Of 38 records with 38 points: 2 points gone (2 records). 2 records wait, the first of them since 2026-01-02 "
        "03:00:00Z: 'extraction reconcile --repair' after 2026-01-02 04:00:00Z removes those that are gone by then as "
        "well."
    )
    said = found.document()
    assert said["gone_waiting_records"] == 2
    assert said["gone_waiting_since"] == "2026-01-02T03:00:00.000Z"
    assert said["gone_waiting_until"] == "2026-01-02T04:00:00.000Z"
    assert (said["gone_held_back_records"], said["gone_held_back_because"]) == (0, None)
    clock.pass_by(minutes=1)
    found = world.reconcile(catalog, repair=True)
    assert (found.removed_records, found.removed_points, found.remaining) == (2, 2, 0)
    left = sorted(set(TABLE) - {2, 3})
    assert held(world, catalog) == (left, left)
    assert listed(world) == []
    assert world.reconcile(catalog, repair=True).differences == []


def test_a_record_that_comes_back_has_to_be_gone_twice_again(world, make, clock):
    catalog = make()
    world.execute("UPDATE insta_content SET is_removed = 1 WHERE id = 2")
    world.reconcile(catalog)
    clock.pass_by(hours=1)
    world.execute("UPDATE insta_content SET is_removed = 0")
    assert world.reconcile(catalog, repair=True).differences == []
    world.execute("UPDATE insta_content SET is_removed = 1 WHERE id = 2")
    found = world.reconcile(catalog, repair=True)
    assert (found.brake.waiting, found.removed_points) == (1, 0)
    assert held(world, catalog) == (sorted(TABLE), sorted(TABLE))


def test_a_comparison_alone_notes_what_is_gone_and_stays_red(world, make, clock):
    catalog = make()
    world.execute("DELETE FROM insta_content WHERE id = 2")
    assert world.reconcile(catalog).remaining == 1
    clock.pass_by(hours=1)
    found = world.reconcile(catalog)
    assert (found.remaining, found.brake.removable, found.removed_points) == (1, (2,), 0)
    assert 2 in world.points()
    assert world.reconcile(catalog, repair=True).removed_points == 1


@pytest.mark.parametrize("moment", ["DELETE FROM insta_content", "UPDATE insta_content SET is_removed = 1"])
def test_a_table_without_an_eligible_row_removes_nothing_whatever_is_said(world, make, clock, moment):
    catalog = make(purge_share=1)
    world.execute(moment)
    for _ in range(2):
        found = world.reconcile(catalog, repair=True, force=True)
        clock.pass_by(days=1)
    assert (found.brake.held_back, found.remaining, found.removed_points) == (40, 40, 0)
    assert "no eligible row, so nothing is removed, also with --force" in found.summary
    assert held(world, catalog) == (sorted(TABLE), sorted(TABLE))


def test_more_than_the_share_is_held_back_as_a_whole_until_it_is_forced(world, make, clock):
    catalog = make(purge_share=0.25)
    world.execute("DELETE FROM insta_content WHERE id <= 11")
    for _ in range(2):
        found = world.reconcile(catalog, repair=True, window_records=3)
        clock.pass_by(hours=1)
    assert (found.brake.held_back, found.remaining, found.removed_points) == (11, 11, 0)
    assert found.document()["gone_held_back_because"] == (
        "11 of 40 known records are gone, more than EXTRACTION_PURGE_SHARE (0.25) allows. See that the table is whole "
        "and EXTRACTION_SOURCE_PREDICATE is meant so; then 'extraction reconcile --repair --force' removes them."
    )
    assert held(world, catalog) == (sorted(TABLE), sorted(TABLE))
    found = world.reconcile(catalog, repair=True, force=True, window_records=3)
    assert (found.removed_points, found.remaining) == (11, 0)
    left = list(range(12, 41))
    assert held(world, catalog) == (left, left)


def test_force_does_not_shorten_the_wait(world, make, clock):
    catalog = make()
    world.execute("DELETE FROM insta_content WHERE id <= 30")
    assert world.reconcile(catalog, repair=True, force=True).brake.waiting == 30
    clock.pass_by(minutes=59)
    assert world.reconcile(catalog, repair=True, force=True).removed_points == 0
    clock.pass_by(minutes=1)
    assert world.reconcile(catalog, repair=True, force=True).removed_points == 30


@pytest.mark.parametrize(
    ("known", "gone", "share", "is_removed"),
    [
        (12, 2, 0.1, True),
        (12, 6, 0.1, True),
        (12, 7, 0.1, False),
        (40, 10, 0.1, True),
        (40, 11, 0.1, False),
        (40, 11, 0.5, True),
        (12, 1, 0, False),
        (2, 1, 0.1, True),
        (1, 1, 0.1, False),
    ],
)
def test_a_handful_of_a_small_table_is_no_accident_and_more_than_half_is_one(  # noqa: PLR0913, PLR0917 - fixtures
    world, make, known, gone, share, is_removed
):
    catalog = make(range(1, known + 1), purge_share=share, purge_after_seconds=0)
    world.add(100)  # what is there is not what is known
    world.execute(f"DELETE FROM insta_content WHERE id <= {gone}")
    found = world.reconcile(catalog, repair=True)
    assert (found.removed_records, found.brake.held_back) == ((gone, 0) if is_removed else (0, gone))


def test_a_share_is_one_of_all_records_whatever_range_is_compared(world, make, clock):
    catalog = make()
    world.execute("DELETE FROM insta_content WHERE id <= 4")
    for _ in range(2):
        found = world.reconcile(catalog, within=IdRange(1, 4), repair=True)
        clock.pass_by(hours=1)
    assert (found.removed_records, found.brake) == (4, Brake(removable=(1, 2, 3, 4)))


def test_a_range_does_not_take_off_the_list_what_lies_outside_of_it(world, make, clock):
    catalog = make()
    world.execute("DELETE FROM insta_content WHERE id IN (2, 30)")
    world.reconcile(catalog, repair=True)
    clock.pass_by(hours=1)
    assert world.reconcile(catalog, within=IdRange(1, 10), repair=True).removed_records == 1
    assert listed(world) == [(30,)]


def test_the_list_is_kept_on_each_kind_of_database(database, clock):
    database.create(ids=(1, 2))
    first, much = clock.moment, 2**40
    with closing(database.catalog()) as catalog:
        assert purge.note_gone(catalog, [3, much], within=ALL) == {3: first, much: first}
        clock.pass_by(minutes=5)
        assert purge.note_gone(catalog, [3, 4], within=IdRange(1, 10)) == {3: first, 4: clock.moment}
        purge.take_off(catalog, [3])
        assert purge.note_gone(catalog, [4, much], within=ALL) == {4: clock.moment, much: first}
        assert database.rows("SELECT record_id FROM extraction_gone ORDER BY record_id") == [(4,), (much,)]


def test_a_lost_ledger_makes_no_few_gone_records_out_of_many_known_ones(world, make):
    catalog = make(purge_after_seconds=0)
    catalog.forget(list(TABLE))
    world.execute("DELETE FROM insta_content WHERE id = 2")
    assert world.reconcile(catalog, repair=True).removed_points == 1


def test_a_row_that_is_back_or_claimed_when_its_turn_comes_is_left_alone(world, make, clock, monkeypatch):
    catalog = make()
    world.execute("DELETE FROM insta_content WHERE id IN (2, 3)")
    world.execute("UPDATE insta_content SET is_removed = 1 WHERE id = 4")
    world.reconcile(catalog)
    clock.pass_by(hours=1)
    decide = reconcile.decide

    def and_meanwhile(*arguments, **options):
        brake = decide(*arguments, **options)
        assert brake.removable == (2, 3, 4)
        world.add(2)
        world.execute("UPDATE extraction_ledger SET claim = claim + 1 WHERE record_id = 4")
        return brake

    monkeypatch.setattr(reconcile, "decide", and_meanwhile)
    assert world.reconcile(catalog, repair=True).removed_records == 1
    left = sorted(set(TABLE) - {3})
    assert held(world, catalog) == (left, left)


def test_a_process_that_dies_between_ledger_and_store_leaves_what_the_next_one_removes(world, make, clock, monkeypatch):
    catalog = make()
    world.execute("DELETE FROM insta_content WHERE id = 2")
    world.execute("UPDATE insta_content SET is_removed = 1 WHERE id = 3")
    world.reconcile(catalog)
    clock.pass_by(hours=1)

    def die(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as dying:
        dying.setattr(EdgeStore, "delete", die)
        with pytest.raises(KeyboardInterrupt, match=r"^$"):
            world.reconcile(catalog, repair=True)
    assert {2, 3} <= set(world.points())
    found = world.reconcile(catalog, repair=True)
    assert (found.removed_points, found.remaining) == (2, 0)
    world.execute("UPDATE insta_content SET is_removed = 0")
    assert world.process(catalog, frames=TABLE) == [3]
    assert world.reconcile(catalog).differences == []


def test_a_neighbour_whose_name_begins_alike_keeps_its_points(world, make, wire_store, stand_in, settings):
    def connect():
        return ServerStore.connect(settings(qdrant_url=stand_in.url, qdrant_grpc_port=stand_in.port))

    catalog = make(purge_after_seconds=0, purge_share=1)
    with EdgeStore(world.home) as ours:
        spec = ours.open_collection("video_frames")
        wire_store.ensure_collection(spec)
        for batch in ours.read():
            wire_store.upsert(batch)
        neighbour = type(spec)("video_frames-staging", spec.dim, spec.fingerprint)
        wire_store.ensure_collection(neighbour)
        for batch in ours.read():
            payloads = tuple({**payload, "record_id": payload["record_id"] + 100} for payload in batch.payloads)
            wire_store.upsert(type(batch)(batch.ids, batch.vectors, payloads))
    found = reconcile.reconcile(catalog, connect, collection_name="video_frames", embedding="e1", repair=True)
    assert found.differences == []
    with closing(connect()) as store:
        store.open_collection("video_frames-staging")
        assert store.count() == 40


def test_rows_that_come_back_marked_after_they_were_removed_are_told_and_done_again(world, purged, monkeypatch):
    monkeypatch.setattr(purge, "_LOOKED_AT", 2)
    catalog = purged(2, 3, 4, 5, 6)
    back_with_its_marks(world, 3, 4, 6)
    assert world.process(catalog, frames=TABLE) == []
    for _ in range(2):
        told = world.reconcile(catalog)
        assert (told.returned, told.remaining, told.document()["returned_records"]) == ([3, 4, 6], 3, 3)
        assert (
            "3 removed records are back, marked as done (records 3, 4, 6): they stay undone until 'ex" in told.summary
        )
    assert world.process(catalog, frames=TABLE) == []
    assert world.reconcile(catalog, within=IdRange(7, 40), repair=True).returned == []
    found = world.reconcile(catalog, repair=True)
    assert (found.returned, found.remaining) == ([3, 4, 6], 3)
    assert found.summary.endswith("3 removed records are back, marked as done (records 3, 4, 6): they are pending now.")
    assert listed(world, removed=True) == [(2,), (5,)]
    assert world.rows("SELECT id FROM insta_content WHERE NOT is_embedded") == [(3,), (4,), (6,)]
    assert world.process(catalog, frames=TABLE) == [3, 4, 6]
    left = sorted(set(TABLE) - {2, 5})
    assert held(world, catalog) == (left, left)
    found = world.reconcile(catalog, repair=True)
    assert (found.returned, found.differences, found.remaining) == ([], [], 0)


def test_what_was_removed_and_needs_nothing_is_taken_off_the_list_silently(world, purged):
    catalog = purged(2, 3, 4)
    world.add(2, 3)
    assert world.process(catalog, IdRange(2, 2), frames=TABLE) == [2]
    assert world.reconcile(catalog).returned == []
    assert listed(world, removed=True) == [(2,), (3,), (4,)]
    found = world.reconcile(catalog, repair=True)
    assert (found.returned, found.remaining) == ([], 0)
    assert listed(world, removed=True) == [(4,)]
    assert world.process(catalog, frames=TABLE) == [3]


def test_what_was_removed_is_remembered_for_90_days(world, purged, clock):
    catalog = purged(2, 3)
    clock.pass_by(days=90)
    world.reconcile(catalog, repair=True)
    assert listed(world, removed=True) == [(2,), (3,)]
    back_with_its_marks(world, 3)
    clock.pass_by(minutes=1)
    assert world.reconcile(catalog).returned == [3]
    assert world.reconcile(catalog, repair=True).returned == [3]
    assert listed(world, removed=True) == []


def test_a_removed_record_that_came_back_and_is_gone_once_more_waits_once_more(world, purged, clock):
    catalog = purged(2)
    world.add(2)
    assert world.process(catalog, frames=TABLE) == [2]
    world.execute("DELETE FROM insta_content WHERE id = 2")
    found = world.reconcile(catalog, repair=True)
    assert (found.brake.waiting, found.removed_points) == (1, 0)
    assert (listed(world), listed(world, removed=True)) == ([(2,)], [])
    clock.pass_by(minutes=59)
    assert world.reconcile(catalog, repair=True).removed_points == 0
    clock.pass_by(minutes=1)
    assert world.reconcile(catalog, repair=True).removed_points == 1
    assert listed(world, removed=True) == [(2,)]


def test_who_looked_before_another_removal_does_not_forget_that_one(world, purged, clock, monkeypatch):
    catalog = purged(2)
    world.add(2)
    make_pending = catalog.make_pending

    def and_meanwhile(record_ids):
        make_pending(record_ids)
        clock.pass_by(minutes=5)
        catalog.forget([2], purged_at=clock.moment)

    monkeypatch.setattr(catalog, "make_pending", and_meanwhile)
    assert world.reconcile(catalog, repair=True).returned == []
    assert listed(world, removed=True) == [(2,)]


@pytest.mark.parametrize("state_apart", [False, True])
def test_what_was_removed_is_found_on_each_kind_of_database(database, clock, state_apart, tmp_path):
    database.create(ids=(1, 2, 2**40))
    apart = {"state_url": f"sqlite:///{tmp_path / 'apart.db'}"} if state_apart else {}
    with closing(database.catalog(**apart)) as catalog:
        database.execute("UPDATE insta_content SET is_extracted = TRUE, is_embedded = TRUE")
        assert purge.note_gone(catalog, [2], within=ALL) == {2: clock.moment}
        catalog.forget([2, 2**40], purged_at=clock.moment)
        assert purge.note_gone(catalog, [2], within=ALL) == {2: clock.moment}
        assert purge.find_returned(catalog, within=ALL, repair=False) == [2, 2**40]
        assert purge.find_returned(catalog, within=IdRange(1, 10), repair=True) == [2]
        assert purge.find_returned(catalog, within=ALL, repair=True) == [2**40]
        assert purge.find_returned(catalog, within=ALL, repair=True) == []
        assert [(key, entry.state) for key, entry in catalog.ledger.entries(ALL).items()] == [
            (2, "todo"),
            (2**40, "todo"),
        ]
        rows = database.rows("SELECT id FROM insta_content WHERE NOT is_embedded ORDER BY id")
        assert [tuple(row) for row in rows] == [(2,), (2**40,)]
