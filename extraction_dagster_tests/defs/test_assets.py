"""What a person sees of the assets: where they belong, what a materialization shows, which checks say what."""

import base64
import re
import shutil
import signal
import threading
import time
import weakref
from pathlib import Path
from types import SimpleNamespace

import dagster as dg
import pytest

from extraction_dagster.defs import checks
from extraction_dagster.errors.index import PointsMissingError
from extraction_dagster.records import IdRange
from extraction_dagster.stages.catalog.ledger import LedgerEntry

PAGE = Path(__file__).parents[2] / "docs/dagster.md"
# Dagster itself reads pydantic's old attribute.
pytestmark = pytest.mark.filterwarnings("ignore:The `__fields__` attribute is deprecated")


def test_every_asset_says_what_it_is_and_whose():
    from extraction_dagster.definitions import defs  # noqa: PLC0415 - reads the environment

    specs = {spec.key.to_user_string(): spec for spec in defs.resolve_all_asset_specs()}
    shown = {
        name: (spec.group_name, sorted(spec.kinds), list(spec.owners), spec.tags["extraction/stage"])
        for name, spec in specs.items()
        if name != "extraction_progress"
    }
    assert shown == {
        "source_table": ("extraction", ["sqlite", "table"], ["team:extraction"], "catalog"),
        "video_frames": ("extraction", ["ffmpeg", "parquet"], ["team:extraction"], "decode"),
        "frame_embeddings": ("extraction", ["parquet", "pytorch"], ["team:extraction"], "embed"),
        "qdrant_points": ("extraction", ["qdrant"], ["team:extraction"], "index"),
    }
    assert all(len(spec.description) > 40 for spec in specs.values())
    lineage = {name: [dep.asset_key.to_user_string() for dep in spec.deps] for name, spec in specs.items()}
    assert lineage["video_frames"] == ["source_table"]
    assert lineage["frame_embeddings"] == ["video_frames"]
    assert lineage["qdrant_points"] == ["frame_embeddings"]
    assert specs["source_table"].metadata["dagster/table_name"] == "insta_content"


def test_numbers_plot_and_failures_are_a_table(world):
    result = world.run()
    assert result.success
    frames, vectors, points = (
        world.shown(result, name) for name in ("video_frames", "frame_embeddings", "qdrant_points")
    )

    counts = (
        "records",
        "videos",
        "videos_kept",
        "videos_partial",
        "frames",
        "failures",
        "records_failed",
        "records_parked",
    )
    assert {name: frames[name] for name in counts} == {
        "records": 4,
        "videos": 3,
        "videos_kept": 0,
        "videos_partial": 0,
        "frames": 9,
        "failures": 1,
        "records_failed": 0,
        "records_parked": 1,
    }
    assert (vectors["videos"], vectors["frames"], vectors["bytes"]) == (3, 9, 9 * 1280 * 2)
    assert (points["videos"], points["points"], points["points_in_range"]) == (3, 9, 9)
    for shown, phases in (
        (frames, {"decode", "other"}),
        (vectors, {"load", "embed", "verify", "other"}),
        (points, {"write", "verify", "other"}),
    ):
        seconds = {name: value for name, value in shown.items() if name.startswith("cpu_seconds_")}
        assert {name.removeprefix("cpu_seconds_") for name in seconds} == phases
        assert sum(seconds.values()) == pytest.approx(shown["cpu_seconds"], abs=0.01)
        assert shown["frames_per_second"] > 0
        numbers = {name for name, value in shown.items() if isinstance(value, int | float)} - seconds.keys()
        assert {name for name in numbers if f"`{name}`" not in PAGE.read_text()} == set()

    table = frames["failures_table"].records
    assert [record.data for record in table] == [
        {
            "record": 4,
            "stage": "decode",
            "type": "VideoOpenError",
            "message": table[0].data["message"],
        }
    ]
    assert "can't be opened" in table[0].data["message"]
    assert len(table[0].data["message"]) <= 401


def test_the_second_run_of_a_range_finds_nothing_to_do_and_says_so(world):
    world.run()
    again = world.run()
    frames, vectors, points = (
        world.shown(again, name) for name in ("video_frames", "frame_embeddings", "qdrant_points")
    )
    assert (frames["videos"], frames["frames"], frames["failures"], frames["records_parked"]) == (0, 0, 0, 1)
    assert "failures_table" not in frames
    (stopped,) = frames["earlier_failures"].records
    assert (stopped.data["record"], stopped.data["state"], stopped.data["type"]) == (4, "parked", "VideoOpenError")
    assert thumbnails(frames) == ["1", "2", "3"]  # of the range, from what is stored
    assert "frames_per_second" not in frames
    assert (vectors["videos"], vectors["frames"]) == (0, 0)
    assert (points["points"], points["points_in_range"]) == (0, 9)


def thumbnails(frames):
    return re.findall(r"!\[(\d+) at 1\.0 s\]\(data:image/jpeg;base64,[A-Za-z0-9+/=]+\)", frames["contact_sheet"])


