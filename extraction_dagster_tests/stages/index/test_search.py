"""Search over every store."""

from datetime import UTC, datetime

import numpy as np
import pytest

from extraction_dagster.errors import RecordShapeError
from extraction_dagster.errors.index import CollectionMismatchError
from extraction_dagster.records import IdRange, VideoRow
from extraction_dagster.stages.index.points import PointBatch, PointFilter, build_points, point_id
from extraction_dagster.stages.index.protocol import CollectionSpec
from extraction_dagster.stages.index.search import Hit, VideoHit, open_for_search, search_images, search_videos


def _towards(cosine):
    return [cosine, float(np.sqrt(1 - cosine**2)), 0, 0, 0, 0, 0, 0]


@pytest.fixture
def scored(opened):
    """`scored({(7, 0): 0.9})`: points whose cosine to the query is known."""

    def write(cosines, *, platforms=None, created="2026-01-01T00:00:00Z"):
        payloads = [
            {
                "record_id": record_id,
                "platform": (platforms or {}).get(record_id, "insta"),
                "video_code": f"c{record_id}",
                "frame_number": number,
                "frame_second": number / 30,
                "path": f"/videos/{record_id}.mp4",
                "created_at": created,
                "generation": "a",
            }
            for record_id, number in cosines
        ]
        vectors = np.array([_towards(cosine) for cosine in cosines.values()], np.float32)
        opened.upsert(PointBatch([point_id(*key) for key in cosines], vectors, payloads))
        return opened

    return write


QUERY = np.array([2.0, 0, 0, 0, 0, 0, 0, 0])


def _found(hits):
    return [(hit.record_id, hit.frame_number) for hit in hits]


def test_the_best_come_first_with_their_cosine(scored):
    store = scored({(7, 0): 0.5, (8, 30): 0.9, (9, 0): -0.2})
    assert search_images(store, QUERY, limit=2) == [
        Hit(8, 30, 1.0, pytest.approx(0.9, abs=2e-3), "insta", "c8", "/videos/8.mp4"),
        Hit(7, 0, 0.0, pytest.approx(0.5, abs=2e-3), "insta", "c7", "/videos/7.mp4"),
    ]


def test_equal_scores_come_by_record_then_frame_even_at_the_limit(scored):
    cosines = {(record_id, number): 0.5 for record_id in (9, 3, 7, 5) for number in (60, 0, 30)}
    store = scored(cosines)
    assert _found(search_images(store, QUERY, limit=4)) == [(3, 0), (3, 30), (3, 60), (5, 0)]


def test_filters_and_threshold_combine(scored):
    store = scored({(7, 0): 0.9, (8, 0): 0.8, (9, 0): 0.7, (9, 1): 0.1}, platforms={8: "tiktok"})
    assert _found(search_images(store, QUERY, filters=PointFilter(record_id_range=IdRange(8, 9)))) == [
        (8, 0),
        (9, 0),
        (9, 1),
    ]
    assert _found(search_images(store, QUERY, filters=PointFilter(platform="insta"), score_threshold=0.5)) == [
        (7, 0),
        (9, 0),
    ]
    assert search_images(store, QUERY, filters=PointFilter(created_from=datetime(2026, 1, 2, tzinfo=UTC))) == []
    assert len(search_images(store, QUERY, filters=PointFilter(created_before=datetime(2026, 1, 2, tzinfo=UTC)))) == 4


def test_grouping_finds_videos_behind_one_that_fills_every_page(scored):
    crowd = {(1, number): 0.9 - number / 1000 for number in range(200)}
    store = scored({**crowd, (5, 0): 0.3, (5, 1): 0.4, (6, 0): 0.2, (4, 0): 0.1})
    hits = search_images(store, QUERY, limit=3, group_by_video=True)
    assert _found(hits) == [(1, 0), (5, 1), (6, 0)]
    assert _found(search_images(store, QUERY, limit=9, group_by_video=True)) == [(1, 0), (5, 1), (6, 0), (4, 0)]


