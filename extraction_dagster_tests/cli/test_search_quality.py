"""Degraded pictures and videos of the demo find the video that they were made from."""

import numpy as np
import pytest
import simplejpeg

from extraction_dagster.demo.table import _middle_frame
from extraction_dagster.records import EmbeddingBatch, VideoRow
from extraction_dagster.settings import Settings
from extraction_dagster.stages.decode.jpeg import decode_frames
from extraction_dagster.stages.decode.task import DecodeJob
from extraction_dagster.stages.decode.workers.pool import PoolOptions, decode_as_ready
from extraction_dagster.stages.embed.models.registry import load_model
from extraction_dagster.stages.embed.passes import normalise
from extraction_dagster.stages.embed.query import embed_query_image, embed_query_video, load_query_image
from extraction_dagster.stages.index.edge.store import EdgeStore
from extraction_dagster.stages.index.moments import find_span
from extraction_dagster.stages.index.protocol import CollectionSpec
from extraction_dagster.stages.index.search import search_images, search_videos
from extraction_dagster.stages.index.stage import replace_records

pytestmark = pytest.mark.slow
BROKEN = ("truncated", "no_video")
# The first twenty good rendered clips of the demo.
RECORDS = (1, 2, 3, 4, 5, 6, 7, 8, 10, 11, 12, 101, 102, 103, 104, 105, 106, 107, 109, 110)


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    return Settings(home=tmp_path_factory.mktemp("home"))


@pytest.fixture(scope="module")
def model(settings):
    return load_model(settings)


@pytest.fixture(scope="module")
def demo_store(settings, model, demo_folder, demo_videos):
    """Every good video of the demo, by the same stages as the assets'."""
    rows = {video.record_id: VideoRow(video.record_id, video.path) for video in demo_videos if video.code not in BROKEN}
    jobs = [DecodeJob.of(row, demo_folder / row.uri, settings) for row in rows.values()]
    with EdgeStore(settings.home / "qdrant") as store:
        store.ensure_collection(CollectionSpec("demo", model.dim, model.fingerprint))
        for decoded in filter(None, decode_as_ready(jobs, PoolOptions.from_settings(settings))):
            frames = decoded.outcome.frames
            vectors, _ = normalise(model.embed_images(decode_frames(frames).data))
            ids = np.full(len(frames), frames.record_id, np.int64)
            batch = EmbeddingBatch(vectors.astype(np.float16), ids, frames.frame_number, frames.pts_seconds)
            replace_records(store, batch, rows=rows, generations={frames.record_id: "a"})
        yield store


def mirrored(picture):
    return picture[:, ::-1]


def cropped(picture):
    """The middle 80 % of each side."""
    height, width = (round(side * 0.1) for side in picture.shape[:2])
    return picture[height:-height, width:-width]


def shrunk(picture):
    import cv2

    return cv2.resize(picture, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA)


# Every one is compressed hard besides.
DEGRADED = {
    "mirrored": (mirrored,),
    "cropped": (cropped,),
    "recompressed": (),
    "shrunk": (shrunk,),
    "mirrored and cropped": (mirrored, cropped),
}


@pytest.fixture(scope="module")
def degraded_picture(demo_folder, demo_videos, tmp_path_factory):
    """`degraded_picture(3, "cropped")`: a JPEG file made from the middle frame of record 3."""
    folder, paths = tmp_path_factory.mktemp("queries"), {video.record_id: video.path for video in demo_videos}

    def make(record_id, name):
        picture = _middle_frame(demo_folder / paths[record_id])
        for degrade in DEGRADED[name]:
            picture = degrade(picture)
        file = folder / f"{record_id}.jpg"
        file.write_bytes(simplejpeg.encode_jpeg(np.ascontiguousarray(picture), quality=25))
        return file

    return make


def test_twenty_degraded_pictures_find_their_videos_first(demo_store, model, degraded_picture):
    found = {}
    for number, record_id in enumerate(RECORDS):
        query = load_query_image(degraded_picture(record_id, list(DEGRADED)[number % len(DEGRADED)]))
        (hit,) = search_images(demo_store, embed_query_image(model, query), limit=1, group_by_video=True)
        found[record_id] = hit.record_id
    assert found == {record_id: record_id for record_id in RECORDS}


def test_a_video_finds_itself_with_every_frame(demo_store, model, settings, demo_folder):
    query = embed_query_video(model, demo_folder / "rendered" / "balls.mp4", settings)
    assert query.vectors.shape == (8, 1280)
    first, second = search_videos(demo_store, query.vectors, limit=2)
    assert (first.record_id, first.votes, first.query_frames) == (3, 8, 8)
    assert first.score == pytest.approx(1.0, abs=1e-3)
    assert second.score < 0.7


def test_a_video_shares_all_of_itself_with_itself_and_a_part_its_part(demo_store, model, settings, demo_folder):
    query = embed_query_video(model, demo_folder / "rendered" / "balls.mp4", settings)
    whole = find_span(demo_store, 3, query.vectors, query.pts_seconds)
    assert whole is not None
    assert (whole.begin_seconds, whole.end_seconds, whole.num_frames) == (0, 7, 8)
    assert (whole.other_begin_seconds, whole.other_end_seconds) == (0, 7)
    part = find_span(demo_store, 3, query.vectors[3:6], query.pts_seconds[3:6] - 3)
    assert part is not None
    assert (part.begin_seconds, part.end_seconds) == (0, 2)
    assert (part.other_begin_seconds, part.other_end_seconds) == (3, 5)
