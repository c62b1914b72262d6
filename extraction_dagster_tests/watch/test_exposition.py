"""Figures under their Prometheus names: read back with the client's own parsers."""

import re
from dataclasses import replace

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_classic

from extraction_dagster.watch.exposition import Exposition


def samples(text, parse=parse_openmetrics):
    """Every sample by name and labels."""
    return {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in parse(text)
        for sample in family.samples
    }


EVERYTHING = {
    ("extraction_build_info", ("version", "0.1.0")): 1,
    ("extraction_up",): 1,
    ("extraction_part_up", ("part", "collection")): 1,
    ("extraction_part_up", ("part", "cursor")): 1,
    ("extraction_part_up", ("part", "dagster")): 1,
    ("extraction_part_up", ("part", "mirror")): 1,
    ("extraction_part_up", ("part", "table")): 1,
    ("extraction_scrape_duration_seconds",): 0.25,
    ("extraction_watermark_id",): 12345,
    ("extraction_frontier_id",): 13345,
    ("extraction_floor_id",): -1,
    ("extraction_lag_rows",): 6,
    ("extraction_newest_id",): 13400,
    ("extraction_due_rows",): 3,
    ("extraction_waiting_rows",): 1,
    ("extraction_watermark_moved_timestamp_seconds",): 1_748_779_000,
    ("extraction_watermark_stalled_seconds",): 1000,
    ("extraction_runs", ("status", "queued")): 3,
    ("extraction_runs", ("status", "started")): 2,
    ("extraction_runs", ("status", "canceling")): 0,
    ("extraction_recent_runs", ("status", "success")): 7,
    ("extraction_recent_runs", ("status", "failure")): 1,
    ("extraction_recent_runs", ("status", "canceled")): 0,
    ("extraction_sensor_last_tick_timestamp_seconds",): 1_748_779_990.5,
    ("extraction_sensor_enabled",): 1,
    ("extraction_daemon_up", ("daemon", "sensor")): 1,
    ("extraction_daemon_up", ("daemon", "backfill")): 0,
    ("extraction_videos_per_second",): 1.25,
    ("extraction_frames_per_second",): 6.5,
    ("extraction_points_per_second",): 6,
    ("extraction_mirror_state", ("state", "ok")): 0,
    ("extraction_mirror_state", ("state", "missing")): 0,
    ("extraction_mirror_state", ("state", "behind")): 1,
    ("extraction_mirror_state", ("state", "ahead")): 0,
    ("extraction_mirror_state", ("state", "corrupt")): 0,
    ("extraction_mirror_state", ("state", "unreachable")): 0,
    ("extraction_mirror_watermark_id",): 12000,
    ("extraction_rows", ("state", "done")): 990,
    ("extraction_rows", ("state", "pending")): 4,
    ("extraction_rows", ("state", "failed")): 2,
    ("extraction_rows", ("state", "parked")): 4,
    ("extraction_frames",): 5000,
    ("extraction_points",): 4990,
    ("extraction_errors_total", ("stage", "decode"), ("type", "VideoOpenError")): 3,
    ("extraction_errors_total", ("stage", "fetch"), ("type", "SchemeError")): 1,
    ("extraction_collection_points",): 4991,
    ("extraction_collection_counted_timestamp_seconds",): 1_748_780_001,
    ("extraction_census_timestamp_seconds",): 1_748_780_000,
    ("extraction_census_duration_seconds",): 1.5,
}


def test_every_figure_has_its_name_in_openmetrics(figures, census):
    text = Exposition(figures, census).openmetrics()
    assert samples(text) == EVERYTHING
    assert text.endswith("# EOF\n")
    assert "# UNIT extraction_watermark_stalled_seconds seconds\n" in text
    assert "# TYPE extraction_errors counter\n" in text


def test_the_form_for_files_holds_the_same_and_no_type_that_its_reader_does_not_know(figures, census):
    text = Exposition(figures, census).classic()
    assert samples(text, parse_classic) == EVERYTHING
    types = set(re.findall(r"^# TYPE \S+ (\S+)$", text, re.MULTILINE))
    assert types == {"gauge", "counter"}
    assert "# EOF" not in text


