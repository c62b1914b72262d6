"""Loss, stale points, deleted rows: found, repaired, and nothing else touched; a real table, ledger and engine."""

from contextlib import closing

import pytest

from extraction_dagster.records import IdRange
from extraction_dagster.stages.catalog.catalog import Catalog, Fingerprints
from extraction_dagster.stages.index.compare import Differences
from extraction_dagster.stages.index.edge.store import EdgeStore
from extraction_dagster.stages.index.points import PointFilter, former_generation, point_id
from extraction_dagster.stages.index.reconcile import compare_range
from extraction_dagster.stages.index.stage import delete_records, replace_records

TODAY = Fingerprints(frames="f1", embedding="e1")
ALL = IdRange(1, 99)
# Record of the world: how many frames it has.
FRAMES = {1: 2, 2: 3, 3: 1, 40: 2, 41: 4}


def lose(world, *ids):
    with world.store() as store:
        store.delete(PointFilter(point_ids=ids))


def test_a_store_that_agrees_gives_no_difference_and_is_compared_to_the_last_record(done, catalog):
    found = done.reconcile(catalog, window_records=2)
    assert found.differences == []
    assert (found.windows, found.records, found.points, found.remaining) == (3, 5, 12, 0)
    assert done.points() == FRAMES


def test_lost_points_are_found_and_their_records_alone_are_written_again_from_what_is_stored(done, catalog):
    lose(done, point_id(2, 0), point_id(2, 1), point_id(41, 3))
    found = done.reconcile(catalog)
    assert [item.lost for item in found.differences] == [{2: 2, 41: 1}]
    assert found.remaining == 2
    assert done.points() == {**FRAMES, 2: 1, 41: 3}
    assert done.process(catalog) == []

    repaired = done.reconcile(catalog, repair=True)
    assert repaired.remaining == 2
    entries = catalog.ledger.entries(ALL)
    assert {key: (entry.state, entry.content_version) for key, entry in entries.items()} == {
        1: ("done", ""),
        2: ("todo", ""),
        3: ("done", ""),
        40: ("done", ""),
        41: ("todo", ""),
    }
    assert done.rows("SELECT id, is_extracted, is_embedded FROM insta_content WHERE NOT is_embedded") == [
        (2, 1, 0),
        (41, 1, 0),
    ]
    assert done.process(catalog) == [2, 41]
    assert done.points() == FRAMES
    assert done.reconcile(catalog).remaining == 0


def test_a_lost_store_is_written_again_as_a_whole(done, catalog):
    (done.home / "video_frames").rename(done.home / "aside")
    found = done.reconcile(catalog, repair=True)
    assert [item.lost for item in found.differences] == [FRAMES]
    assert done.process(catalog) == [1, 2, 3, 40, 41]
    assert done.points() == FRAMES


def test_points_of_another_generation_and_too_many_points_are_written_again(done, catalog):
    with done.store() as store:
        replace_records(
            store,
            done.embeddings_of({2: 5}),
            rows={2: catalog.plan(ALL, TODAY)[2].video},
            generations={2: "0123456789abcdef"},
        )
        surplus = replace_records(
            store,
            done.embeddings_of({3: 3}),
            rows={3: catalog.plan(ALL, TODAY)[3].video},
            generations={3: catalog.ledger.entries(ALL)[3].generation},
        )
    assert surplus == {3: 3}
    found = done.reconcile(catalog, repair=True)
    assert found.differences == [
        Differences(IdRange(-(2**63), 2**63 - 1), compared=5, held=12, lost={2: 3}, stale={2: 5, 3: 2})
    ]
    assert done.process(catalog) == [2, 3]
    assert done.points() == FRAMES


def test_points_of_deleted_rows_are_removed_and_the_ledger_forgets_them(done, catalog):
    done.execute("DELETE FROM insta_content WHERE id IN (1, 40)")
    found = done.reconcile(catalog)
    assert [item.gone for item in found.differences] == [{1: 2, 40: 2}]
    assert found.remaining == 2
    repaired = done.reconcile(catalog, repair=True)
    assert (repaired.remaining, repaired.removed_points) == (0, 4)
    assert done.points() == {2: 3, 3: 1, 41: 4}
    assert list(catalog.ledger.entries(ALL)) == [2, 3, 41]
    assert done.reconcile(catalog).differences == []


