"""Variety, moments and shared spans: over every store, and with vectors whose likeness is known."""

import numpy as np
import pytest

from extraction_dagster.stages.index.moments import (
    find_span,
    search_diverse,
    search_moments,
    shared_span,
    to_moments,
)
from extraction_dagster.stages.index.points import PointBatch, PointFilter, point_id
from extraction_dagster.stages.index.protocol import Hit
from extraction_dagster.stages.index.search import combine_examples


def vector(*parts):
    """A unit vector of eight dimensions that begins with these."""
    return np.array([*parts, np.sqrt(1 - sum(part * part for part in parts)), *[0] * (7 - len(parts))], np.float32)


def scenes(count, *, seed):
    """Vectors of frames of different scenes: no two alike."""
    made = np.random.default_rng(seed).standard_normal((count, 64)).astype(np.float32)
    return made / np.linalg.norm(made, axis=1, keepdims=True)


@pytest.fixture
def written(opened):
    """`written({(7, 0.5): vector})`: points of these records and seconds."""

    def write(vectors):
        keys = [(record_id, round(second * 30)) for record_id, second in vectors]
        payloads = [
            {
                "record_id": record_id,
                "platform": "insta",
                "video_code": f"c{record_id}",
                "frame_number": number,
                "frame_second": number / 30,
                "path": "v.mp4",
                "created_at": "2026-01-01T00:00:00Z",
                "generation": "a",
            }
            for record_id, number in keys
        ]
        ids = [point_id(*key) for key in keys]
        opened.upsert(PointBatch(ids, np.array(list(vectors.values()), np.float32), payloads))
        return opened

    return write


QUERY = vector(1.0)


def hit(record_id, second, score):
    return Hit(record_id, round(second * 30), second, score, None, None, "v.mp4")


def seen(moments):
    return [(m.best.record_id, m.begin_seconds, m.end_seconds, m.num_frames, m.score) for m in moments]


def test_neighbouring_hits_of_a_video_are_one_moment():
    hits = [hit(7, 2, 0.9), hit(8, 1, 0.8), hit(7, 0, 0.5), hit(7, 9, 0.7), hit(7, 1, 0.95), hit(7, 10.5, 0.6)]
    assert seen(to_moments(hits, limit=9)) == [(7, 0, 2, 3, 0.95), (8, 1, 1, 1, 0.8), (7, 9, 10.5, 2, 0.7)]
    assert seen(to_moments(hits, limit=1)) == [(7, 0, 2, 3, 0.95)]
    assert to_moments([], limit=1) == []


def test_moments_are_looked_for_until_there_are_enough(written):
    one_long = {(7, second): vector(0.99 - second / 10_000) for second in range(40)}
    store = written({**one_long, (8, 3): vector(0.5), (8, 4): vector(0.6), (9, 0): vector(0.4)})
    found = search_moments(store, QUERY, limit=3)
    assert [(m.best.record_id, m.begin_seconds, m.end_seconds, m.num_frames) for m in found] == [
        (7, 0, 39, 40),
        (8, 3, 4, 2),
        (9, 0, 0, 1),
    ]
    assert found[1].score == pytest.approx(0.6, abs=1e-3)
    assert len(search_moments(store, QUERY, limit=3, score_threshold=0.55)) == 2
    assert [m.best.record_id for m in search_moments(store, QUERY, limit=3, filters=PointFilter(record_ids=[9]))] == [9]


def test_diverse_frames_are_unlike_each_other(written):
    same = {(7, second): vector(0.9 - second / 1000) for second in range(5)}
    store = written({**same, (8, 0): vector(0.7, 0, 0.7), (9, 0): vector(0.6, -0.75)})
    assert [(found.record_id, found.frame_second) for found in search_diverse(store, QUERY, limit=3)] == [
        (7, 0),
        (9, 0),
        (8, 0),
    ]
    assert len(search_diverse(store, QUERY, limit=50)) == 7
    assert search_diverse(store, QUERY, limit=3, score_threshold=0.99) == []


