from __future__ import annotations

import numpy as np

from extraction_dagster.stages.embed.vectors import count_unnormalised, normalise


def test_vectors_are_scaled_to_length_one():
    unit, faults = normalise(np.array([[3, 4], [0, -2]], np.float32))

    assert unit.dtype == np.float32
    assert np.allclose(unit, [[0.6, 0.8], [0, -1]], atol=1e-7)
    assert faults == [None, None]


def test_each_bad_vector_is_named_and_the_good_ones_between_are_kept():
    raw = np.array([[1, 0], [np.nan, 1], [0, 2], [np.inf, 1], [0, 0], [-np.inf, np.nan]], np.float32)

    unit, faults = normalise(raw)

    assert faults == [None, "NaN", None, "an infinite value", "length zero", "NaN"]
    assert unit.tolist() == [[1, 0], [0, 0], [0, 1], [0, 0], [0, 0], [0, 0]]


def test_a_vector_whose_square_overflows_float32_is_kept():
    unit, faults = normalise(np.array([[3e30, 4e30]], np.float32))

    assert faults == [None]
    assert np.allclose(unit, [[0.6, 0.8]], atol=1e-6)


def test_no_vectors_are_no_fault():
    unit, faults = normalise(np.empty((0, 5), np.float32))

    assert unit.shape == (0, 5)
    assert faults == []


def test_stored_vectors_of_another_length_than_one_are_counted():
    unit = np.array([[0.6, 0.8], [1, 0]], np.float16)
    assert count_unnormalised(unit) == 0
    assert count_unnormalised(unit * np.array([[1.005], [0.995]], np.float16)) == 0
    assert count_unnormalised(np.array([[0.6, 0.8], [0, 0], [2, 0], [np.nan, 1]], np.float16)) == 3
    assert count_unnormalised(np.empty((0, 2), np.float16)) == 0