def test_rows_that_are_no_longer_eligible_are_removed_and_come_back_with_their_points(done, catalog):
    done.execute("UPDATE insta_content SET is_removed = 1 WHERE id = 41")
    assert done.reconcile(catalog, repair=True).removed_points == 4
    assert 41 not in done.points()
    assert done.reconcile(catalog).differences == []
    done.execute("UPDATE insta_content SET is_removed = 0 WHERE id = 41")
    assert done.process(catalog) == [41]
    assert done.points() == FRAMES


def test_points_that_no_row_and_no_ledger_knows_are_removed(done, catalog):
    with done.store() as store:
        rows = {7: catalog.plan(ALL, TODAY)[2].video}
        replace_records(store, done.embeddings_of({7: 2}), rows=rows, generations={7: "a"})
    assert [item.gone for item in done.reconcile(catalog, repair=True).differences] == [{7: 2}]
    assert done.points() == FRAMES


def test_an_entry_of_a_deleted_row_without_points_is_forgotten(done, catalog):
    done.execute("DELETE FROM insta_content WHERE id = 3")
    with done.store() as store:
        delete_records(store, [3])
    assert [item.gone for item in done.reconcile(catalog, repair=True).differences] == [{3: 0}]
    assert 3 not in catalog.ledger.entries(ALL)


def test_what_is_pending_keeps_its_old_points(done, catalog):
    done.execute("UPDATE insta_content SET is_extracted = 0, is_embedded = 0 WHERE id = 2")
    lose(done, point_id(2, 0))
    assert done.reconcile(catalog, repair=True).differences == []
    assert done.points() == {**FRAMES, 2: 2}
    catalog.make_pending([41])
    assert done.reconcile(catalog, repair=True).differences == []
    assert done.points()[41] == 4


def test_a_ledger_that_was_lost_costs_no_points(done, catalog):
    catalog.forget([1, 2, 3, 40, 41])
    assert done.reconcile(catalog, repair=True).differences == []
    assert done.points() == FRAMES


def test_only_the_given_range_is_compared(done, catalog):
    lose(done, point_id(2, 0), point_id(41, 3))
    found = done.reconcile(catalog, within=IdRange(3, 60), repair=True)
    assert found.differences == [Differences(IdRange(3, 60), compared=3, held=7, lost={41: 1})]
    assert done.process(catalog) == [41]


def test_an_updated_row_is_written_again_and_keeps_its_old_points_until_then(world, settings):
    world.execute("ALTER TABLE insta_content ADD COLUMN etag TEXT NOT NULL DEFAULT 'v1'")
    with closing(Catalog(settings(source_version_column="etag"))) as catalog:
        world.add(*FRAMES)
        assert world.process(catalog) == [1, 2, 3, 40, 41]
        old = catalog.ledger.entries(ALL)[40].generation
        world.execute("UPDATE insta_content SET etag = 'v2' WHERE id IN (2, 40)")
        assert world.reconcile(catalog, repair=True).differences == []
        assert world.points() == FRAMES
        assert world.process(catalog, frames={2: 1, 40: 3}) == [2, 40]
        assert world.points() == {**FRAMES, 2: 1, 40: 3}
        assert world.reconcile(catalog).differences == []
        with world.store() as store:  # as if the new file's points had been taken for the old ones'
            replace_records(
                store,
                world.embeddings_of({40: 3}),
                rows={40: catalog.plan(ALL, TODAY)[40].video},
                generations={40: old},
            )
        (found,) = world.reconcile(catalog, repair=True).differences
        assert (found.lost, found.stale) == ({40: 3}, {40: 3})
        assert world.process(catalog, frames={40: 3}) == [40]
        assert world.reconcile(catalog).differences == []