@pytest.mark.parametrize(
    ("accept", "content_type", "ends_with"),
    [
        ("application/openmetrics-text; version=1.0.0", "application/openmetrics-text; version=1.0.0", b"# EOF\n"),
        ("text/plain", "text/plain; version=0.0.4", b"\n"),
        ("", "text/plain; version=0.0.4", b"\n"),
    ],
)
def test_an_endpoint_speaks_as_it_is_asked(figures, census, accept, content_type, ends_with):
    body, got = Exposition(figures, census).negotiated(accept)
    assert got.startswith(content_type)
    assert body.endswith(ends_with)
    assert (b"# EOF" in body) == (b"EOF" in ends_with)


def test_what_is_not_known_is_left_out_and_not_shown_as_zero(figures, census):
    progress = replace(figures.progress, last_processed_id=None, frontier_id=None, floor_id=None, newest_id=None)
    instance = replace(figures.instance, last_tick_at=None)
    shown = replace(figures, progress=progress, instance=instance, mirror=None)
    not_counted = replace(census, collection_points=None, collection_counted_at=None)
    names = {key[0] for key in samples(Exposition(shown, not_counted).openmetrics())}
    assert {key[0] for key in EVERYTHING} - names == {
        "extraction_watermark_id",
        "extraction_frontier_id",
        "extraction_floor_id",
        "extraction_newest_id",
        "extraction_sensor_last_tick_timestamp_seconds",
        "extraction_mirror_state",
        "extraction_mirror_watermark_id",
        "extraction_collection_points",
        "extraction_collection_counted_timestamp_seconds",
    }


def test_failed_and_parked_rows_need_no_census(figures):
    shown = samples(Exposition(figures).openmetrics())
    assert {key[1][1]: value for key, value in shown.items() if key[0] == "extraction_rows"} == {
        "failed": 2,
        "parked": 4,
    }


def test_a_lag_too_long_to_count_each_time_is_the_censuss(figures, census):
    long = replace(figures, progress=replace(figures.progress, lag_rows=100_000))
    assert samples(Exposition(long, census).openmetrics())["extraction_lag_rows",] == 17
    assert ("extraction_lag_rows",) not in samples(Exposition(long).openmetrics())


@pytest.mark.parametrize("part", ["dagster", "table", "cursor", "mirror"])
def test_one_part_that_is_down_is_enough_to_be_down(figures, census, part):
    shown = samples(Exposition(replace(figures, parts={**figures.parts, part: False}), census).openmetrics())
    assert shown["extraction_up",] == 0
    assert shown["extraction_part_up", ("part", part)] == 0


def test_a_collection_that_is_down_is_down_and_one_that_a_run_holds_is_not(figures, census):
    assert samples(Exposition(figures, census).openmetrics())["extraction_up",] == 1
    down = replace(census, collection_is_up=False)
    assert samples(Exposition(figures, down).openmetrics())["extraction_up",] == 0


def test_where_nothing_could_be_taken_it_is_down_and_says_no_more():
    assert samples(Exposition(None).openmetrics()) == {
        ("extraction_build_info", ("version", "0.1.0")): 1,
        ("extraction_up",): 0,
    }


def test_where_nothing_was_made_lately_the_rates_are_zero(figures, census):
    idle = replace(figures, instance=replace(figures.instance, rates={}))
    shown = samples(Exposition(idle, census).openmetrics())
    assert [shown[f"extraction_{name}_per_second",] for name in ("videos", "frames", "points")] == [0, 0, 0]


def test_names_of_errors_cannot_break_the_text(figures, census):
    odd = replace(census, errors={("decode", 'a "quoted"\nname\\'): 2})
    shown = samples(Exposition(figures, odd).openmetrics())
    assert shown["extraction_errors_total", ("stage", "decode"), ("type", 'a "quoted"\nname\\')] == 2


def test_names_follow_prometheus_conventions(figures, census):
    for family in parse_openmetrics(Exposition(figures, census).openmetrics()):
        assert re.fullmatch(r"extraction_[a-z]+(_[a-z]+)*", family.name)
        assert family.documentation.endswith(".")
        assert (family.unit == "seconds") == family.name.endswith("_seconds")
        assert not re.search(r"_(ms|minutes|count|total)$", family.name)
