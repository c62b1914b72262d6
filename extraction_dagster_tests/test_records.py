"""The records between rooms: what they hold and what they refuse."""

import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from extraction_dagster.addresses import scrubbed
from extraction_dagster.errors import PartitionKeyError, RecordShapeError
from extraction_dagster.records import (
    EmbeddingBatch,
    EncodedFrames,
    Failure,
    FrameBatch,
    IdRange,
    Outcome,
    VideoRow,
    fingerprint,
)

BIGINTS = st.integers(min_value=-(2**63), max_value=2**63 - 1)


@given(st.tuples(BIGINTS, BIGINTS).map(sorted))
def test_a_range_comes_back_from_its_key(ends):
    ids = IdRange(*ends)
    assert IdRange.parse(ids.partition_key) == ids
    assert str(ids) == ids.partition_key
    assert ends[0] in ids
    assert ends[1] in ids


@given(st.text(alphabet="0123456789- +_.\n\u0663", max_size=12))
def test_a_key_is_refused_or_is_the_only_spelling_of_its_range(key):
    try:
        ids = IdRange.parse(key)
    except PartitionKeyError:
        return
    assert ids.partition_key == key


@pytest.mark.parametrize(
    ("key", "ids"),
    [
        ("12346-13345", IdRange(12346, 13345)),
        ("7-7", IdRange(7, 7)),
        ("-5--1", IdRange(-5, -1)),
        ("-5-0", IdRange(-5, 0)),
    ],
)
def test_keys_are_read(key, ids):
    assert IdRange.parse(key) == ids


@pytest.mark.parametrize(
    "key",
    [
        "",
        "5",
        "1-",
        "-1",
        "1-2-3",
        "1..5",
        "a-b",
        "01-5",
        "1-05",
        "-0-5",
        "1 - 5",
        "1-5\n",
        "\u0663-\u0665",
        "1_0-20",
        "+1-5",
        "9" * 5000 + "-1",
    ],
)
def test_a_malformed_key_is_refused(key):
    with pytest.raises(PartitionKeyError, match="is not a range of ids: it is not two integers joined by '-'"):
        IdRange.parse(key)


@pytest.mark.parametrize("key", ["5-1", "-1--5", f"1-{2**63}", f"{-(2**63) - 1}-1"])
def test_a_range_that_is_empty_or_too_big_is_refused(key):
    with pytest.raises(PartitionKeyError, match=f"'{key}' is not a range of ids: the first id must not be greater"):
        IdRange.parse(key)


def test_a_range_holds_its_ends_and_nothing_beyond():
    assert [record_id in IdRange(3, 5) for record_id in (2, 3, 4, 5, 6)] == [False, True, True, True, False]


def test_ranges_sort_by_their_ids_not_by_their_keys():
    assert sorted([IdRange(10, 19), IdRange(-5, -1), IdRange(2, 9)]) == [
        IdRange(-5, -1),
        IdRange(2, 9),
        IdRange(10, 19),
    ]


def frames(**changes):
    arrays = {
        "data": np.zeros((2, 4, 6, 3), np.uint8),
        "pts_seconds": np.array([0.0, 1.0]),
        "target_seconds": np.array([0.0, 1.0]),
        "frame_number": np.array([0, 25]),
    }
    return FrameBatch(**(arrays | changes))


def test_a_frame_batch_knows_its_length():
    assert len(frames()) == 2


def test_a_frame_batch_prints_shapes_and_no_pixels():
    assert repr(frames(data=np.full((2, 4, 6, 3), 77, np.uint8))) == (
        "FrameBatch(data: uint8 (2, 4, 6, 3), pts_seconds: float64 (2,), target_seconds: float64 (2,), "
        "frame_number: int64 (2,))"
    )