def test_a_missing_platform_and_code_come_back_as_none(opened, embeddings):
    batch = embeddings({7: [0]})
    opened.upsert(build_points(batch, rows={7: VideoRow(7, "v.mp4")}, generations={7: "a"}))
    (hit,) = search_images(opened, batch.vectors[0])
    assert (hit.platform, hit.video_code, hit.path) == (None, None, "v.mp4")


@pytest.mark.parametrize(
    ("vector", "limit"), [(np.zeros(8), 1), (np.full(8, np.nan), 1), (np.ones((1, 8)), 1), (QUERY, 0)]
)
def test_what_can_not_be_searched_with_is_refused(scored, vector, limit):
    with pytest.raises(RecordShapeError, match="search refused: it needs a vector"):
        search_images(scored({(7, 0): 0.5}), vector, limit=limit)


# The cosine of a frame at `angle` with the query's frame 1 is cos(angle); frames 2 and 3 are at 0.5 and 1 rad.
FRAMES = np.array([[np.cos(angle), np.sin(angle), 0, 0, 0, 0, 0, 0] for angle in (0.0, 0.5, 1.0)])


def test_a_video_that_is_like_the_query_from_end_to_end_beats_one_with_the_best_frame(scored):
    # 7 has exactly frame 1 and nothing near the others; 8 is 0.2 rad off every one of them.
    store = scored({(7, 0): 1.0, (8, 0): np.cos(0.2), (8, 30): np.cos(0.7), (8, 60): np.cos(1.2)})
    first, second = search_videos(store, FRAMES, limit=5)
    assert first == VideoHit(
        8,
        pytest.approx(np.cos(0.2), abs=0.01),  # frame 2 is nearest to the one at 0.7, frame 3 to the one at 1.2
        votes=2,
        query_frames=3,
        best=Hit(8, first.best.frame_number, first.best.frame_second, first.best.score, "insta", "c8", "/videos/8.mp4"),
    )
    assert (second.record_id, second.votes, second.best.frame_number) == (7, 1, 0)
    assert second.score == pytest.approx((1 + np.cos(0.5) + np.cos(1.0)) / 3, abs=0.01)


def test_a_frame_that_did_not_vote_for_a_video_counts_as_nothing(scored, monkeypatch):
    monkeypatch.setattr("extraction_dagster.stages.index.search._VOTES_PER_FRAME", 1)
    store = scored({(7, 0): 1.0, **{(record_id, 0): np.cos(0.75) for record_id in (8, 9, 10, 11)}})
    hits = search_videos(store, FRAMES, limit=1)
    assert (hits[0].record_id, hits[0].votes) == (8, 2)
    only_7 = PointFilter(record_id_range=IdRange(7, 7))
    scores = {hit.record_id: hit.score for hit in search_videos(store, FRAMES, limit=1, filters=only_7)}
    assert scores == {7: pytest.approx((1 + np.cos(0.5) + np.cos(1.0)) / 3, abs=0.01)}


def test_filters_and_threshold_hold_for_videos(scored):
    store = scored({(7, 0): 1.0, (8, 0): 0.9, (9, 0): 0.1}, platforms={8: "tube"})
    assert [hit.record_id for hit in search_videos(store, FRAMES[:1], filters=PointFilter(platform="insta"))] == [7, 9]
    assert [hit.record_id for hit in search_videos(store, FRAMES[:1], score_threshold=0.5)] == [7, 8]
    assert [hit.record_id for hit in search_videos(store, FRAMES[:1], limit=1)] == [7]
    with pytest.raises(RecordShapeError, match="it needs vectors"):
        search_videos(store, FRAMES[0])


def test_a_query_of_another_model_is_refused(opened, spec):
    open_for_search(opened, spec)
    with pytest.raises(CollectionMismatchError, match="fingerprint abc123, but the settings give dim 8, fingerprint x"):
        open_for_search(opened, CollectionSpec(spec.name, 8, "x"))
