"""Ids, generations, payloads, batches."""

import pickle
import uuid
from datetime import UTC, date, datetime, time, timedelta, timezone
from decimal import Decimal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from extraction_dagster.errors import RecordShapeError, SettingsError
from extraction_dagster.errors.index import PayloadError, VectorNormError
from extraction_dagster.records import EmbeddingBatch, VideoRow
from extraction_dagster.stages.index.points import PointBatch, build_points, former_generation, generation, point_id

_IDS = st.integers(min_value=-(2**63), max_value=2**63 - 1)


def test_point_ids_stay_what_they_always_were():
    # A change here would leave every point of every collection behind as an orphan.
    assert point_id(7, 30) == "df73e46f-bbf6-5028-8250-636007141bfa"
    assert point_id(-5, 0) == "9deb4dde-a767-51bf-ac82-14674e700e88"


@given(first=st.tuples(_IDS, _IDS), second=st.tuples(_IDS, _IDS))
def test_two_frames_never_share_an_id(first, second):
    assert (point_id(*first) == point_id(*second)) == (first == second)


def test_a_generation_follows_from_what_the_points_are_made_from():
    made = {
        "embedding_fingerprint": "e",
        "frames_fingerprint": "f",
        "content_version": "c",
        "source": "s",
        "address": "a",
    }
    assert generation(**made) == generation(**made)
    others = {generation(**{**made, key: "x"}) for key in made}
    assert len(others | {generation(**made)}) == 6


def test_the_generation_of_an_earlier_release_stays_what_it_was():
    made = {"embedding_fingerprint": "e", "frames_fingerprint": "f", "content_version": "c"}
    assert former_generation(**made) == "c7d8c7883eaba22b"


def _one(vector=(0.6, 0.8)):
    return EmbeddingBatch(
        np.array([vector], np.float16), np.array([7], np.int64), np.array([30], np.int64), np.array([1.25])
    )


def _payload(row):
    return build_points(
        _one(), rows={7: row}, generations={7: "g"}, created_at=datetime(2026, 1, 2, tzinfo=UTC)
    ).payloads[0]


def test_a_payload_says_everything_about_its_frame():
    row = VideoRow(7, "s3://b/v.mp4", platform=None, code="c", payload={"likes": 3})
    assert _payload(row) == {
        "record_id": 7,
        "platform": None,
        "video_code": "c",
        "frame_number": 30,
        "frame_second": 1.25,
        "path": "s3://b/v.mp4",
        "created_at": "2026-01-02T00:00:00.000Z",
        "generation": "g",
        "likes": 3,
    }


def test_a_payload_holds_no_password_and_no_signature():
    row = VideoRow(7, "https://me:canary@host/v.mp4?X-Amz-Signature=canary")
    assert _payload(row)["path"] == "https://host/v.mp4?…"


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, None),
        (True, True),
        (2**63 - 1, 9223372036854775807),
        (Decimal("1.50"), 1.5),
        (Decimal("NaN"), None),
        (float("inf"), None),
        (datetime(2026, 1, 2, 3, 4, 5, 678000, tzinfo=timezone(timedelta(hours=2))), "2026-01-02T01:04:05.678Z"),
        (datetime(2026, 1, 2, 3, 4, 5), "2026-01-02T03:04:05.000Z"),
        (date(2026, 1, 2), "2026-01-02"),
        (time(3, 4, 5, tzinfo=UTC), "03:04:05+00:00"),
        (uuid.UUID(int=1), "00000000-0000-0000-0000-000000000001"),
        (np.float32(0.5), 0.5),
        ("caf\udce9.mp4", "caf\\udce9.mp4"),
        ({"a": [Decimal(1), (date(2026, 1, 2),)]}, {"a": [1.0, ["2026-01-02"]]}),
    ],
)
def test_a_database_value_becomes_json(value, expected):
    assert _payload(VideoRow(7, "v", payload={"x": value}))["x"] == expected


@pytest.mark.parametrize(
    ("value", "why"), [(2**63, "does not fit 64 bits"), (b"x", "a value of type bytes has no JSON form")]
)
def test_a_value_without_json_form_names_the_record_and_the_column(value, why):
    with pytest.raises(PayloadError, match=f"Column 'x' of record 7 .*{why}.*extraction retry 7") as caught:
        _payload(VideoRow(7, "v", payload={"x": value}))
    again = pickle.loads(pickle.dumps(caught.value))  # noqa: S301 - our own error
    assert (str(again), again.record_id, again.permanent) == (str(caught.value), 7, True)


def test_a_payload_column_can_not_take_a_reserved_name():
    with pytest.raises(SettingsError, match=r"COLUMNS is 'created_at, record_id', expected columns other"):
        _payload(VideoRow(7, "v", payload={"record_id": 1, "created_at": 2, "likes": 3}))


def test_vectors_are_normalised_again_in_float32():
    vector = build_points(_one(), rows={7: VideoRow(7, "v")}, generations={7: "g"}).vectors
    assert vector.dtype == np.float32
    assert np.linalg.norm(vector[0]) == pytest.approx(1.0, abs=1e-7)


@pytest.mark.parametrize("vector", [(0.0, 0.0), (0.6, 0.9)])
def test_a_vector_that_is_not_normalised_names_its_frame(vector):
    with pytest.raises(VectorNormError, match=r"record 7, frame 30, has norm (0|1\.08\d), expected 1"):
        build_points(_one(vector), rows={7: VideoRow(7, "v")}, generations={7: "g"})


@pytest.mark.parametrize(("rows", "generations"), [({}, {7: "g"}), ({7: VideoRow(7, "v")}, {})])
def test_a_record_without_row_or_generation_is_refused(rows, generations):
    with pytest.raises(RecordShapeError, match="record 7 needs a row and a generation"):
        build_points(_one(), rows=rows, generations=generations)


def _batch(count, dim=4):
    return PointBatch(
        [point_id(1, number) for number in range(count)], np.zeros((count, dim), np.float32), [{"n": 0}] * count
    )


def test_a_batch_is_cut_by_points_and_by_bytes():
    # A point weighs 4 * 4 bytes of vector, 64 of id and framing, and 8 of payload: 88.
    assert [len(part) for part in _batch(7).chunks(max_points=3, max_bytes=10_000)] == [3, 3, 1]
    assert [len(part) for part in _batch(7).chunks(max_points=100, max_bytes=2 * 88)] == [2, 2, 2, 1]
    assert [len(part) for part in _batch(2).chunks(max_points=100, max_bytes=10)] == [1, 1]
    assert list(_batch(0).chunks(max_points=1, max_bytes=1)) == []
    ids = [point for part in _batch(7).chunks(max_points=3, max_bytes=10_000) for point in part.ids]
    assert ids == list(_batch(7).ids)


def test_a_batch_refuses_what_does_not_fit_together():
    good = _batch(2)
    with pytest.raises(RecordShapeError, match=r"one length; got ids 2, vectors float32 \(1, 4\), payloads 2"):
        PointBatch(good.ids, good.vectors[:1], good.payloads)
    with pytest.raises(RecordShapeError, match="vectors must be float32 or float16"):
        PointBatch(good.ids, good.vectors.astype(np.float64), good.payloads)
    with pytest.raises(RecordShapeError, match="a frame occurs twice"):
        PointBatch([good.ids[0]] * 2, good.vectors, good.payloads)