def test_a_resampled_record_is_no_difference_and_its_left_over_points_are(done, catalog):
    resampled = Fingerprints(frames="f2", embedding="e1")
    assert done.process(catalog, IdRange(1, 3), frames={1: 1, 2: 1, 3: 1}, made_with=resampled) == [1, 2, 3]
    assert done.reconcile(catalog).differences == []
    with done.store() as store:  # as if the removal of the old frames had been lost
        batch = next(store.read(PointFilter(record_ids=(41,))))
        payloads = tuple({**payload, "record_id": 2} for payload in batch.payloads)
        store.upsert(type(batch)(tuple(point_id(2, 90 + number) for number in range(4)), batch.vectors, payloads))
    assert [item.stale for item in done.reconcile(catalog, repair=True).differences] == [{2: 4}]
    assert done.process(catalog, IdRange(1, 3), frames={2: 1}, made_with=resampled) == [2]
    assert done.points()[2] == 1


def test_a_collection_being_loaded_beside_is_compared_for_its_own_records(done, catalog):
    other = Fingerprints(frames="f1", embedding="e2")
    assert done.process(catalog, IdRange(1, 3), made_with=other, staged=True) == [1, 2, 3]
    assert done.reconcile(catalog, embedding="e2").differences == []
    with EdgeStore(done.home) as store:
        store.open_collection("video_frames", fingerprint="e2")
        store.delete(PointFilter(record_ids=(3,)))
    assert [item.lost for item in done.reconcile(catalog, embedding="e2").differences] == [{3: 1}]
    assert done.points() == FRAMES


def test_records_that_one_run_wrote_for_another_model_keep_their_points_in_both_collections(done, catalog):
    other = Fingerprints(frames="f1", embedding="e2")
    assert done.process(catalog, IdRange(1, 3), made_with=other, staged=True) == [1, 2, 3]
    assert done.reconcile(catalog, embedding="e1").differences == []
    with done.store() as store:
        delete_records(store, [2])
    with EdgeStore(done.home) as store:
        store.open_collection("video_frames", fingerprint="e2")
        delete_records(store, [3])
    assert [item.lost for item in done.reconcile(catalog, embedding="e1").differences] == [{2: 3}, {3: 1}]


def test_new_records_need_only_be_in_the_collection_that_is_being_loaded(done, catalog):
    done.add(50)
    other = Fingerprints(frames="f1", embedding="e2")
    assert done.process(catalog, IdRange(50, 50), frames={50: 2}, made_with=other, staged=True) == [50]
    assert done.reconcile(catalog, embedding="e2").differences == []
    assert [item.lost for item in done.reconcile(catalog, embedding="e1").differences] == [{50: 2}]


def test_records_that_only_a_collection_no_longer_in_use_holds_are_written_again(done, catalog):
    with done.store("e2", staged=True) as store:
        store.publish()  # by force: none of the records is in it
    found = done.reconcile(catalog, embedding="e2", repair=True)
    assert [item.lost for item in found.differences] == [FRAMES]
    assert done.process(catalog, made_with=Fingerprints(frames="f1", embedding="e2")) == [1, 2, 3, 40, 41]
    assert done.points() == FRAMES


def test_points_of_deleted_rows_are_removed_from_every_collection(done, catalog):
    other = Fingerprints(frames="f1", embedding="e2")
    assert done.process(catalog, made_with=other, staged=True) == [1, 2, 3, 40, 41]
    done.execute("DELETE FROM insta_content WHERE id = 40")
    assert done.reconcile(catalog, embedding="e1", repair=True).removed_points == 4
    assert 40 not in done.points("e1")
    assert 40 not in done.points("e2")


def test_records_of_a_dropped_collection_are_written_again(done, catalog):
    other = Fingerprints(frames="f1", embedding="e2")
    assert done.process(catalog, IdRange(1, 3), made_with=other, staged=True) == [1, 2, 3]
    with done.store("e2", staged=True) as store:
        store.publish()
        store.drop("video_frames", "e1")
    found = done.reconcile(catalog, embedding="e2", repair=True)
    assert [item.lost for item in found.differences] == [{40: 2, 41: 4}]
    assert done.process(catalog, made_with=other, staged=True) == [40, 41]
    assert done.points() == FRAMES