def test_the_contact_sheet_shows_a_frame_of_each_video_as_a_small_picture(world):
    sheet = world.shown(world.run(), "video_frames")["contact_sheet"]
    pictures = re.findall(r"!\[(\d) at 1\.0 s\]\(data:image/jpeg;base64,([A-Za-z0-9+/=]+)\)", sheet)
    assert [record for record, _ in pictures] == ["1", "2", "3"]
    assert all(base64.b64decode(content)[:3] == b"\xff\xd8\xff" for _, content in pictures)
    assert len(sheet.splitlines()) == 3


def test_without_a_contact_sheet_no_picture_reaches_dagsters_storage(world, monkeypatch):
    monkeypatch.setenv("EXTRACTION_CONTACT_SHEET_FRAMES", "0")
    assert "contact_sheet" not in world.shown(world.run(), "video_frames")


def test_the_checks_of_a_run_say_what_they_found(world):
    result = world.run()
    warning = "1 of 4 records are failed or parked (25.0%; 10.0% is allowed where there are 10 or more)."
    assert world.checks(result) == {
        "video_frames no_zero_frame_video": (True, "ERROR", "0 of 3 extracted records have no frame."),
        "video_frames failure_rate": (True, "WARN", warning),
        "frame_embeddings vectors_normalised": (True, "ERROR", "0 of 9 vectors written do not have length 1."),
        "qdrant_points points_verified": (
            True,
            "ERROR",
            "Qdrant holds exactly the 9 points of the range's finished records.",
        ),
        "qdrant_points failure_rate": (True, "WARN", warning),
    }
    (rate,) = (
        found
        for found in result.get_asset_check_evaluations()
        if found.check_name == "failure_rate" and found.asset_key == dg.AssetKey("qdrant_points")
    )
    (row,) = (record.data for record in rate.metadata["records_table"].records)
    assert (row["record"], row["state"], row["type"]) == (4, "parked", "VideoOpenError")
    assert rate.partition == "1-4"


@pytest.mark.parametrize(
    ("records", "bad", "most", "passed"),
    [(10, 1, 0.1, True), (10, 2, 0.1, False), (10, 2, 0.2, True), (9, 9, 0.1, True), (0, 0, 0.0, True)],
)
def test_the_failure_rate_is_judged_by_the_setting_where_there_are_enough_records(records, bad, most, passed, settings):
    entries = {key: LedgerEntry(key, "parked" if key < bad else "done") for key in range(records)}
    work = SimpleNamespace(
        plan=entries, entries=lambda: entries, settings=settings(max_failure_rate=most), id_range=IdRange(0, 9)
    )
    found = checks.failure_rate(work, checks.FRAMES_FAILURE_RATE)
    assert (found.passed, found.metadata["records_failed_or_parked"].value) == (passed, bad)


def test_each_range_keeps_its_own_result(world):
    world.run(key="1-3")
    world.run(key="4-4")
    check = dg.AssetCheckKey(dg.AssetKey("video_frames"), "failure_rate")
    history = world.instance.event_log_storage.get_asset_check_execution_history(check, limit=10)
    found = {record.partition: record.evaluation.metadata["records_failed_or_parked"].value for record in history}
    assert found == {"1-3": 0, "4-4": 1}


def test_a_retry_of_one_row_leaves_the_numbers_and_pictures_of_the_whole_range(world):
    world.run()
    world.sql("UPDATE insta_content SET is_embedded = 0 WHERE id = 2")
    shown = world.shown(world.run(), "video_frames")
    assert thumbnails(shown) == ["1", "2", "3"]
    assert {name: shown[name] for name in ("videos", "frames", "videos_in_range", "frames_in_range")} == {
        "videos": 1,
        "frames": 3,
        "videos_in_range": 3,
        "frames_in_range": 9,
    }


def test_a_contact_sheet_of_stored_frames_holds_so_many_thumbnails_and_is_worth_no_run(world, monkeypatch):
    world.run()
    monkeypatch.setenv("EXTRACTION_CONTACT_SHEET_FRAMES", "2")
    assert len(thumbnails(world.shown(world.run(), "video_frames"))) == 2
    for path in world.home.glob("frames/*/1-4/*.parquet"):
        content = path.read_bytes()
        path.write_bytes(content[:4] + bytes(2000) + content[2004:])  # its footer is whole
    again = world.run()
    assert again.success
    assert "contact_sheet" not in world.shown(again, "video_frames")


def test_a_record_marked_without_a_frame_fails_the_run_before_anything_is_embedded(world):
    world.run(key="1-1")
    world.sql("UPDATE extraction_ledger SET num_frames = 0")
    result = world.run()
    found = world.checks(result)
    assert found["video_frames no_zero_frame_video"] == (
        False,
        "ERROR",
        "1 of 3 extracted records have no frame: 1.",
    )
    assert not result.success
    assert not any(name.startswith(("frame_embeddings", "qdrant_points")) for name in found)
    assert world.ledger() == [(1, "done"), (2, "extracted"), (3, "extracted"), (4, "parked")]


