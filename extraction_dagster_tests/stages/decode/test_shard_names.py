from datetime import UTC, datetime, timedelta

import pytest

from extraction_dagster.shards.names import merged_name, new_name, written_at


def test_a_new_name_says_now_and_later_names_sort_behind():
    names = [new_name() for _ in range(20)]
    assert sorted(names) == names
    assert abs(written_at(names[0]) - datetime.now(UTC)) < timedelta(minutes=5)


def test_the_time_is_read_off_a_name():
    read = written_at("20260102T030405000006Z-0a1b2c3d4e5f.parquet")
    assert read == datetime(2026, 1, 2, 3, 4, 5, 6, tzinfo=UTC)


def test_a_merged_shard_comes_just_after_the_last_of_its_sources_whoever_merges_them():
    names = ["20260102T030405000006Z-aaaaaaaaaaaa.parquet", "20260102T030405000009Z-000000000000.parquet"]
    merged = merged_name(names)
    assert merged.startswith("20260102T030405000010Z-")
    assert merged == merged_name(names[::-1])
    assert merged != merged_name(names[1:])


def test_another_name_tells_no_time():
    with pytest.raises(ValueError, match="does not match format"):
        written_at("0001-abc")