def test_points_that_an_earlier_release_wrote_agree_and_are_not_written_again(done, catalog):
    old = former_generation(embedding_fingerprint="e1", frames_fingerprint="f1", content_version="")
    with done.store() as store:
        rows = {key: planned.video for key, planned in catalog.plan(ALL, TODAY).items()}
        replace_records(store, done.embeddings_of(FRAMES), rows=rows, generations=dict.fromkeys(FRAMES, old))
    done.execute("UPDATE extraction_ledger SET generation = NULL, address = NULL, claim = 0")
    assert done.reconcile(catalog, repair=True).differences == []
    assert done.process(catalog) == []
    catalog.make_pending([2])
    assert done.process(catalog) == [2]
    assert done.reconcile(catalog).differences == []


def test_a_row_that_can_not_be_read_stops_nothing_and_is_not_gone(done, catalog):
    done.execute("UPDATE insta_content SET path = CAST(x'ff' AS TEXT), code = CAST(x'ff' AS TEXT) WHERE id = 2")
    lose(done, point_id(3, 0))
    found = done.reconcile(catalog, repair=True)
    assert ([item.lost for item in found.differences], found.total("gone"), found.moved) == ([{3: 1}], (0, 0), [])


def test_a_row_at_another_address_is_told_of_and_made_pending_where_the_settings_say_so(done, catalog, settings):
    done.execute("UPDATE insta_content SET path = 'corrected.mp4' WHERE id = 2")
    with closing(Catalog(settings(source_predicate="NOT is_removed", address_changes="report"))) as reporting:
        found = done.reconcile(reporting, repair=True)
    assert (found.differences, found.moved, found.remaining) == ([], [2], 0)
    assert found.document()["moved_records"] == 1
    assert "1 records were made of a file at another address (records 2): with EXTRACTION_ADDRESS" in found.summary
    assert done.reconcile(catalog).moved == [2]
    assert catalog.ledger.entries(ALL)[2].state == "done"
    found = done.reconcile(catalog, repair=True, window_records=2)
    assert (found.moved, found.remaining, found.summary[-26:]) == ([2], 1, " 2): they are pending now.")
    assert catalog.ledger.entries(ALL)[2].state == "todo"
    assert done.process(catalog) == [2]
    assert done.reconcile(catalog, repair=True).moved == []


def test_entries_of_an_earlier_release_adopt_their_rows_address_when_it_repairs(done, catalog):
    known = {key: entry.address for key, entry in catalog.ledger.entries(ALL).items()}
    assert all(known.values())
    done.execute("UPDATE extraction_ledger SET address = NULL")
    assert done.reconcile(catalog).differences == []
    assert {entry.address for entry in catalog.ledger.entries(ALL).values()} == {None}
    assert done.reconcile(catalog, repair=True).moved == []
    assert {key: entry.address for key, entry in catalog.ledger.entries(ALL).items()} == known


@pytest.mark.parametrize("kind", ["lost", "stale", "gone"])
def test_what_a_second_look_finds_first_does_not_count_either(kind):
    looks = [Differences(ALL, compared=5, held=12, **{kind: {key: 2}}) for key in (2, 3)]
    assert looks[0].seen_again(looks[1]) == Differences(ALL, compared=5, held=12)
    assert looks[0].seen_again(looks[0]) == looks[0]


def test_a_record_that_somebody_claimed_between_two_looks_is_not_gone():
    before, after = (Differences(ALL, gone={2: 1, 3: 1}, claims={2: 7, 3: claim}) for claim in (7, 8))
    assert before.seen_again(after) == Differences(ALL, gone={2: 1})