@pytest.mark.parametrize("chosen", [slice(1, 3), np.array([1, 2]), np.array([False, True, True])])
def test_some_frames_and_some_vectors_are_taken_with_all_that_belongs_to_them(chosen):
    numbers, seconds = np.array([0, 25, 50]), np.array([0.0, 1.0, 2.0])
    data = np.arange(3, dtype=np.uint8).repeat(72).reshape(3, 4, 6, 3)
    some = FrameBatch(data, seconds, seconds + 0.5, numbers)[chosen]
    assert (some.data[:, 0, 0, 0].tolist(), some.pts_seconds.tolist()) == ([1, 2], [1.0, 2.0])
    assert (some.target_seconds.tolist(), some.frame_number.tolist()) == ([1.5, 2.5], [25, 50])
    vectors = EmbeddingBatch(np.eye(3, dtype=np.float16), np.array([7, 8, 9]), numbers, seconds)[chosen]
    assert (vectors.vectors.tolist(), vectors.record_id.tolist()) == ([[0, 1, 0], [0, 0, 1]], [8, 9])
    assert (vectors.frame_number.tolist(), vectors.pts_seconds.tolist()) == ([25, 50], [1.0, 2.0])


def test_frames_out_of_order_are_refused():
    with pytest.raises(RecordShapeError, match="pts_seconds must be finite and ascending"):
        frames()[np.array([1, 0])]


def test_encoded_frames_print_no_bytes():
    seconds = np.zeros(2)
    shown = repr(EncodedFrames(7, "v1", [b"jpeg", b"jpeg"], seconds, seconds, np.arange(2), 398, 224, partial="cut"))
    assert shown == (
        "EncodedFrames(record_id: 7, content_version: 'v1', jpegs: 2 JPEGs, pts_seconds: float64 (2,), "
        "target_seconds: float64 (2,), frame_number: int64 (2,), width_px: 398, height_px: 224, "
        "duration_seconds: None, partial: 'cut', address: '', claim: 0)"
    )


def test_an_embedding_batch_prints_no_vectors():
    ids = np.arange(2)
    assert repr(EmbeddingBatch(np.ones((2, 1280), np.float16), ids, ids, np.zeros(2))) == (
        "EmbeddingBatch(vectors: float16 (2, 1280), record_id: int64 (2,), frame_number: int64 (2,), "
        "pts_seconds: float64 (2,))"
    )


def test_a_frame_batch_may_be_empty():
    empty = np.zeros(0)
    batch = FrameBatch(np.zeros((0, 4, 6, 3), np.uint8), empty, empty, np.zeros(0, np.int64))
    assert len(batch) == 0


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"data": np.zeros((2, 4, 6, 3), np.float32)}, r"data must be uint8 \(N, H, W, 3\)"),
        ({"data": np.zeros((2, 3, 4, 6), np.uint8)}, r"data must be uint8 \(N, H, W, 3\)"),
        ({"data": np.zeros((4, 6, 3), np.uint8)}, r"data must be uint8 \(N, H, W, 3\)"),
        ({"data": np.zeros((3, 4, 6, 3), np.uint8)}, "every array must have 3 entries"),
        ({"pts_seconds": np.array([0.0])}, "every array must have 2 entries"),
        ({"target_seconds": np.zeros((2, 1))}, "every array must have 2 entries"),
        ({"pts_seconds": np.array([0.0, 1.0], np.float32)}, "times must be float64 and frame_number int64"),
        ({"frame_number": np.array([0, 25], np.int32)}, "times must be float64 and frame_number int64"),
        ({"pts_seconds": np.array([1.0, 0.0])}, "pts_seconds must be finite and ascending"),
        ({"pts_seconds": np.array([0.0, np.nan])}, "pts_seconds must be finite and ascending"),
        ({"frame_number": np.array([5, 5])}, "frame_number must be strictly ascending"),
    ],
)
def test_a_frame_batch_that_does_not_fit_is_refused(changes, why):
    with pytest.raises(RecordShapeError, match=f"^FrameBatch refused: {why}; got "):
        frames(**changes)


def test_a_refusal_prints_every_shape():
    with pytest.raises(RecordShapeError) as refused:
        frames(pts_seconds=np.array([0.0]))
    assert str(refused.value) == (
        "FrameBatch refused: every array must have 2 entries; got data uint8 (2, 4, 6, 3), pts_seconds float64 (1,), "
        "target_seconds float64 (2,), frame_number int64 (2,)."
    )