def test_vectors_that_are_not_normalised_are_neither_marked_nor_indexed(world, monkeypatch):
    from extraction_dagster.stages.embed import stage  # noqa: PLC0415 - beside the fault

    honest = stage.normalise

    def twice_as_long(raw):
        unit, faults = honest(raw)
        return 2 * unit, faults

    monkeypatch.setattr(stage, "normalise", twice_as_long)
    result = world.run()
    assert world.checks(result)["frame_embeddings vectors_normalised"] == (
        False,
        "ERROR",
        "9 of 9 vectors written do not have length 1.",
    )
    assert not result.success
    assert [state for _, state in world.ledger()] == ["extracted", "extracted", "extracted", "parked"]
    assert not (world.home / "qdrant").exists()


def test_points_that_the_store_lost_fail_the_check_and_the_run_and_mark_nothing(world, monkeypatch):
    from extraction_dagster.stages.index import stage  # noqa: PLC0415 - beside the fault

    def lose(*_, **__):
        raise PointsMissingError("after writing them", expected=9, got=7, records="record 2: 1 of 3")

    monkeypatch.setattr(stage, "replace_records", lose)
    result = world.run()
    passed, severity, description = world.checks(result)["qdrant_points points_verified"]
    assert (result.success, passed, severity) == (False, False, "ERROR")
    assert "7 points were found after writing them, expected exactly 9 (record 2: 1 of 3)" in description
    assert [state for _, state in world.ledger()] == ["embedded", "embedded", "embedded", "parked"]
    assert result.asset_materializations_for_node("qdrant_points") == []


def test_points_that_vanish_after_they_were_verified_are_pending_again(world):
    from extraction_dagster.stages.index.edge.store import EdgeStore  # noqa: PLC0415 - loads the engine
    from extraction_dagster.stages.index.stage import delete_records  # noqa: PLC0415

    world.run()
    with EdgeStore(world.home / "qdrant") as store:
        store.open_collection("video_frames")
        delete_records(store, [2])
    result = world.run()
    passed, _, description = world.checks(result)["qdrant_points points_verified"]
    assert (result.success, passed) == (False, False)
    assert "Range 1-4: 3 verified points are gone and 0 are too many (records 2)" in description
    assert world.ledger() == [(1, "done"), (2, "todo"), (3, "done"), (4, "parked")]

    assert world.run().success
    assert world.points() == {1: 3, 2: 3, 3: 3}


@pytest.mark.parametrize("lost", [("embeddings",), ("embeddings", "qdrant")], ids=["vectors", "vectors and store"])
def test_a_range_is_not_green_without_its_points_although_no_vectors_are_stored(world, lost):
    from extraction_dagster.stages.index.edge.store import EdgeStore  # noqa: PLC0415 - loads the engine
    from extraction_dagster.stages.index.stage import delete_records  # noqa: PLC0415

    world.run()
    with EdgeStore(world.home / "qdrant") as store:
        store.open_collection("video_frames")
        delete_records(store, [1, 2, 3])
    for folder in lost:
        shutil.rmtree(world.home / folder)
    result = world.run()
    passed, _, description = world.checks(result)["qdrant_points points_verified"]
    assert (result.success, passed) == (False, False)
    assert "Range 1-4: 9 verified points are gone and 0 are too many (records 1, 2, 3)" in description

    assert world.run().success
    assert world.points() == {1: 3, 2: 3, 3: 3}


def test_a_run_that_only_tries_again_while_the_store_is_down_is_no_sign_of_work(world, monkeypatch):
    from extraction_dagster.stages.index import stage  # noqa: PLC0415 - beside the fault

    def store_is_down(*_, **__):
        message = "the store is down"
        raise OSError(message)

    monkeypatch.setattr(stage, "replace_records", store_is_down)
    assert not world.run().success
    before = world.ledger("state, updated_at")
    assert [state for state, _ in before] == ["embedded", "embedded", "embedded", "parked"]
    assert not world.run().success
    assert world.ledger("state, updated_at") == before


def test_a_run_that_is_told_to_stop_while_python_cleans_up_stops(world, monkeypatch):
    from extraction_dagster.stages.embed import stage  # noqa: PLC0415 - beside the fault

    def clean_up(_raw):
        thing = threading.Event()
        reference = weakref.ref(thing, lambda _: signal.raise_signal(signal.SIGINT))  # dropped: nobody called this
        del thing
        assert reference() is None
        time.sleep(60)
        pytest.fail("the run went on")

    monkeypatch.setattr(stage, "normalise", clean_up)
    result = world.run()
    (failure,) = [event.step_failure_data for event in result.all_events if event.is_step_failure]
    assert (result.success, failure.error.cls_name) == (False, "DagsterExecutionInterruptedError")
    assert [state for _, state in world.ledger()] == ["extracted", "extracted", "extracted", "parked"]