def test_a_shared_stretch_is_found_on_both_sides():
    own, other = scenes(30, seed=1), scenes(60, seed=2)
    other[20:32] = own[5:17]  # own 5 to 16 s are the other's 20 to 31 s
    found = shared_span(own, np.arange(30.0), other, np.arange(60.0))
    assert found is not None
    assert (found.begin_seconds, found.end_seconds) == (5, 16)
    assert (found.other_begin_seconds, found.other_end_seconds) == (20, 31)
    assert (found.num_frames, round(found.score, 4)) == (12, 1.0)


def test_times_that_were_sampled_at_other_moments_still_agree():
    own = scenes(20, seed=3)
    other = np.repeat(own[4:15], 2, axis=0)  # twice as many frames, half a second apart, 0.3 s late
    found = shared_span(own, np.arange(20.0), other, 0.3 + np.arange(22) / 2)
    assert found is not None
    assert (found.begin_seconds, found.end_seconds) == (4, 14)
    assert found.other_begin_seconds == pytest.approx(0.3, abs=0.51)
    assert found.other_end_seconds == pytest.approx(10.3, abs=0.51)


def test_a_still_picture_does_not_hide_what_moves():
    own, other = scenes(40, seed=4), scenes(50, seed=5)
    own[:15] = other[:15] = own[0]  # the same title card at the beginning of both, at every offset
    other[25:45] = own[15:35]
    found = shared_span(own, np.arange(40.0), other, np.arange(50.0))
    assert found is not None
    assert (found.end_seconds, found.other_end_seconds) == (34, 44)
    assert found.begin_seconds <= 15


def test_the_longest_of_several_stretches_counts():
    own = scenes(40, seed=6)
    other = scenes(40, seed=7)
    other[2:5], other[20:30] = own[2:5], own[20:30]
    found = shared_span(own, np.arange(40.0), other, np.arange(40.0))
    assert found is not None
    assert (found.begin_seconds, found.end_seconds, found.num_frames) == (20, 29, 10)


def test_videos_that_share_nothing_have_no_span():
    assert shared_span(scenes(9, seed=8), np.arange(9.0), scenes(9, seed=9), np.arange(9.0)) is None


def test_a_few_frames_far_apart_are_still_one_stretch():
    own = scenes(8, seed=10)
    found = shared_span(own, np.arange(8) * 20.0, own, np.arange(8) * 20.0)
    assert found is not None
    assert (found.begin_seconds, found.end_seconds, found.num_frames) == (0, 140, 8)


def test_thousands_of_like_frames_take_no_time():
    own = np.repeat(scenes(1, seed=11), 1500, axis=0)
    found = shared_span(own, np.arange(1500.0), own, np.arange(1500.0))
    assert found is not None
    assert (found.begin_seconds, found.other_begin_seconds, found.num_frames) == (0, 0, 1500)


def test_a_span_with_a_record_is_read_from_the_store(written):
    store = written({(7, 10): vector(1.0), (7, 11): vector(0, 1.0), (7, 12): vector(0, 0, 1.0)})
    own = np.array([vector(0, 1.0), vector(0, 0, 1.0), vector(0, 0, 0, 1.0)])
    found = find_span(store, 7, own, np.arange(3.0))
    assert found is not None
    assert (found.begin_seconds, found.end_seconds, found.other_begin_seconds, found.other_end_seconds) == (
        0,
        1,
        11,
        12,
    )
    assert find_span(store, 8, own, np.arange(3.0)) is None


def test_examples_are_met_in_the_middle_and_counter_examples_left_behind():
    first, second, unwanted = vector(1.0), vector(0, 1.0), vector(0, 0, 1.0)
    assert combine_examples([first]).tolist() == first.tolist()
    middle = combine_examples([first, second])
    assert middle @ first == pytest.approx(middle @ second)
    away = combine_examples([first, unwanted], [unwanted])
    assert away @ first > combine_examples([first, unwanted]) @ first
    assert away @ unwanted < combine_examples([first, unwanted]) @ unwanted
    assert np.linalg.norm(away) == pytest.approx(1)


def test_examples_that_cancel_out_still_give_a_vector():
    first = vector(1.0)
    assert np.linalg.norm(combine_examples([first, -first])) == pytest.approx(1)
    assert combine_examples([first, vector(0, 1.0)], [first, first]).dtype == np.float32