def encoded(**changes):
    fields = {
        "record_id": 42,
        "content_version": "",
        "jpegs": [b"a", b"b"],
        "pts_seconds": np.array([0.0, 1.0]),
        "target_seconds": np.array([0.0, 1.0]),
        "frame_number": np.array([0, 25]),
        "width_px": 6,
        "height_px": 4,
    }
    return EncodedFrames(**(fields | changes))


def test_encoded_frames_know_their_length_and_default_to_whole():
    assert (len(encoded()), encoded().partial, encoded().duration_seconds) == (2, None, None)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"jpegs": []}, "a video must have at least one frame"),
        ({"jpegs": [b"a"]}, "every array must have 1 entries"),
        ({"frame_number": np.array([25, 0])}, "frame_number must be strictly ascending"),
    ],
)
def test_encoded_frames_that_do_not_fit_are_refused(changes, why):
    with pytest.raises(RecordShapeError, match=f"^EncodedFrames refused: {why}; got "):
        encoded(**changes)


def embeddings(**changes):
    arrays = {
        "vectors": np.ones((2, 5), np.float16),
        "record_id": np.array([1, 1]),
        "frame_number": np.array([0, 25]),
        "pts_seconds": np.array([0.0, 1.0]),
    }
    return EmbeddingBatch(**(arrays | changes))


def test_an_embedding_batch_knows_its_length_and_dim():
    assert (len(embeddings()), embeddings().dim) == (2, 5)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"vectors": np.ones((2, 5), np.float32)}, r"vectors must be float16 \(N, dim\)"),
        ({"vectors": np.ones(5, np.float16)}, r"vectors must be float16 \(N, dim\)"),
        ({"record_id": np.array([1])}, "every array must have 2 entries"),
        ({"frame_number": np.array([0, 25], np.int32)}, "record_id and frame_number must be int64"),
        ({"vectors": np.full((2, 5), np.nan, np.float16)}, "vectors must be finite"),
        ({"vectors": np.full((2, 5), np.inf, np.float16)}, "vectors must be finite"),
    ],
)
def test_an_embedding_batch_that_does_not_fit_is_refused(changes, why):
    with pytest.raises(RecordShapeError, match=f"^EmbeddingBatch refused: {why}; got "):
        embeddings(**changes)


def test_an_outcome_is_frames_or_a_failure():
    failure = Failure(42, "", "decode", "VideoDecodeError", "no frame")
    assert Outcome(42, failure=failure).failure == failure
    assert len(Outcome(42, frames=encoded()).frames) == 2
    with pytest.raises(RecordShapeError, match=r"^Outcome refused: either frames or a failure; got record_id 42\."):
        Outcome(42)
    with pytest.raises(RecordShapeError, match=r"^Outcome refused: either frames or a failure; got record_id 42\."):
        Outcome(42, frames=encoded(), failure=failure)


def test_records_do_not_change():
    with pytest.raises(dataclasses.FrozenInstanceError, match="record_id"):
        VideoRow(1, "a.mp4").record_id = 2


def test_a_fingerprint_is_stable_and_sees_every_part():
    assert fingerprint(a=1, b="x") == fingerprint(b="x", a=1) == "ecf9e98ec0641e23"
    assert fingerprint(a=1) != fingerprint(a="1")


@given(st.dictionaries(st.from_regex(r"[a-z]{1,3}", fullmatch=True), st.integers() | st.text(), max_size=4))
def test_a_fingerprint_depends_on_the_parts_alone(parts):
    shuffled = json.loads(json.dumps(dict(reversed(parts.items()))))
    assert fingerprint(**parts) == fingerprint(**shuffled)


def test_the_texts_of_a_failure_are_capped_without_half_a_password():
    address = "https://me:canary@host/a.mp4"
    for before in range(3_960, 4_001):
        failure = Failure(1, "v", "fetch", "E", f"{'x' * before} '{address}'", details="y" * 50_000)
        assert len(failure.message) <= 4_001
        assert "canary" not in scrubbed(failure.message)
        assert "me:" not in scrubbed(failure.message)
    assert len(failure.details) == 16_001
    assert Failure(1, "v", "fetch", "E", "short").message == "short"