def test_a_difference_that_is_gone_at_the_second_look_does_not_count(done, catalog, monkeypatch):
    entries, looks = catalog.ledger.entries, []

    def before_the_run_marked_it(window):
        looks.append(window)
        found = entries(window)
        return {key: entry for key, entry in found.items() if len(looks) > 1 or key != 41}

    done.execute("UPDATE insta_content SET is_removed = 1 WHERE id = 41")
    rows_of = catalog.source.rows_of
    monkeypatch.setattr(catalog.ledger, "entries", before_the_run_marked_it)

    def rows_again(ids):
        if len(looks) == 2:
            done.execute("UPDATE insta_content SET is_removed = 0")
        return rows_of(ids)

    monkeypatch.setattr(catalog.source, "rows_of", rows_again)
    assert done.reconcile(catalog, repair=True).differences == []
    assert len(looks) == 2
    assert done.points() == FRAMES


def test_a_row_that_blinks_between_two_looks_is_neither_gone_nor_lost(done, catalog, monkeypatch):
    looks = []
    entries = catalog.ledger.entries

    def look(window):
        looks.append(window)
        done.execute(f"UPDATE insta_content SET is_removed = (id = {1 if len(looks) == 1 else 41})")
        return entries(window)

    monkeypatch.setattr(catalog.ledger, "entries", look)
    found = done.reconcile(catalog, repair=True)
    assert (len(looks), found.differences, found.removed_points) == (2, [], 0)
    assert done.points() == FRAMES


def test_the_store_is_let_go_of_between_windows(done, catalog):
    done.reconcile(catalog, window_records=2, hold_seconds=60)
    once = done.opened
    done.opened = 0
    done.reconcile(catalog, window_records=2, hold_seconds=-1)
    assert once == 2  # to see what there is, and to compare
    assert done.opened == 4  # and anew for each of three windows


def test_room_is_given_back_when_much_was_removed(done, catalog, monkeypatch):
    calls = []
    monkeypatch.setattr(EdgeStore, "optimize", lambda _: calls.append("optimized"))
    lose(done, point_id(2, 0))
    done.reconcile(catalog, repair=True)
    assert calls == []
    done.execute("DELETE FROM insta_content WHERE id = 40")
    done.reconcile(catalog, repair=True)
    assert len(calls) == 1


def test_a_range_is_compared_within_its_bounds_and_for_its_own_fingerprint(done, catalog):
    lose(done, point_id(2, 0), point_id(40, 0))
    with done.store() as store:
        store.open_collection("video_frames")
        assert compare_range(catalog, store, within=IdRange(1, 3), fingerprint="e1") == Differences(
            IdRange(1, 3), compared=3, held=6, lost={2: 1}
        )
        assert compare_range(catalog, store, within=IdRange(3, 3), fingerprint="e1").agrees
        assert compare_range(catalog, store, within=ALL, fingerprint="e2") == Differences(ALL)


def test_a_row_that_waits_for_another_try_is_no_difference_of_its_range(done, catalog):
    catalog.make_pending([2])
    with done.store() as store:
        store.open_collection("video_frames")
        found = compare_range(catalog, store, within=ALL, fingerprint="e1")
    assert (found.agrees, found.compared, found.held) == (True, 4, 9)


def shown_platforms(world):
    with world.store() as store:
        return {int(item["record_id"]): item["platform"] for item in store.payloads(None, ["record_id", "platform"])}


def test_a_payload_that_is_not_what_its_row_says_is_found_and_written_without_the_vectors(done, catalog):
    before = shown_platforms(done)
    done.execute("UPDATE insta_content SET platform = 'changed' WHERE id IN (2, 41)")
    with done.store() as store:
        vectors = {batch.ids: batch.vectors.tolist() for batch in store.read()}
    found = done.reconcile(catalog)
    assert (sorted(found.payloads), found.remaining, found.differences) == ([2, 41], 2, [])
    assert "2 records have another payload than their rows say" in found.summary
    assert found.document()["payload_records"] == 2
    assert shown_platforms(done) == before
    repaired = done.reconcile(catalog, repair=True)
    assert (sorted(repaired.payloads), repaired.remaining) == ([2, 41], 0)
    assert shown_platforms(done) == {**before, 2: "changed", 41: "changed"}
    with done.store() as store:
        assert {batch.ids: batch.vectors.tolist() for batch in store.read()} == vectors
    assert done.process(catalog) == []
    assert done.reconcile(catalog).remaining == 0
