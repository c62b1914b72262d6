"""Frames that are not kept: gone once their points are verified, and nothing is decoded again for it."""

import sqlite3
from fractions import Fraction

import dagster as dg
import numpy as np
import pytest

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
    """A table with two good videos."""
    for name, value in (("HOME", tmp_path), ("KEEP_FRAMES", "none"), ("DECODE_WORKERS", 1)):
        monkeypatch.setenv(f"EXTRACTION_{name}", str(value))
    (tmp_path / "videos").mkdir()
    render(tmp_path / "videos" / "a.mp4")
    with sqlite3.connect(tmp_path / "source.db") as connection:
        connection.execute(
            "CREATE TABLE insta_content (id INTEGER PRIMARY KEY, platform, code, path, is_extracted BOOLEAN DEFAULT 0, "
            "is_embedded BOOLEAN DEFAULT 0)"
        )
        path = str(tmp_path / "videos" / "a.mp4")
        connection.execute("INSERT INTO insta_content (id, path) VALUES (1, ?), (2, ?)", (path, path))
    return tmp_path


def run(instance):
    from extraction_dagster.definitions import defs  # noqa: PLC0415 - reads the environment

    job = defs.resolve_job_def("extraction_job")
    result = job.execute_in_process(instance=instance, partition_key="1-2")
    (materialization,) = result.asset_materializations_for_node("video_frames")
    return {name: materialization.metadata[name].value for name in ("videos", "frames")}


def test_frames_go_with_the_run_that_verified_their_points_and_are_not_made_again(home):
    with dg.DagsterInstance.ephemeral() as instance:
        instance.add_dynamic_partitions("id_ranges", ["1-2"])
        assert run(instance) == {"videos": 2, "frames": 6}
        assert list(home.glob("frames/**/*.parquet")) == []
        assert len(list(home.glob("embeddings/**/*.parquet"))) == 1
        assert run(instance) == {"videos": 0, "frames": 0}
    with sqlite3.connect(home / "source.db") as connection:
        states = connection.execute("SELECT record_id, state, num_points FROM extraction_ledger ORDER BY 1").fetchall()
    assert states == [(1, "done", 3), (2, "done", 3)]
