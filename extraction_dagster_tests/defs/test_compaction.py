"""A slow trickle of rows: each leaves a shard behind, the runs themselves merge them, and nothing is done twice."""

import sqlite3
from datetime import timedelta
from fractions import Fraction

import dagster as dg
import numpy as np
import pytest

from extraction_dagster.shards.compaction import CompactionOptions

# Dagster itself reads pydantic's old attribute.
pytestmark = pytest.mark.filterwarnings("ignore:The `__fields__` attribute is deprecated")


def render(path):
    import av

    with av.open(str(path), "w") as sink:
        stream = sink.add_stream("mpeg4", rate=2)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for number in range(6):
            image = np.random.default_rng(number).integers(0, 255, (48, 64, 3), dtype=np.uint8)
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, 2)
            sink.mux(stream.encode(frame))
        sink.mux(stream.encode(None))


@pytest.fixture
def home(tmp_path, monkeypatch):
    for name, value in (("HOME", tmp_path), ("DECODE_WORKERS", 1)):
        monkeypatch.setenv(f"EXTRACTION_{name}", str(value))
    at_once = CompactionOptions(max_records=8, enough_shards=4, untouched=timedelta())
    monkeypatch.setattr(CompactionOptions, "from_settings", lambda _settings: at_once)
    (tmp_path / "videos").mkdir()
    render(tmp_path / "videos" / "a.mp4")
    with sqlite3.connect(tmp_path / "source.db") as connection:
        connection.execute(
            "CREATE TABLE insta_content (id INTEGER PRIMARY KEY, platform, code, path, is_extracted BOOLEAN DEFAULT 0, "
            "is_embedded BOOLEAN DEFAULT 0)"
        )
    return tmp_path


def add(home, number):
    with sqlite3.connect(home / "source.db") as connection:
        connection.execute("INSERT INTO insta_content (id, path) VALUES (?, 'a.mp4')", (number,))


def run(instance):
    from extraction_dagster.definitions import defs  # noqa: PLC0415 - reads the environment

    job = defs.resolve_job_def("extraction_job")
    result = job.execute_in_process(instance=instance, partition_key="1-9")
    counts = {}
    for asset, name in (("video_frames", "videos"), ("frame_embeddings", "frames"), ("qdrant_points", "points")):
        (materialization,) = result.asset_materializations_for_node(asset)
        counts[name] = materialization.metadata[name].value
    return counts


def shards(home):
    return [len(list(home.glob(f"{kind}/**/*.parquet"))) for kind in ("frames", "embeddings")]


def test_shards_of_a_trickle_are_merged_and_nothing_is_decoded_or_embedded_again(home):
    numbers = []
    with dg.DagsterInstance.ephemeral() as instance:
        instance.add_dynamic_partitions("id_ranges", ["1-9"])
        for number in range(1, 6):
            add(home, number)
            assert run(instance) == {"videos": 1, "frames": 3, "points": 3}
            numbers.append(shards(home))
        assert run(instance) == {"videos": 0, "frames": 0, "points": 0}
    assert numbers == [[1, 1], [2, 2], [3, 3], [1, 1], [2, 2]]
    with sqlite3.connect(home / "source.db") as connection:
        states = connection.execute("SELECT record_id, state, num_points FROM extraction_ledger ORDER BY 1").fetchall()
    assert states == [(number, "done", 3) for number in range(1, 6)]
